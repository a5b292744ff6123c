"""`vllm-wsi train`: from question files to a checkpoint, through stops, stages and adapters."""

import csv
import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import vllm_wsi.training.stages as stages
import vllm_wsi.training.train as training
from vllm_wsi.cli.app import main
from vllm_wsi.errors import SettingsError, SlideError
from vllm_wsi.haystack.recipe import GENERATORS
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.config import SLIDE_TOKEN
from vllm_wsi.model.init_checkpoint import init_checkpoint, new_model
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.questions.items import QuestionError
from vllm_wsi.slides import write_features
from vllm_wsi.study.answering import choose
from vllm_wsi.training.model import SparseLearnModel
from vllm_wsi.training.settings import TrainSettings, load_settings
from vllm_wsi.training.sparselearn import SparseLearn
from vllm_wsi.training.train import train
from vllm_wsi.training.trainer import LOG_COLUMNS, WEIGHTS, last_whole_checkpoint

from .stopping import stopped_at

pytestmark = pytest.mark.slow
D = 16
GATE = {"num_slide_tokens": 4, "k_start": 8}


def haystack_stage(**changes):
    generate = {"name": "haystack", "count": 64, "num_patches": 24, "feature_dim": D}
    stage = {
        "name": "scorer",
        "data": {"generate": generate, "stretch_positions": 500, "mix_positions": True},
        "train": ["scorer", "projector"],
        "sparselearn": GATE,
        "steps": 6,
        "batch_size": 4,
        "warmup_steps": 1,
        "learning_rate": {"scorer": 1e-2, "denoiser": 1e-2, "projector": 1e-2},
    }
    return stage | changes


def settings(*stages, **model) -> TrainSettings:
    start = model or {"new": {"feature_dim": D, "hidden_size": 64, "num_layers": 1, "num_slide_tokens": 4}}
    return TrainSettings.model_validate({"model": start, "stages": list(stages) or [haystack_stage()]})


def weights(checkpoint):
    return load_file(checkpoint / "model.safetensors")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return train(settings(), out, GENERATORS)


def test_a_stage_changes_what_it_trains_and_nothing_else(whole_run):
    before, _ = new_model(TinySettings(feature_dim=D, hidden_size=64, num_layers=1, num_slide_tokens=4, seed=0))
    after = weights(whole_run)
    for name, tensor in before.state_dict().items():
        changed = not torch.equal(tensor, after[name])
        assert changed == name.startswith(("scorer.", "projector.")), name


def test_the_checkpoint_holds_nothing_of_the_training_path(whole_run):
    assert {name.partition(".")[0] for name in weights(whole_run)} == {"scorer", "projector", "language_model"}
    assert not list(whole_run.parent.glob("*.partial"))


def test_the_log_follows_the_schedules(tmp_path):
    stage = haystack_stage(steps=20, trainer={"logging_steps": 5})
    train(settings(stage), tmp_path / "run", GENERATORS)
    rows = list(csv.DictReader(open(tmp_path / "run" / "log.csv", newline="")))
    assert tuple(rows[0]) == LOG_COLUMNS
    assert [int(row["step"]) for row in rows] == [5, 10, 15, 20]
    assert [float(row["tau"]) for row in rows] == sorted((float(row["tau"]) for row in rows), reverse=True)
    assert [int(row["num_slide_tokens"]) for row in rows] == [
        6,
        4,
        4,
        4,
    ]  # int(8 * 2 ** -min(1, done / 12)) after 4, 9, ...


def test_a_stopped_run_goes_on_to_the_same_bits(whole_run, tmp_path):
    stage = haystack_stage(save_steps=2)
    out = tmp_path / "run"
    with stopped_at(5):
        train(settings(stage), out, GENERATORS)
    assert not (out / "checkpoint").exists()
    found, wanted = weights(train(settings(stage), out, GENERATORS)), weights(whole_run)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kept", [None, 0, 40])
def test_a_run_killed_while_it_saves_goes_on_from_the_whole_checkpoint_to_the_same_bits(whole_run, tmp_path, kept):
    """Of the file that is written last, `kept` bytes are there; None: it is not there."""
    stage, out = haystack_stage(save_steps=2), tmp_path / "run"
    with stopped_at(5):
        train(settings(stage), out, GENERATORS)
    directory = out / "stages/0-scorer"
    state = directory / "checkpoint-4/trainer_state.json"
    if kept is None:
        state.unlink()
    else:
        state.write_bytes(state.read_bytes()[:kept])
    assert last_whole_checkpoint(directory, is_main=False) == directory / "checkpoint-2"
    assert (directory / "checkpoint-4").is_dir()  # another process than the main one leaves it
    with stopped_at(3):  # step 4, whose checkpoint was not whole, is not there yet
        train(settings(stage), out, GENERATORS)
    assert [path.name for path in directory.iterdir()] == ["checkpoint-2"]
    found, wanted = weights(train(settings(stage), out, GENERATORS)), weights(whole_run)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_run_killed_in_its_first_checkpoint_begins_anew_to_the_same_bits(whole_run, tmp_path, caplog):
    stage, out = haystack_stage(save_steps=4), tmp_path / "run"
    with stopped_at(5):
        train(settings(stage), out, GENERATORS)
    checkpoint = out / "stages/0-scorer/checkpoint-4"
    (checkpoint / "trainer_state.json").unlink()
    found, wanted = weights(train(settings(stage), out, GENERATORS)), weights(whole_run)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert f"{checkpoint}: found a checkpoint that was not written to its end; it is removed" in caplog.text


def two_stages(**changes) -> TrainSettings:
    rates = haystack_stage()["learning_rate"] | {"lora": 1e-2}
    second = {"name": "lora", "lora": {"r": 4, "alpha": 8}, "learning_rate": rates}
    return settings(haystack_stage(**changes), haystack_stage(**(second | changes)))


def test_a_run_stopped_between_stages_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    asked = two_stages(steps=3)
    wanted = weights(train(asked, tmp_path / "whole", GENERATORS))
    make = stages.make_trainer

    def stop_at_the_second(wrapped, stage, *arguments):
        if stage.name == "lora":
            raise KeyboardInterrupt
        return make(wrapped, stage, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "make_trainer", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            train(asked, tmp_path / "run", GENERATORS)
    torch.randn(99)  # a new process has another random state
    found = weights(train(asked, tmp_path / "run", GENERATORS))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_log_of_a_stopped_run_holds_every_step_once(tmp_path):
    asked = two_stages(steps=8, save_steps=4, trainer={"logging_steps": 1})
    for step in (7, 2):  # behind a saved step, then before the first one of a stage
        with stopped_at(step):
            train(asked, tmp_path / "run", GENERATORS)
    train(asked, tmp_path / "run", GENERATORS)
    rows = list(csv.DictReader(open(tmp_path / "run" / "log.csv", newline="")))
    assert [(row["stage"], int(row["step"])) for row in rows] == [
        (stage, step) for stage in ("scorer", "lora") for step in range(1, 9)
    ]
    assert not list((tmp_path / "run").glob("*.partial"))


def test_a_stage_goes_on_with_the_denoiser_of_the_stage_before(tmp_path):
    still = haystack_stage()["learning_rate"] | {"denoiser": 0.0}
    other = haystack_stage(name="other", sparselearn=GATE | {"denoiser": "global"}, learning_rate=still)
    same = haystack_stage(name="same", learning_rate=still)
    train(settings(haystack_stage(), same, other), tmp_path / "run", GENERATORS)
    first, second, third = (
        {name: tensor for name, tensor in load_file(path / "final" / WEIGHTS).items() if ".denoiser." in name}
        for path in sorted((tmp_path / "run" / "stages").iterdir())
    )
    assert first["sparselearn.denoiser.down.weight"].any()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not third["sparselearn.denoiser.down.weight"].any()  # of another kind: it begins anew


def test_two_processes_train_one_checkpoint(tmp_path):
    """On gloo; each process has half of a batch."""
    config = two_stages(steps=4, save_steps=2, batch_size=2, trainer={"logging_steps": 2, "use_cpu": True})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(config.model_dump_json(exclude_defaults=True))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "vllm_wsi.cli", "train", str(path), "--out", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "run"
    rows = list(csv.DictReader(open(out / "log.csv", newline="")))
    assert [(row["stage"], int(row["step"])) for row in rows] == [
        (stage, step) for stage in ("scorer", "lora") for step in (2, 4)
    ]
    assert not list(out.rglob("*.partial"))
    model = SparseWSIForConditionalGeneration.from_pretrained(out / "checkpoint")
    trained = load_file(out / "stages" / "1-lora" / "final" / WEIGHTS)
    assert all(
        torch.equal(tensor, trained[f"model.scorer.{name}"]) for name, tensor in model.scorer.state_dict().items()
    )
    # Anyone alone makes the same checkpoint of what the stages saved.
    (out / "checkpoint").rename(tmp_path / "together")
    alone = weights(train(load_settings(path), out, GENERATORS))
    assert all(torch.equal(alone[name], tensor) for name, tensor in weights(tmp_path / "together").items())


def test_a_model_left_in_shares_is_made_whole_from_what_the_stages_saved(tmp_path, monkeypatch):
    asked, run = two_stages(steps=2), training.run_stage
    wanted = weights(train(asked, tmp_path / "whole", GENERATORS))

    def run_sharded(model, stage, dataset, tokenizer, output, number, *arguments):
        was_done = (output / "stages" / f"{number}-{stage.name}" / "final").is_dir()
        trained = run(model, stage, dataset, tokenizer, output, number, *arguments)
        if was_done:
            return trained
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        return trained._replace(is_sharded=True)

    monkeypatch.setattr(training, "run_stage", run_sharded)
    found = weights(train(asked, tmp_path / "run", GENERATORS))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_a_checkpoint_runs_knows_nothing_of_the_gate(whole_run, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("the soft path ran")

    model = SparseWSIForConditionalGeneration.from_pretrained(whole_run).eval()
    encoder = ChatRenderer(AutoTokenizer.from_pretrained(whole_run))
    item = GENERATORS["haystack"]("test", 1, 200, feature_dim=D)[0]
    monkeypatch.setattr(SparseLearn, "forward", never)
    monkeypatch.setattr(SparseLearnModel, "tail_logits", never)
    with item.slides[0].open() as slide:
        selection = model.selector().select(slide)
        scores = model.scorer(torch.from_numpy(slide.read_rows(0, 200))[None], torch.ones(1, 200, dtype=torch.bool))[0]
    assert selection.indices.tolist() == scores.topk(4).indices.sort().values.tolist()
    (choice,) = choose(model, encoder, [item], [[selection]])
    assert choice.option in item.options


def test_gradient_checkpointing_changes_no_weight_by_more_than_rounding(whole_run, tmp_path):
    stage = haystack_stage(trainer={"gradient_checkpointing": True})
    found, wanted = weights(train(settings(stage), tmp_path / "run", GENERATORS)), weights(whole_run)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)


def test_a_finished_run_and_a_run_of_other_settings_are_not_overwritten(whole_run, tmp_path):
    with pytest.raises(SettingsError, match="found a finished run, wanted a new directory"):
        train(settings(), whole_run.parent, GENERATORS)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(SettingsError, match="found a run of other settings"):
        train(settings(), tmp_path, GENERATORS)


def test_two_stages_as_in_the_paper_end_with_adapters_merged_into_the_decoder(whole_run, tmp_path):
    asked = two_stages()
    out = tmp_path / "run"
    after, before = weights(train(asked, out, GENERATORS)), weights(whole_run)
    assert after.keys() == before.keys()
    projections = [name for name in after if name.endswith("_proj.weight")]
    assert projections
    assert all(not torch.equal(after[name], before[name]) for name in projections)
    assert torch.equal(
        after["language_model.model.embed_tokens.weight"], before["language_model.model.embed_tokens.weight"]
    )
    # What the stages saved is enough to make the checkpoint again, without a step.
    (out / "checkpoint").rename(tmp_path / "first")
    again = weights(train(asked, out, GENERATORS))
    assert all(torch.equal(again[name], after[name]) for name in after)


@pytest.fixture
def text_decoder(tmp_path):
    """A causal language model that has never heard of slides, with a chat template of strings."""
    model, tokenizer = new_model(TinySettings(feature_dim=D, hidden_size=64, num_layers=1))
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    path = tmp_path / "decoder"
    model.language_model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def files(tmp_path):
    """Question files in both formats, and the features of their slides."""
    folder = tmp_path / "features"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, n in (("a", 50), ("b", 7), ("c", 300)):
        write_features(folder / f"{name}.safetensors", rng.standard_normal((n, D)).astype(np.float16))
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A sarcoma."}]
    rows = [{"id": name, "image": [f"{name}.csv"], "conversations": talk} for name in "abc"]
    (tmp_path / "instruct.json").write_text(json.dumps(rows))
    (tmp_path / "bench.csv").write_text("Slide,Question,A,B,C,D,Answer\na,Which?,x,y,,,B\nb,Which?,x,y,z,,C\n")
    return SimpleNamespace(folder=folder, json=tmp_path / "instruct.json", csv=tmp_path / "bench.csv")


def test_question_files_train_a_text_decoder_and_leave_its_weights_alone(text_decoder, files, tmp_path):
    data = {"questions": [str(files.json), str(files.csv)], "features": str(files.folder), "max_patches": 40}
    stage = haystack_stage(data=data, steps=2, batch_size=3)
    asked = settings(stage, decoder=str(text_decoder), feature_dim=D, num_slide_tokens=4, encoder="test@1")
    checkpoint = train(asked, tmp_path / "run")
    model = SparseWSIForConditionalGeneration.from_pretrained(checkpoint)
    assert (model.config.encoder, model.config.feature_dim, model.config.num_slide_tokens) == ("test@1", D, 4)
    assert AutoTokenizer.from_pretrained(checkpoint).convert_tokens_to_ids(SLIDE_TOKEN) == model.config.slide_token_id
    before = AutoModelForCausalLM.from_pretrained(text_decoder).state_dict()
    after = model.language_model.state_dict()
    assert all(torch.equal(before[name], after[name][: len(before[name])]) for name in before)


def test_the_checkpoint_names_every_token_at_which_a_server_would_end(text_decoder, files, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(text_decoder)
    end_of_turn = tokenizer.eos_token_id
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    tokenizer.save_pretrained(text_decoder)
    GenerationConfig(eos_token_id=5).save_pretrained(text_decoder)
    stage = haystack_stage(data={"questions": [str(files.json)], "features": str(files.folder)}, steps=1)
    checkpoint = train(settings(stage, decoder=str(text_decoder), feature_dim=D, num_slide_tokens=4), tmp_path / "run")
    named = GenerationConfig.from_pretrained(checkpoint)
    assert named.eos_token_id == sorted({5, end_of_turn, tokenizer.eos_token_id})
    assert named.pad_token_id == tokenizer.pad_token_id


def test_bad_items_are_named_before_the_first_step(text_decoder, files, tmp_path):
    with open(files.csv, "a") as file:
        file.write("nosuch,Which?,x,y,,,A\nb,Which?,x,y,,,D\n")
    write_features(files.folder / "b.safetensors", np.ones((3, D + 1), np.float32))
    data = {"questions": [str(files.json), str(files.csv)], "features": str(files.folder)}
    asked = settings(haystack_stage(data=data), decoder=str(text_decoder), feature_dim=D, num_slide_tokens=4)
    with pytest.raises(QuestionError) as error:
        train(asked, tmp_path / "run")
    assert "bench.csv, line 4: found no features of slide 'nosuch'" in str(error.value)
    assert "bench.csv, line 5: Answer: found 'D'" in str(error.value)
    files.csv.write_text("Slide,Question,A,B,C,D,Answer\na,Which?,x,y,,,B\n")
    with pytest.raises(QuestionError, match=f"instruct.json, item 1: .*b.safetensors: found d = {D + 1}, wanted {D}"):
        train(asked, tmp_path / "other")
    assert not (tmp_path / "other" / "stages").exists()


def test_bad_items_of_all_files_are_named_at_once_those_of_broken_slides_too(text_decoder, files, tmp_path):
    write_features(files.folder / "b.safetensors", np.full((3, D), np.nan, np.float32))
    (files.folder / "c.safetensors").unlink()
    header = ",".join([*map(str, range(D)), "patch_name"])
    (files.folder / "c.csv").write_text("\n".join([header, ",".join(["1"] * D + ["p"]), ",".join(["1"] * (D - 1))]))
    with open(files.csv, "a") as file:
        file.write("nosuch,Which?,x,y,,,A\n")
    other = tmp_path / "other.csv"
    other.write_text("Slide,Question,A,B,C,D,Answer\na,Which?,x,y,,,D\n")
    data = {"questions": [str(files.json), str(files.csv), str(other)], "features": str(files.folder)}
    stages = [haystack_stage(data=data), haystack_stage(data=data, name="again")]
    asked = settings(*stages, decoder=str(text_decoder), feature_dim=D, num_slide_tokens=4)
    with pytest.raises(QuestionError) as error:
        train(asked, tmp_path / "run")
    assert sorted(problem[: problem.index(": ")] for problem in error.value.problems) == [
        "bench.csv, line 3",  # slide b again
        "bench.csv, line 4",
        "instruct.json, item 1",
        "instruct.json, item 2",
        "other.csv, line 2",
    ]
    assert "instruct.json, item 1: b.safetensors: found no patch with finite features" in str(error.value)
    assert "c.csv" in str(error.value)
    assert not (tmp_path / "run" / "stages").exists()


def test_slides_are_read_through_before_training_unless_the_data_say_not(text_decoder, files, tmp_path):
    write_features(files.folder / "b.safetensors", np.full((3, D), np.nan, np.float32))
    data = {"questions": [str(files.csv)], "features": str(files.folder), "read_first": False}
    asked = settings(haystack_stage(data=data), decoder=str(text_decoder), feature_dim=D, num_slide_tokens=4)
    with pytest.raises(SlideError, match="found no patch with finite features"):  # in a step
        train(asked, tmp_path / "run")
    assert (tmp_path / "run" / "stages").exists()


def test_slides_of_another_encoder_are_named_before_the_first_step_unless_they_are_allowed(
    text_decoder, files, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "vllm_wsi")
    rng = np.random.default_rng(0)
    for name, encoder in (("a", "MahmoodLab/UNI"), ("b", "uni_v2"), ("c", "uni_v1")):
        features = rng.standard_normal((9, D)).astype(np.float16)
        write_features(files.folder / f"{name}.safetensors", features, metadata={"encoder": encoder})
    data = {"questions": [str(files.json)], "features": str(files.folder)}
    start = {"decoder": str(text_decoder), "feature_dim": D, "num_slide_tokens": 4}
    found = r"b.safetensors: encoder: found features of 'uni_v2', wanted '{}', {};"
    for encoder, wanted in (
        ("uni", found.format("uni", "as the checkpoint was trained on")),
        (None, found.format("MahmoodLab/UNI", "as the slides before it have")),
    ):
        with pytest.raises(QuestionError, match=wanted) as error:
            train(settings(haystack_stage(data=data, steps=1), **start, encoder=encoder), tmp_path / str(encoder))
        assert len(error.value.problems) == 1
    asked = settings(haystack_stage(data=data, steps=1), **start, encoder="uni")
    asked.encoder_mismatch = "allow"
    train(asked, tmp_path / "allowed")
    assert "stage scorer: 1 slides: features of another encoder, which encoder_mismatch" in caplog.text


def test_what_the_cap_takes_away_is_said_of_each_stage(text_decoder, files, tmp_path, caplog):
    caplog.set_level(logging.INFO, "vllm_wsi")
    data = {"questions": [str(files.json)], "features": str(files.folder), "max_patches": 40}
    wide = haystack_stage(name="wide", data=data | {"max_patches": 300}, steps=1)
    asked = settings(haystack_stage(data=data, steps=1), wide, decoder=str(text_decoder), feature_dim=D,
                     num_slide_tokens=4)  # fmt: skip
    train(asked, tmp_path / "run")
    said = [message for message in caplog.messages if message.startswith("stage ")]
    assert [line for line in said if "encoder" not in line] == [
        "stage scorer: 2 of 3 slides have more than 40 patches (the longest 300): each epoch takes one of each of as "
        "many equal parts of them"
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"trainer": {"nosuch": 1}}, "stages: scorer: trainer, report_to: .* unexpected keyword argument 'nosuch'"),
        ({"trainer": {"report_to": "nosuch"}}, "stages: scorer: trainer, report_to: nosuch is not supported"),
        ({"data": {"generate": {"name": "haystack", "patches": 1}}}, "haystack: found patches, wanted some of seed"),
        ({"data": {"generate": {"name": "nosuch"}}}, "generate: found name 'nosuch', wanted one of haystack"),
    ],
)
def test_what_no_trainer_and_no_generator_takes_is_refused_by_its_name(tmp_path, change, sentence):
    with pytest.raises(SettingsError, match=sentence):
        train(settings(haystack_stage(**change)), tmp_path, GENERATORS)


def test_the_command_trains_from_a_checkpoint_and_says_how_to_serve(tmp_path, capsys):
    init_checkpoint(tmp_path / "start", TinySettings(feature_dim=D, hidden_size=64, num_layers=1, num_slide_tokens=4))
    config = {"model": {"checkpoint": str(tmp_path / "start")}, "stages": [haystack_stage(steps=2)]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"), "--seed", "3"]) == 0
    assert f"vllm serve {tmp_path / 'run' / 'checkpoint'}" in capsys.readouterr().out
    assert main(["train", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"), "--seed", "3"]) == 1
    assert "found a finished run" in capsys.readouterr().err

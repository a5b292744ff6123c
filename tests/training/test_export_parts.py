"""A run over a plain decoder leaves what it trained in `trained/`, from which its checkpoint can be made again."""

import pytest
import torch
from safetensors.torch import load_file

from vllm_wsi.haystack.recipe import GENERATORS
from vllm_wsi.model.assemble import assemble
from vllm_wsi.model.lora import read_lora
from vllm_wsi.model.trained_parts import read_trained_parts
from vllm_wsi.training.export_parts import export_parts
from vllm_wsi.training.settings import TrainSettings
from vllm_wsi.training.train import train

from ..model.text_decoder import write_text_decoder

pytestmark = pytest.mark.slow
D = 16


def stage(name, **changes):
    generate = {"name": "haystack", "count": 8, "num_patches": 12, "feature_dim": D}
    return {
        "name": name,
        "data": {"generate": generate},
        "train": ["projector"],
        "steps": 3,
        "batch_size": 2,
        "learning_rate": {"projector": 1e-2, "lora": 1e-2, "decoder": 1e-3},
    } | changes


def settings(*stages, **model):
    return TrainSettings.model_validate({"model": model, "stages": list(stages)})


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def run(request, tmp_path_factory):
    """(directory of a run with two stages of adapters on different layers, its decoder's directory)"""
    folder = tmp_path_factory.mktemp("run")
    decoder = write_text_decoder(folder / "decoder", dtype=request.param)
    first = stage("first", lora={"r": 2, "alpha": 3, "target_modules": ["q_proj", "v_proj"]})
    second = stage("second", lora={"r": 4, "alpha": 8, "target_modules": ["v_proj", "down_proj"]})
    asked = settings(
        first, second, decoder=str(decoder), feature_dim=D, encoder="test@1", num_slide_tokens=4, dtype="float32"
    )
    train(asked, folder / "out", GENERATORS)
    return folder / "out", decoder


def test_the_parts_and_the_decoder_give_the_checkpoint_of_the_run(run, tmp_path):
    """The run merges into fp32; a bf16 decoder gets the same sum, rounded once."""
    out, decoder = run
    found = load_file(assemble(out / "trained", tmp_path / "assembled") / "model.safetensors")
    wanted, plain = load_file(out / "checkpoint" / "model.safetensors"), load_file(decoder / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, one in found.items():
        if one.dtype == torch.bfloat16:
            torch.testing.assert_close(one.float(), wanted[name].float(), rtol=2**-8, atol=1e-6)
        else:
            torch.testing.assert_close(one, wanted[name].float(), rtol=1e-5, atol=1e-6)
    changed = {
        name.removeprefix("language_model.")
        for name, one in wanted.items()
        if name.removeprefix("language_model.") in plain
        and not torch.equal(one.float()[:258], plain[name.removeprefix("language_model.")].float()[:258])
    }
    assert changed == {f"{name}.weight" for name in read_lora(out / "trained")}


def test_the_adapters_of_all_stages_are_one_of_their_ranks_together(run):
    lora = read_lora(run[0] / "trained")
    assert {name.rpartition(".")[2] for name in lora} == {"q_proj", "v_proj", "down_proj"}
    assert {len(one.a) for one in lora.values()} == {6}
    assert all(one.b.any() for one in lora.values())


def test_the_card_names_the_decoder_and_every_stage_and_states_no_number(run):
    out, decoder = run
    card = (out / "trained" / "README.md").read_text()
    base = read_trained_parts(out / "trained").base
    assert base.name == str(decoder)
    for wanted in (
        base.sha256,
        "test@1",
        "- first: projector, LoRA of rank 2; 3 steps of 2",
        "- second:",
        "Not stated",
    ):
        assert wanted in card


def test_a_run_that_trains_the_decoder_or_starts_from_none_says_why_there_are_no_parts(tmp_path, caplog):
    decoder = write_text_decoder(tmp_path / "decoder")
    whole = settings(stage("whole", train=["projector", "decoder"]), decoder=str(decoder), feature_dim=D)
    new = settings(stage("new"), new={"feature_dim": D, "hidden_size": 64, "num_layers": 1})
    with caplog.at_level("INFO", logger="vllm_wsi"):
        assert export_parts(whole, None, None, tmp_path) is None
        assert export_parts(new, None, None, tmp_path) is None
    assert "stage whole trained the whole decoder" in caplog.messages[0]
    assert "it started from no plain decoder" in caplog.messages[1]
    assert not (tmp_path / "trained").exists()


def test_a_decoder_that_is_gone_takes_no_checkpoint_with_it(run, tmp_path, caplog):
    gone = settings(stage("first"), decoder=str(tmp_path / "nosuch"), feature_dim=D)
    with caplog.at_level("WARNING", logger="vllm_wsi"):
        assert export_parts(gone, None, None, tmp_path) is None
    assert "trained: not written" in caplog.text


def test_adapters_on_the_real_language_model_ship_as_a_few_megabytes(smollm2, tmp_path):
    lora = {"r": 2, "alpha": 2, "target_modules": ["q_proj", "v_proj"]}
    one = stage("only", lora=lora, steps=2, trainer={"use_cpu": True})
    asked = settings(one, decoder="smollm2-135m-instruct", feature_dim=D, num_slide_tokens=4, dtype="float32")
    checkpoint = train(asked, tmp_path / "run", GENERATORS)
    trained = tmp_path / "run" / "trained"
    assert read_trained_parts(trained).base.name == "smollm2-135m-instruct"
    assert sum(file.stat().st_size for file in trained.iterdir()) < 4e6
    found = load_file(assemble(trained, tmp_path / "assembled") / "model.safetensors")
    wanted, plain = load_file(checkpoint / "model.safetensors"), load_file(smollm2 / "model.safetensors")
    assert found.keys() == wanted.keys() >= {f"language_model.{name}" for name in plain}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), wanted[name].float(), rtol=2**-8, atol=1e-6)
    q = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(wanted[f"language_model.{q}"], plain[q].float())

"""The YAML file of a training run: what it gives, and what is refused by the key's name."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_wsi.errors import SettingsError
from vllm_wsi.training.settings import TrainSettings, load_settings
from vllm_wsi.training.sparselearn import SparseLearnSettings

STAGE = {
    "name": "scorer",
    "data": {"questions": ["q/train.json", "q/more.csv"], "features": "../features"},
    "train": ["scorer", "projector"],
    "sparselearn": {"num_slide_tokens": 16, "gate": "scale", "denoiser": "none"},
    "steps": 140,
    "batch_size": 16,
    "learning_rate": {"scorer": 2e-3, "projector": 1e-3},
}
GOOD: dict[str, Any] = {"seed": 3, "model": {"checkpoint": "somebody/model"}, "stages": [STAGE]}


def changed(key: str, value: object) -> dict[str, Any]:
    """GOOD with another value at a dotted key; None leaves the key out."""
    made: Any = copy.deepcopy(GOOD)
    place, parts = made, [int(part) if part.isdigit() else part for part in key.split(".")]
    for part in parts[:-1]:
        place = place[part]
    if value is None:
        del place[parts[-1]]
    else:
        place[parts[-1]] = value
    return made


def write(folder: Path, content: object) -> Path:
    path = folder / "run.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def refusal(folder: Path, content: object) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(write(folder, content))
    said = str(caught.value)
    assert all(line.startswith(f"{folder / 'run.yaml'}: ") for line in said.splitlines())
    assert "pydantic" not in said
    return said


def test_a_good_file_gives_its_settings_and_the_defaults(tmp_path):
    settings = load_settings(write(tmp_path, GOOD))
    (stage,) = settings.stages
    assert (settings.seed, settings.model.checkpoint, settings.report_to) == (3, "somebody/model", [])
    assert stage.sparselearn == SparseLearnSettings(num_slide_tokens=16, gate="scale", denoiser="none")
    assert stage.learning_rate == {"scorer": 2e-3, "projector": 1e-3}
    assert (stage.train, stage.steps, stage.batch_size) == (["scorer", "projector"], 140, 16)
    assert (stage.data.max_patches, stage.data.stretch_positions, stage.data.mix_positions) == (10_240, 0, False)
    assert stage.lora is None


def test_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    folder = tmp_path / "runs"
    folder.mkdir()
    path = write(folder, changed("stages.0.data.questions", ["q/train.json", "/data/bench.csv"]))
    data = load_settings(path).stages[0].data
    assert data.questions == [folder / "q/train.json", Path("/data/bench.csv")]
    assert data.features == folder / "../features"
    monkeypatch.chdir(folder)
    assert load_settings("run.yaml").stages[0].data.questions[0] == Path("q/train.json")


def test_the_file_of_the_demo_is_good():
    import vllm_wsi.haystack

    settings = load_settings(Path(vllm_wsi.haystack.__file__).parent / "haystack.yaml")
    assert settings.model.new is not None
    assert all(stage.data.generate["name"] == "haystack" for stage in settings.stages)
    assert {"scorer", "projector", "decoder"} == {part for stage in settings.stages for part in stage.train}


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    text = yaml.safe_dump(GOOD).replace("scorer: 0.002", "scorer: 2e-3")
    assert "2e-3" in text
    assert load_settings(write(tmp_path, text)).stages[0].learning_rate["scorer"] == 2e-3


@pytest.mark.parametrize("start", [{"new": {"feature_dim": 8}}, {"decoder": "a/b", "feature_dim": 512}])
def test_a_run_may_begin_from_a_decoder_or_from_nothing(tmp_path, start):
    model = load_settings(write(tmp_path, changed("model", start))).model
    assert model.checkpoint is None
    assert model.model_dump(exclude_defaults=True) == start


def test_a_stage_may_train_by_lora_or_the_denoiser_alone(tmp_path):
    lora = changed("stages.0", STAGE | {"train": [], "lora": {"r": 8}, "learning_rate": {"lora": 2e-4}})
    lora["stages"][0].pop("sparselearn")
    assert load_settings(write(tmp_path, lora)).stages[0].lora.r == 8
    alone = STAGE | {"train": [], "sparselearn": {}, "learning_rate": {"denoiser": 1e-3}}
    assert load_settings(write(tmp_path, changed("stages.0", alone))).stages[0].sparselearn == SparseLearnSettings()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", {}, "model: found none, wanted exactly one of checkpoint, decoder, new"),
        ("model", {"checkpoint": "a", "new": {"feature_dim": 8}}, "model: found checkpoint, new, wanted exactly one"),
        ("model", {"decoder": "a"}, "model: found a decoder without feature_dim"),
        (
            "model",
            {"checkpoint": "a", "summary_tokens": 8},
            "summary_tokens: found 8 beside checkpoint, wanted it beside",
        ),
        ("model", None, "model: found none, wanted one"),
        ("model.position_ids", "absolute", "model.position_ids: found 'absolute', wanted 'original' or 'packed'"),
        ("model.dtype", "int8", "model.dtype: found 'int8', wanted 'float32', 'bfloat16' or 'float16'"),
        ("stages", [], "stages: found [], wanted at least 1"),
        ("stages", None, "stages: found none, wanted one"),
        ("stages.0.name", None, "stages.0.name: found none, wanted one"),
        ("stages.0.data", {}, "stages.0.data: wanted either questions with features, or generate"),
        ("stages.0.data.generate", {"name": "x"}, "stages.0.data: wanted either questions with features"),
        ("stages.0.data.features", None, "stages.0.data: found questions without features"),
        ("stages.0.data.questions", "q.json", "stages.0.data.questions: found 'q.json', wanted a list"),
        ("stages.0.data.max_patches", 0, "stages.0.data.max_patches: found 0, wanted at least 1"),
        ("stages.0.data.stretch_positions", -1, "stages.0.data.stretch_positions: found -1, wanted at least 0"),
        (
            "stages.0.train",
            ["scorer", "gate"],
            "stages.0.train.1: found 'gate', wanted 'scorer', 'projector' or 'decoder'",
        ),
        ("stages.0.train", ["scorer", "decoder"], "stages.0: learning_rate: found none for decoder"),
        ("stages.0.train", "scorer", "stages.0.train: found 'scorer', wanted a list"),
        ("stages.0.learning_rate", {}, "learning_rate: found none for projector, scorer, wanted one for each part"),
        ("stages.0.learning_rate.gate", 1.0, "stages.0.learning_rate.gate"),
        ("stages.0.sparselearn", {"num_slide_tokens": 8}, "learning_rate: found none for denoiser"),
        ("stages.0.sparselearn", None, "stages.0: found a scorer to train without sparselearn"),
        (
            "stages.0.sparselearn.gate",
            "sum",
            "stages.0.sparselearn.gate: found 'sum', wanted 'noise', 'scale' or 'none'",
        ),
        ("stages.0.sparselearn.relaxation", "softmax", "stages.0.sparselearn.relaxation: found 'softmax', wanted"),
        (
            "stages.0.sparselearn.num_slide_tokens",
            2.5,
            "stages.0.sparselearn.num_slide_tokens: found 2.5, wanted a whole number",
        ),
        ("stages.0.sparselearn.tau_start", -1, "stages.0.sparselearn.tau_start: found -1, wanted above 0"),
        ("stages.0.sparselearn.k_fraction", 1.5, "stages.0.sparselearn.k_fraction: found 1.5, wanted at most 1"),
        (
            "stages.0.sparselearn.tau_end",
            float("nan"),
            "stages.0.sparselearn.tau_end: found nan, wanted a finite number",
        ),
        (
            "model",
            {"new": {"feature_dim": 8, "hidden_size": 40}},
            "model.new.hidden_size: found 40, wanted a multiple of 32",
        ),
        ("model", {"new": {"feature_dim": 8, "layers": 1}}, "model.new.layers: found 1, wanted no key of this name"),
        ("stages.0.lora", {"r": 4}, "learning_rate: found none for lora"),
        ("stages.0.steps", 0, "stages.0.steps: found 0, wanted at least 1"),
        ("stages.0.steps", None, "stages.0.steps: found none, wanted one"),
        ("stages.0.batch_size", 0, "stages.0.batch_size: found 0, wanted at least 1"),
        ("stages.0.batch_size", "many", "stages.0.batch_size: found 'many', wanted a whole number"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_by_its_key(tmp_path, key, value, message):
    assert message in refusal(tmp_path, changed(key, value))


@pytest.mark.parametrize(
    "key",
    [
        "sed", "model.decoders", "stages.0.stepps", "stages.0.data.question", "stages.0.sparselearn.denoisr",
        "stages.0.sparselearn.tau",
    ],
)  # fmt: skip
def test_an_unknown_key_is_refused_by_its_name(tmp_path, key):
    assert refusal(tmp_path, changed(key, 1)) == f"{tmp_path / 'run.yaml'}: {key}: found 1, wanted no key of this name"


def test_an_unknown_key_of_lora_is_refused(tmp_path):
    stage = STAGE | {"lora": {"rank": 4}, "learning_rate": STAGE["learning_rate"] | {"lora": 1e-4}}
    assert "stages.0.lora.rank: " in refusal(tmp_path, changed("stages.0", stage))


def test_nothing_to_train_and_a_decoder_beside_lora_are_refused(tmp_path):
    idle = {name: value for name, value in STAGE.items() if name != "sparselearn"} | {"train": []}
    assert "train: found nothing, wanted some of scorer, projector, decoder" in refusal(
        tmp_path, changed("stages.0", idle)
    )
    rates = {"decoder": 1e-4, "lora": 1e-4}
    both = idle | {"train": ["decoder"], "lora": {}, "learning_rate": rates}
    assert "found lora and a decoder to train, wanted one of the two" in refusal(tmp_path, changed("stages.0", both))


def test_all_that_does_not_fit_is_told_at_once(tmp_path):
    bad = changed("stages.0.steps", 0)
    bad["seed"] = "x"
    bad["stages"].append(STAGE | {"batch_size": -1})
    lines = refusal(tmp_path, bad).splitlines()
    keys = [line.removeprefix(f"{tmp_path / 'run.yaml'}: ").split(": ")[0] for line in lines]
    assert sorted(keys) == ["seed", "stages.0.steps", "stages.1.batch_size"]


@pytest.mark.parametrize("content", ["a: [1", "a:\n\tb: 1", "{"])
def test_what_is_no_yaml_is_told_in_one_line(tmp_path, content):
    said = refusal(tmp_path, content)
    assert said.startswith(f"{tmp_path / 'run.yaml'}: found no YAML: ")
    assert "\n" not in said


@pytest.mark.parametrize("content", ["", "text", "- 1\n- 2", "3"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, content):
    found = yaml.safe_load(content)
    assert refusal(tmp_path, content) == f"{tmp_path / 'run.yaml'}: found {found!r}, wanted a mapping"


def test_settings_survive_their_own_json():
    settings = TrainSettings.model_validate(GOOD)
    assert TrainSettings.model_validate_json(settings.model_dump_json()) == settings

"""The tissue checkpoint and its recipe."""

import numpy as np
import pytest
import yaml

from vllm_wsi.cli.app import main
from vllm_wsi.errors import SetupError
from vllm_wsi.model.checkpoint import load_selector, read_config
from vllm_wsi.model.trained_parts import read_trained_parts
from vllm_wsi.tissue.tissue_generator import TissueSplit, near_whole_slide
from vllm_wsi.tissue.tissue_recipe import TISSUE_PARTS, TISSUE_RECIPES
from vllm_wsi.training.settings import load_settings

from .kather_tiles import write_tiles


def test_the_last_stage_has_patients_that_the_scorer_has_not_seen():
    *earlier, last = load_settings(TISSUE_RECIPES["tissue"]).all_stages()
    assert [stage.name for stage in earlier] == ["reader", "scorer"]
    assert last.selection == "hard"
    ends = {stage.data.generate["part"][1] for stage in earlier}
    assert ends == {last.data.generate["part"][0]}
    assert {stage.data.generate.get("side", "train") for stage in [*earlier, last]} == {"train"}


def test_its_language_model_is_fetched_and_its_scorer_comes_from_the_run_before():
    settings = load_settings(TISSUE_RECIPES["tissue"])
    assert settings.model.decoder == "smollm2-135m-instruct"
    assert settings.scorer_run is not None
    assert settings.scorer_run.model.new.encoder.startswith("efficientnet-lite0@")


@pytest.mark.parametrize("name", ["tissue", "kather"])
def test_it_is_a_command_that_asks_for_the_tissues_folder(name, tmp_path, capsys):
    assert main(["train", name, "--out", str(tmp_path / "run")]) == 1
    assert f"{name}: reader: found no data, wanted --tissue-dir" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_kather_asks_for_the_slide_that_is_left_out(tmp_path, capsys):
    assert main(["train", "kather", "--tissue-dir", str(tmp_path), "--out", str(tmp_path / "run")]) == 1
    assert "kather: found no slide to leave out, wanted --leave-out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_eight_tissues_records_the_encoder_of_the_slide_that_is_left_out(tmp_path):
    recipe = yaml.safe_load(TISSUE_RECIPES["kather"].read_text())
    recipe["model"]["new"] |= {"feature_dim": 5, "hidden_size": 64, "num_layers": 1}
    for stage in recipe["stages"]:
        stage["data"]["generate"] |= {"count": 4, "num_patches": 40}
        stage |= {"steps": 1, "batch_size": 1, "warmup_steps": 0}
    (tmp_path / "kather.yaml").write_text(yaml.safe_dump(recipe))
    folder = write_tiles(tmp_path, slides=("01", "02", "03"))
    command = ["train", str(tmp_path / "kather.yaml"), "--tissue-dir", str(folder), "--leave-out", "02"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert read_config(str(tmp_path / "run" / "checkpoint")).encoder == "kather2016-texture@84-without-02"


def test_the_package_holds_what_was_trained_and_says_what_it_is():
    parts = read_trained_parts(TISSUE_PARTS)
    settings = load_settings(TISSUE_RECIPES["tissue"])
    small = settings.scorer_run.model.new
    assert parts.base.name == settings.model.decoder
    assert (parts.config.encoder, parts.config.feature_dim) == (small.encoder, small.feature_dim)
    assert (parts.config.num_slide_tokens, parts.config.position_ids) == (32, "packed")
    assert len(parts.lora) == 60  # query and value of 30 layers
    assert sum(file.stat().st_size for file in TISSUE_PARTS.iterdir()) < 8e6
    card = (TISSUE_PARTS / "README.md").read_text()
    for wanted in (parts.base.sha256, small.encoder, "Cruz-Roa", "not for diagnosis", "Apache-2.0"):
        assert wanted in card


@pytest.mark.slow
def test_of_a_whole_slide_whose_patient_it_never_saw_it_keeps_tumour(tissue_folder):
    """197 of the slide's 478 patches are tumour, so 32 by lot would hold 13."""
    try:
        slide = near_whole_slide(TissueSplit(data=tissue_folder))
    except SetupError as error:
        pytest.skip(f"PyPI is not to be had here: {error}")
    with slide.open() as opened:
        kept = load_selector(str(TISSUE_PARTS)).select(opened).indices.numpy()
    assert len(kept) == 32
    assert np.isin(kept, slide.key_patches).sum() >= 29

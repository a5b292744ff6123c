"""The recipe of the tissue checkpoint."""

from vllm_wsi.cli.app import main
from vllm_wsi.tissue.tissue_recipe import TISSUE_RECIPE
from vllm_wsi.training.settings import load_settings


def test_the_last_stage_has_patients_that_neither_scorer_nor_reader_has_seen():
    *earlier, last = load_settings(TISSUE_RECIPE).all_stages()
    assert [stage.name for stage in earlier] == ["reader", "scorer", "reader"]
    assert last.selection == "hard"
    ends = {stage.data.generate["part"][1] for stage in earlier}
    assert ends == {last.data.generate["part"][0]}
    assert {stage.data.generate.get("side", "train") for stage in [*earlier, last]} == {"train"}


def test_its_language_model_is_fetched_and_its_scorer_comes_from_the_run_before():
    settings = load_settings(TISSUE_RECIPE)
    assert settings.model.decoder == "smollm2-135m-instruct"
    assert settings.scorer_run is not None
    assert settings.scorer_run.model.new.encoder.startswith("efficientnet-lite0@")


def test_it_is_a_command_that_asks_for_the_tissues_folder(tmp_path, capsys):
    assert main(["train", "tissue", "--out", str(tmp_path / "run")]) == 1
    assert "tissue: reader: found no data, wanted --tissue-dir" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

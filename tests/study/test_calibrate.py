"""Fitting a calibration: the fits by themselves, and the command on the demo checkpoint and a real file of it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml

from vllm_wsi.cli.app import main
from vllm_wsi.confidence import calibration_error
from vllm_wsi.errors import CheckpointError, SettingsError
from vllm_wsi.haystack.generator import haystack_items
from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT
from vllm_wsi.model.checkpoint import CALIBRATION, load_calibration, load_scorer
from vllm_wsi.slides import write_features
from vllm_wsi.study.calibrate import calibrate, logistic_fit, temperature_fit


def softmax(x):
    return np.exp(x - np.logaddexp.reduce(x))


@pytest.mark.parametrize("truth", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_answers_is_found(truth):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 4)) * 2
    right = [int(rng.choice(4, p=softmax(one / truth))) for one in logits]
    found = temperature_fit(list(logits), right)
    assert found == pytest.approx(truth, rel=0.1)
    sure = [softmax(one / found).max() for one in logits]
    assert calibration_error(logits.argmax(axis=1) == right, sure) < 0.03


def test_n_right_answers_of_n_are_no_certainty():
    logits = [np.array([1.0, 0.0])] * 20
    found = temperature_fit(logits, [0] * 20)
    assert softmax(logits[0] / found)[0] == pytest.approx(21 / 22, abs=1e-3)


def test_the_logistic_fit_finds_weights_that_made_the_labels():
    rng = np.random.default_rng(0)
    x = np.c_[rng.normal(size=20_000), rng.uniform(5, 10, size=20_000)]
    shows = rng.uniform(size=20_000) < 1 / (1 + np.exp(-(2 * x[:, 0] - 0.5 * x[:, 1] + 3)))
    assert logistic_fit(x, shows) == pytest.approx((2, -0.5, 3), rel=0.1)


def test_labels_that_a_threshold_parts_give_a_finite_slope_and_equal_lengths_no_weight():
    x = np.c_[[0.0, 1.0, 2.0, 3.0], np.full(4, 6.9)]
    slope, of_length, _ = logistic_fit(x, np.array([False, False, True, True]))
    assert 0 < slope < 100
    assert of_length == 0
    alike = np.c_[np.arange(60.0), np.log(np.full(60, 200))]  # whose mean is not exactly one of them
    assert logistic_fit(alike, np.arange(60) % 3 == 0)[1] == 0


def test_a_temperature_at_the_end_of_the_range_is_said(copied, caplog):
    items = haystack_items("validation", 24, 512, empty_share=0.5)
    wrong = [
        replace(item, turns=((item.question, next(one for one in item.options if one != item.answer)),))
        for item in items
    ]
    with caplog.at_level("WARNING", logger="vllm_wsi"):
        calibrate(copied, haystack_items("train", 2, 512), wrong, "none")
    assert "temperature: found 20.0" in caplog.text


def test_higher_scores_never_tell_of_less():
    x = np.c_[np.arange(10.0), np.ones(10)]
    assert logistic_fit(x, np.arange(10) < 5)[0] == 0


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(DEMO_CHECKPOINT, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / CALIBRATION).unlink(missing_ok=True)
    return tmp_path / "checkpoint"


def test_the_command_writes_what_a_selection_then_says(copied, tmp_path, capsys):
    slides = {"name": "haystack", "num_patches": [512, 2048]}
    settings = {
        "training": [{"generate": slides | {"count": 12}}],
        "validation": [{"generate": slides | {"split": "validation", "count": 48, "empty_share": 0.3}}],
        "absent": "none",
    }
    config = tmp_path / "fit.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert main(["calibrate", str(config), "--checkpoint", str(copied)]) == 0
    assert "48 validation slides" in capsys.readouterr().out
    found = load_calibration(str(copied), load_scorer(str(copied)))
    assert found is not None
    said = {}
    for finding, item in zip(("there", "none"), _one_of_each(), strict=True):
        with item.slides[0].open() as slide:
            path = tmp_path / f"{finding}.safetensors"
            _save(slide, path)
        assert main(["select", str(path), "--checkpoint", str(copied), "--encoder-mismatch", "allow"]) == 0
        printed = capsys.readouterr()
        said[finding] = json.loads(printed.out)
        assert [line for line in printed.err.splitlines() if line.startswith(f"{path}: ")] == [
            f"{path}: {warning}" for warning in said[finding]["warnings"]
        ]
    assert said["there"]["sufficiency"] > 0.9 > 0.2 > said["none"]["sufficiency"]
    assert said["there"]["warnings"] == []
    assert said["none"]["warnings"] == ["No patch of this slide stands out: what is asked for is probably not on it."]
    assert said["there"]["in_distribution"] > 0.01
    assert said["there"]["answer_temperature"] == round(found.temperature, 4)


def test_a_calibration_of_another_scorer_or_a_damaged_one_is_refused(copied):
    scorer = load_scorer(str(copied))
    assert load_calibration(str(copied), scorer) is None
    items = haystack_items("validation", 24, 512, empty_share=0.5)
    calibrate(copied, haystack_items("train", 2, 512), items, "none")
    good = (copied / CALIBRATION).read_text()
    (copied / CALIBRATION).write_text(json.dumps(json.loads(good) | {"scorer": "another"}))
    with pytest.raises(CheckpointError, match="scorer: found another, wanted"):
        load_calibration(str(copied), scorer)
    for damaged in (good[:-9], "[]", "{}"):
        (copied / CALIBRATION).write_text(damaged)
        with pytest.raises(CheckpointError, match=r"calibration|loads"):
            load_calibration(str(copied), scorer)


def test_validation_that_cannot_tell_is_refused(copied):
    training = haystack_items("train", 2, 512)
    with pytest.raises(SettingsError, match="found 4 of 4 whose slide shows"):
        calibrate(copied, training, haystack_items("validation", 4, 512), "none")
    with pytest.raises(SettingsError, match="found no question whose"):
        calibrate(copied, training, [], "none")
    with pytest.raises(SettingsError, match="training: found no slide"):
        calibrate(copied, [], haystack_items("validation", 8, 512, empty_share=0.5), "none")
    with pytest.raises(SettingsError, match="no question of choice"):
        calibrate(copied, training, haystack_items("validation", 8, 512, open_share=1.0), "none")
    assert not (copied / CALIBRATION).exists()


def _one_of_each():
    items = haystack_items("test", 40, 1000, empty_share=0.5)
    return [next(one for one in items if (one.slides[0].finding is None) == lacks) for lacks in (False, True)]


def _save(slide, path):
    write_features(path, slide.read_rows(0, slide.num_patches), metadata=dict(slide.metadata))

"""Summaries of scores, and what a calibration says of a slide by them."""

import json

import numpy as np
import pytest
import torch

from vllm_wsi.errors import SettingsError
from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT
from vllm_wsi.selection.calibration import TRAINING_LEVELS, USUAL, Calibration, Trust, UsualScores, distances
from vllm_wsi.selection.score_summary import LEVELS, SAMPLED, score_summary
from vllm_wsi.selection.selection import Selection


def usual(**changes):
    levels = np.array(TRAINING_LEVELS)
    values = {
        "max_patches": 10_000,
        "training_scores": (2 * levels - 1).tolist(),  # of scores that are spread evenly over -1 .. 1
        "body_distances": np.linspace(0.01, 0.1, 199).tolist(),
        "tail_distances": np.linspace(0.01, 0.5, 199).tolist(),
    }
    return UsualScores(**values | changes)


def calibration(**changes):
    values = {
        "scorer": "abc",
        "temperature": 2.0,
        "best_weight": 4.0,
        "log_patches_weight": 0.0,
        "bias": -8.0,
        "enough": 0.5,
        "usual": (usual(),),
        "num_slides": 199,
        "num_patches": (100, 10_000),
    }
    return Calibration(**values | changes)


def even_scores(n=4000):
    return torch.linspace(-1, 1, n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]


def chosen(scores):
    return Selection(torch.arange(1), torch.zeros(1), torch.zeros(1, 2), len(scores), 0, summary=score_summary(scores))


@pytest.mark.parametrize(("n", "wanted"), [(1, 0.0), (3, 1.0), (4, 1.5), (5, 2.5), (100, 97.5)])
def test_the_best_is_the_mean_of_the_four_highest_scores_or_of_all(n, wanted):
    assert score_summary(torch.arange(n).float()).best == wanted


def test_scores_that_are_not_finite_count_in_nothing():
    scores = torch.tensor([torch.nan, 1.0, torch.inf, 2.0, -torch.inf])
    found = score_summary(scores)
    assert found.best == 1.5
    assert found.quantiles.min() >= 1
    assert found.quantiles.max() <= 2
    assert score_summary(torch.full((3,), torch.nan)) is None


def test_quantiles_are_those_of_the_spread_where_other_scores_select():
    scores, spread = torch.arange(100).float(), torch.full((100,), 7.0)
    found = score_summary(scores, spread)
    assert found.best == 97.5
    assert found.quantiles.tolist() == [7.0] * len(LEVELS)


@pytest.mark.parametrize("n", [SAMPLED - 1, SAMPLED, SAMPLED + 1, 3 * SAMPLED])
def test_many_scores_have_nearly_the_quantiles_of_all(n):
    scores = even_scores(n)
    wanted = torch.quantile(scores, torch.tensor(LEVELS))
    assert torch.allclose(score_summary(scores).quantiles, wanted, atol=0.03)
    if n <= SAMPLED:
        assert torch.equal(score_summary(scores).quantiles, wanted)


def test_a_slide_like_the_training_slides_is_near_them_and_a_shifted_one_far():
    model = calibration()
    near = model.in_distribution(score_summary(even_scores()), 4000)
    far = model.in_distribution(score_summary(even_scores() * 0.5 + 1), 4000)
    assert near > 0.5
    assert far == 2 / 200


def test_look_alikes_in_the_upper_tail_alone_are_seen():
    scores = even_scores()
    scores[:200] = 1.5
    found = distances(score_summary(scores).quantiles.numpy(), usual().training_scores)
    plain = distances(score_summary(even_scores()).quantiles.numpy(), usual().training_scores)
    assert found.tail > 20 * plain.tail
    assert calibration().in_distribution(score_summary(scores), 4000) == 2 / 200


def test_sufficiency_rises_with_the_best_scores_and_falls_with_n_where_the_fit_says_so():
    model = calibration(log_patches_weight=-0.5)
    low, high = (model.sufficiency(score_summary(torch.full((9,), best)), 1000) for best in (1.0, 3.0))
    assert 0 < low < high < 1
    assert model.sufficiency(score_summary(torch.full((9,), 3.0)), 100_000) < high
    assert calibration().sufficiency(score_summary(torch.full((9,), 2.0)), 5) == 0.5
    assert calibration(best_weight=1e30).sufficiency(score_summary(torch.full((9,), -1e9)), 5) >= 0.0


def test_what_is_wrong_is_said_in_words_and_nothing_where_nothing_is():
    good = even_scores()
    good[:4] = 3.0
    assert calibration().warnings(score_summary(good), 4000) == []
    bare, shifted = score_summary(even_scores()), score_summary(even_scores() + 2)
    assert [text[:20] for text in calibration().warnings(bare, 4000)] == ["No patch of this sli"]
    doubtful = torch.cat((even_scores(), torch.full((4,), 2.1)))  # sufficiency 0.6
    for enough, wanted in ((0.7, ["The patches stand ou"]), (0.5, []), (0.65, ["The patches stand ou"])):
        said = calibration(enough=enough).warnings(score_summary(doubtful), 4000)
        assert [text[:20] for text in said] == wanted
    sure = calibration(enough=0.3).warnings(score_summary(torch.cat((even_scores(), torch.full((4,), 1.85)))), 4000)
    assert sure == []  # sufficiency 0.35: above what validation asks for
    assert calibration().warnings(score_summary(good), 50) == [
        "Slides of 50 patches were not checked (100 to 10000 were)."
    ]
    low = calibration(usual=(usual(body_distances=np.linspace(0.01, 0.1, 999).tolist()),))
    assert [text[:20] for text in low.warnings(shifted, 4000)] == ["This slide is unlike"]


def test_trust_says_nothing_where_nothing_was_fitted_or_no_scorer_scored():
    known = chosen(even_scores())
    assert Trust.of(None, known) == Trust(None, None, None, ())
    assert Trust.of(calibration(), Selection(torch.arange(1), torch.zeros(1), torch.zeros(1, 2), 9, 0)) == Trust()
    found = Trust.of(calibration(), known)
    assert found.answer_temperature == 2.0
    assert 0 <= found.sufficiency <= 1
    assert 0 < found.in_distribution <= 1


def test_a_slide_that_is_told_to_be_unlike_the_others_has_a_number_below_the_limit():
    model = Calibration.of(json.loads((DEMO_CHECKPOINT / "calibration.json").read_text()), "calibration.json")
    found = Trust.of(model, chosen(even_scores() + 1000))
    assert found.warnings[0].startswith("This slide is unlike")
    assert found.in_distribution < USUAL


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": 0.0}, "temperature: found 0.0, wanted above 0"),
        ({"best_weight": -1.0}, "best_weight: found -1.0, wanted at least 0"),
        ({"usual": ()}, "usual"),
        ({"usual": (usual(max_patches=9), usual(max_patches=8))}, r"usual: found groups of up to \[9, 8\]"),
        ({"bias": float("nan")}, "bias: found nan, wanted a finite number"),
        ({"more": 1}, "more: found 1, wanted no key of this name"),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(changes, said):
    with pytest.raises(SettingsError, match=said):
        calibration(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training_scores": (0.0,)}, "training_scores"),
        ({"training_scores": [-one for one in usual().training_scores]}, "out of the order of their levels"),
        ({"body_distances": (2.0, 1.0)}, "body_distances: found numbers out of order"),
        ({"tail_distances": ()}, "tail_distances"),
        ({"max_patches": 0}, "max_patches: found 0, wanted at least 1"),
    ],
)
def test_what_cannot_be_usual_is_refused(changes, said):
    with pytest.raises(SettingsError, match=said):
        usual(**changes)


@pytest.mark.parametrize(("n", "group"), [(1, 0), (100, 0), (101, 1), (10_000, 1), (10_001, 1)])
def test_a_slide_is_compared_with_those_of_its_length(n, group):
    groups = usual(max_patches=100), usual(body_distances=[1.0] * 199, tail_distances=[9.0] * 199)
    summary = score_summary(even_scores() + 0.1)
    assert calibration(usual=groups).in_distribution(summary, n) == groups[group].share_as_far(summary)
    assert groups[0].share_as_far(summary) != groups[1].share_as_far(summary)

"""Haystack's knobs: each does what it says, and none changes the slides of a world that does not turn it."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from vllm_wsi.errors import SettingsError
from vllm_wsi.haystack.generator import FINDINGS, LETTERS, NONE, HaystackWorld, haystack_items


@pytest.mark.parametrize(
    ("knobs", "number", "n", "key", "types"),
    [
        ({}, 0, 5, [0, 1, 2, 4], "3a21c602a0909c26"),
        ({}, 3, 333, [92, 168, 202, 204, 221, 239, 246, 247, 296, 301, 320], "b9db412f1b2d2720"),
        ({"lookalike_rate": 0.03, "key_patches": (1, 1)}, 7, 20_000, [18519], "ff9d7723ab78f9eb"),
    ],
)
def test_slides_of_older_worlds_are_laid_out_as_they_were(knobs, number, n, key, types):
    slide = HaystackWorld(**knobs).slide("test", number, n)
    assert slide.key_patches.tolist() == key
    assert hashlib.sha256(slide._types.tobytes()).hexdigest()[:16] == types


def test_the_features_of_an_older_world_are_as_they_were():
    x = HaystackWorld().slide("test", 3, 333).features()
    assert np.allclose(
        x[[0, 99, 332], :3],
        [[0.44052, -1.021573, -1.599733], [1.50815, -0.098268, -0.425204], [0.674216, -0.595239, -0.777193]],
        atol=1e-5,
    )


@pytest.mark.parametrize("n", [1, 2, 3, 12, 24, 25, 4096])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_slide_has_as_many_findings_as_asked_and_their_patches_are_apart(n, count):
    for number in range(20):
        world = HaystackWorld(num_findings=(count, count), key_patches=(1, 12))
        slide = world.slide("train", number, n)
        kinds = slide._types - world.num_common
        present = {int(kind) for kind in kinds if 0 <= kind < len(FINDINGS)}
        assert present == set(slide.findings)
        assert slide.finding in slide.findings
        assert len(slide.findings) == count or n < 12 * count
        assert np.flatnonzero(kinds == slide.finding).tolist() == slide.key_patches.tolist()
        assert len(slide.key_patches) == len(HaystackWorld(key_patches=(1, 12)).slide("train", number, n).key_patches)


def test_the_number_of_findings_is_drawn_between_least_and_most():
    world = HaystackWorld(num_findings=(1, 3))
    counts = Counter(len(world.slide("train", number, 200).findings) for number in range(150))
    assert set(counts) == {1, 2, 3}
    assert min(counts.values()) > 25


def test_a_question_offers_the_finding_it_asks_for_and_none_of_the_others_on_the_slide():
    for item in HaystackWorld(num_findings=(2, 2)).items("train", 60, 300):
        (slide,) = item.slides
        assert len(item.options) == 3
        assert item.options[item.answer] == FINDINGS[slide.finding]
        assert not {FINDINGS[one] for one in slide.findings} & (set(item.options.values()) - {FINDINGS[slide.finding]})


@pytest.mark.parametrize("findings", [(1, 1), (1, 2)])
def test_slides_without_evidence_are_answered_none_and_each_letter_is_as_likely(findings):
    items = HaystackWorld(empty_share=0.25, num_findings=findings).items("validation", 800, 60)
    empty = [item for item in items if item.slides[0].finding is None]
    assert 150 < len(empty) < 250
    for item in items:
        (slide,) = item.slides
        assert sorted(item.options) == list(LETTERS)
        assert len(set(item.options.values())) == len(LETTERS)
        assert NONE in item.options.values()
        assert item.options[item.answer] == slide.finding_name
        assert (slide.finding is None) == (slide.finding_name == NONE) == (not len(slide.key_patches))
    for part in (items, empty):
        letters = Counter(item.answer for item in part)
        assert all(0.15 * len(part) < letters[letter] < 0.35 * len(part) for letter in LETTERS)
    none_letters = Counter(letter for item in items for letter, text in item.options.items() if text == NONE)
    assert all(150 < none_letters[letter] < 250 for letter in LETTERS)


@pytest.mark.parametrize(("none_share", "least", "most"), [(0.0, 0, 0), (0.5, 150, 250), (1.0, 400, 400)])
def test_none_is_offered_about_a_finding_as_often_as_asked_and_always_about_an_empty_slide(none_share, least, most):
    for empty_share in (1e-9, 1.0):
        items = HaystackWorld(empty_share=empty_share, none_share=none_share).items("train", 400, 60)
        assert all(len(item.options) == len(LETTERS) for item in items)
        offered = sum(NONE in item.options.values() for item in items)
        assert offered == 400 if empty_share == 1 else least <= offered <= most


def test_an_empty_slide_is_the_slide_that_it_would_be_but_for_its_evidence():
    full, empty = HaystackWorld().slide("test", 1, 500), HaystackWorld(empty_share=1.0).slide("test", 1, 500)
    assert empty.findings == ()
    changed = np.flatnonzero((full.features() != empty.features()).any(axis=1))
    assert changed.tolist() == full.key_patches.tolist()


def test_an_open_question_is_answered_by_all_findings_or_none():
    items = haystack_items(count=200, num_patches=50, open_share=1.0, empty_share=0.3, num_findings=(1, 2))
    for item in items:
        names = [FINDINGS[one] for one in item.slides[0].findings]
        assert item.answer == (", ".join(names) or "none")
    assert {item.answer.count(",") for item in items} == {0, 1}


@pytest.mark.parametrize("dim", [5, 64])
def test_a_shift_turns_every_centre_by_its_angle_and_leaves_them_to_each_other_as_they_were(dim):
    centres = HaystackWorld(feature_dim=dim).centres
    turned = HaystackWorld(feature_dim=dim, shift_degrees=60).centres
    assert np.allclose(turned @ turned.T, centres @ centres.T, atol=1e-3)
    assert np.allclose(turned.mean(axis=1), 0, atol=1e-5)
    cosines = (turned * centres).mean(axis=1)
    # Where d is even, one direction of d - 1 is left over.
    assert np.allclose(cosines, 0.5, atol=1e-5 if dim % 2 else 0.1)


def test_a_shift_moves_no_patch_to_another_type():
    plain, turned = (HaystackWorld(shift_degrees=angle).slide("test", 2, 400) for angle in (0.0, 90.0))
    assert plain._types.tolist() == turned._types.tolist()
    assert plain.item().turns == turned.item().turns
    assert not np.allclose(plain.features(), turned.features())


@pytest.mark.parametrize(
    ("knob", "sentence"),
    [
        ({"empty_share": 1.5}, "empty_share: found 1.5, wanted 0 to 1"),
        ({"lookalike_rate": float("nan")}, "lookalike_rate: found nan, wanted 0 to 1"),
        ({"feature_dim": 2}, "feature_dim: found 2, wanted at least 3"),
        ({"noise": 0.0}, "noise: found 0.0, wanted a finite number above 0"),
        ({"shift_degrees": float("inf")}, "shift_degrees: found inf, wanted a finite number"),
        ({"key_patches": (0, 3)}, "key_patches: found 0, 3, wanted 1 <= least <= most"),
        ({"key_patches": (4, 3)}, "key_patches: found 4, 3, wanted 1 <= least <= most"),
        ({"num_findings": (1, 4)}, "num_findings: found 1, 4, wanted 1 <= least <= most <= 3"),
    ],
)
def test_a_knob_out_of_range_is_refused_in_a_sentence(knob, sentence):
    with pytest.raises(SettingsError, match=sentence):
        HaystackWorld(**knob)

"""Haystack slides: equal arguments give equal slides; only the key patches tell the answer; distractors are loud."""

from collections import Counter

import numpy as np
import pytest

from vllm_wsi.errors import SettingsError
from vllm_wsi.haystack.generator import FINDINGS, LETTERS, STEMS, HaystackSlide, HaystackWorld, haystack_items

WORLD = HaystackWorld()
SPLITS = ("train", "validation", "test")


def standardised(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(axis=1, keepdims=True)
    return x / x.std(axis=1, keepdims=True)


def nearest_types(slide: HaystackSlide, rows: np.ndarray) -> np.ndarray:
    """The patch type whose centre is nearest to each row, after both are standardised."""
    x, centres = standardised(slide.features()[rows]), standardised(slide.world.centres)
    return np.argmin(((x[:, None] - centres) ** 2).sum(axis=2), axis=1)


@pytest.mark.parametrize("n", [1, 2, 5, 31, 100_000])
def test_a_slide_of_any_length_can_be_made(n):
    slide = WORLD.slide("test", 3, n)
    x, coords = slide.features(), slide.coords_px()
    assert x.shape == (n, 64)
    assert x.dtype == np.float32
    assert np.isfinite(x).all()
    assert coords.shape == (n, 2)
    assert len(np.unique(coords, axis=0)) == n
    assert coords.max() < int(slide.metadata()["width"])
    assert len(slide.key_patches) == min(n, len(slide.key_patches)) >= min(n, 4)
    with slide.open() as opened:
        assert (opened.num_patches, opened.feature_dim, opened.name) == (n, 64, slide.name)
        assert np.array_equal(opened.read_rows(0, n), x)


def test_the_same_arguments_give_the_same_slide_bit_for_bit():
    for number in range(5):
        one, other = (HaystackWorld(seed=4).slide("train", number, 777) for _ in range(2))
        assert one.features().tobytes() == other.features().tobytes()
        assert one.features().tobytes() == one.features().tobytes()
        assert one.key_patches.tolist() == other.key_patches.tolist()
        assert (one.finding, one.name, one.item().turns) == (other.finding, other.name, other.item().turns)


def test_another_split_number_length_or_seed_gives_another_slide():
    slides = [WORLD.slide(split, number, n) for split in SPLITS for number in (0, 1, 2) for n in (300, 301)]
    slides.append(HaystackWorld(seed=1).slide("train", 0, 300))
    assert len({slide.features()[:300].tobytes() for slide in slides}) == len(slides)
    assert len({tuple(slide.key_patches) for slide in slides}) == len(slides)
    assert len({slide.name for slide in slides}) == len(slides)


def test_no_two_slides_of_any_splits_share_a_patch():
    rows = [row.tobytes() for split in SPLITS for i in range(12) for row in WORLD.slide(split, i, 128).features()]
    assert len(set(rows)) == len(rows) == 3 * 12 * 128


def test_a_split_that_there_is_not_is_refused():
    with pytest.raises(KeyError, match="dev"):
        WORLD.slide("dev", 0, 10)


@pytest.mark.parametrize("n", [12, 13, 100, 4096])
def test_key_patches_are_distinct_ascending_and_4_to_12(n):
    counts = Counter()
    for number in range(60):
        rows = WORLD.slide("train", number, n).key_patches
        assert (np.diff(rows) > 0).all()
        assert rows[0] >= 0
        assert rows[-1] < n
        counts[len(rows)] += 1
    assert min(counts) >= 4
    assert max(counts) <= 12
    assert len(counts) >= 7


@pytest.mark.parametrize("key_patches", [(1, 1), (1, 12), (2, 3)])
def test_a_world_may_ask_for_another_count_of_key_patches(key_patches):
    world = HaystackWorld(key_patches=key_patches)
    counts = {len(world.slide("train", number, 200).key_patches) for number in range(100)}
    assert counts == set(range(key_patches[0], key_patches[1] + 1))


def test_key_patches_resemble_their_finding_and_no_other_patches_do():
    right = wrong = key = others = 0
    for number in range(30):
        slide = WORLD.slide("test", number, 512)
        first = WORLD.num_common
        kinds = nearest_types(slide, np.arange(512))
        of_finding = kinds == first + slide.finding
        of_other = (kinds >= first) & (kinds < first + len(FINDINGS)) & ~of_finding
        right += of_finding[slide.key_patches].sum()
        key += len(slide.key_patches)
        elsewhere = np.delete(np.arange(512), slide.key_patches)
        wrong += (of_finding | of_other)[elsewhere].sum()
        others += len(elsewhere)
    assert right > 0.95 * key
    assert wrong < 0.01 * others


def test_no_finding_stands_beside_the_key_patches():
    for number in range(100):
        slide = WORLD.slide("train", number, 128)
        rare = (slide._types >= WORLD.num_common) & (slide._types < WORLD.num_common + len(FINDINGS))
        assert np.flatnonzero(rare).tolist() == slide.key_patches.tolist()
        assert set(slide._types[rare]) == {WORLD.num_common + slide.finding}


def test_centres_are_of_unit_variance_and_each_rare_one_is_half_like_a_common_one():
    for seed in range(3):
        world = HaystackWorld(seed=seed)
        centres = world.centres
        assert centres.shape == (12 + 4 + 8 + 4, 64)
        assert centres.dtype == np.float32
        assert np.abs(centres.mean(axis=1)).max() < 1e-5
        assert np.abs(centres.std(axis=1) - 1).max() < 1e-5
        cosines = centres[12:24] @ centres[:12].T / 64
        assert np.isclose(cosines, 0.5, atol=1e-5).any(axis=1).all()
        lookalikes = centres[world.first_lookalike :]
        assert np.allclose((lookalikes * centres[12:16]).mean(axis=1), np.sqrt(0.75), atol=1e-5)
        assert np.array_equal(centres, HaystackWorld(seed=seed).centres)


def test_letters_and_findings_are_balanced_and_the_letter_names_the_finding():
    items = WORLD.items("validation", 400, 16)
    letters, findings, asked = Counter(), Counter(), Counter()
    for item in items:
        (slide,) = item.slides
        assert list(item.options) == list(LETTERS)
        assert sorted(item.options.values()) == sorted(FINDINGS)
        assert item.options[item.answer] == FINDINGS[slide.finding]
        mark, stem, *lines = item.question.split("\n")
        assert mark == "<image>"
        assert stem in STEMS
        assert lines == [f"{letter}. {text}" for letter, text in item.options.items()]
        letters[item.answer] += 1
        findings[slide.finding] += 1
        asked[stem] += 1
    for found, kinds in ((letters, 4), (findings, 4)):
        assert len(found) == kinds
        assert all(60 <= count <= 140 for count in found.values())
    assert all(asked[stem] > 80 for stem in STEMS)


def test_the_letter_does_not_follow_from_the_finding():
    pairs = Counter((item.answer, item.slides[0].finding) for item in WORLD.items("train", 800, 8))
    assert len(pairs) == 16
    assert all(25 <= count <= 80 for count in pairs.values())


@pytest.mark.parametrize("n", [4096, 20_000])
def test_the_loudest_patches_are_distractors_and_never_key_patches(n):
    for number in range(4):
        slide = WORLD.slide("test", number, n)
        norms = np.linalg.norm(slide.features(), axis=1)
        loudest = np.argsort(norms)[-32:]
        assert not set(loudest) & set(slide.key_patches)
        assert (slide._types[loudest] >= WORLD.num_common + len(FINDINGS)).all()


def test_norms_do_not_give_the_key_patches_away():
    slides = [WORLD.slide("test", number, 1024) for number in range(20)]
    key, common = [], []
    for slide in slides:
        norms = np.linalg.norm(slide.features(), axis=1)
        key += norms[slide.key_patches].tolist()
        common += norms[slide._types < WORLD.num_common].tolist()
    assert abs(np.mean(key) - np.mean(common)) < 0.3


def test_dense_distractors_are_near_copies_of_each_other():
    slide = WORLD.slide("test", 0, 8192)
    first, x = WORLD.num_common + len(FINDINGS), slide.features()
    for kind in range(first, first + WORLD.num_distractors):
        rows = standardised(x[slide._types == kind])
        cosine = (rows @ rows.T / 64)[np.triu_indices(len(rows), 1)]
        assert (cosine.mean() > 0.9) == (kind % 2 == 0)


def test_distractors_take_their_share():
    slide = HaystackWorld(distractor_rate=0.3).slide("train", 0, 10_000)
    share = (slide._types >= WORLD.num_common + len(FINDINGS)).mean()
    assert 0.28 < share < 0.32
    assert not (HaystackWorld(distractor_rate=0.0).slide("train", 0, 999)._types >= 16).any()


def test_items_begin_where_they_are_told():
    all_six, last_two = WORLD.items("train", 6, 40), WORLD.items("train", 2, 40, first=4)
    assert [item.where for item in last_two] == [item.where for item in all_six[4:]]
    assert [item.turns for item in last_two] == [item.turns for item in all_six[4:]]
    assert len({item.where for item in all_six}) == 6


@pytest.mark.parametrize("lengths", [(12, 48), [12, 48]])
def test_haystack_items_take_a_range_of_lengths(lengths):
    items = haystack_items(count=300, num_patches=lengths, first=7, seed=3, feature_dim=10)
    sizes = [item.slides[0].num_patches for item in items]
    assert (min(sizes), max(sizes)) == (12, 48)
    assert [item.slides[0].number for item in items] == list(range(7, 307))
    assert {(item.slides[0].world.seed, item.slides[0].split) for item in items} == {(3, "train")}
    assert items[0].slides[0].features().shape == (sizes[0], 10)
    again = haystack_items(count=300, num_patches=lengths, first=7, seed=3, feature_dim=10)
    assert [item.turns for item in again] == [item.turns for item in items]
    assert [item.slides[0].num_patches for item in again] == sizes


def test_haystack_items_of_one_length_are_those_of_the_world():
    items = haystack_items("test", 5, 33, first=2, noise=0.5)
    wanted = HaystackWorld(noise=0.5).items("test", 5, 33, 2)
    assert [item.turns for item in items] == [item.turns for item in wanted]
    assert {item.slides[0].num_patches for item in items} == {33}
    with pytest.raises(SettingsError, match="haystack: found loudness, wanted some of seed, "):
        haystack_items(count=1, loudness=2)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.3, 60, 120), (1.0, 300, 300)])
def test_a_share_of_the_questions_is_open_and_answered_by_the_finding(share, low, high):
    items = haystack_items(count=300, num_patches=9, open_share=share)
    opened = [item for item in items if not item.options]
    assert low <= len(opened) <= high
    for item in opened:
        assert item.answer == FINDINGS[item.slides[0].finding]
        assert item.question.split("\n", 1)[1] in STEMS
    # What is on the slides does not depend on how they are asked about.
    plain = haystack_items(count=300, num_patches=9)
    assert [item.slides[0].finding for item in items] == [item.slides[0].finding for item in plain]

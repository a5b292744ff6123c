"""Slides of several topics: what they hold, what is asked, and that a run can be trained on them."""

import numpy as np
import pytest

from vllm_wsi.errors import SettingsError
from vllm_wsi.haystack.recipe import GENERATORS
from vllm_wsi.haystack.topics import KINDS, LEAST_PATCHES, NUM_COMMON, TOPICS, TopicWorld, topic_items


@pytest.mark.parametrize(("n", "most_share"), [(32, 0.125), (64, 0.125), (512, 1 / 16), (4096, 1 / 16)])
def test_every_slide_shows_one_finding_of_each_topic_and_the_answer_is_that_of_the_topic_asked(n, most_share):
    world = TopicWorld(most_share=most_share)
    for number in range(20):
        slide = world.slide("train", number, n)
        kinds = slide._types[slide._types >= NUM_COMMON] - NUM_COMMON
        shown = {KINDS[kind] for kind in kinds}
        assert [topic for topic, _ in sorted(shown, key=lambda one: list(TOPICS).index(one[0]))] == list(TOPICS)
        counts = np.bincount(kinds, minlength=len(KINDS))
        assert counts[counts > 0].min() >= LEAST_PATCHES
        assert counts.max() <= max(LEAST_PATCHES, n * most_share)
        wanted = NUM_COMMON + KINDS.index((slide.topic, slide.finding))
        assert slide.key_patches.tolist() == np.flatnonzero(slide._types == wanted).tolist()
        item = slide.item()
        assert item.options[item.answer] == slide.finding
        assert sorted(item.options) == sorted(TOPICS[slide.topic])
        assert slide.topic in item.question


def test_the_same_arguments_make_the_same_slide_and_other_ones_another():
    world = TopicWorld(seed=1)
    one, again = world.slide("test", 3, 200), world.slide("test", 3, 200)
    assert np.array_equal(one.features(), again.features())
    others = [world.slide("test", 4, 200), world.slide("train", 3, 200), TopicWorld(seed=2).slide("test", 3, 200)]
    assert all(not np.array_equal(one.features(), other.features()) for other in others)
    with one.open() as opened:
        assert np.array_equal(opened.read_rows(0, 200), one.features())


def test_patches_lie_about_the_centres_of_their_types():
    slide = TopicWorld(feature_dim=256).slide("train", 0, 2000)
    nearest = (slide.features() @ slide.world.centres.T).argmax(axis=1)
    assert (nearest == slide._types).mean() > 0.99


def test_findings_and_topics_are_as_likely():
    items = topic_items("train", 800, 64, most_share=0.125)
    asked = [item.slides[0].topic for item in items]
    assert all(60 < asked.count(topic) < 140 for topic in TOPICS)
    places = [TOPICS[topic].index(item.answer) for topic, item in zip(asked, items, strict=True)]
    assert all(150 < count < 250 for count in np.bincount(places))


def test_some_slides_show_nothing_of_the_topic_asked_and_all_else_stays():
    items = topic_items("train", 400, 64, most_share=0.125, absent_share=0.3)
    plain = topic_items("train", 400, 64, most_share=0.125)
    absent = [item.answer == "none" for item in items]
    assert 80 < sum(absent) < 160
    for item, other, lacks in zip(items, plain, absent, strict=True):
        slide, wanted = item.slides[0], other.slides[0]
        assert list(item.options) == [*other.options, "none"]
        assert item.question == other.question
        kinds = {KINDS[kind][0] for kind in slide._types[slide._types >= NUM_COMMON] - NUM_COMMON}
        assert (slide.topic in kinds) != lacks
        assert len(kinds) == 8 - lacks
        assert slide.key_patches.tolist() == ([] if lacks else wanted.key_patches.tolist())
        changed = np.flatnonzero(slide._types != wanted._types)
        assert set(changed) <= (set(wanted.key_patches) if lacks else set())


def test_lengths_are_drawn_between_two_numbers():
    lengths = {item.slides[0].num_patches for item in topic_items("train", 60, (32, 40), most_share=0.125)}
    assert lengths == set(range(32, 41))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"noise": 0.0}, "noise"), ({"feature_dim": 2}, "feature_dim"), ({"most_share": 0.2}, "most_share"),
        ({"topics": 3}, "wanted some of"), ({"absent_share": 1.1}, "absent_share"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused(changes, said):
    with pytest.raises(SettingsError, match=said):
        topic_items("train", 1, 64, **changes)


def test_a_slide_too_short_for_its_topics_is_refused_and_recipes_know_the_generator():
    with pytest.raises(SettingsError, match="found 31, wanted at least 32"):
        topic_items("train", 1, 31)
    assert len(GENERATORS["topics"]("train", 2, 32, most_share=0.125)) == 2

"""The trained checkpoint in the package: small, and right about virtual slides that it was not trained on."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from vllm_wsi.haystack.generator import HaystackWorld
from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.selection.baselines import make_policy
from vllm_wsi.study.judge import judge, judge_blind, select_all, with_positions

K = 32


@pytest.fixture(scope="module")
def model():
    return SparseWSIForConditionalGeneration.from_pretrained(DEMO_CHECKPOINT).eval()


@pytest.fixture(scope="module")
def encoder():
    return ChatRenderer(AutoTokenizer.from_pretrained(DEMO_CHECKPOINT))


def test_it_is_small():
    assert sum(file.stat().st_size for file in DEMO_CHECKPOINT.iterdir()) < 10 << 20


def test_the_kept_patches_of_slides_of_4000_answer_as_well_as_the_key_patches_themselves(model, encoder):
    items = HaystackWorld().items("validation", 48, 4000)
    chosen = select_all(items, {"learned": model.selector()}, K)
    found = {name: judge(model, encoder, items, selections, K) for name, selections in chosen.items()}
    assert found["learned"].correct.mean() >= 0.95 * found["oracle"].correct.mean()
    assert found["oracle"].correct.mean() > 0.97
    assert found["learned"].key_patch_recall.mean() > 0.8


@pytest.mark.parametrize("mode", ["original", "packed"])
def test_slides_of_100000_patches_are_answered_at_original_and_at_packed_positions(model, encoder, mode):
    items = HaystackWorld().items("validation", 8, 100_000)
    chosen = select_all(items, {"learned": model.selector()}, K)["learned"]
    found = judge(with_positions(model, mode), encoder, items, chosen, K)
    assert found.correct.sum() >= 7
    assert found.key_patch_recall.mean() >= 0.85  # 0.88 was measured; by chance it would be 0.0003
    assert found.key_patch_recall.min() >= 0.6


@pytest.mark.parametrize(
    "knobs", [{"num_findings": (2, 2)}, {"num_findings": (3, 3)}, {"empty_share": 0.25}, {"key_patches": (1, 1)}]
)
def test_several_findings_no_finding_and_a_single_patch_are_answered_too(model, encoder, knobs):
    items = HaystackWorld(**knobs).items("validation", 48, 4000)
    chosen = []
    for item in items:
        with item.slides[0].open() as slide:
            chosen.append([model.selector().select(slide)])
    right = judge(model, encoder, items, chosen, K).correct
    assert right.mean() >= 0.9
    assert all(right[[item.slides[0].finding is None for item in items]])


def test_without_the_slide_or_with_any_patches_the_answer_is_a_guess(model, encoder):
    items = HaystackWorld().items("validation", 96, 1000)
    rules = {name: make_policy(name, K) for name in ("random", "uniform", "top-norm")}
    accuracy = {"blind": judge_blind(model, encoder, items).mean()}
    for name, chosen in select_all(items, rules, K).items():
        if name != "oracle":
            accuracy[name] = judge(model, encoder, items, chosen, K).correct.mean()
    assert accuracy["blind"] < 0.4
    assert max(accuracy.values()) < 0.6, accuracy


def test_train_validation_and_test_never_share_a_slide():
    slides = [HaystackWorld().slide(split, 3, 200).features() for split in ("train", "validation", "test")]
    assert not any(np.array_equal(one, other) for one, other in zip(slides, [*slides[1:], slides[0]], strict=True))

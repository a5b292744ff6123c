"""RoPE positions: the place among the N, packed, or scaled, always strictly increasing."""

import pytest
import torch

from vllm_wsi.selection.positions import SlideSpan, prompt_positions, slide_offsets


def span(start: int, indices: list[int], n: int) -> SlideSpan:
    return SlideSpan(start, torch.tensor(indices), n)


def test_original_positions_are_the_rows_themselves_and_text_goes_on_behind_the_slide():
    positions, delta = prompt_positions(8, [span(2, [0, 7, 99], 100)], slide_position_budget=1000)
    assert positions.tolist() == [0, 1, 2, 9, 101, 102, 103, 104]
    assert delta == 97


def test_packed_positions_count_every_token():
    positions, delta = prompt_positions(8, [span(2, [0, 7, 99], 100)], slide_position_budget=0)
    assert positions.tolist() == list(range(8))
    assert delta == 0


def test_a_longer_slide_is_scaled_into_the_budget():
    positions, delta = prompt_positions(5, [span(1, [0, 500, 999], 1000)], slide_position_budget=100)
    assert positions.tolist() == [0, 1, 51, 100, 101]
    assert delta == 97


def test_slides_share_the_budget_first_come_first_served():
    slides = [span(0, [0, 79], 80), span(2, [0, 79], 80), span(4, [3, 4], 80)]
    positions, delta = prompt_positions(7, slides, slide_position_budget=100)
    # 80 for the first, the 20 that are left for the second, its own two tokens for the third.
    assert positions.tolist() == [0, 79, 80, 99, 100, 101, 102]
    assert delta == 78 + 18


def test_a_slide_stands_where_it_stood_when_another_follows_it():
    first = span(3, [5, 50, 500], 1000)
    alone, _ = prompt_positions(6, [first], 300)
    followed, _ = prompt_positions(12, [first, span(8, [1, 2], 1000)], 300)
    assert torch.equal(followed[:6], alone)


@pytest.mark.parametrize(
    ("n", "k", "budget"), [(1, 1, 1), (32, 32, 5), (33, 32, 33), (100_000, 32, 40), (10**6, 256, 28_672)]
)
def test_positions_increase_strictly_and_stay_inside_the_span(n, k, budget):
    generator = torch.Generator().manual_seed(n)
    for clustered in (False, True):
        pool = min(n, 2 * k) if clustered else n
        indices = torch.randperm(pool, generator=generator)[:k].sort().values + (n - pool)
        size = max(k, min(n, budget))
        offsets = slide_offsets(indices, n, size)
        assert (offsets.diff() > 0).all()
        assert offsets[0] >= 0 and offsets[-1] < size  # noqa: PT018


@pytest.mark.parametrize(
    ("budget", "wanted"),
    [
        (1000, [0, 7, 99, 100, 101, 102]),  # N positions for the patches
        (0, [0, 1, 2, 3, 4, 5]),  # packed
        (52, [0, 3, 49, 50, 51, 52]),  # 50 for the patches, 2 for the summary
        (4, [0, 1, 2, 3, 4, 5]),  # less than its tokens need
    ],
)
def test_summary_tokens_follow_the_patches_span_one_position_each(budget, wanted):
    slide = SlideSpan(0, torch.tensor([0, 7, 99]), 100, num_summary=2)
    positions, delta = prompt_positions(6, [slide], budget)
    assert positions.tolist() == wanted
    assert delta == wanted[-1] - 5


def test_summary_tokens_take_of_the_budget_that_slides_share():
    first, second = (SlideSpan(start, torch.tensor([0, 79]), 80, num_summary=3) for start in (0, 5))
    positions, _ = prompt_positions(11, [first, second], 100)
    # 80 and 3 for the first; of the 17 that are left, 14 for the second's patches.
    assert positions.tolist() == [0, 79, 80, 81, 82, 83, 96, 97, 98, 99, 100]


def test_text_alone_is_counted():
    positions, delta = prompt_positions(4, [], 100)
    assert (positions.tolist(), delta) == ([0, 1, 2, 3], 0)


def test_a_slide_without_kept_patches_gives_no_offsets():
    assert slide_offsets(torch.empty(0, dtype=torch.long), 5, 0).shape == (0,)

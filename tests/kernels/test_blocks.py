"""A function of each row on every core: the same bits for every cut, and nothing of it is felt by the caller."""

import itertools
import os
import threading
import time

import pytest
import torch

from vllm_wsi.kernels import block_rows, map_blocks
from vllm_wsi.kernels.blocks import on_cores

D, ROWS = 24, 8


def mapped(features: torch.Tensor, first_row: int = 0, rows: int = ROWS, function=torch.neg) -> torch.Tensor:
    out = torch.full(features.shape, -1.0)
    map_blocks(features, first_row, function, out, rows)
    return out


@pytest.mark.parametrize(("width", "rows"), [(1, 131072), (64, 2048), (128, 1024), (129, 512), (9999, 256)])
def test_a_block_has_a_power_of_two_rows_of_half_a_mebibyte_or_256(width, rows):
    assert block_rows(width) == rows


@pytest.mark.parametrize("n", [0, 1, ROWS - 1, ROWS, ROWS + 1, 5 * ROWS, 1001])
@pytest.mark.parametrize("first_row", [0, 1, ROWS - 1, ROWS, 1000])
def test_every_row_meets_the_function_once_wherever_the_part_begins(n, first_row):
    x = torch.randn(n, D)
    assert torch.equal(mapped(x, first_row), -x)


def test_the_function_sees_full_blocks_alone_with_zeros_where_no_row_is():
    seen = []
    mapped(torch.ones(ROWS + 3, D), first_row=2, function=lambda block: seen.append(block.clone()) or block)
    assert [len(block) for block in seen] == [ROWS, ROWS]
    assert sorted(block.sum().item() / D for block in seen) == [5, 6]
    assert not next(block for block in seen if block.sum() == 6 * D)[:2].any()


def test_what_the_function_raises_reaches_the_caller_and_the_next_call_runs():
    def refuse(block: torch.Tensor) -> torch.Tensor:
        raise ValueError("not this block")

    with pytest.raises(ValueError, match="not this block"):
        mapped(torch.ones(100, D), function=refuse)
    assert mapped(torch.ones(3, D)).eq(-1).all()


def test_when_a_block_fails_the_caller_hears_of_it_only_when_no_thread_works_any_more():
    numbers, ended = itertools.count(), []

    def fail_first(block: torch.Tensor) -> torch.Tensor:
        if next(numbers) == 0:
            raise ValueError("the first block")
        time.sleep(0.2)
        ended.append(block)
        return block

    with pytest.raises(ValueError, match="the first block"):
        mapped(torch.ones(2 * ROWS, D), function=fail_first)
    assert len(ended) == min(1, len(os.sched_getaffinity(0)) - 1)
    time.sleep(0.5)
    assert len(ended) == min(1, len(os.sched_getaffinity(0)) - 1)


@pytest.mark.parametrize("most", [0, 1])
def test_work_for_few_asks_few_threads(most):
    threads = []
    on_cores(lambda: threads.append(threading.current_thread()), most)
    assert len(threads) == most


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_caller_may_be_in_any_mode_of_autograd_and_gets_no_graph(mode):
    weight = torch.ones(D, requires_grad=True)
    with mode():
        assert not mapped(torch.ones(20, D), function=lambda block: block * weight).requires_grad


def test_work_runs_on_one_thread_of_torch_each_and_the_callers_number_and_the_default_stay():
    inside, before = [], (torch.get_num_threads(), threads_of_a_new_thread())
    on_cores(lambda: inside.append(torch.get_num_threads()), most=1000)
    assert inside == [1] * len(os.sched_getaffinity(0))
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == before


def threads_of_a_new_thread():
    """The default, which earlier tests of this process may have changed."""
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_many_callers_at_once_get_their_own_rows():
    slides = [torch.full((500, D), float(i)) for i in range(16)]
    found: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: mapped(slides[i], function=torch.neg)})) for i in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], -slides[i]) for i in range(16))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_process_scores_too():
    mapped(torch.zeros(100, D))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if mapped(torch.ones(100, D)).eq(-1).all() else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

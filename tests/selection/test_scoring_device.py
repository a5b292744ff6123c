"""The choice of a device and what becomes of its faults. A stand-in GPU works on the CPU, behind the same code."""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from triton.compiler.errors import CompilationError

from vllm_wsi.errors import SettingsError, SetupError
from vllm_wsi.kernels import score_topk, self_check
from vllm_wsi.selection import best_of_file, question_selection, scoring_device
from vllm_wsi.selection.scorer import seeded_scorer
from vllm_wsi.selection.scoring_device import GPU_THREADS, Cpu, Gpu
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.slides import features_in_memory

D, K = 64, 8
NAME = "a stand-in, sm_90, Triton 3.9"


def cuda_error(code, text):
    error = torch.AcceleratorError(f"CUDA error: {text}")
    error.error_code = code
    return error


FAULTS = {
    "compile error": CompilationError("kernel", None, "no such instruction"),
    "out of memory": torch.cuda.OutOfMemoryError("CUDA out of memory"),
    "out of pinned memory": cuda_error(2, "out of memory"),
    "sticky error": cuda_error(700, "an illegal memory access was encountered"),
    "error without a code": RuntimeError("CUDA error: unspecified launch failure"),
}


@pytest.fixture
def gpus(monkeypatch):
    """The indices of the stand-in GPUs that were asked for; there are four."""
    asked = []

    def device(index):
        asked.append(index)
        return torch.device("cpu")

    monkeypatch.setattr(scoring_device, "num_gpus", lambda: 4)
    monkeypatch.setattr(scoring_device, "gpu_device", device)
    monkeypatch.setattr(scoring_device, "gpu_name", lambda device: NAME)
    monkeypatch.setattr(scoring_device, "free_bytes", lambda device: 1 << 40)
    return asked


def weights(h=16):
    return seeded_scorer("patch", D, h, seed=0).requires_grad_(False).weights()


def slide(n=300, seed=0):
    return features_in_memory(torch.randn(n, D, generator=torch.Generator().manual_seed(seed)).numpy())


def failing(monkeypatch, error):
    """Scoring that raises on a GPU's threads; returns what to call when it shall work again."""
    failing = [True]

    def score(*args, **kwargs):
        if failing and threading.current_thread().name.startswith("wsi-"):
            raise error
        return score_topk(*args, **kwargs)

    monkeypatch.setattr(best_of_file, "score_topk", score)
    return failing.clear


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:x", "cpu:0", "auto:1", ""])
def test_another_device_is_refused(name):
    with pytest.raises(SettingsError, match=r"device: found .*, wanted 'cpu', 'cuda', 'cuda:N' or 'auto'"):
        SlideSelector(weights(), K, name)


def test_a_gpu_that_is_not_there_is_refused(gpus):
    SlideSelector(weights(), K, "cuda:3")
    with pytest.raises(SetupError, match="found 'cuda:4', wanted 'cpu' or 'auto': PyTorch finds 4 CUDA devices here"):
        SlideSelector(weights(), K, "cuda:4")


def test_auto_takes_the_cpu_where_there_is_no_gpu_and_says_so():
    chooser = SlideSelector(weights(), K, "auto")
    assert chooser.select(slide()).scored_on == "cpu"
    assert chooser.device.told == "slides are scored on the CPU: PyTorch finds no CUDA device"


@pytest.mark.parametrize("h", [0, 16])
def test_a_fit_gpu_is_taken_and_tells_what_it_is_worth(gpus, h):
    chooser = SlideSelector(weights(h), K, "auto", chunk_rows=70)
    found = chooser.select(slide(), keep_all_scores=True)
    assert chooser.device.told.startswith(f"slides are scored on {NAME}: compiled and checked in ")
    assert "32768 patches take it" in chooser.device.told
    wanted = SlideSelector(weights(h), K).select(slide(), keep_all_scores=True)
    assert (found.scored_on, wanted.scored_on) == (NAME, "cpu")
    for name in ("indices", "scores", "features", "all_scores"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))


def test_a_context_scorer_runs_on_the_gpu_too(gpus):
    scorer = seeded_scorer("context", D, 16, seed=0, num_layers=1, num_heads=2).requires_grad_(False)
    found = SlideSelector(scorer, K, "cuda", chunk_rows=70).select(slide())
    assert found.scored_on == NAME
    assert torch.equal(found.indices, SlideSelector(scorer, K).select(slide()).indices)


def question_scorer():
    scorer = seeded_scorer("question", D, 16, seed=0, rank=4, free_tokens=2, text_size=8, num_slide_tokens=K)
    return scorer.requires_grad_(False)


def as_a_kernel(x, weights):
    """What a kernel gives, to rounding: products of the dtype of X."""
    return self_check.exact_scores(x, weights, x.dtype).scores.float()


@pytest.mark.parametrize("has_kernel", [True, False])
def test_a_scorer_that_hears_the_question_takes_its_vectors_from_the_kernel_where_there_is_one(
    gpus, monkeypatch, has_kernel
):
    calls = []

    def kernel(x, weights):
        calls.append(len(x))
        return as_a_kernel(x, weights) if has_kernel else None

    for module in (self_check, question_selection):
        monkeypatch.setattr(module, "gpu_vectors", kernel)
    chooser = SlideSelector(question_scorer(), K, "cuda", chunk_rows=70)
    chooser.start()
    assert len(calls) == 6  # the check: twice for each dtype
    found = chooser.select(slide())
    assert found.scored_on == NAME
    assert sum(calls[6:]) == slide().num_patches
    assert torch.equal(found.indices, SlideSelector(question_scorer(), K).select(slide()).indices)


@pytest.mark.parametrize("fault", ["wrong", "another", "nan"])
def test_a_gpu_whose_vectors_are_wrong_is_not_taken(gpus, monkeypatch, caplog, fault):
    calls = []

    def kernel(x, weights):
        calls.append(x)
        found = as_a_kernel(x, weights)
        if fault == "nan":
            return found.nan_to_num(0)
        return found + (1e-2 if fault == "wrong" else 1e-7 * len(calls))

    monkeypatch.setattr(self_check, "gpu_vectors", kernel)
    with caplog.at_level(logging.WARNING, logger="vllm_wsi"):
        assert isinstance(SlideSelector(question_scorer(), K, "auto").start(), Cpu)
    assert "DeviceMismatch: vectors of torch." in caplog.text


@pytest.mark.parametrize(
    ("wanted", "rank", "index"), [("auto", 0, 0), ("auto", 5, 1), ("cuda", 3, 3), ("cuda:2", 1, 2)]
)
def test_each_api_server_takes_the_gpu_of_its_rank_or_the_named_one(gpus, wanted, rank, index):
    assert isinstance(SlideSelector(weights(), K, wanted).start(rank), Gpu)
    assert gpus == [index]


def test_too_little_free_memory_leaves_slides_to_the_cpu(gpus, monkeypatch, caplog):
    monkeypatch.setattr(scoring_device, "free_bytes", lambda device: 100 << 20)
    with caplog.at_level(logging.WARNING, logger="vllm_wsi"):
        assert isinstance(SlideSelector(weights(), K, "auto").start(), Cpu)
    assert "found 100 MiB free, wanted 448 MiB" in caplog.text
    with pytest.raises(SetupError, match=r"found 'cuda:1', wanted a GPU that is fit .*found 100 MiB free"):
        SlideSelector(weights(), K, "cuda:1").start()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_the_start_is_one_warning_and_the_cpu(gpus, fault, monkeypatch, caplog):
    def score(*args, **kwargs):
        raise FAULTS[fault]

    monkeypatch.setattr(self_check, "score_topk", score)
    with caplog.at_level(logging.INFO, logger="vllm_wsi"):
        chooser = SlideSelector(weights(), K, "auto")
        assert chooser.select(slide()).scored_on == "cpu"
        assert chooser.select(slide()).fallback is None
    (line,) = caplog.records
    assert line.levelname == "WARNING"
    assert type(FAULTS[fault]).__name__ in line.message


def other_score(found):
    """One score is off by a thousandth of their deviation, and the Top-K is right by it."""
    found.all_scores[5] += 1e-3


def other_row(found):
    found.indices[0, 0] += 1


def other_bits(found):
    found.scores[0, 0] += torch.rand(())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_score, r"scores of torch.float16: row 5: found -?0\.\d+, wanted"),
        (other_row, "indices of torch.float16: found others than the 32 best by the device's own scores"),
        (other_bits, "scores of torch.float16: found two runs that differ, wanted the same bits"),
    ],
)
def test_a_gpu_that_scores_wrong_is_not_taken(gpus, change, said, monkeypatch):
    def score(*args, **kwargs):
        found = score_topk(*args, **kwargs)
        if not kwargs.get("first_row"):
            change(found) if change is other_score else None
        elif change is not other_score:
            change(found)
        return found

    monkeypatch.setattr(self_check, "score_topk", score)
    with pytest.raises(SetupError, match=said):
        SlideSelector(weights(), K, "cuda").start()


@pytest.mark.parametrize("fault", ["compile error", "sticky error", "error without a code"])
def test_a_gpu_that_fails_is_left_for_good_and_the_slide_goes_to_the_cpu(gpus, fault, monkeypatch, caplog):
    chooser = SlideSelector(weights(), K, "auto")
    assert chooser.select(slide()).scored_on == NAME
    mended = failing(monkeypatch, FAULTS[fault])
    with caplog.at_level(logging.INFO, logger="vllm_wsi"):
        selection = chooser.select(slide())
        mended()
        after = chooser.select(slide(seed=1))
    assert (selection.scored_on, selection.fallback) == ("cpu", "device failed")
    assert torch.equal(selection.indices, SlideSelector(weights(), K).select(slide()).indices)
    assert (after.scored_on, after.fallback) == ("cpu", None)
    (line,) = caplog.records
    assert line.levelname == "ERROR"
    assert "from now on slides are scored on the CPU" in line.message


@pytest.mark.parametrize("fault", ["out of memory", "out of pinned memory"])
def test_a_slide_that_finds_no_memory_goes_to_the_cpu_alone(gpus, fault, monkeypatch, caplog):
    chooser = SlideSelector(weights(), K, "auto")
    mended = failing(monkeypatch, FAULTS[fault])
    with caplog.at_level(logging.WARNING, logger="vllm_wsi"):
        selection = chooser.select(slide())
    assert (selection.scored_on, selection.fallback) == ("cpu", "out of memory")
    assert "out of memory for a slide" in caplog.text
    mended()
    assert chooser.select(slide()).scored_on == NAME


def test_a_fault_of_the_reader_is_none_of_the_gpus(gpus):
    class Broken:
        near_rows = None

        def read_into(self, start, out):
            raise RuntimeError("the reader trips")

        def close(self):
            pass

    chooser, broken = SlideSelector(weights(), K, "auto"), slide()
    broken.rows = Broken()
    with pytest.raises(RuntimeError, match="the reader trips"):
        chooser.select(broken)
    assert chooser.select(slide()).scored_on == NAME


def test_two_threads_that_start_the_device_at_once_check_it_once(gpus, monkeypatch):
    checks = []

    def check(*args):
        checks.append(args)
        time.sleep(0.2)

    monkeypatch.setattr(scoring_device, "check_device", check)
    chooser = SlideSelector(weights(), K, "auto")
    with ThreadPoolExecutor(4) as pool:
        places = list(pool.map(lambda _: chooser.start(), range(4)))
    assert len({id(one) for one in places}) == 1
    assert len(checks) == 1


def test_the_check_asks_for_the_k_of_the_server_and_of_its_largest_request(gpus, monkeypatch):
    sizes = []
    monkeypatch.setattr(scoring_device, "check_device", lambda scorer, k, device: sizes.append(k))
    SlideSelector(weights(), K, "cuda", max_slide_tokens=256).start()
    SlideSelector(weights(), 32, "cuda").start()
    assert sizes == [32, 256, 32]


def test_few_chunks_are_on_a_gpu_at_once_however_many_slides_are_read(gpus, monkeypatch):
    lock, now, most = threading.Lock(), [0], [0]

    def score(*args, **kwargs):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.005)
        found = score_topk(*args, **kwargs)
        with lock:
            now[0] -= 1
        return found

    monkeypatch.setattr(best_of_file, "score_topk", score)
    chooser = SlideSelector(weights(), K, "auto", chunk_rows=50)
    chooser.start()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda seed: chooser.select(slide(seed=seed)), range(16)))
    assert most[0] <= GPU_THREADS
    for seed, one in enumerate(found):
        assert torch.equal(one.indices, SlideSelector(weights(), K).select(slide(seed=seed)).indices)

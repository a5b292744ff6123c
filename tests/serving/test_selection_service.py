"""The selection service: one flight for each slide, a bounded cache, and nobody waits for another's slide."""

import asyncio
import base64
import io
import logging
import os
import threading
import time
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY

from vllm_wsi.errors import SlideError
from vllm_wsi.selection import scoring_device
from vllm_wsi.selection.scorer import seeded_scorer
from vllm_wsi.selection.scoring_device import Gpu
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.serving import connector, metrics
from vllm_wsi.serving.connector import SlideConnector
from vllm_wsi.serving.service import SelectionService
from vllm_wsi.serving.slide_request import SlideRequest
from vllm_wsi.slides import SlideIdentity, features_in_memory, open_features
from vllm_wsi.slides.formats.rows import RawRows

from .conftest import D, make_slide

WAIT = 30  # seconds; only a failing test waits that long


class CountingSelector(SlideSelector):
    """The real selector, which also counts its runs and can be held."""

    runs = 0
    hold: threading.Event | None = None

    def select(self, slide, k=None, keep_all_scores=False):
        self.runs += 1
        if self.hold is not None:
            assert self.hold.wait(WAIT)
        return super().select(slide, k, keep_all_scores)


@pytest.fixture
def selector():
    weights = seeded_scorer("patch", D, 16, seed=0).requires_grad_(False).weights()
    return CountingSelector(weights, 8)


def test_features_by_value_are_checked_before_all_of_them_are_in_memory(selector, monkeypatch):
    service = SelectionService(selector, "scorer", max_slide_tokens=16)
    monkeypatch.setattr(connector, "current_service", lambda: service)
    sent, read = io.BytesIO(), []
    monkeypatch.setattr(connector, "read_tensor_rows", read.append)
    torch.save(torch.ones(5, D + 1), sent)
    with pytest.raises(SlideError, match=f"found d = {D + 1}, wanted {D}, as the checkpoint has it"):
        SlideConnector().fetch_image_embedding(base64.b64encode(sent.getvalue()).decode())
    assert read == []


@pytest.fixture
def log_lines(service):
    """Lines of the service's logger, which does not pass them on to the root logger; none of the service's start."""
    lines = []
    service.start()
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("vllm.vllm_wsi.serving.service")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)  # as a server has it
    yield lines
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(handler)


@pytest.fixture
def service(selector):
    return SelectionService(selector, "scorer", max_slide_tokens=16)


def test_the_second_request_runs_no_selection(service, selector, tmp_path):
    path = make_slide(tmp_path / "a.safetensors", 100)
    first, second = (service.select(SlideRequest(path)) for _ in range(2))
    assert selector.runs == 1
    assert second.selection is first.selection
    assert (first.source, second.source) == ("file", "memory")


def test_sixty_four_requests_at_once_run_one_selection(service, selector, tmp_path):
    selector.hold = threading.Event()
    path = make_slide(tmp_path / "a.safetensors", 100)
    futures = [service.submit(SlideRequest(path)) for _ in range(64)]
    selector.hold.set()
    assert len({id(future.result(WAIT)) for future in futures}) == 1
    assert selector.runs == 1


def test_a_held_slide_delays_neither_a_known_nor_another_new_slide(service, tmp_path, monkeypatch):
    known, blocked, new = (make_slide(tmp_path / f"{name}.safetensors", 50) for name in ("known", "blocked", "new"))
    service.select(SlideRequest(known))
    release, read = threading.Event(), RawRows.read_into

    def read_into(self, start, out):
        if self.source.name == str(blocked):
            assert release.wait(WAIT)
        read(self, start, out)

    monkeypatch.setattr(RawRows, "read_into", read_into)
    held: Future = service.submit(SlideRequest(blocked))
    assert service.submit(SlideRequest(known)).result(WAIT).selection.num_patches == 50
    assert service.submit(SlideRequest(new)).result(WAIT).selection.num_patches == 50
    assert not held.done()
    release.set()
    assert held.result(WAIT).selection.num_patches == 50


def test_a_file_replaced_under_its_name_is_read_anew(service, selector, tmp_path):
    path = make_slide(tmp_path / "a.safetensors", 100, seed=1)
    before = service.select(SlideRequest(path))
    make_slide(path, 100, seed=2)
    after = service.select(SlideRequest(path))
    assert selector.runs == 2
    assert before.digest != after.digest


def test_two_names_of_one_file_are_one_slide(service, selector, tmp_path):
    path = make_slide(tmp_path / "a.safetensors", 100)
    (tmp_path / "link.safetensors").symlink_to(path)
    link, file = (service.select(SlideRequest(one)) for one in (tmp_path / "link.safetensors", path))
    assert link.selection is file.selection
    assert selector.runs == 1


def test_a_file_that_changes_while_it_is_read_is_refused_and_not_remembered(service, selector, tmp_path, monkeypatch):
    path = make_slide(tmp_path / "a.safetensors", 100)
    select = CountingSelector.select

    def and_touch(self, slide, k=None, keep_all_scores=False):
        selection = select(self, slide, k, keep_all_scores)
        os.utime(path, ns=(time.time_ns(), time.time_ns()))
        return selection

    monkeypatch.setattr(CountingSelector, "select", and_touch)
    with pytest.raises(SlideError, match="changed while it was read"):
        service.select(SlideRequest(path))
    monkeypatch.setattr(CountingSelector, "select", select)
    assert service.select(SlideRequest(path)).selection.num_patches == 100


def test_an_error_is_given_to_all_who_wait_and_not_remembered(service, selector, tmp_path):
    selector.hold = threading.Event()
    path = make_slide(tmp_path / "a.safetensors", 10, d=D + 1)
    futures = [service.submit(SlideRequest(path)) for _ in range(3)]
    selector.hold.set()
    for future in futures:
        with pytest.raises(SlideError, match=f"found d = {D + 1}, wanted {D}"):
            future.result(WAIT)
    make_slide(path, 10)
    assert service.select(SlideRequest(path)).selection.num_patches == 10


@pytest.mark.parametrize("k", [1, 16])
def test_k_of_a_request_makes_another_selection(service, selector, tmp_path, k):
    path = make_slide(tmp_path / "a.safetensors", 100)
    assert len(service.select(SlideRequest(path)).selection.indices) == 8
    assert len(service.select(SlideRequest(path, k=k)).selection.indices) == k
    assert selector.runs == 2


@pytest.mark.parametrize("k", [0, -1, 17])
def test_k_outside_the_bound_is_refused(service, tmp_path, k):
    with pytest.raises(SlideError, match=f"k: found {k}, wanted 1 .. 16"):
        service.submit(SlideRequest(make_slide(tmp_path / "a.safetensors", 100), k=k))


def test_the_cache_forgets_the_least_used_slide_at_its_bound(selector, tmp_path):
    one = SelectionService(selector, "scorer", 16).select(SlideRequest(make_slide(tmp_path / "0.safetensors", 20)))
    service = SelectionService(selector, "scorer", 16, cache_bytes=2 * one.num_bytes)
    paths = [make_slide(tmp_path / f"{i}.safetensors", 20, seed=i) for i in range(3)]
    selector.runs = 0
    for path in (*paths[:2], paths[0], paths[2], paths[0]):  # the third takes the place of the second
        service.select(SlideRequest(path))
    assert selector.runs == 3
    service.select(SlideRequest(paths[1]))
    assert selector.runs == 4


def test_a_slide_larger_than_the_cache_is_answered(selector, tmp_path):
    service = SelectionService(selector, "scorer", 16, cache_bytes=1)
    path = make_slide(tmp_path / "a.safetensors", 20)
    assert service.select(SlideRequest(path)).digest == service.select(SlideRequest(path)).digest
    assert selector.runs == 2


def test_equal_arrays_are_one_slide_and_other_arrays_another(service, selector):
    x = np.random.default_rng(0).standard_normal((30, D)).astype(np.float32)
    first = service.select(SlideRequest(slide=features_in_memory(x)))
    assert service.select(SlideRequest(slide=features_in_memory(x.copy()))).selection is first.selection
    assert service.select(SlideRequest(slide=features_in_memory(x + 1))).selection is not first.selection
    assert selector.runs == 2


async def test_a_client_that_goes_away_does_not_cancel_the_others(service, selector, tmp_path):
    selector.hold = threading.Event()
    request = SlideRequest(make_slide(tmp_path / "a.safetensors", 100))
    gone, stays = (asyncio.create_task(service.select_async(request)) for _ in range(2))
    await asyncio.sleep(0.05)
    gone.cancel()
    selector.hold.set()
    assert (await stays).selection.num_patches == 100
    with pytest.raises(asyncio.CancelledError):
        await gone


def test_files_are_closed_after_success_and_failure(service, tmp_path, open_files_below):
    for i in range(20):
        path = make_slide(tmp_path / f"{i}.safetensors", 20, d=D + i % 2, seed=i)
        try:
            service.select(SlideRequest(path))
        except SlideError:
            assert i % 2
    assert open_files_below() == 0


def test_a_slide_by_value_that_is_refused_is_closed(service, tmp_path, open_files_below):
    slide = open_features(make_slide(tmp_path / "a.safetensors", 20))
    assert open_files_below() == 1
    with pytest.raises(SlideError, match="k: found 999"):
        service.submit(SlideRequest(slide=slide, k=999))
    assert open_files_below() == 0


def test_a_file_rewritten_in_place_with_its_old_time_is_read_anew(service, selector, tmp_path):
    path = make_slide(tmp_path / "a.safetensors", 20, seed=1)
    service.select(SlideRequest(path))
    stat = path.stat()
    path.write_bytes(make_slide(tmp_path / "b.safetensors", 20, seed=2).read_bytes().replace(b'"b"', b'"a"'))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    service.select(SlideRequest(path))
    assert selector.runs == 2


async def test_a_stalled_stat_does_not_stop_the_event_loop(service, tmp_path, monkeypatch):
    release, stat = threading.Event(), SlideIdentity.of_file

    def stalled(path):
        assert release.wait(WAIT)
        return stat(path)

    monkeypatch.setattr(SlideIdentity, "of_file", stalled)
    request = SlideRequest(make_slide(tmp_path / "a.safetensors", 20))
    waiting = asyncio.create_task(service.select_async(lambda: request))
    await asyncio.sleep(0.05)  # returns only if the loop runs
    assert not waiting.done()
    release.set()
    assert (await waiting).selection.num_patches == 20


def test_metadata_count_towards_the_caches_bound(service, tmp_path):
    path = make_slide(tmp_path / "a.safetensors", 20)
    done = service.select(SlideRequest(path))
    assert done.selection.coords is not None
    assert done.num_bytes > done.selection.features.nbytes + done.selection.coords.nbytes + len("slide_id") + 1024


def test_each_new_slide_is_one_line_of_the_log_with_its_times_and_a_known_one_none(service, tmp_path, log_lines):
    path = make_slide(tmp_path / "a.safetensors", 100)
    service.select(SlideRequest(path))
    service.select(SlideRequest(path))
    (line,) = log_lines
    assert line.startswith("selected 8 of 100 patches of a.safetensors in 0.")
    assert str(tmp_path) not in line


def test_a_name_with_a_line_break_makes_no_second_line_in_the_log(service, tmp_path, log_lines):
    service.select(SlideRequest(make_slide(tmp_path / "a\nforged.safetensors", 10)))
    (line,) = log_lines
    assert "a?forged.safetensors" in line


def test_the_start_of_a_service_says_what_selects(selector, log_lines):
    SelectionService(selector, "0123456789abcdef:rule", max_slide_tokens=16, threads=3, cache_bytes=5 << 20)
    assert log_lines == [
        "slides: scorer 0123456789ab, K = 8 (at most 16 by request), on cpu, encoder not recorded, 3 readers, "
        "cache of 5 MiB, store none"
    ]


def test_histograms_count_each_selection_once_and_gauges_return_to_zero(service, selector, tmp_path):
    def value(name):
        return REGISTRY.get_sample_value(f"vllm_wsi:{name}")

    names = ("read_seconds_count", "score_seconds_count", "selection_seconds_count")
    before = [value(name) for name in names]
    selector.hold = threading.Event()
    future = service.submit(SlideRequest(make_slide(tmp_path / "a.safetensors", 100)))
    deadline = time.monotonic() + WAIT
    while value("selections_running") < 1:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    selector.hold.set()
    done = future.result(WAIT)
    service.select(SlideRequest(tmp_path / "a.safetensors"))
    assert [value(name) - old for name, old in zip(names, before, strict=True)] == [1, 1, 1]
    assert (value("selections_queued"), value("selections_running")) == (0, 0)
    assert (value("selection_cache_slides"), value("selection_cache_bytes")) == (1, done.num_bytes)


class FailingGpu(SlideSelector):
    """Chooses a GPU, and then has to leave every slide to the CPU."""

    def start(self, rank=0):
        return Gpu(torch.device("cpu"))

    def select(self, slide, k=None, keep_all_scores=False):
        selection = SlideSelector.select(CountingSelector(self.scorer, self.num_slide_tokens), slide, k)
        return replace(selection, fallback="out of memory")


def test_two_devices_scores_never_share_a_key(selector, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring_device, "gpu_name", lambda device: "a stand-in, sm_90, Triton 3.9")
    path, on_cpu = make_slide(tmp_path / "a.safetensors", 100), SelectionService(selector, "scorer", 16)
    on_gpu = SelectionService(FailingGpu(selector.scorer, 8), "scorer", 16)
    before = counted("vllm_wsi:selection_fallbacks_total", reason="out of memory")
    left, wanted = on_gpu.select(SlideRequest(path)), on_cpu.select(SlideRequest(path))
    assert left.digest == wanted.digest  # the CPU scored both
    assert on_gpu.select(SlideRequest(path)).selection is left.selection  # and is not asked again
    assert counted("vllm_wsi:selection_fallbacks_total", reason="out of memory") == before + 1
    monkeypatch.setattr(FailingGpu, "select", SlideSelector.select)
    other = make_slide(tmp_path / "b.safetensors", 100)
    assert on_gpu.select(SlideRequest(other)).digest != on_cpu.select(SlideRequest(other)).digest


def test_the_device_that_scores_is_shown(service):
    service.start()
    assert counted("vllm_wsi:selection_device", device="cpu") == 1
    metrics.show_device("a stand-in")
    assert counted("vllm_wsi:selection_device", device="cpu") == 0
    assert counted("vllm_wsi:selection_device", device="a stand-in") == 1


def counted(name, **labels):
    return REGISTRY.get_sample_value(name, labels) or 0

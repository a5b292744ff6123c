"""Slides that stand still: what they hold up, what they do not, and when further ones are refused."""

import asyncio
import csv
import subprocess
import sys
import threading
import time
from http import HTTPStatus
from pathlib import Path

import pytest
from vllm.exceptions import GracefulHTTPError

from vllm_wsi.selection.scorer import seeded_scorer
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.serving import connector, stalling_pool
from vllm_wsi.serving.connector import SlideConnector
from vllm_wsi.serving.service import LOOK_UP_THREADS, SelectionService
from vllm_wsi.serving.slide_request import SlideRequest
from vllm_wsi.serving.stalling_pool import SlidesStalled, StallingPool
from vllm_wsi.slides import SlideIdentity, open_features
from vllm_wsi.slides.formats.rows import RawRows

from .conftest import D, make_slide

ROOT = Path(__file__).resolve().parents[2]
THREADS = 2
WAIT = 30  # seconds; only a failing test waits that long


@pytest.fixture
def service():
    weights = seeded_scorer("patch", D, 16, seed=0).requires_grad_(False).weights()
    return SelectionService(SlideSelector(weights, 8), "scorer", max_slide_tokens=16, threads=THREADS)


@pytest.fixture
def client(service, tmp_path, monkeypatch):
    """The connector of a server of that service."""
    monkeypatch.setattr(connector, "current_service", lambda: service)
    return SlideConnector(allowed_local_media_path=str(tmp_path))


@pytest.fixture
def disk(monkeypatch):
    """Rows of files whose name begins with «stalled» are not read before this is set."""
    answers, read = threading.Event(), RawRows.read_into

    def read_into(self, start, out):
        if Path(self.source.name).name.startswith("stalled"):
            assert answers.wait(WAIT)
        read(self, start, out)

    monkeypatch.setattr(RawRows, "read_into", read_into)
    yield answers
    answers.set()


def slide(folder, name):
    return make_slide(folder / f"{name}.safetensors", 50)


def stall_all(service, folder):
    """Futures of slides that hold all threads."""
    held = [service.submit(SlideRequest(slide(folder, f"stalled-{i}"))) for i in range(THREADS)]
    while not all(future.running() for future in held):
        pass
    return held


def test_new_slides_wait_for_a_while_behind_stalled_ones_and_known_ones_do_not(service, tmp_path, disk):
    known = slide(tmp_path, "known")
    service.select(SlideRequest(known))
    held = stall_all(service, tmp_path)
    waits = service.submit(SlideRequest(slide(tmp_path, "new")))
    assert service.submit(SlideRequest(known)).result(WAIT).selection.num_patches == 50
    assert not waits.done()
    disk.set()
    assert {future.result(WAIT).selection.num_patches for future in (*held, waits)} == {50}


def test_once_all_threads_stood_still_too_long_new_slides_alone_are_refused(service, tmp_path, disk, monkeypatch):
    known, new = slide(tmp_path, "known"), slide(tmp_path, "new")
    service.select(SlideRequest(known))
    held = stall_all(service, tmp_path)
    monkeypatch.setattr(stalling_pool, "STALL_SECONDS", 0)
    for _ in range(3):
        with pytest.raises(SlidesStalled, match=f"its {THREADS} readers have waited"):
            service.submit(SlideRequest(new))
    assert service.submit(SlideRequest(known)).result(WAIT).selection.num_patches == 50
    joined = service.submit(SlideRequest(tmp_path / "stalled-0.safetensors"))
    disk.set()
    assert joined.result(WAIT) is held[0].result(WAIT)
    held[1].result(WAIT)
    assert service.select(SlideRequest(new)).selection.num_patches == 50


def test_clients_that_give_up_do_not_keep_further_ones_waiting(monkeypatch):
    monkeypatch.setattr(stalling_pool, "STALL_SECONDS", 0.5)
    pool, disk = StallingPool("test", THREADS), threading.Event()
    held = [pool.submit(disk.wait, WAIT) for _ in range(THREADS)]
    while not all(future.running() for future in held):
        pass
    ends, num_refused = time.monotonic() + 1.5, 0
    while time.monotonic() < ends:
        try:
            assert pool.submit(print).cancel()
        except SlidesStalled:
            num_refused += 1
        time.sleep(0.1)
    assert num_refused >= 5
    disk.set()
    assert all(future.result(WAIT) for future in held)
    assert pool.submit(int, "3").result(WAIT) == 3


def test_a_thread_that_cannot_be_started_costs_its_own_work_alone(monkeypatch):
    start, pool = threading.Thread.start, StallingPool("test", THREADS)

    def refused(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    for _ in range(3):
        with pytest.raises(SlidesStalled, match=r"no reader can be started \(can't start new thread\)"):
            pool.submit(int, "3")
    monkeypatch.setattr(threading.Thread, "start", start)
    disk = threading.Event()
    held = pool.submit(disk.wait, WAIT)
    monkeypatch.setattr(threading.Thread, "start", refused)
    queued = pool.submit(int, "4")  # one thread is enough
    disk.set()
    assert (held.result(WAIT), queued.result(WAIT)) == (True, 4)
    monkeypatch.setattr(threading.Thread, "start", start)
    assert pool._unfinished == 0


def test_a_slide_by_value_that_is_refused_is_closed(service, tmp_path, disk, monkeypatch, open_files_below):
    stall_all(service, tmp_path)
    monkeypatch.setattr(stalling_pool, "STALL_SECONDS", 0)
    while open_files_below() < THREADS:  # the stalled ones are being opened
        pass
    opened = open_features(slide(tmp_path, "new"))
    with pytest.raises(SlidesStalled):
        service.submit(SlideRequest(slide=opened))
    assert open_files_below() == THREADS


async def test_clients_are_told_503_so_that_they_ask_again(service, client, tmp_path, disk, monkeypatch):
    stall_all(service, tmp_path)
    monkeypatch.setattr(stalling_pool, "STALL_SECONDS", 0)
    url = slide(tmp_path, "new").as_uri()
    for ask in (client.fetch_image_async(url), asyncio.to_thread(client.fetch_image, url)):
        with pytest.raises(GracefulHTTPError, match="cannot be read now") as error:
            await ask
        assert error.value.http_status == HTTPStatus.SERVICE_UNAVAILABLE


async def test_clients_that_go_away_while_their_slide_waits_leave_no_work_counted(service, client, tmp_path, disk):
    """Or new slides would one day be refused for work that is long gone."""
    stall_all(service, tmp_path)
    waiting = [asyncio.create_task(client.fetch_image_async(slide(tmp_path, f"{i}").as_uri())) for i in range(5)]
    await asyncio.sleep(0.05)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    disk.set()
    await client.fetch_image_async(slide(tmp_path, "last").as_uri())
    while service._pool._unfinished or service._look_ups._unfinished:
        await asyncio.sleep(0.01)


async def test_a_mount_that_does_not_answer_holds_up_none_of_another(service, client, tmp_path, monkeypatch):
    """As many requests as vLLM has threads for media, many times over, whose stat does not come back."""
    answers, of_file = threading.Event(), SlideIdentity.of_file

    def stat(path):
        if path.name.startswith("stalled"):
            assert answers.wait(WAIT)
        return of_file(path)

    monkeypatch.setattr(SlideIdentity, "of_file", stat)
    stalled = slide(tmp_path, "stalled").as_uri()
    waiting = [asyncio.create_task(client.fetch_image_async(stalled)) for _ in range(LOOK_UP_THREADS - 1)]
    await asyncio.sleep(0.05)
    for name in ("new", "new"):
        answer = await asyncio.wait_for(client.fetch_image_async(slide(tmp_path, name).as_uri()), WAIT)
        assert answer.selection.num_patches == 50
    assert not any(task.done() for task in waiting)
    answers.set()
    assert {done.selection.num_patches for done in await asyncio.gather(*waiting)} == {50}


@pytest.mark.server
@pytest.mark.skipif(sys.platform != "linux", reason="stalls files by Linux's leases")
def test_a_server_answers_the_others_while_sixteen_slides_stall_within_the_kernel(tmp_path):
    """`bench/reliability/slow_file.py` fails where a slow slide was not slow, or a request not answered.

    No time is judged.
    """
    table = tmp_path / "slow.csv"
    command = [sys.executable, "-m", "bench.reliability.slow_file", "--quick", "--csv", str(table)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    with open(table, newline="") as file:
        (row,) = csv.DictReader(file)
    assert all(int(row[f"requests_{arm}"]) > 0 for arm in ("none", "slow", "full"))

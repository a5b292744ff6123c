"""What becomes of open requests when the server ends: uvicorn and the ASGI layer as they are, with a small app."""

import asyncio
import contextlib

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from vllm_wsi.serving.open_requests import AnswerOpenRequests, OpenRequests, end_with_engine

WAIT = 20  # seconds; only a failing test waits that long


class Engine:
    """As much of vLLM's engine client as its end needs; it stops when it is told to."""

    def __init__(self):
        self.timeouts, self.stopped = [], asyncio.Event()

    def shutdown(self, timeout=None):
        self.timeouts.append(timeout)
        asyncio.run_coroutine_threadsafe(self.stopped.wait(), self.loop).result(WAIT)


class Served:
    """A running server of `app`, ended as vLLM ends it: the engine on a thread first, then uvicorn."""

    def __init__(self):
        self.app, self.requests, self.engine = FastAPI(), OpenRequests(), Engine()
        self.waiting, self.go_on = 0, asyncio.Event()
        self.app.add_middleware(AnswerOpenRequests, requests=self.requests)
        self.app.post("/wait")(self.wait)
        self.app.get("/stream")(self.stream)
        self.app.get("/flood")(self.flood)

    async def wait(self, request: Request):
        self.waiting += 1
        await request.body()
        await self.go_on.wait()
        return "done"

    async def stream(self):
        async def parts():
            yield b"first"
            self.waiting += 1
            await self.go_on.wait()
            yield b"last"

        return StreamingResponse(parts())

    async def flood(self):
        async def parts():
            self.waiting += 1
            while True:
                yield bytes(1 << 20)

        return StreamingResponse(parts())

    async def until(self, waiting):
        async with asyncio.timeout(WAIT):
            while self.waiting < waiting:
                await asyncio.sleep(0)

    async def end(self, timeout=0):
        await asyncio.to_thread(self.engine.shutdown, timeout=timeout)
        self.server.should_exit = True
        async with asyncio.timeout(WAIT):
            await self.task


@pytest.fixture
async def served():
    served = Served()
    served.engine.loop = asyncio.get_running_loop()
    served.server = uvicorn.Server(uvicorn.Config(served.app, port=0, log_level="error"))
    served.app.state.server = served.server
    end_with_engine(served.engine, served.requests, served.app.state)
    served.task = asyncio.create_task(served.server.serve())
    while not served.server.started:
        await asyncio.sleep(0)
    host, port = served.server.servers[0].sockets[0].getsockname()
    served.address = (host, port)
    async with httpx.AsyncClient(
        base_url=f"http://{host}:{port}", timeout=WAIT, limits=httpx.Limits()
    ) as served.client:
        yield served
    served.engine.stopped.set()
    served.server.should_exit = served.server.force_exit = True
    with contextlib.suppress(asyncio.CancelledError):
        await served.task


async def test_every_open_request_gets_503_before_the_engine_has_stopped_where_it_has_no_shutdown_time(served):
    asked = [asyncio.create_task(served.client.post("/wait")) for _ in range(33)]
    await served.until(33)
    ending = asyncio.create_task(served.end())
    answers = await asyncio.gather(*asked)
    assert not ending.done()
    assert [answer.status_code for answer in answers] == [503] * 33
    assert answers[0].json()["error"]["message"] == "The server is shutting down; ask again later"
    assert answers[0].headers["retry-after"] == "5"
    served.engine.stopped.set()
    await ending
    assert served.engine.timeouts == [0]
    assert not served.requests.tasks


async def test_with_a_shutdown_time_open_requests_end_well_and_new_ones_get_503(served):
    asked = asyncio.create_task(served.client.post("/wait"))
    await served.until(1)
    ending = asyncio.create_task(served.end(timeout=30))
    while not served.requests.refusing:
        await asyncio.sleep(0)
    assert (await served.client.post("/wait")).status_code == 503
    assert not asked.done()
    served.go_on.set()
    assert (await asked).json() == "done"
    served.engine.stopped.set()
    await ending


async def test_what_is_still_open_when_the_shutdown_time_is_over_gets_503(served):
    asked = asyncio.create_task(served.client.post("/wait"))
    await served.until(1)
    served.engine.stopped.set()
    await served.end(timeout=30)
    assert (await asked).status_code == 503


async def test_a_stream_ends_without_its_last_chunk_so_that_no_client_takes_it_for_whole(served):
    served.engine.stopped.set()
    async with served.client.stream("GET", "/stream") as answer:
        parts = answer.aiter_bytes()
        assert await anext(parts) == b"first"
        await served.until(1)
        await served.end()
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
            await anext(parts)


async def test_half_a_body_and_an_idle_connection_hold_nobody_up(served):
    served.engine.stopped.set()
    idle = await asyncio.open_connection(*served.address)
    half = await asyncio.open_connection(*served.address)
    half[1].write(b"POST /wait HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
    await served.until(1)
    await served.end()
    assert (await half[0].read()).startswith(b"HTTP/1.1 503")
    assert await idle[0].read() == b""
    half[1].close()
    idle[1].close()


async def test_a_client_that_reads_no_answer_holds_the_end_up_for_the_grace_seconds_alone(served, monkeypatch):
    monkeypatch.setattr("vllm_wsi.serving.open_requests.GRACE_SECONDS", 0.2)
    served.engine.stopped.set()
    _, writer = await asyncio.open_connection(*served.address, limit=1)
    writer.write(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
    await served.until(1)
    await asyncio.sleep(0.1)  # the socket's buffers fill up
    await served.end()
    writer.close()


async def test_a_uvicorn_with_a_grace_of_its_own_keeps_it(served):
    served.server.config.timeout_graceful_shutdown = 7
    served.engine.stopped.set()
    await served.end()
    assert served.server.config.timeout_graceful_shutdown == 7

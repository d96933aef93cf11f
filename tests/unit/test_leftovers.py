"""What remains in the event loop when requests end, and how their end is reported to other code."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import trio
from fastapi import Depends, FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from cancelonleave import ClientClosedRequest, cancel_on_disconnect
from cancelonleave._loop import GRACE
from cancelonleave.testing import Client
from tests.shared.asking import on_trio
from tests.shared.virtual_time import anyio_backend as anyio_backend

pytestmark = pytest.mark.anyio

SCOPE: dict[str, Any] = {"type": "http", "method": "GET", "path": "/", "headers": []}  # Any: as ASGI has it


class Server:
    """Serves an empty body to a client that stays."""

    def __init__(self) -> None:
        self.pending = 0
        self.messages: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive(self) -> Message:
        if self.messages:
            return self.messages.pop()
        self.pending += 1
        try:
            while True:
                await anyio.sleep(3600)
        finally:
            self.pending -= 1

    def request(self) -> Request:
        return Request(dict(SCOPE), self.receive)


@cancel_on_disconnect
async def wait(request: Request, seconds: float) -> None:
    await anyio.sleep(seconds)


async def test_the_timer_stops_when_there_are_no_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[float] = []
    living = 0
    if on_trio():
        living = trio.lowlevel.current_statistics().tasks_living
    else:
        loop = asyncio.get_running_loop()
        call_later: Callable[..., object] = loop.call_later

        def count(delay: float, *args: Any, **options: Any) -> object:  # Any: as in call_later()
            timers.append(loop.time())
            return call_later(delay, *args, **options)

        monkeypatch.setattr(loop, "call_later", count)
    with anyio.fail_after(60):
        await wait(Server().request(), 0)
        await anyio.sleep(GRACE * 3)
        timers.clear()
        await anyio.sleep(GRACE * 20)
    if on_trio():
        assert trio.lowlevel.current_statistics().tasks_living == living
    else:
        assert len(timers) <= 1  # the timer of the test itself


@pytest.mark.parametrize("anyio_backend", ["asyncio", "uvloop"], indirect=True)
async def test_a_watch_that_cannot_start_leaves_no_other_call_unguarded() -> None:
    reported: list[dict[str, Any]] = []  # Any: asyncio's own type
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    broken = Server().request()
    broken.scope["headers"] = [b"no pair"]
    gone = Server()
    gone.messages = [{"type": "http.disconnect"}]
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, broken, 1)
            await anyio.lowlevel.checkpoint()
            with pytest.raises(ClientClosedRequest):
                await wait(gone.request(), 1)
    assert [type(context["exception"]) for context in reported] == [ValueError]


class Held:
    """An object that a request keeps in a context variable."""


held: ContextVar[Held] = ContextVar("held")


async def test_the_timer_keeps_nothing_of_the_request_that_started_it() -> None:
    references: list[weakref.ref[Held]] = []

    async def first() -> None:
        value = Held()
        held.set(value)
        references.append(weakref.ref(value))
        await wait(Server().request(), 0)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first)
            for _ in range(10):  # the timer keeps ticking, since there are always new calls
                await anyio.sleep(GRACE / 2)
                tasks.start_soon(wait, Server().request(), GRACE)
            gc.collect()
            assert references[0]() is None


@pytest.mark.parametrize("seconds", [0, GRACE * 3])
async def test_the_wait_for_a_discarded_response_ends_before_its_request(seconds: float) -> None:
    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        await anyio.sleep(seconds)
        return StreamingResponse(iter([b""]))

    server = Server()
    request = server.request()
    with anyio.fail_after(60):
        await endpoint(request)
        gc.collect()
        await anyio.sleep(GRACE * 10)
    assert server.pending == 0
    del request


@pytest.mark.parametrize("error", [ValueError("own"), ExceptionGroup("own", [KeyError()])], ids=repr)
async def test_an_exception_group_with_another_error_is_not_taken_for_the_disconnect(error: Exception) -> None:
    gone = anyio.Event()

    @cancel_on_disconnect
    async def endpoint(request: Request) -> None:
        await request.body()
        gone.set()
        await request.receive()
        raise ExceptionGroup("both", [ClientDisconnect(), error])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await endpoint(Request(scope, receive))

    exchange = await Client(app).get("/", leave_when=gone)
    assert str(exchange.error) == "both (2 sub-exceptions)"


async def test_dependencies_see_the_error_of_a_failed_cleanup_instead_of_the_disconnect() -> None:
    seen: list[BaseException] = []

    async def dependency() -> AsyncGenerator[None]:
        try:
            yield
        except BaseException as error:
            seen.append(error)
            raise

    async def chunks() -> AsyncGenerator[bytes]:
        try:
            yield b"a"
            yield b"b"
        finally:
            raise ValueError("the cleanup's")

    app = FastAPI()

    @app.get("/", dependencies=[Depends(dependency)])
    @cancel_on_disconnect
    async def endpoint() -> StreamingResponse:
        return StreamingResponse(chunks())

    async def fails_to_send(scope: Scope, receive: Receive, send: Send) -> None:
        async def fail(message: Message) -> None:
            if message["type"] == "http.response.body":
                raise BrokenPipeError
            await send(message)

        await app(scope, receive, fail)

    exchange = await Client(fails_to_send, server="gunicorn-h2").get("/")
    assert [type(error) for error in seen] == [ValueError]
    assert isinstance(exchange.error, ValueError)

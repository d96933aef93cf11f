"""FastAPI's generator endpoints (0.134 and newer): JSON Lines, server-sent events and raw pieces."""

from __future__ import annotations

import inspect
import threading
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable
from contextlib import aclosing
from contextvars import ContextVar
from itertools import count
from typing import Any

import anyio
import anyio.from_thread
import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel
from starlette.background import BackgroundTasks

from cancelonleave import ClientClosedRequest, cancel_on_disconnect
from cancelonleave.testing import SERVERS, Client
from virtual import BACKENDS
from work import LONGER_THAN_PATIENCE, on_trio, undecorated

pytestmark = pytest.mark.anyio

# Their send() fails after the leave, which ends a response of FastAPI's own with an error, decorated or not.
QUIET_SERVERS = tuple(name for name in ("strict", *SERVERS) if name != "gunicorn-h2")
# In virtual time, which tests without threads can have. The servers that these tests need have no trio.
ASYNCIO = {name: BACKENDS[name][1]() for name in ("asyncio", "uvloop")}
on_asyncio = pytest.mark.parametrize("anyio_backend", [("asyncio", ASYNCIO[name]) for name in ASYNCIO], ids=ASYNCIO)
IDLE = 60  # seconds
Guard = Callable[[Any], Any]  # Any: functions and generator functions

variable: ContextVar[str] = ContextVar("variable")


class Item(BaseModel):
    number: int


class Generators:
    """Generator endpoints of all kinds, that say some things and then wait; it notes what becomes of them."""

    def __init__(self, guard: Guard, *, wait: float = IDLE, cleanup: float = 0.01) -> None:
        self.wait = wait
        self.cleanup = cleanup
        self.events: list[str] = []
        self.idle = anyio.Event()
        self.app = FastAPI()
        self.app.get("/jsonl")(guard(self.items))
        self.app.get("/sse", response_class=EventSourceResponse)(guard(self.server_sent))
        self.app.get("/raw", response_class=StreamingResponse)(guard(self.raw))
        self.app.get("/jsonl/sync")(guard(self.sync_items))
        self.app.get("/sse/sync", response_class=EventSourceResponse)(guard(self.sync_server_sent))
        self.app.get("/raw/sync", response_class=StreamingResponse)(guard(self.sync_raw))

    async def items(self, size: int = 2) -> AsyncIterable[Item]:
        async with aclosing(self.numbers(size)) as numbers:
            async for number in numbers:
                yield Item(number=number)

    async def server_sent(self, request: Request, size: int = 2) -> AsyncIterable[ServerSentEvent]:
        async with aclosing(self.numbers(size)) as numbers:
            async for number in numbers:
                yield ServerSentEvent(data=number)

    async def raw(self, tasks: BackgroundTasks, size: int = 2) -> AsyncIterable[str]:
        tasks.add_task(self.events.append, "background")
        async with aclosing(self.numbers(size)) as numbers:
            async for number in numbers:
                yield str(number)

    def sync_items(self, size: int = 2) -> Iterable[Item]:
        for number in self.sync_numbers(size):
            yield Item(number=number)

    def sync_server_sent(self, request: Request, size: int = 2) -> Iterable[ServerSentEvent]:
        for number in self.sync_numbers(size):
            yield ServerSentEvent(data=number)

    def sync_raw(self, tasks: BackgroundTasks, size: int = 2) -> Iterable[str]:
        tasks.add_task(self.events.append, "background")
        for number in self.sync_numbers(size):
            yield str(number)

    async def numbers(self, size: int) -> AsyncGenerator[int]:
        try:
            for number in range(size):
                yield number
            self.idle.set()
            await anyio.sleep(self.wait)
        except anyio.get_cancelled_exc_class():
            self.events.append("cancelled")
            raise
        finally:
            with anyio.CancelScope(shield=on_trio()):
                await anyio.sleep(self.cleanup)
            self.events.append("clean")

    def sync_numbers(self, size: int) -> Generator[int]:
        assert threading.current_thread() is not threading.main_thread()
        try:
            yield from range(size)
            anyio.from_thread.run_sync(self.idle.set)
            until = anyio.from_thread.run_sync(anyio.current_time) + self.wait
            while anyio.from_thread.run_sync(anyio.current_time) < until:
                anyio.from_thread.check_cancelled()
                anyio.from_thread.run(anyio.sleep, 0.001)
        except anyio.from_thread.run_sync(anyio.get_cancelled_exc_class):
            self.events.append("cancelled")
            raise
        finally:
            self.events.append("clean")


PATHS = ("/jsonl", "/sse", "/raw", "/jsonl/sync", "/sse/sync", "/raw/sync")


@pytest.mark.parametrize("server", ["strict", "uvicorn", "gunicorn-h2"])
@pytest.mark.parametrize("path", PATHS)
async def test_a_generator_endpoint_whose_client_stays_is_as_undecorated(path: str, server: str) -> None:
    decorated, plain = Generators(cancel_on_disconnect, wait=0.06), Generators(undecorated, wait=0.06)
    of_decorated, of_plain = [await Client(one.app, server=server).get(f"{path}?size=3") for one in (decorated, plain)]
    assert [sent.message for sent in of_decorated.messages] == [sent.message for sent in of_plain.messages]
    assert of_decorated.complete
    assert decorated.events == plain.events


def test_the_documentation_of_generator_endpoints_is_as_undecorated() -> None:
    assert Generators(cancel_on_disconnect).app.openapi() == Generators(undecorated).app.openapi()


@pytest.mark.parametrize("server", QUIET_SERVERS)
@pytest.mark.parametrize("path", PATHS)
async def test_an_idle_generator_endpoint_stops_when_its_client_leaves(path: str, server: str) -> None:
    told: list[str] = []
    generators = Generators(cancel_on_disconnect(on_disconnect=lambda request: told.append(request.url.path)))
    exchange = await Client(generators.app, server=server).get(path, leave_when=generators.idle)
    assert exchange.error is None, exchange
    assert exchange.status == 200
    assert generators.events[:2] == ["cancelled", "clean"]
    assert generators.events[2:] == ["background"] * path.startswith("/raw")
    assert told == [path]


@pytest.mark.parametrize("server", QUIET_SERVERS)
@pytest.mark.parametrize("path", PATHS)
async def test_a_busy_generator_endpoint_stops_when_its_client_leaves(path: str, server: str) -> None:
    told: list[str] = []
    generators = Generators(cancel_on_disconnect(on_disconnect=lambda request: told.append(request.url.path)))
    left = anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:  # Any: ASGI's own types
        number = count()

        async def leave_at_the_tenth(message: Any) -> None:  # Any: so
            await send(message)
            if next(number) == 10:
                left.set()
                await anyio.sleep(LONGER_THAN_PATIENCE)

        await generators.app(scope, receive, leave_at_the_tenth)

    exchange = await Client(app, server=server).get(f"{path}?size=1000000", leave_when=left)
    assert exchange.error is None, exchange
    assert generators.events[-1] == ("background" if path.startswith("/raw") else "clean")
    assert generators.events.count("clean") == 1
    assert told == [path]


async def test_a_generator_endpoint_loses_no_byte_of_what_it_reads() -> None:
    pieces = [bytes([number]) * 1000 for number in range(200)]
    app = FastAPI()

    @app.post("/", response_class=StreamingResponse)
    @cancel_on_disconnect
    async def echo(request: Request) -> AsyncIterable[bytes]:
        async for piece in request.stream():
            yield piece

    for server in ("strict", *SERVERS):
        exchange = await Client(app, server=server).post("/", content=pieces)
        assert exchange.body == b"".join(pieces)


async def test_a_generator_endpoint_that_does_not_read_leaves_the_invitation_to_nobody() -> None:
    generators = Generators(cancel_on_disconnect, wait=LONGER_THAN_PATIENCE)
    exchange = await Client(generators.app).get("/jsonl", content=b"a", headers={"expect": "100-continue"})
    assert exchange.complete
    assert not exchange.asked_for_body


async def test_errors_of_generator_endpoints_are_passed_on_unchanged() -> None:
    app = FastAPI()

    @app.get("/")
    @cancel_on_disconnect
    async def fail() -> AsyncIterable[Item]:
        yield Item(number=1)
        raise ZeroDivisionError("the endpoint's own")

    exchange = await Client(app).get("/")
    assert isinstance(exchange.error, ZeroDivisionError)


async def test_a_sync_generator_endpoint_sees_context_variables() -> None:
    app = FastAPI()

    async def set_variable() -> None:
        variable.set("seen")

    @app.get("/", dependencies=[Depends(set_variable)])
    @cancel_on_disconnect
    def numbers() -> Iterable[str]:
        yield variable.get()

    exchange = await Client(app).get("/")
    assert exchange.text == '"seen"\n'


async def test_without_a_request_a_generator_just_runs() -> None:
    @cancel_on_disconnect
    async def numbers() -> AsyncIterable[int]:
        yield 1

    @cancel_on_disconnect
    def sync_numbers() -> Iterable[int]:
        yield 2

    assert [number async for number in numbers()] == [1]
    assert list(sync_numbers()) == [2]


async def test_a_decorated_dependency_with_yield_is_refused_when_it_is_called() -> None:
    app = FastAPI()
    dependency = cancel_on_disconnect(Generators(undecorated).numbers)

    @app.get("/", dependencies=[Depends(dependency)])
    async def endpoint() -> None: ...

    exchange = await Client(app).get("/?size=1")
    assert isinstance(exchange.error, TypeError)
    assert "Decorate the endpoint" in str(exchange.error)


@pytest.mark.parametrize("path", PATHS)
async def test_a_dependency_with_yield_rolls_back_when_the_client_leaves_and_commits_when_it_stays(path: str) -> None:
    events: list[str] = []

    async def transaction() -> AsyncGenerator[None]:
        try:
            yield
        except ClientClosedRequest:
            events.append("rollback")
            raise
        else:
            events.append("commit")

    for wait, left in ((IDLE, True), (0, False)):
        generators = Generators(cancel_on_disconnect, wait=wait)
        app = FastAPI(dependencies=[Depends(transaction)])
        app.include_router(generators.app.router)
        exchange = await Client(app).get(path, leave_when=generators.idle if left else anyio.Event())
        assert exchange.error is None
    assert events == ["rollback", "commit"]


@on_asyncio
@pytest.mark.parametrize(
    ("path", "server"),
    [
        ("/jsonl", "strict"),
        ("/jsonl", "gunicorn-h2"),
        ("/sse", "strict"),  # and with gunicorn-h2 FastAPI itself ends it, when send() has failed
        ("/raw", "gunicorn"),
        ("/raw", "gunicorn-h2"),
    ],
)
async def test_the_generator_ends_although_nobody_ends_a_send(path: str, server: str) -> None:
    ends: list[str] = []

    async def transaction() -> AsyncGenerator[None]:
        try:
            yield
        finally:
            ends.extend(generators.events[-1:])

    generators = Generators(cancel_on_disconnect)
    app = FastAPI(dependencies=[Depends(transaction)])
    app.include_router(generators.app.router)
    client = Client(app, server=server, timeout=0.5)
    if server == "gunicorn-h2":  # where send() fails, which ends the response of FastAPI's own
        assert (await client.get(f"{path}?size=100", leave_after_received=20)).error is not None
    else:
        with pytest.raises(AssertionError, match="still ran"):
            await client.get(f"{path}?size=100", leave_after_received=20)
    assert generators.events == ["clean"]
    assert ends == ["clean"]


@on_asyncio
async def test_no_leave_cancels_the_cleanup_of_a_generator_that_is_being_closed() -> None:
    generators = Generators(cancel_on_disconnect, cleanup=LONGER_THAN_PATIENCE)
    await Client(generators.app, server="gunicorn-h2").get("/raw?size=100", leave_after_received=20)
    assert generators.events[-1:] == ["clean"]


async def test_a_sync_generator_is_an_async_one_to_fastapi() -> None:
    @cancel_on_disconnect
    def numbers() -> Iterable[int]:
        yield 1

    innermost: Any = inspect.unwrap(numbers)  # Any: not what it wraps
    assert inspect.isasyncgenfunction(innermost)
    assert [item async for item in innermost()] == [None]
    assert list(numbers()) == [1]

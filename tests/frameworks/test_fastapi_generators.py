"""FastAPI's generator endpoints (0.134 and newer): JSON Lines, server-sent events and raw chunks."""

from __future__ import annotations

import functools
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
from dishka import Provider, Scope, make_async_container
from dishka.integrations.fastapi import FromDishka, inject, setup_dishka
from fastapi import Depends, FastAPI, Request
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel
from starlette.background import BackgroundTasks

from cancelonleave import ClientClosedRequest, cancel_on_disconnect
from cancelonleave.testing import SERVERS, Client, Options
from tests.shared.asking import LONGER_THAN_GRACE, on_trio, undecorated
from tests.shared.virtual_time import BACKENDS

pytestmark = pytest.mark.anyio

# Their send() fails after the disconnect, which ends FastAPI's own responses with an error, decorated or not.
QUIET_SERVERS = tuple(name for name in ("strict", *SERVERS) if name != "gunicorn-h2")
# These run in virtual time, since they need no threads; and without trio, since their servers don't support it.
ASYNCIO = {name: BACKENDS[name][1]() for name in ("asyncio", "uvloop")}
on_asyncio = pytest.mark.parametrize("anyio_backend", [("asyncio", ASYNCIO[name]) for name in ASYNCIO], ids=ASYNCIO)
IDLE = 60  # seconds
Guard = Callable[[Any], Any]  # Any: functions and generator functions

variable: ContextVar[str] = ContextVar("variable")


class Item(BaseModel):
    number: int


class Generators:
    """Generator endpoints of all kinds, which yield some items and then wait; records what happens to them."""

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
async def test_a_generator_endpoint_whose_client_stays_behaves_as_undecorated(path: str, server: str) -> None:
    decorated, plain = Generators(cancel_on_disconnect, wait=0.06), Generators(undecorated, wait=0.06)
    of_decorated, of_plain = [await Client(one.app, server=server).get(f"{path}?size=3") for one in (decorated, plain)]
    assert [sent.message for sent in of_decorated.messages] == [sent.message for sent in of_plain.messages]
    assert of_decorated.complete
    assert decorated.events == plain.events


def test_the_documentation_of_generator_endpoints_is_the_same_as_undecorated() -> None:
    assert Generators(cancel_on_disconnect).app.openapi() == Generators(undecorated).app.openapi()


@pytest.mark.parametrize("server", QUIET_SERVERS)
@pytest.mark.parametrize("path", PATHS)
async def test_an_idle_generator_endpoint_stops_when_its_client_disconnects(path: str, server: str) -> None:
    notified: list[str] = []
    generators = Generators(cancel_on_disconnect(on_disconnect=lambda request: notified.append(request.url.path)))
    exchange = await Client(generators.app, server=server).get(path, leave_when=generators.idle)
    assert exchange.error is None, exchange
    assert exchange.status == 200
    assert generators.events[:2] == ["cancelled", "clean"]
    assert generators.events[2:] == ["background"] * path.startswith("/raw")
    assert notified == [path]


@pytest.mark.parametrize("server", QUIET_SERVERS)
@pytest.mark.parametrize("path", PATHS)
async def test_a_busy_generator_endpoint_stops_when_its_client_disconnects(path: str, server: str) -> None:
    notified: list[str] = []
    generators = Generators(cancel_on_disconnect(on_disconnect=lambda request: notified.append(request.url.path)))
    disconnect = anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:  # Any: ASGI's own types
        number = count()

        async def disconnect_at_the_tenth(message: Any) -> None:
            await send(message)
            if next(number) == 10:
                disconnect.set()
                await anyio.sleep(LONGER_THAN_GRACE)

        await generators.app(scope, receive, disconnect_at_the_tenth)

    exchange = await Client(app, server=server).get(f"{path}?size=1000000", leave_when=disconnect)
    assert exchange.error is None, exchange
    assert generators.events[-1] == ("background" if path.startswith("/raw") else "clean")
    assert generators.events.count("clean") == 1
    assert notified == [path]


async def test_a_generator_endpoint_loses_no_byte_of_what_it_reads() -> None:
    chunks = [bytes([number]) * 1000 for number in range(200)]
    app = FastAPI()

    @app.post("/", response_class=StreamingResponse)
    @cancel_on_disconnect
    async def echo(request: Request) -> AsyncIterable[bytes]:
        async for chunk in request.stream():
            yield chunk

    for server in ("strict", *SERVERS):
        exchange = await Client(app, server=server).post("/", content=chunks)
        assert exchange.body == b"".join(chunks)


async def test_a_generator_endpoint_that_does_not_read_does_not_ask_for_100_continue() -> None:
    generators = Generators(cancel_on_disconnect, wait=LONGER_THAN_GRACE)
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
async def test_a_dependency_with_yield_rolls_back_when_the_client_disconnects_and_commits_when_it_stays(
    path: str,
) -> None:
    events: list[str] = []

    async def transaction() -> AsyncGenerator[None]:
        try:
            yield
        except ClientClosedRequest:
            events.append("rollback")
            raise
        else:
            events.append("commit")

    for wait, disconnect in ((IDLE, True), (0, False)):
        generators = Generators(cancel_on_disconnect, wait=wait)
        app = FastAPI(dependencies=[Depends(transaction)])
        app.include_router(generators.app.router)
        exchange = await Client(app).get(path, leave_when=generators.idle if disconnect else anyio.Event())
        assert exchange.error is None
    assert events == ["rollback", "commit"]


@on_asyncio
@pytest.mark.parametrize(
    ("path", "server"),
    [
        ("/jsonl", "gunicorn-uvloop"),
        ("/jsonl", "gunicorn-h2"),
        ("/sse", "gunicorn-uvloop"),  # with gunicorn-h2, FastAPI itself ends it when send() has failed
        ("/raw", "gunicorn-uvloop"),
        ("/raw", "gunicorn-h2"),
    ],
)
async def test_the_generator_ends_even_if_send_never_returns(path: str, server: str) -> None:
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
    if server == "gunicorn-h2":  # its send() fails, which ends FastAPI's own response
        assert (await client.get(f"{path}?size=100", leave_after_received=20)).error is not None
    else:
        with pytest.raises(AssertionError, match=r"It waits in send\(\), .* Choose another server"):
            await client.get(f"{path}?size=100", leave_after_received=20)
    assert generators.events == ["clean"]
    assert ends == ["clean"]


@pytest.mark.parametrize("server", ["strict", *SERVERS])
@pytest.mark.parametrize("path", PATHS)
async def test_the_test_client_reports_no_fault_whenever_the_client_disconnects(path: str, server: str) -> None:
    whens: list[Options] = [
        {"leave_after": 0},
        {"leave_after": 0.02},
        {"leave_after_received": 0},
        {"leave_after_received": 3},
    ]
    for when in whens:
        generators = Generators(cancel_on_disconnect)
        exchange = await Client(generators.app, server=server).get(f"{path}?size=100", **when)
        assert exchange.left_after is not None


@on_asyncio
async def test_no_disconnect_cancels_the_cleanup_of_a_generator_that_is_being_closed() -> None:
    generators = Generators(cancel_on_disconnect, cleanup=LONGER_THAN_GRACE)
    await Client(generators.app, server="gunicorn-h2").get("/raw?size=100", leave_after_received=20)
    assert generators.events[-1:] == ["clean"]


async def test_fastapi_takes_a_decorated_sync_generator_for_an_async_one() -> None:
    @cancel_on_disconnect
    def numbers() -> Iterable[int]:
        yield 1

    innermost: Any = inspect.unwrap(numbers)  # Any: it isn't of the wrapped type
    assert inspect.isasyncgenfunction(innermost)
    assert [item async for item in innermost()] == [None]
    assert list(numbers()) == [1]


async def coroutine(size: int) -> list[int]:
    return list(range(size))


def sync(size: int) -> list[int]:
    return list(range(size))


async def generator(size: int) -> AsyncIterable[int]:
    for number in range(size):
        yield number


def sync_generator(size: int) -> Iterable[int]:
    yield from range(size)


class Coroutine:
    async def __call__(self, size: int) -> list[int]:
        return await coroutine(size)


class Sync:
    def __call__(self, size: int) -> list[int]:
        return sync(size)


class AsyncItems:
    async def __call__(self, size: int) -> AsyncIterable[int]:
        async for number in generator(size):
            yield number


class SyncItems:
    def __call__(self, size: int) -> Iterable[int]:
        yield from range(size)


def timed(function: Callable[..., Any]) -> Callable[..., Any]:  # Any: a function of any result
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


KINDS: list[Callable[..., object]] = [
    *(coroutine, sync, generator, sync_generator),
    *(Coroutine(), Sync(), AsyncItems(), SyncItems()),
]
WRAPPERS: dict[str, Guard] = {
    "alone": cancel_on_disconnect,
    "below": lambda endpoint: timed(cancel_on_disconnect(endpoint)),
    "above": lambda endpoint: cancel_on_disconnect(timed(endpoint)),
    "between": lambda endpoint: timed(cancel_on_disconnect(timed(endpoint))),
    "around": lambda endpoint: cancel_on_disconnect(timed(cancel_on_disconnect(endpoint))),
}


@pytest.mark.parametrize("endpoint", KINDS, ids=count())
@pytest.mark.parametrize("decorate", WRAPPERS.values(), ids=list(WRAPPERS))
async def test_fastapi_calls_an_endpoint_of_any_kind_as_undecorated_among_wrappers_that_are_plain_functions(
    decorate: Guard, endpoint: Callable[..., object]
) -> None:
    bodies: list[bytes] = []
    for guard in (plain, timed, decorate):
        app = FastAPI()
        app.get("/")(guard(endpoint))
        exchange = await Client(app).get("/?size=3")
        assert (exchange.status, exchange.error) == (200, None)
        bodies.append(exchange.body)
    assert bodies == [bodies[0]] * 3


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("is_above", [True, False], ids=["above", "below"])
async def test_dishka_injects_into_generators_as_well(is_above: bool) -> None:
    async def injected(word: FromDishka[str]) -> AsyncIterable[str]:
        yield word
        await anyio.sleep(IDLE)

    provider = Provider(scope=Scope.REQUEST)
    provider.provide(lambda: "injected", provides=str)
    app = FastAPI()
    decorate: Guard = cancel_on_disconnect
    app.get("/")(inject(decorate(injected)) if is_above else decorate(inject(injected)))
    setup_dishka(make_async_container(provider), app)
    exchange = await Client(app, server="uvicorn").get("/", leave_after_received=1)
    assert exchange.error is None
    assert exchange.text.startswith('"injected"')

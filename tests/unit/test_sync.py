"""Sync endpoints: they run in the framework's threads, and can check whether their client has disconnected."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
import time
from collections.abc import Callable, Generator
from contextvars import ContextVar
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp
from starlette.websockets import WebSocket

from cancelonleave import ClientClosedRequest, cancel_on_disconnect
from cancelonleave._stream import in_threads
from cancelonleave.testing import SERVERS, Client
from tests.conftest import BACKENDS
from tests.shared.asking import LONGER_THAN_GRACE, ask
from tests.shared.readme_code import module
from tests.shared.websocket_in_memory import Socket, connected

pytestmark = pytest.mark.anyio

variable: ContextVar[str] = ContextVar("variable")


class Loop:
    """Work in a thread that checks for cancellation between its steps."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.begun = anyio.Event()

    def __call__(self, *, deaf: bool = False) -> str:
        assert threading.current_thread() is not threading.main_thread()
        anyio.from_thread.run_sync(self.begun.set)
        try:
            if deaf:
                time.sleep(0.1)
            for _ in range(0 if deaf else 10_000):
                anyio.from_thread.check_cancelled()
                time.sleep(0.005)
        except BaseException as error:
            self.events.append(type(error).__name__)
            raise
        finally:
            self.events.append("cleaned up")
        return "result"


def starlette_function(loop: Loop) -> ASGIApp:
    @cancel_on_disconnect
    def endpoint(request: Request) -> Response:
        return PlainTextResponse(loop())

    return Starlette(routes=[Route("/", endpoint)])


def starlette_class(loop: Loop) -> ASGIApp:
    class Endpoint(HTTPEndpoint):
        @cancel_on_disconnect
        def get(self, request: Request) -> Response:
            return PlainTextResponse(loop())

    return Starlette(routes=[Route("/", Endpoint)])


def fastapi_function(loop: Loop) -> ASGIApp:
    app = FastAPI()

    @app.get("/")
    @cancel_on_disconnect
    def endpoint(number: int = 1) -> str:
        return loop()

    return app


def fastapi_dependency(loop: Loop) -> ASGIApp:
    app = FastAPI()

    @cancel_on_disconnect
    def dependency(number: int = 1) -> str:
        return loop()

    @app.get("/", dependencies=[Depends(dependency)])
    async def endpoint() -> None: ...

    return app


def fastapi_partial(loop: Loop) -> ASGIApp:
    app = FastAPI()

    def endpoint(own: str, number: int = 1) -> str:
        return own + loop()

    app.get("/")(cancel_on_disconnect(functools.partial(endpoint, "own")))
    return app


SITES = (starlette_function, starlette_class, fastapi_function, fastapi_dependency, fastapi_partial)


@pytest.mark.parametrize("where", ["helper", "dependency"])
async def test_a_loop_that_works_for_a_websocket_stops_when_its_client_disconnects(where: str) -> None:
    app, loop = FastAPI(), Loop()

    @cancel_on_disconnect
    def work(websocket: WebSocket) -> str:
        return loop()

    @app.websocket("/helper")
    async def of_helper(websocket: WebSocket) -> None:
        await websocket.accept()
        decorated: Any = work  # Any: one that is called directly must be awaited, though its type is unchanged
        await decorated(websocket)

    @app.websocket("/dependency", dependencies=[Depends(work)])
    async def of_dependency(websocket: WebSocket) -> None: ...

    async with connected(app, Socket(f"/{where}")) as socket:
        await loop.begun.wait()
        socket.close(1001)
    assert loop.events == [anyio.get_cancelled_exc_class().__name__, "cleaned up"]
    assert socket.error is None


@pytest.mark.parametrize("server", ["strict", *SERVERS])
@pytest.mark.parametrize("site", SITES)
async def test_a_loop_that_checks_for_cancellation_stops_when_its_client_disconnects(
    site: Callable[[Loop], ASGIApp], server: str
) -> None:
    loop = Loop()
    exchange = await Client(site(loop), server=server).get("/", leave_when=loop.begun)
    assert loop.events in (["CancelledError", "cleaned up"], ["Cancelled", "cleaned up"])
    assert exchange.status == 499


async def test_a_function_that_never_checks_runs_to_the_end_and_its_result_is_delivered() -> None:
    loop = Loop()

    @cancel_on_disconnect
    def endpoint(request: Request) -> Response:
        return PlainTextResponse(loop(deaf=True))

    exchange = await ask(Starlette(routes=[Route("/", endpoint)]), leave_when=loop.begun)
    assert exchange.text == "result"
    assert loop.events == ["cleaned up"]


async def test_a_function_that_waits_for_a_thread_is_cancelled_at_once() -> None:
    limiter = anyio.to_thread.current_default_thread_limiter()
    before = limiter.total_tokens
    limiter.total_tokens = 1
    entered: list[str] = []
    held, release = anyio.Event(), threading.Event()

    def hold() -> None:
        anyio.from_thread.run_sync(held.set)
        release.wait(10)

    @cancel_on_disconnect(on_disconnect=lambda request: release.set())  # a response may also be created in a thread
    def endpoint(request: Request) -> Response:
        entered.append("endpoint")
        return PlainTextResponse("result")

    try:
        with anyio.fail_after(10):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(anyio.to_thread.run_sync, hold)
                await held.wait()
                exchange = await ask(Starlette(routes=[Route("/", endpoint)]), leave_after=0.01)
                assert exchange.status == 499
                assert not entered
                await ask(Starlette(routes=[Route("/", endpoint)]))
                assert entered == ["endpoint"]
    finally:
        release.set()
        limiter.total_tokens = before


async def test_a_function_whose_client_stays_behaves_as_undecorated() -> None:
    async def app_of(decorate: Callable[[Any], Any]) -> list[object]:  # Any: of functions
        app = FastAPI()
        seen: list[object] = []

        async def set_variable() -> None:
            variable.set("seen")

        @app.get("/", dependencies=[Depends(set_variable)])
        @decorate
        def endpoint(tasks: BackgroundTasks, number: int) -> dict[str, int]:
            tasks.add_task(seen.append, "background")
            seen.append(variable.get())
            borrowed = anyio.from_thread.run_sync(anyio.to_thread.current_default_thread_limiter).borrowed_tokens
            seen.append(borrowed)
            anyio.from_thread.check_cancelled()
            if number > 3:
                raise HTTPException(418)
            return {"number": number}

        for query in ("number=1", "number=4", "number=a"):
            exchange = await Client(app).get(f"/?{query}")
            seen += [exchange.error, exchange.status, exchange.body]
        return [*seen, app.openapi()]

    assert await app_of(cancel_on_disconnect) == await app_of(lambda endpoint: endpoint)


async def test_an_error_of_the_thread_is_raised_although_the_client_has_disconnected() -> None:
    loop = Loop()

    @cancel_on_disconnect
    def endpoint(request: Request) -> Response:
        loop(deaf=True)
        raise HTTPException(418)

    exchange = await ask(Starlette(routes=[Route("/", endpoint)]), leave_when=loop.begun)
    assert exchange.status == 418


async def test_a_dependency_with_yield_rolls_back_when_a_sync_endpoint_has_stopped() -> None:
    loop = Loop()
    app = FastAPI()
    events: list[str] = []

    def transaction() -> Generator[None]:
        try:
            yield
        except ClientClosedRequest:
            events.append("rollback")
            raise
        events.append("commit")

    @app.get("/", dependencies=[Depends(transaction)])
    @cancel_on_disconnect
    def endpoint(deaf: bool = False) -> str:
        return loop(deaf=deaf)

    await ask(app, leave_when=loop.begun)
    await ask(app, "/?deaf=true")
    assert events == ["rollback", "commit"]


async def test_a_function_called_by_a_decorated_endpoint_stops_and_ends_it() -> None:
    loop = Loop()
    events: list[str] = []

    def inner(request: Request) -> str:
        return loop()

    decorated_inner: Any = cancel_on_disconnect(inner)  # Any: the decorated function must be awaited

    @cancel_on_disconnect(on_disconnect=lambda request: events.append("on_disconnect"))
    async def endpoint(request: Request) -> Response:
        try:
            return PlainTextResponse(await decorated_inner(request))
        except ClientClosedRequest:
            await anyio.sleep(LONGER_THAN_GRACE)
            events.append("not cancelled as well")
            raise

    exchange = await ask(Starlette(routes=[Route("/", endpoint)]), leave_when=loop.begun)
    assert exchange.status == 499
    on_trio = loop.events[0] == "Cancelled"  # trio cancels every await, again and again
    assert events == ["not cancelled as well"] * (not on_trio) + ["on_disconnect"]


async def test_without_a_request_a_function_just_runs_in_a_thread() -> None:
    def report(year: int) -> str:
        return f"{year} {threading.current_thread() is threading.main_thread()}"

    decorated: Any = cancel_on_disconnect(report)
    assert await decorated(2024) == "2024 False"


@pytest.mark.parametrize("server", ["strict", *SERVERS])
async def test_a_sync_generator_in_a_thread_can_check_for_the_disconnect(server: str) -> None:
    events: list[str] = []
    idle = anyio.Event()

    def stream() -> Generator[str]:
        try:
            yield "0"
            anyio.from_thread.run_sync(idle.set)
            while True:
                anyio.from_thread.check_cancelled()
                anyio.from_thread.run(anyio.sleep, 0.001)
        finally:
            events.append("closed")

    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        return StreamingResponse(stream())

    exchange = await Client(Starlette(routes=[Route("/", endpoint)]), server=server).get("/", leave_when=idle)
    assert events == ["closed"]
    assert exchange.body == b"0"


@pytest.mark.parametrize("anyio_backend", [BACKENDS["asyncio"], BACKENDS["uvloop"]], ids=["asyncio", "uvloop"])
async def test_a_generator_is_not_closed_while_its_abandoned_thread_still_runs() -> None:
    begun = anyio.Event()
    go_on = threading.Event()

    def numbers() -> Generator[int]:
        anyio.from_thread.run_sync(begun.set)
        go_on.wait(10)
        yield 1

    generator = numbers()
    items = in_threads(generator)

    async def pull() -> None:
        await anext(items)

    task = asyncio.create_task(pull())
    with anyio.fail_after(10):
        await begun.wait()
        task.cancel()  # a native cancellation, as in a server's shutdown: it abandons anyio's threads
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        while inspect.getgeneratorstate(generator) == inspect.GEN_RUNNING:
            await anyio.sleep(0.001)
    generator.close()


async def test_an_awaitable_that_a_function_returns_is_awaited() -> None:
    async def respond() -> Response:
        await anyio.lowlevel.checkpoint()
        return PlainTextResponse("result")

    def endpoint(request: Request) -> Any:  # Any: stands for an unannotated function
        return respond()

    exchange = await ask(Starlette(routes=[Route("/", cancel_on_disconnect(endpoint))]))
    assert exchange.text == "result"


async def test_a_coroutine_that_a_function_returns_after_the_disconnect_is_closed() -> None:
    begun, release = anyio.Event(), threading.Event()
    coroutine = anyio.sleep(60)

    def endpoint(request: Request) -> Any:  # Any: stands for one without annotations
        anyio.from_thread.run_sync(begun.set)
        release.wait(10)
        return coroutine

    async def leave() -> None:
        await begun.wait()
        await anyio.sleep(LONGER_THAN_GRACE)
        release.set()

    app = Starlette(routes=[Route("/", cancel_on_disconnect(endpoint))])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(leave)
        assert (await ask(app, leave_when=begun)).status == 499
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


async def test_a_websocket_endpoint_in_a_wrapper_that_is_not_async_stops_when_its_client_disconnects() -> None:
    events: list[str] = []

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            await anyio.sleep_forever()
        finally:
            events.append("stopped")

    def wrapper(websocket: WebSocket) -> Any:  # Any: stands for one without annotations
        return endpoint(websocket)

    app = Starlette(routes=[WebSocketRoute("/", cancel_on_disconnect(wrapper))])
    async with connected(app) as socket:
        await anyio.sleep(LONGER_THAN_GRACE)
        socket.close(1001)
    assert events == ["stopped"]
    assert socket.error is None


async def test_the_sync_example_of_the_readme_stops_when_its_client_disconnects() -> None:
    exchange = await ask(module("primes.py")["app"], "/primes/1000000007", leave_after=0.1)
    assert exchange.status == 499


async def test_the_sync_example_of_the_readme_recognizes_primes() -> None:
    exchanges = [await ask(module("primes.py")["app"], f"/primes/{number}") for number in range(2, 12)]
    assert [exchange.json() for exchange in exchanges] == [number in (2, 3, 5, 7, 11) for number in range(2, 12)]


async def test_the_route_class_of_the_readme_stops_sync_endpoints_too() -> None:
    loop = Loop()
    app = FastAPI()
    app.router.route_class = module("everywhere.py")["StoppingRoute"]
    app.get("/")(loop.__call__)
    exchange = await ask(app, leave_when=loop.begun)
    assert exchange.status == 499
    assert loop.events[1:] == ["cleaned up"]

"""Clients that disconnect before their endpoint begins: its Request knows it, or the event loop lags."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, cast

import anyio
import pytest
import trio
from fastapi import Depends, FastAPI, Request
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp
from trio.testing import MockClock

from cancelonleave import cancel_on_disconnect
from cancelonleave.testing import SERVERS, Client
from tests.shared.asking import LONGER_THAN_GRACE, on_trio
from tests.shared.virtual_time import VirtualTime
from tests.shared.virtual_time import anyio_backend as anyio_backend

pytestmark = pytest.mark.anyio

ALL_SERVERS = ("strict", *SERVERS)
DISCONNECT_AFTER = 0.1  # seconds
Know = Callable[[Request], Awaitable[None]]

# How a Request learns of the disconnect.


async def asks(request: Request) -> None:
    await anyio.sleep(DISCONNECT_AFTER * 2)
    assert await request.is_disconnected()


async def asks_after_the_body(request: Request) -> None:
    await request.body()
    await asks(request)


async def reads(request: Request) -> None:
    with pytest.raises(ClientDisconnect):
        await request.body()


async def streams(request: Request) -> None:
    with pytest.raises(ClientDisconnect):
        async for _ in request.stream():
            pass


async def asks_after_a_helper(request: Request) -> None:
    @cancel_on_disconnect
    async def helper(request: Request) -> None:
        await anyio.sleep(LONGER_THAN_GRACE)

    await helper(request)
    await asks_after_the_body(request)


KNOW_BY_ASKING: tuple[Know, ...] = (asks_after_the_body, asks_after_a_helper)
KNOW_BY_READING: tuple[Know, ...] = (reads, streams)
Site = Callable[[Know, list[str]], ASGIApp]


def endpoint_after_a_dependency(know: Know, seen: list[str]) -> ASGIApp:
    app = FastAPI()

    async def dependency(request: Request) -> None:
        await know(request)
        seen.append("known")

    @app.post("/", dependencies=[Depends(dependency)])
    @cancel_on_disconnect
    async def endpoint() -> None:
        seen.append("started")

    return app


def stream_after_a_dependency(know: Know, seen: list[str]) -> ASGIApp:
    app = FastAPI()

    async def dependency(request: Request) -> None:
        await know(request)
        seen.append("known")

    @app.post("/", dependencies=[Depends(dependency)], response_model=None)
    @cancel_on_disconnect
    async def endpoint() -> Response:
        seen.append("started")
        return StreamingResponse(one_chunk())

    return app


def helper_in_an_endpoint(know: Know, seen: list[str]) -> ASGIApp:
    @cancel_on_disconnect
    async def helper(request: Request) -> None:
        seen.append("started")

    async def endpoint(request: Request) -> Response:
        await know(request)
        seen.append("known")
        await helper(request)
        return PlainTextResponse("done")

    return Starlette(routes=[Route("/", endpoint, methods=["POST"])])


def helper_in_a_decorated_endpoint(know: Know, seen: list[str]) -> ASGIApp:
    @cancel_on_disconnect
    async def helper(request: Request) -> None:
        seen.append("started")

    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        with anyio.CancelScope(shield=True):
            await know(request)
            seen.append("known")
            await helper(request)
        return PlainTextResponse("done")

    return Starlette(routes=[Route("/", endpoint, methods=["POST"])])


SITES: tuple[Site, ...] = (
    endpoint_after_a_dependency,
    stream_after_a_dependency,
    helper_in_an_endpoint,
    helper_in_a_decorated_endpoint,
)


async def one_chunk() -> AsyncIterator[str]:
    yield "piece"


async def begun() -> AsyncIterator[bytes]:
    yield b"a"
    await anyio.sleep_forever()


async def is_not_started(site: Site, know: Know, server: str, content: bytes | AsyncIterator[bytes]) -> None:
    seen: list[str] = []
    with anyio.fail_after(10):
        exchange = await Client(site(know, seen), server=server).post(
            "/", content=content, leave_after=DISCONNECT_AFTER
        )
    assert seen == ["known"]
    assert exchange.status == 499


@pytest.mark.parametrize("know", KNOW_BY_ASKING)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_an_endpoint_is_not_started_after_is_disconnected_returned_true(
    site: Site, know: Know, server: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cancelonleave")
    await is_not_started(site, know, server, b"body")
    assert [record.levelname for record in caplog.records] == ["INFO"]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("server", ["uvicorn", "gunicorn", "gunicorn-h2"])
async def test_an_endpoint_is_not_started_after_is_disconnected_returned_true_on_servers_that_drop_unread_body(
    site: Site, server: str
) -> None:
    await is_not_started(site, asks, server, begun())


@pytest.mark.parametrize("know", KNOW_BY_READING)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("server", [name for name in ALL_SERVERS if name != "daphne"])  # it waits for the body
async def test_an_endpoint_is_not_started_after_reading_raised_client_disconnect(
    site: Site, know: Know, server: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cancelonleave")
    await is_not_started(site, know, server, begun())
    assert [record.levelname for record in caplog.records] == ["INFO"]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_an_endpoint_is_started_if_its_request_knows_of_no_disconnect(site: Site, server: str) -> None:
    async def reads_body(request: Request) -> None:
        assert await request.body() == b"body"

    seen: list[str] = []
    with anyio.fail_after(10):
        exchange = await Client(site(reads_body, seen), server=server).post("/", content=b"body")
    assert seen == ["known", "started"]
    assert (exchange.status, exchange.complete) == (200, True)


# An event loop that lags.


def hold_up(seconds: float) -> None:
    """Block the event loop, as a long computation does."""
    if on_trio():
        cast(MockClock, trio.lowlevel.current_clock()).jump(seconds)
    else:
        cast(VirtualTime, asyncio.get_running_loop())._now += seconds


ROUNDS = 10


async def begin_while_it_lags(visit: Callable[[int], Coroutine[Any, Any, None]]) -> None:  # Any: a coroutine's own
    """Visit once in each round, while the event loop is blocked and a client that stays sends a request."""
    app = Starlette(routes=[Route("/", cancel_on_disconnect(lasts))])

    async def stay() -> None:
        assert (await Client(app).get("/")).body == b"answer"

    with anyio.fail_after(100):
        async with anyio.create_task_group() as tasks:
            for number in range(ROUNDS):
                tasks.start_soon(stay)
                await anyio.sleep(0.01)
                hold_up(0.06)
                tasks.start_soon(visit, number)


async def lasts(request: Request) -> Response:
    await anyio.sleep(0.5)
    return PlainTextResponse("answer")


@pytest.mark.parametrize("server", [name for name in ALL_SERVERS if name != "daphne"])  # it wouldn't start it
async def test_on_a_lagging_event_loop_an_endpoint_takes_at_most_one_step_for_a_disconnected_client(
    server: str,
) -> None:
    steps = [0] * ROUNDS

    @cancel_on_disconnect
    async def endpoint(request: Request) -> None:
        while True:
            steps[int(request.query_params["round"])] += 1
            await anyio.sleep(0.004)  # as a query does

    app = Starlette(routes=[Route("/", endpoint)])
    statuses: list[int | None] = []

    async def visit(number: int) -> None:
        exchange = await Client(app, server=server).get("/", params={"round": number}, leave_after=0)
        statuses.append(exchange.status)

    await begin_while_it_lags(visit)
    assert statuses == [499] * ROUNDS
    assert max(steps[2:]) <= 1, steps  # from the first time that the timer was late


@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_on_a_lagging_event_loop_an_endpoint_takes_at_most_one_step_after_the_disconnect(server: str) -> None:
    steps_after = [-1] * ROUNDS

    async def visit(number: int) -> None:
        disconnect = anyio.Event()

        @cancel_on_disconnect
        async def endpoint(request: Request) -> None:
            await anyio.sleep(0.004)
            disconnect.set()
            while True:
                steps_after[number] += 1
                await anyio.sleep(0.004)

        app = Starlette(routes=[Route("/", endpoint)])
        exchange = await Client(app, server=server).get("/", leave_when=disconnect)
        assert exchange.status == 499

    await begin_while_it_lags(visit)
    assert max(steps_after[2:]) <= 1, steps_after

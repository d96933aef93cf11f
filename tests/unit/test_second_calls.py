"""Second guarded calls of a request: they are guarded too, even where a cancelled receive() can't be called again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

import anyio
import pytest
from fastapi import Depends, FastAPI, Request
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from cancelonleave import ClientClosedRequest, cancel_on_disconnect
from cancelonleave.testing import SERVERS, Client, Exchange
from tests.shared.annotated_endpoints import Endpoint
from tests.shared.asking import LONGER_THAN_GRACE, on_trio
from tests.shared.virtual_time import anyio_backend as anyio_backend

pytestmark = pytest.mark.anyio

ALL_SERVERS = ("strict", *SERVERS)
UNTIL_THE_END = ("strict", "gunicorn")  # here a receive() must go on waiting from call to call
LONG = 0.5  # seconds of work that must not be done after a disconnect
DISCONNECT_AFTER = 0.3  # seconds; during that work
AT_ONCE = 0.05
BODY = (b"a", b"b", b"c")
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio", "uvloop"], indirect=True)


class Work:
    """The work of the second call, which records what happens to it."""

    def __init__(self) -> None:
        self.events: list[str] = []

    async def __call__(self) -> None:
        self.events.append("begun")
        try:
            await anyio.sleep(LONG)
            self.events.append("done")
        except anyio.get_cancelled_exc_class():
            self.events.append("cancelled")
            raise
        finally:
            with anyio.CancelScope(shield=on_trio()):
                await anyio.sleep(0.01)
            self.events.append("clean")


# First calls.


@cancel_on_disconnect
async def short(request: Request) -> None:
    await anyio.sleep(0.001)


@cancel_on_disconnect
async def lasting(request: Request) -> None:
    await anyio.sleep(LONGER_THAN_GRACE)


@cancel_on_disconnect
async def reads_the_body(request: Request) -> None:
    assert await request.body() == b"abc"


@cancel_on_disconnect
async def reads_the_body_late(request: Request) -> None:
    await anyio.sleep(LONGER_THAN_GRACE)
    assert await request.body() == b"abc"


@cancel_on_disconnect
async def asks(request: Request) -> None:
    assert not await request.is_disconnected()


@cancel_on_disconnect
async def asks_late(request: Request) -> None:
    await anyio.sleep(LONGER_THAN_GRACE)
    assert not await request.is_disconnected()


async def times_out(request: Request) -> None:
    @cancel_on_disconnect
    async def too_slow(request: Request) -> None:
        await anyio.sleep_forever()

    with anyio.move_on_after(LONGER_THAN_GRACE):
        await too_slow(request)


async def fails(request: Request) -> None:
    @cancel_on_disconnect
    async def failing(request: Request) -> None:
        await anyio.sleep(LONGER_THAN_GRACE)
        raise LookupError

    with pytest.raises(LookupError):
        await failing(request)


async def twice(request: Request) -> None:
    await lasting(request)
    await lasting(request)


async def side_by_side_in_a_task_group(request: Request) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lasting, request)
        tasks.start_soon(lasting, request)
        tasks.start_soon(short, request)


async def in_a_child(request: Request) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lasting, request)


async def side_by_side_in_gather(request: Request) -> None:
    await asyncio.gather(lasting(request), lasting(request), short(request))


async def in_a_task(request: Request) -> None:
    await asyncio.create_task(lasting(request))


First = Callable[[Request], Awaitable[None]]
FIRST: tuple[First, ...] = (
    short,
    lasting,
    reads_the_body,
    reads_the_body_late,
    asks,
    asks_late,
    times_out,
    fails,
    twice,
    side_by_side_in_a_task_group,
    in_a_child,
)
FIRST_ON_ASYNCIO: tuple[First, ...] = (side_by_side_in_gather, in_a_task)

# Applications with two calls in one request.

Site = Callable[[First, Work], ASGIApp]


def starlette(endpoint: Endpoint) -> ASGIApp:
    return Starlette(routes=[Route("/", endpoint, methods=["POST"])])


def dependency_then_endpoint(first: First, work: Work) -> ASGIApp:
    app = FastAPI()

    async def dependency(request: Request) -> None:
        await first(request)

    @app.post("/", dependencies=[Depends(dependency)])
    @cancel_on_disconnect
    async def endpoint() -> str:
        await work()
        return "done"

    return app


def helper_then_helper(first: First, work: Work) -> ASGIApp:
    @cancel_on_disconnect
    async def helper(request: Request) -> None:
        await work()

    async def endpoint(request: Request) -> Response:
        await first(request)
        await helper(request)
        return PlainTextResponse("done")

    return starlette(endpoint)


def helper_then_helper_in_a_child(first: First, work: Work) -> ASGIApp:
    @cancel_on_disconnect
    async def helper(request: Request) -> None:
        await work()

    async def child(request: Request) -> None:
        await first(request)
        await helper(request)

    async def endpoint(request: Request) -> Response:
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(child, request)
        except* ClientClosedRequest as group:
            raise ClientClosedRequest from group
        return PlainTextResponse("done")

    return starlette(endpoint)


def pause_then_helper(first: First, work: Work) -> ASGIApp:
    @cancel_on_disconnect
    async def helper(request: Request) -> None:
        await work()

    async def endpoint(request: Request) -> Response:
        await first(request)
        await anyio.sleep(0.05)  # in the endpoint itself
        await helper(request)
        return PlainTextResponse("done")

    return starlette(endpoint)


def dependency_then_stream(first: First, work: Work) -> ASGIApp:
    app = FastAPI()

    async def dependency(request: Request) -> None:
        await first(request)

    async def chunks() -> AsyncIterator[str]:
        await work()
        yield "done"

    @app.post("/", dependencies=[Depends(dependency)], response_model=None)
    @cancel_on_disconnect
    async def endpoint() -> Response:
        return StreamingResponse(chunks())

    return app


SITES: tuple[Site, ...] = (
    dependency_then_endpoint,
    helper_then_helper,
    helper_then_helper_in_a_child,
    pause_then_helper,
    dependency_then_stream,
)


async def post(app: ASGIApp, server: str, leave_after: float = 1000) -> Exchange:
    with anyio.fail_after(2000):  # of virtual time
        return await Client(app, server=server).post("/", content=BODY, leave_after=leave_after)


async def second_is_cancelled(first: First, site: Site, server: str) -> None:
    work = Work()
    exchange = await post(site(first, work), server, DISCONNECT_AFTER)
    assert work.events == ["begun", "cancelled", "clean"]
    assert exchange.status == (200 if site is dependency_then_stream else 499)
    assert exchange.seconds_after_leave is not None
    assert exchange.seconds_after_leave < AT_ONCE


async def second_is_left_alone(first: First, site: Site, server: str) -> None:
    work = Work()
    exchange = await post(site(first, work), server)
    assert exchange.error is None
    assert work.events == ["begun", "done", "clean"]
    assert (exchange.status, exchange.complete) == (200, True)


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("server", UNTIL_THE_END)
async def test_the_second_call_of_a_request_is_cancelled_too(first: First, site: Site, server: str) -> None:
    await second_is_cancelled(first, site, server)


@pytest.mark.parametrize("first", FIRST_ON_ASYNCIO)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("server", UNTIL_THE_END)
@on_asyncio
async def test_the_second_call_after_calls_in_asyncio_tasks_is_cancelled_too(
    first: First, site: Site, server: str
) -> None:
    await second_is_cancelled(first, site, server)


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("server", UNTIL_THE_END)
async def test_the_second_call_runs_to_the_end_if_the_client_stays(first: First, site: Site, server: str) -> None:
    await second_is_left_alone(first, site, server)


@pytest.mark.parametrize("first", FIRST_ON_ASYNCIO)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("server", UNTIL_THE_END)
@on_asyncio
async def test_the_second_call_after_calls_in_asyncio_tasks_runs_to_the_end_if_the_client_stays(
    first: First, site: Site, server: str
) -> None:
    await second_is_left_alone(first, site, server)


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_a_second_call_begun_after_the_disconnect_is_not_started_or_is_cancelled(
    first: First, server: str
) -> None:
    work = Work()

    @cancel_on_disconnect
    async def helper(request: Request) -> None:
        await work()

    async def endpoint(request: Request) -> None:
        await first(request)
        await anyio.sleep(DISCONNECT_AFTER)
        await helper(request)

    exchange = await post(starlette(endpoint), server, DISCONNECT_AFTER)
    assert exchange.status == 499
    assert work.events in ([], ["begun", "cancelled", "clean"])
    assert exchange.seconds_after_leave is not None
    assert exchange.seconds_after_leave < DISCONNECT_AFTER


# On gunicorn, which reports a disconnect forever once a receive() was cancelled, however long the pause is.


@pytest.mark.parametrize("first", [lasting, side_by_side_in_a_task_group, in_a_child])
@pytest.mark.parametrize("pause", [0.9, 1.5, 5])
@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_a_client_that_stays_is_not_reported_as_disconnected_after_a_long_pause(
    first: First, pause: float, server: str
) -> None:
    work = Work()

    @cancel_on_disconnect
    async def helper(request: Request) -> None:
        await work()

    async def endpoint(request: Request) -> Response:
        await first(request)
        await anyio.sleep(pause)
        await helper(request)
        return PlainTextResponse("done")

    exchange = await post(starlette(endpoint), server)
    assert exchange.error is None
    assert work.events == ["begun", "done", "clean"]
    assert exchange.body == b"done"


@pytest.mark.parametrize("first", [lasting, side_by_side_in_a_task_group, in_a_child])
@pytest.mark.parametrize("pause", [0.9, 1.5, 5])
@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_the_second_call_is_cancelled_if_the_client_disconnects_after_a_long_pause(
    first: First, pause: float, server: str
) -> None:
    work = Work()

    @cancel_on_disconnect
    async def helper(request: Request) -> None:
        await work()

    async def endpoint(request: Request) -> None:
        await first(request)
        await anyio.sleep(pause)
        await helper(request)

    exchange = await post(starlette(endpoint), server, pause + DISCONNECT_AFTER)
    assert work.events == ["begun", "cancelled", "clean"]
    assert exchange.status == 499
    assert exchange.seconds_after_leave is not None
    assert exchange.seconds_after_leave < AT_ONCE


@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_repeated_calls_in_children_are_each_guarded(server: str) -> None:
    """This is what an endpoint does that gathers results, works on them, and gathers again."""
    work = Work()

    @cancel_on_disconnect
    async def helper(request: Request) -> None:
        await work()

    async def child(request: Request) -> None:
        with suppress(ClientClosedRequest):  # otherwise the task group would interrupt the other child's cleanup
            await helper(request)

    async def endpoint(request: Request) -> Response:
        for _ in range(3):
            await side_by_side_in_a_task_group(request)
            await anyio.sleep(0.01)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child, request)
            tasks.start_soon(child, request)
        return PlainTextResponse("done")

    stayed = await post(starlette(endpoint), server)
    assert stayed.body == b"done"
    assert sorted(work.events) == ["begun", "begun", "clean", "clean", "done", "done"]
    work.events.clear()
    left = await post(starlette(endpoint), server, 3 * (LONGER_THAN_GRACE + 0.01) + DISCONNECT_AFTER)
    assert sorted(work.events) == ["begun", "begun", "cancelled", "cancelled", "clean", "clean"]
    assert left.seconds_after_leave is not None
    assert left.seconds_after_leave < AT_ONCE

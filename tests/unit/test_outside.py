"""Cancellation from outside: it is passed on, it replaces no result, and cleanup can await."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import fastapi
import pytest
from anyio.lowlevel import checkpoint
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Scope

from cancelonleave import cancel_on_disconnect
from tests.shared.annotated_endpoints import Guard
from tests.shared.asking import LONGER_THAN_GRACE, TRUSTS_SEND, undecorated
from tests.shared.virtual_time import anyio_backend as anyio_backend

pytestmark = pytest.mark.anyio

VERSIONS = ("2.0", "2.3", "2.4")
LASTING = (0, 0.001, LONGER_THAN_GRACE)  # seconds; a watch has begun after the last of these
GUARDS = pytest.mark.parametrize("guard", [undecorated, cancel_on_disconnect], ids=["plain", "decorated"])
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio", "uvloop"], indirect=True)


def scope_of(version: str) -> Scope:
    return {
        "type": "http",
        "method": "GET",
        "path": "/",
        "query_string": b"",
        "headers": [],
        "asgi": {"version": "3.0", "spec_version": version},
    }


def request_of(version: str) -> Request:
    """Return a request whose client stays."""
    messages: list[Message] = [{"type": "http.request", "body": b"body", "more_body": False}]

    async def receive() -> Message:
        if not messages:
            await anyio.sleep_forever()
        return messages.pop()

    return Request(scope_of(version), receive)


async def waits(request: Request, seconds: float) -> None:
    await anyio.sleep(seconds)


async def reads(request: Request, seconds: float) -> None:
    await anyio.sleep(seconds)
    assert await request.body() == b"body"


async def helped(request: Request, seconds: float) -> None:
    await cancel_on_disconnect(waits)(request, seconds)


Before = Callable[[Request, float], Awaitable[None]]
BEFORE: tuple[Before, ...] = (waits, reads, helped)


# A cancellation that is due as the endpoint returns.


@GUARDS
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("seconds", LASTING)
@pytest.mark.parametrize("version", VERSIONS)
async def test_an_outer_scope_cancelled_as_the_endpoint_returns_keeps_its_result(
    guard: Guard, before: Before, seconds: float, version: str
) -> None:
    @guard
    async def endpoint(request: Request) -> str:
        await before(request, seconds)
        scope.cancel()
        return "result"

    results: list[object] = []
    with anyio.fail_after(5), anyio.CancelScope() as scope:
        results.append(await endpoint(request_of(version)))
        await checkpoint()
    assert results == ["result"]
    assert scope.cancelled_caught


@GUARDS
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("seconds", LASTING)
@pytest.mark.parametrize("version", VERSIONS)
async def test_an_outer_deadline_that_passes_as_the_endpoint_returns_keeps_its_result(
    guard: Guard, before: Before, seconds: float, version: str
) -> None:
    @guard
    async def endpoint(request: Request) -> str:
        await before(request, seconds)
        scope.deadline = anyio.current_time()
        return "result"

    results: list[object] = []
    with anyio.fail_after(5), anyio.CancelScope() as scope:
        results.append(await endpoint(request_of(version)))
    assert results == ["result"]


@GUARDS
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("seconds", LASTING)
@pytest.mark.parametrize("version", VERSIONS)
@on_asyncio
async def test_an_asyncio_timeout_that_passes_as_the_endpoint_returns_keeps_its_result(
    guard: Guard, before: Before, seconds: float, version: str
) -> None:
    @guard
    async def endpoint(request: Request) -> str:
        await before(request, seconds)
        timeout.reschedule(asyncio.get_running_loop().time())
        return "result"

    results: list[object] = []
    async with asyncio.timeout(None) as timeout:
        results.append(await endpoint(request_of(version)))
    assert results == ["result"]
    assert not timeout.expired()
    assert current_task().cancelling() == 0


@GUARDS
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("seconds", LASTING)
@pytest.mark.parametrize("version", VERSIONS)
@on_asyncio
async def test_a_task_that_cancels_itself_as_its_endpoint_returns_gets_the_result_first(
    guard: Guard, before: Before, seconds: float, version: str
) -> None:
    @guard
    async def endpoint(request: Request) -> str:
        await before(request, seconds)
        current_task().cancel()
        return "result"

    async def call() -> None:
        results.append(await endpoint(request_of(version)))
        results.append(current_task().cancelling())
        await checkpoint()

    results: list[object] = []
    task = asyncio.create_task(call())
    with anyio.fail_after(5):
        await asyncio.wait([task])
    assert results == ["result", 1]
    assert task.cancelled()


@GUARDS
@pytest.mark.parametrize("seconds", LASTING)
@pytest.mark.parametrize("version", VERSIONS)
@on_asyncio
async def test_an_error_raised_by_a_just_cancelled_endpoint_is_raised_before_the_cancellation(
    guard: Guard, seconds: float, version: str
) -> None:
    @guard
    async def endpoint(request: Request) -> None:
        await waits(request, seconds)
        current_task().cancel()
        raise LookupError

    async def call() -> None:
        with pytest.raises(LookupError):
            await endpoint(request_of(version))
        results.append(current_task().cancelling())
        await checkpoint()

    results: list[object] = []
    task = asyncio.create_task(call())
    with anyio.fail_after(5):
        await asyncio.wait([task])
    assert results == [1]
    assert task.cancelled()


def current_task() -> asyncio.Task[Any]:  # Any: tasks with any result
    task = asyncio.current_task()
    assert task is not None
    return task


# A cancellation while a generator produces its next chunk.


class Chunks:
    """A generator that is cancelled at some point, and then awaits something in its cleanup."""

    def __init__(self, *, chunks: int) -> None:
        self.events: list[str] = []
        self.waits = anyio.Event()
        self.chunks = chunks

    async def __call__(self) -> AsyncIterator[str]:
        try:
            for number in range(self.chunks):
                yield f"{number}"
            self.waits.set()
            await anyio.sleep_forever()
        except asyncio.CancelledError:
            self.events.append("cancelled")
            raise
        finally:
            await anyio.sleep(0.01)
            await checkpoint()
            self.events.append("clean")


def streaming_response(chunks: Chunks, guard: Guard) -> ASGIApp:
    @guard
    async def endpoint(request: Request) -> Response:
        return StreamingResponse(chunks())

    return Starlette(routes=[Route("/", endpoint)])


def generator_endpoint(chunks: Chunks, guard: Any) -> ASGIApp:  # Any: a Guard that also accepts generator functions
    app = FastAPI()
    app.get("/", response_class=StreamingResponse)(guard(chunks.__call__))
    return app


Kind = Callable[[Chunks, Guard], ASGIApp]
has_generators = pytest.mark.skipif(not hasattr(fastapi, "sse"), reason="FastAPI 0.134 and newer")
KINDS = [
    streaming_response,
    pytest.param(generator_endpoint, marks=has_generators),
]


async def serve(app: ASGIApp, version: str) -> None:
    """Run an application for a client that stays."""

    async def send(message: Message) -> None:
        await checkpoint()

    await app(scope_of(version), request_of(version).receive, send)


async def cancel(task: asyncio.Task[None], own: set[asyncio.Task[Any]] | None = None) -> None:
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def cancel_all(task: asyncio.Task[None], own: set[asyncio.Task[Any]]) -> None:
    """Cancel all tasks except the test's own, as `asyncio.run()` does when it ends."""
    for each in asyncio.all_tasks() - own:
        each.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


@pytest.mark.parametrize("chunks", [0, 1, 10])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("way", [cancel, cancel_all])
@on_asyncio
async def test_a_generator_cancelled_from_outside_can_finish_its_cleanup(
    kind: Kind,
    chunks: int,
    version: str,
    way: Callable[[asyncio.Task[None], set[asyncio.Task[Any]]], Awaitable[None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "cancelonleave")
    generator = Chunks(chunks=chunks)
    with anyio.fail_after(10):
        own = asyncio.all_tasks()
        task = asyncio.create_task(serve(kind(generator, cancel_on_disconnect), version))
        await generator.waits.wait()
        await anyio.sleep(LONGER_THAN_GRACE)
        await way(task, own)
    assert generator.events == ["cancelled", "clean"]
    assert caplog.records == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", VERSIONS)
@on_asyncio
async def test_a_generator_cancelled_by_an_asyncio_timeout_can_finish_its_cleanup(kind: Kind, version: str) -> None:
    generator = Chunks(chunks=1)
    with anyio.fail_after(10), pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await serve(kind(generator, cancel_on_disconnect), version)
    assert generator.events == ["cancelled", "clean"]
    assert current_task().cancelling() == 0


@pytest.mark.skipif(not TRUSTS_SEND, reason="Starlette 0.42 and newer wait in no task group on ASGI 2.4")
@on_asyncio
async def test_an_undecorated_generator_can_finish_its_cleanup_on_asgi_2_4() -> None:
    generator = Chunks(chunks=1)
    with anyio.fail_after(10):
        task = asyncio.create_task(serve(streaming_response(generator, undecorated), "2.4"))
        await generator.waits.wait()
        await cancel(task)
    assert generator.events == ["cancelled", "clean"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", VERSIONS)
@on_asyncio
async def test_a_second_cancellation_from_outside_interrupts_cleanup_as_it_does_undecorated(
    kind: Kind, version: str
) -> None:
    generator = Chunks(chunks=1)
    with anyio.fail_after(10):
        task = asyncio.create_task(serve(kind(generator, cancel_on_disconnect), version))
        await generator.waits.wait()
        task.cancel()
        await anyio.sleep(0.005)
        assert generator.events == ["cancelled"]
        await cancel(task)
    assert generator.events == ["cancelled"]


@pytest.mark.parametrize("version", VERSIONS)
@on_asyncio
async def test_an_endpoint_cancelled_from_outside_while_it_waits_can_finish_its_cleanup(version: str) -> None:
    events: list[str] = []

    @cancel_on_disconnect
    async def endpoint(request: Request) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0.01)
            events.append("clean")

    with anyio.fail_after(10):
        task = asyncio.create_task(endpoint(request_of(version)))
        await anyio.sleep(LONGER_THAN_GRACE)
        await cancel(task)
    assert events == ["clean"]

"""Children: tasks that an endpoint starts, and that read its request or call decorated functions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import nullcontext, suppress
from typing import Any
from weakref import WeakSet

import anyio
import pytest
from anyio.abc import ObjectSendStream
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from cancelonleave import ClientClosedRequest, cancel_on_disconnect
from cancelonleave.testing import SERVERS, Exchange
from tests.shared.annotated_endpoints import Endpoint, Guard
from tests.shared.asking import ask, on_trio, undecorated
from tests.shared.virtual_time import anyio_backend as anyio_backend

pytestmark = pytest.mark.anyio

ALL_SERVERS = ("strict", *SERVERS)
DISCONNECT_AFTER = 0.2  # seconds
ABOUT_A_SECOND = 1.2
AT_ONCE = 0.1
Child = Callable[[], Coroutine[Any, Any, None]]  # Any: coroutines' own types for what tasks ignore
Way = Callable[[Child], Awaitable[None]]
Read = Callable[[Request], Awaitable[None]]
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio", "uvloop"], indirect=True)


def application(endpoint: Endpoint) -> Starlette:
    return Starlette(routes=[Route("/", endpoint, methods=["POST"])])


async def upload_that_breaks_off(endpoint: Endpoint, server: str = "strict") -> Exchange:
    async def chunks() -> AsyncIterator[bytes]:
        for chunk in (b"a", b"b", b"c"):
            yield chunk
            await anyio.sleep(0.03)
        await anyio.sleep_forever()

    # daphne starts the application once the whole body has arrived, so this body ends, and then the client waits.
    content = b"abc" if server == "daphne" else chunks()
    with anyio.fail_after(30):
        return await ask(
            application(endpoint), method="POST", server=server, content=content, leave_after=DISCONNECT_AFTER
        )


async def clean_up(seconds: float = 0.01) -> None:
    with anyio.CancelScope(shield=on_trio()):
        await anyio.sleep(seconds)


class Notes:
    """What happened, in order."""

    def __init__(self) -> None:
        self.child: list[str] = []
        self.endpoint: list[str] = []


# What a child does with the request.


async def streams(request: Request) -> None:
    async for _ in request.stream():
        pass
    await request.receive()  # if the whole body had arrived, the disconnect comes next
    raise ClientDisconnect


async def receives(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def asks(request: Request) -> None:
    while not await request.is_disconnected():
        await anyio.sleep(0.01)


async def helps(request: Request) -> None:
    await cancel_on_disconnect(streams)(request)


# How an endpoint starts a child, and waits for the child and something else.


async def beside_others_of_gather(child: Child) -> None:
    await asyncio.gather(child(), anyio.sleep_forever(), return_exceptions=True)


async def in_a_task_group_of_asyncio(child: Child) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(child())
        await anyio.sleep_forever()


async def in_a_task_and_a_queue(child: Child) -> None:
    queue: asyncio.Queue[bytes] = asyncio.Queue()
    task = asyncio.create_task(child())
    try:
        await queue.get()
    finally:
        await asyncio.wait([task])
        with suppress(ClientDisconnect):
            task.result()


forgotten: WeakSet[asyncio.Task[None]] = WeakSet()


async def in_a_task_that_it_forgets(child: Child) -> None:
    async def quiet() -> None:
        with suppress(ClientDisconnect):
            await child()

    forgotten.add(asyncio.create_task(quiet()))
    await anyio.sleep_forever()


async def in_a_task_group_of_anyio(child: Child) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(child)
        await anyio.sleep_forever()


ASYNCIO_WAYS = (
    beside_others_of_gather,
    in_a_task_group_of_asyncio,
    in_a_task_and_a_queue,
    in_a_task_group_of_anyio,
)


def endpoint_with(notes: Notes, way: Way, read: Read) -> Endpoint:
    """Return a decorated endpoint whose child reads its request, and which would wait forever itself."""

    @cancel_on_disconnect
    async def endpoint(request: Request) -> None:
        async def child() -> None:
            try:
                await read(request)
            except BaseException as error:
                notes.child.append(type(error).__name__)
                raise
            notes.child.append("disconnected")

        try:
            await way(child)
        finally:
            await clean_up()
            notes.endpoint.append("clean")

    return endpoint


@pytest.mark.parametrize(("read", "end"), [(streams, "ClientDisconnect"), (receives, "disconnected")])
@pytest.mark.parametrize("way", ASYNCIO_WAYS)
@pytest.mark.parametrize("server", ALL_SERVERS)
@on_asyncio
async def test_an_endpoint_whose_child_reads_the_disconnect_ends_in_about_a_second(
    way: Way, read: Read, end: str, server: str
) -> None:
    notes = Notes()
    exchange = await upload_that_breaks_off(endpoint_with(notes, way, read), server)
    assert exchange.status == 499
    assert exchange.seconds_after_leave is not None
    assert exchange.seconds_after_leave < ABOUT_A_SECOND
    assert notes.child == [end]
    assert notes.endpoint == ["clean"]


@pytest.mark.parametrize(("read", "end"), [(streams, "ClientDisconnect"), (receives, "disconnected")])
@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_an_endpoint_whose_child_in_an_anyio_task_group_reads_the_disconnect_ends_in_about_a_second(
    read: Read, end: str, server: str
) -> None:
    notes = Notes()
    exchange = await upload_that_breaks_off(endpoint_with(notes, in_a_task_group_of_anyio, read), server)
    assert exchange.status == 499
    assert exchange.seconds_after_leave is not None
    assert exchange.seconds_after_leave < ABOUT_A_SECOND
    assert notes.child == [end]
    assert notes.endpoint == ["clean"]


@pytest.mark.parametrize("way", [in_a_task_group_of_asyncio, in_a_task_group_of_anyio])
@on_asyncio
async def test_an_endpoint_that_learns_of_the_disconnect_from_its_child_ends_at_once(way: Way) -> None:
    exchange = await upload_that_breaks_off(endpoint_with(Notes(), way, streams))
    assert exchange.status == 499
    assert exchange.seconds_after_leave is not None
    assert exchange.seconds_after_leave < AT_ONCE


@on_asyncio
async def test_an_endpoint_that_gathers_a_reading_child_ends_at_once() -> None:
    async def gathered(child: Child) -> None:
        await asyncio.gather(child(), asyncio.sleep(DISCONNECT_AFTER))

    notes = Notes()
    exchange = await upload_that_breaks_off(endpoint_with(notes, gathered, streams))
    assert exchange.status == 499
    assert exchange.seconds_after_leave is not None
    assert exchange.seconds_after_leave < AT_ONCE
    assert notes.child == ["ClientDisconnect"]


@on_asyncio
async def test_an_endpoint_that_gathers_two_reading_children_ends_at_once() -> None:
    notes = Notes()

    async def gathered(child: Child) -> None:
        await asyncio.gather(child(), child())

    exchange = await upload_that_breaks_off(endpoint_with(notes, gathered, receives_and_raises))
    assert exchange.status == 499
    assert exchange.seconds_after_leave is not None
    assert exchange.seconds_after_leave < AT_ONCE
    assert notes.child == ["ClientDisconnect"] * 2


async def receives_and_raises(request: Request) -> None:
    await receives(request)
    raise ClientDisconnect


@pytest.mark.parametrize("way", ASYNCIO_WAYS)
@on_asyncio
async def test_a_child_that_calls_is_disconnected_does_not_delay_the_cancellation_of_its_endpoint(way: Way) -> None:
    notes = Notes()
    exchange = await upload_that_breaks_off(endpoint_with(notes, way, asks))
    assert exchange.status == 499
    assert exchange.seconds_after_leave is not None
    assert exchange.seconds_after_leave < ABOUT_A_SECOND
    assert len(notes.child) == 1
    assert notes.endpoint == ["clean"]


@pytest.mark.parametrize("way", [*ASYNCIO_WAYS, in_a_task_that_it_forgets])
@on_asyncio
async def test_a_child_that_reads_in_a_decorated_helper_does_not_delay_the_cancellation_of_its_endpoint(
    way: Way,
) -> None:
    notes = Notes()
    exchange = await upload_that_breaks_off(endpoint_with(notes, way, helps))
    assert exchange.status == 499
    assert exchange.seconds_after_leave is not None
    assert exchange.seconds_after_leave < ABOUT_A_SECOND
    assert notes.child == ["ClientClosedRequest"]
    assert notes.endpoint == ["clean"]


async def test_a_child_in_an_anyio_task_group_does_not_delay_the_cancellation_of_its_endpoint() -> None:
    for read, ends in ((asks, {"disconnected", "CancelledError", "Cancelled"}), (helps, {"ClientClosedRequest"})):
        notes = Notes()
        exchange = await upload_that_breaks_off(endpoint_with(notes, in_a_task_group_of_anyio, read))
        assert exchange.status == 499
        assert exchange.seconds_after_leave is not None
        assert exchange.seconds_after_leave < ABOUT_A_SECOND
        assert set(notes.child) <= ends
        assert len(notes.child) == 1
        assert notes.endpoint == ["clean"]


async def waits_for_the_task(child: Child) -> None:
    await asyncio.create_task(child())


async def gathers(child: Child) -> None:
    await asyncio.gather(child())


@pytest.mark.parametrize("way", [waits_for_the_task, gathers, in_a_task_group_of_asyncio, in_a_task_group_of_anyio])
@on_asyncio
async def test_a_child_that_has_read_the_disconnect_finishes_its_cleanup_before_its_endpoint_ends(way: Way) -> None:
    notes = Notes()

    async def reads_and_cleans_up(request: Request) -> None:
        try:
            await streams(request)
        finally:
            notes.child.append("cleaning up")
            await anyio.sleep(0.5)
            notes.child.append("clean")

    exchange = await upload_that_breaks_off(endpoint_with(notes, way, reads_and_cleans_up))
    assert exchange.status == 499
    assert exchange.seconds_after_leave == pytest.approx(0.51, abs=0.02)
    assert notes.child == ["cleaning up", "clean", "ClientDisconnect"]


@pytest.mark.parametrize("guard", [undecorated, cancel_on_disconnect], ids=["plain", "decorated"])
async def test_a_decorated_helper_beside_a_child_that_reads_is_cancelled(guard: Guard) -> None:
    notes = Notes()

    @cancel_on_disconnect
    async def helper(request: Request) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            await clean_up()
            notes.child.append("clean")

    @guard
    async def endpoint(request: Request) -> Response:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receives, request)
            with suppress(ClientClosedRequest):
                await helper(request)
        return PlainTextResponse("stopped", 499)

    exchange = await upload_that_breaks_off(endpoint)
    assert exchange.status == 499
    assert exchange.seconds_after_leave is not None
    assert exchange.seconds_after_leave < ABOUT_A_SECOND
    assert notes.child == ["clean"]


# Streams that send while a child reads the request.


async def read_for(request: Request, notes: Notes, chunks: ObjectSendStream[bytes], *, is_loud: bool) -> None:
    with nullcontext() if is_loud else suppress(ClientDisconnect):
        try:
            async for chunk in request.stream():
                await chunks.send(chunk)
            await receives_and_raises(request)
        except BaseException as error:
            notes.child.append(type(error).__name__)
            raise


async def echo_by_a_task_group(request: Request, notes: Notes, *, is_loud: bool) -> AsyncGenerator[bytes]:
    send, receive = anyio.create_memory_object_stream[bytes]()
    with send, receive:
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: read_for(request, notes, send, is_loud=is_loud))
                async for chunk in receive:
                    yield chunk
        finally:
            await clean_up()
            notes.endpoint.append("clean")


async def echo_by_a_task(request: Request, notes: Notes, *, is_loud: bool) -> AsyncGenerator[bytes]:
    send, receive = anyio.create_memory_object_stream[bytes]()
    task = asyncio.create_task(read_for(request, notes, send, is_loud=is_loud))
    with send, receive:
        try:
            async for chunk in receive:
                yield chunk
        finally:
            await asyncio.wait([task])
            with suppress(ClientDisconnect):
                task.result()
            notes.endpoint.append("clean")


async def duplex(make: Callable[..., AsyncGenerator[bytes]], server: str, *, is_loud: bool) -> None:
    notes = Notes()

    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        return StreamingResponse(make(request, notes, is_loud=is_loud))

    exchange = await upload_that_breaks_off(endpoint, server)
    assert exchange.status == 200
    assert exchange.body == b"abc"
    assert not exchange.complete
    assert exchange.seconds_after_leave is not None
    assert exchange.seconds_after_leave < ABOUT_A_SECOND
    assert notes.child == ["ClientDisconnect"]
    assert notes.endpoint == ["clean"]


@pytest.mark.parametrize("is_loud", [False, True], ids=["catches it", "raises"])
@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_a_stream_ends_when_its_child_in_a_task_group_reads_the_disconnect(server: str, is_loud: bool) -> None:
    await duplex(echo_by_a_task_group, server, is_loud=is_loud)


@pytest.mark.parametrize("is_loud", [False, True], ids=["catches it", "raises"])
@pytest.mark.parametrize("server", ALL_SERVERS)
@on_asyncio
async def test_a_stream_ends_when_its_task_reads_the_disconnect(server: str, is_loud: bool) -> None:
    await duplex(echo_by_a_task, server, is_loud=is_loud)


@pytest.mark.parametrize("server", ALL_SERVERS)
@on_asyncio
async def test_a_stream_ends_when_a_task_that_its_endpoint_started_reads_the_disconnect(server: str) -> None:
    notes = Notes()

    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        send, receive = anyio.create_memory_object_stream[bytes]()
        task = asyncio.create_task(read_for(request, notes, send, is_loud=False))

        async def chunks() -> AsyncIterator[bytes]:
            with send, receive:
                try:
                    async for chunk in receive:
                        yield chunk
                finally:
                    await task
                    notes.endpoint.append("clean")

        return StreamingResponse(chunks())

    exchange = await upload_that_breaks_off(endpoint, server)
    assert exchange.status == 200
    assert exchange.body == b"abc"
    assert not exchange.complete
    assert exchange.seconds_after_leave is not None
    assert exchange.seconds_after_leave < ABOUT_A_SECOND
    assert notes.child == ["ClientDisconnect"]
    assert notes.endpoint == ["clean"]


# Decorated helpers in children.


class Helper:
    """A decorated function that works for a long time, and records what happens to it."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.ended_at = 0.0
        self.call = cancel_on_disconnect(self._work)

    async def _work(self, request: Request) -> None:
        try:
            await anyio.sleep(60)
        except anyio.get_cancelled_exc_class():
            self.events.append("cancelled")
            raise
        finally:
            await clean_up()
            self.events.append("clean")

    async def call_and_note(self, request: Request) -> None:
        began = anyio.current_time()
        try:
            await self.call(request)
        except BaseException as error:
            self.events.append(type(error).__name__)
        self.ended_at = anyio.current_time() - began

    def assert_ended(self) -> None:
        assert self.events == ["cancelled", "clean", "ClientClosedRequest"]
        assert self.ended_at < DISCONNECT_AFTER + AT_ONCE


Use = Callable[[Helper, Request], Awaitable[None]]


async def in_a_task_that_cleanup_waits_for(helper: Helper, request: Request) -> None:
    task = asyncio.create_task(helper.call_and_note(request))
    try:
        await asyncio.sleep(1)
    finally:
        await asyncio.wait([task])


async def in_a_task_that_it_shields(helper: Helper, request: Request) -> None:
    task = asyncio.create_task(helper.call_and_note(request))
    try:
        await asyncio.shield(task)
        await asyncio.sleep(1)
    finally:
        await task


async def in_gather_in_a_shield(helper: Helper, request: Request) -> None:
    with anyio.CancelScope(shield=True):
        await asyncio.gather(helper.call_and_note(request), asyncio.sleep(0.05))
    await anyio.sleep(1)


async def in_a_task_group_of_asyncio_in_a_shield(helper: Helper, request: Request) -> None:
    with anyio.CancelScope(shield=True):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(helper.call_and_note(request))
    await anyio.sleep(1)


async def in_a_task_group_in_a_shield(helper: Helper, request: Request) -> None:
    with anyio.CancelScope(shield=True):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(helper.call_and_note, request)
    await anyio.sleep(1)


async def in_a_shield_in_a_task_group(helper: Helper, request: Request) -> None:
    async def child() -> None:
        with anyio.CancelScope(shield=True):
            await helper.call_and_note(request)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(child)
        await anyio.sleep(1)


async def in_a_task_group_of_its_cleanup(helper: Helper, request: Request) -> None:
    try:
        await anyio.sleep(DISCONNECT_AFTER / 2)
    finally:
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(helper.call_and_note, request)
    await anyio.sleep(1)


ON_ALL = (in_a_task_group_in_a_shield, in_a_shield_in_a_task_group, in_a_task_group_of_its_cleanup)
ON_ASYNCIO = (
    in_a_task_that_cleanup_waits_for,
    in_a_task_that_it_shields,
    in_gather_in_a_shield,
    in_a_task_group_of_asyncio_in_a_shield,
)


async def helped(use: Use, guard: Guard, server: str) -> None:
    helper = Helper()

    @guard
    async def endpoint(request: Request) -> Response:
        await use(helper, request)
        return PlainTextResponse("worked on")

    exchange = await upload_that_breaks_off(endpoint, server)
    assert exchange.seconds_after_leave is not None
    if guard is undecorated:
        assert exchange.body == b"worked on"
        assert exchange.seconds_after_leave < ABOUT_A_SECOND
    else:
        assert exchange.status == 499
        assert exchange.seconds_after_leave < AT_ONCE
    helper.assert_ended()


@pytest.mark.parametrize("guard", [undecorated, cancel_on_disconnect], ids=["plain", "decorated"])
@pytest.mark.parametrize("use", ON_ALL)
@pytest.mark.parametrize("server", ["strict", "uvicorn"])
async def test_a_decorated_helper_in_a_child_is_cancelled_at_once(use: Use, guard: Guard, server: str) -> None:
    await helped(use, guard, server)


@pytest.mark.parametrize("guard", [undecorated, cancel_on_disconnect], ids=["plain", "decorated"])
@pytest.mark.parametrize("use", ON_ASYNCIO)
@pytest.mark.parametrize("server", ["strict", "uvicorn"])
@on_asyncio
async def test_a_decorated_helper_in_an_asyncio_child_is_cancelled_at_once(use: Use, guard: Guard, server: str) -> None:
    await helped(use, guard, server)


@pytest.mark.parametrize("count", [2, 10])
@on_asyncio
async def test_many_helpers_that_cleanup_waits_for_are_cancelled_at_once(count: int) -> None:
    helpers = [Helper() for _ in range(count)]

    @cancel_on_disconnect
    async def endpoint(request: Request) -> None:
        tasks = [asyncio.create_task(helper.call_and_note(request)) for helper in helpers]
        try:
            await anyio.sleep_forever()
        finally:
            await asyncio.wait(tasks)

    exchange = await upload_that_breaks_off(endpoint)
    assert exchange.status == 499
    assert exchange.seconds_after_leave is not None
    assert exchange.seconds_after_leave < AT_ONCE
    for helper in helpers:
        helper.assert_ended()

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import anyio
import pytest
import trio
from anyio.lowlevel import checkpoint
from starlette.requests import Request
from starlette.types import Message, Receive

from cancelonleave._endpoint import guard
from cancelonleave._loop import GRACE, Loop, loop_of
from cancelonleave._receive import PAUSE, READ_AHEAD, Reader
from cancelonleave._trio import _loop_of
from cancelonleave._watch import Watch, watch_of
from tests.shared.asking import on_trio
from tests.shared.receiving import Receiving
from tests.shared.virtual_time import anyio_backend as anyio_backend

pytestmark = pytest.mark.anyio

ReaderT = TypeVar("ReaderT", bound=Reader)
DISCONNECT: Message = {"type": "http.disconnect"}
SCOPE: dict[str, Any] = {"type": "http", "method": "POST", "path": "/", "headers": []}  # Any: as ASGI has it
EXPECTING = {**SCOPE, "headers": [(b"host", b"test"), (b"expect", b"100-continue")]}
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio", "uvloop"], indirect=True)
MALFORMED: Message = {"no": "type"}


def body(data: bytes, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": data, "more_body": more}


class Server:
    """Returns its messages, raises its exceptions, then waits until `gone` is set and reports the disconnect."""

    def __init__(self, *messages: Message | Exception) -> None:
        self.messages = list(messages)
        self.calls = 0
        self.pending = self.most_pending = 0
        self.gone = anyio.Event()

    async def receive(self) -> Message:
        self.calls += 1
        self.pending += 1
        self.most_pending = max(self.most_pending, self.pending)
        try:
            await checkpoint()
            if not self.messages:
                await self.gone.wait()
                return DISCONNECT
            message = self.messages.pop(0)
            if isinstance(message, Exception):
                raise message
            return message
        finally:
            self.pending -= 1


class Cancelled:
    """Ends at once, like a receive() whose own future has been cancelled."""

    def __init__(self, *, times: int) -> None:
        self.times = times
        self.calls = 0

    async def receive(self) -> Message:
        self.calls += 1
        if self.calls <= self.times:
            raise asyncio.CancelledError
        return DISCONNECT


def current_loop() -> Loop:
    return _loop_of(trio.lowlevel.current_trio_token()) if on_trio() else loop_of(asyncio.get_running_loop())


def make(
    kind: Callable[[Receive, dict[str, Any]], ReaderT],
    receive: Receive,
    scope: dict[str, Any] = SCOPE,
) -> ReaderT:
    reader = kind(receive, scope)
    reader.loop = current_loop()
    return reader


async def taken(reader: Reader) -> Message:
    with anyio.fail_after(5):
        return await reader.next_message()


async def some_turns() -> None:
    await anyio.sleep(GRACE)  # virtual time: this lasts until nothing else can run, or a hundred turns have passed


@contextmanager
def reading_ahead(reader: Reader) -> Generator[None]:
    reader.may_read_ahead = True
    reader.read_ahead(None)
    try:
        yield
    finally:
        reader.stop_reading_ahead()


# Which reader gets which message, and in which order.


async def test_a_reader_that_does_not_read_ahead_receives_only_when_asked() -> None:
    server = Server(body(b"a", more=True), body(b"b"))
    reader = make(Reader, server.receive)
    await some_turns()
    assert server.calls == 0
    assert await taken(reader) == body(b"a", more=True)
    await some_turns()
    assert server.calls == 1
    assert await taken(reader) == body(b"b")
    assert server.calls == 2


class Queue:
    """Returns the messages that were put into it."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._changed = anyio.Event()

    def put(self, *messages: Message) -> None:
        self._messages += messages
        self._changed.set()

    async def receive(self) -> Message:
        while not self._messages:
            self._changed = anyio.Event()
            await self._changed.wait()
        return self._messages.pop(0)


async def test_a_message_that_comes_together_with_the_disconnect_is_delivered_before_it() -> None:
    queue = Queue()
    reader = make(Reader, queue.receive)
    received: list[Message] = []

    async def receive_two() -> None:
        received.extend([await taken(reader), await taken(reader)])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive_two)
        await some_turns()
        with reading_ahead(reader):
            queue.put(body(b"last"), DISCONNECT)
            await some_turns()
    assert received == [body(b"last"), DISCONNECT]


async def test_a_question_is_answered_although_another_task_reads_the_last_message_meanwhile() -> None:
    queue = Queue()
    reader = make(Reader, queue.receive)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(taken, reader)
        await some_turns()
        queue.put(body(b"last"), DISCONNECT)
        assert await reader.ask() == DISCONNECT


async def test_reading_ahead_that_begins_during_a_question_goes_on_after_it() -> None:
    server = Server(body(b"whole"))
    reader = make(Reader, server.receive)
    await taken(reader)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reader.ask)
        await checkpoint()
        with reading_ahead(reader):
            await some_turns()
            server.gone.set()
            await some_turns()
            assert reader.disconnect == DISCONNECT


async def test_messages_read_ahead_are_delivered_in_order_and_before_the_disconnect() -> None:
    messages = [body(b"a", more=True), body(b"", more=True), body(b"b", more=True), body(b"")]
    server = Server(*messages)
    reader = make(Reader, server.receive)
    with reading_ahead(reader):
        server.gone.set()
        with anyio.fail_after(5):
            await reader.wait_for_disconnect()
        assert [await taken(reader) for _ in messages] == messages
        assert await taken(reader) == DISCONNECT
    assert await taken(reader) == DISCONNECT
    assert reader.disconnect == DISCONNECT
    assert server.calls == 5


async def test_a_disconnect_that_the_server_reports_only_once_is_remembered() -> None:
    server = Server(body(b""), DISCONNECT)
    reader = make(Reader, server.receive)
    assert [await taken(reader) for _ in range(4)] == [body(b""), *[DISCONNECT] * 3]
    assert await reader.ask() == DISCONNECT
    assert server.calls == 2


async def test_each_reader_of_an_empty_end_of_the_body_gets_its_own_message() -> None:
    first = make(Reader, Server(body(b"")).receive)
    second = make(Reader, Server(body(b"")).receive)
    (await taken(first))["body"] = b"changed"
    assert await taken(second) == body(b"")


async def test_a_call_that_is_reading_gets_the_disconnect_before_it_would_be_cancelled() -> None:
    server = Server(body(b""))
    request = Request(SCOPE, server.receive)
    seen: list[Message] = []

    async def disconnect() -> None:
        await anyio.sleep(GRACE * 4)
        server.gone.set()

    with anyio.fail_after(5):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(disconnect)
            with guard(watch_of(request), request):
                seen += [await request.receive() for _ in range(2)]
                await anyio.sleep(GRACE * 4)
    assert seen == [body(b""), DISCONNECT]


async def test_two_readers_share_the_messages_and_both_get_the_disconnect() -> None:
    server = Server(body(b"a", more=True), body(b"b"))
    reader = make(Reader, server.receive)
    got: list[Message] = []
    disconnects = 0

    async def read() -> None:
        nonlocal disconnects
        while (message := await reader.next_message()) != DISCONNECT:
            got.append(message)
        disconnects += 1

    with anyio.fail_after(5):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(read)
            task_group.start_soon(read)
            await some_turns()
            server.gone.set()
    assert got == [body(b"a", more=True), body(b"b")]
    assert disconnects == 2
    assert (server.calls, server.most_pending) == (3, 1)


async def test_a_pending_read_goes_on_when_reading_ahead_ends() -> None:
    server = Server(body(b""))
    reader = make(Reader, server.receive)
    assert await taken(reader) == body(b"")
    async with anyio.create_task_group() as task_group:
        with reading_ahead(reader):
            task_group.start_soon(taken, reader)
            await some_turns()
        await some_turns()
        assert (server.calls, server.pending) == (2, 1)
        server.gone.set()
    assert reader.disconnect == DISCONNECT


async def test_messages_of_unknown_type_are_passed_on() -> None:
    unknown: Message = {"type": "http.early"}
    reader = make(Reader, Server(unknown, body(b"a")).receive)
    assert await taken(reader) == unknown
    assert await taken(reader) == body(b"a")


# Readers that are cancelled.


async def test_a_cancelled_reader_loses_nothing() -> None:
    server = Server()
    reader = make(Reader, server.receive)
    with reading_ahead(reader):
        with anyio.move_on_after(GRACE) as scope:
            await reader.next_message()
        assert scope.cancelled_caught
        server.gone.set()
        assert await taken(reader) == DISCONNECT
    assert server.calls == 1


@pytest.mark.parametrize("more", [True, False])
async def test_a_cancelled_reader_loses_nothing_on_servers_where_cancelling_receive_loses_body(more: bool) -> None:
    server = Server(body(b"a", more=more))
    reader = make(Reader, lambda: Receiving(server.receive))
    assert await taken(reader) == body(b"a", more=more)
    with anyio.move_on_after(GRACE):
        await reader.next_message()
    await some_turns()
    assert server.pending == int(more)  # some servers lose body when a receive() that waits for it is cancelled
    server.gone.set()
    assert await taken(reader) == DISCONNECT
    assert server.most_pending == 1
    assert server.calls == (2 if more else 3)


async def test_a_cancelled_read_cancels_a_receive_that_is_a_coroutine_at_most_once() -> None:
    server = Server(body(b"a", more=True))
    reader = make(Reader, server.receive)
    assert await taken(reader) == body(b"a", more=True)
    with anyio.move_on_after(GRACE):
        await reader.next_message()
    assert server.pending == 0  # as without the decorator
    with anyio.move_on_after(GRACE):
        await reader.next_message()
    assert server.pending == 1
    server.gone.set()
    assert await taken(reader) == DISCONNECT
    assert server.calls == 3


async def test_a_cancelled_reader_takes_no_chunk_of_the_body() -> None:
    watch = make(Watch, Server(body(b"a")).receive)
    with reading_ahead(watch):
        await some_turns()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await watch()
        assert scope.cancelled_caught
        assert await taken(watch) == body(b"a")


async def test_a_cancelled_reader_gets_the_disconnect_even_before_the_body_is_read() -> None:
    watch = make(Watch, Server(body(b"a"), DISCONNECT).receive)
    with reading_ahead(watch):
        await some_turns()
        with anyio.CancelScope() as scope:
            scope.cancel()
            assert await watch() == DISCONNECT
        assert not scope.cancelled_caught
        assert await taken(watch) == body(b"a")


async def test_one_of_two_readers_can_be_cancelled_while_the_other_reads_on() -> None:
    server = Server(body(b""))
    reader = make(Reader, server.receive)
    assert await taken(reader) == body(b"")
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(taken, reader)
        await some_turns()
        with anyio.move_on_after(GRACE):
            await reader.next_message()
        assert (server.calls, server.pending) == (2, 1)
        server.gone.set()
    assert reader.disconnect == DISCONNECT


# Asking whether the client has disconnected.


async def test_asking_neither_waits_nor_discards_anything() -> None:
    server = Server(body(b"a", more=True), body(b"b"))
    reader = make(Reader, server.receive)
    for _ in range(3):
        assert await reader.ask() is None
    assert await taken(reader) == body(b"a", more=True)
    assert await taken(reader) == body(b"b")
    assert await reader.ask() is None
    await some_turns()
    server.gone.set()
    assert await reader.ask() == DISCONNECT
    assert server.most_pending == 1


async def test_asking_finds_the_disconnect_behind_unread_body() -> None:
    reader = make(Reader, Server(body(b"a"), DISCONNECT).receive)
    assert await reader.ask() == DISCONNECT
    assert await taken(reader) == body(b"a")
    assert await taken(reader) == DISCONNECT


async def test_asking_works_in_a_cancelled_scope_as_starlette_asks() -> None:
    server = Server(body(b""))
    request = Request(SCOPE, server.receive)
    watch_of(request).loop = current_loop()
    assert not await request.is_disconnected()
    await some_turns()
    server.gone.set()
    assert await request.is_disconnected()
    assert await taken(watch_of(request)) == body(b"")


async def test_asking_leaves_no_receive_pending_when_the_body_is_complete() -> None:
    server = Server(body(b""))
    reader = make(Reader, server.receive)
    assert await reader.ask() is None
    await some_turns()
    assert (server.calls, server.pending) == (2, 0)


async def test_asking_takes_nothing_from_reading_ahead() -> None:
    server = Server(body(b""))
    reader = make(Reader, server.receive)
    with reading_ahead(reader):
        await some_turns()
        assert await reader.ask() is None
        await some_turns()
        assert (server.calls, server.pending) == (2, 1)
        server.gone.set()
        with anyio.fail_after(5):
            await reader.wait_for_disconnect()


# Errors of receive().


async def test_an_error_of_receive_reaches_the_reader_and_does_not_end_reading_ahead() -> None:
    error = RuntimeError("too large")
    server = Server(body(b"a", more=True), error, body(b"b"))
    reader = make(Reader, server.receive)
    with reading_ahead(reader):
        await some_turns()
        assert server.calls == 2  # and no more calls until the error is read
        assert await taken(reader) == body(b"a", more=True)
        with pytest.raises(RuntimeError) as raised:
            await taken(reader)
        assert raised.value is error
        assert await taken(reader) == body(b"b")
        server.gone.set()
        with anyio.fail_after(5):
            await reader.wait_for_disconnect()


async def test_an_unread_error_of_receive_is_not_a_disconnect() -> None:
    reader = make(Reader, Server(RuntimeError("too large")).receive)
    assert await reader.ask() is None
    with pytest.raises(RuntimeError, match="too large"):
        await taken(reader)


@on_asyncio
async def test_a_cancellation_raised_by_receive_reaches_the_reader_as_undecorated() -> None:
    server = Cancelled(times=1)
    reader = make(Reader, server.receive)
    with pytest.raises(asyncio.CancelledError):
        await taken(reader)
    assert server.calls == 1
    assert await taken(reader) == DISCONNECT


@on_asyncio
async def test_a_receive_that_is_cancelled_every_time_does_not_block_the_event_loop() -> None:
    server = Cancelled(times=1000)
    reader = make(Reader, server.receive)
    with anyio.fail_after(5):
        for _ in range(5):
            with pytest.raises(asyncio.CancelledError):
                await reader.next_message()
    assert server.calls == 5


# How far it reads ahead.


@pytest.mark.parametrize("size", [READ_AHEAD // 4, 1])
async def test_reading_ahead_is_bounded_and_goes_on_when_there_is_room(size: int) -> None:
    chunks = [body(bytes(size), more=True) for _ in range(1000)]
    server = Server(*chunks)
    reader = make(Reader, server.receive)
    with reading_ahead(reader):
        for _ in range(10):
            await some_turns()
        full = server.calls
        assert full * size <= READ_AHEAD
        assert full <= 300
        assert await taken(reader) == chunks[0]
        await some_turns()
        assert server.calls == full + 1


async def test_a_reader_gets_a_chunk_if_there_is_no_room() -> None:
    chunks = [body(bytes(READ_AHEAD), more=True), body(bytes(READ_AHEAD), more=True), body(b"")]
    reader = make(Reader, Server(*chunks).receive)
    with reading_ahead(reader):
        await some_turns()
        assert [await taken(reader) for _ in chunks] == chunks


async def test_nothing_is_read_ahead_from_a_client_that_waits_for_100_continue() -> None:
    server = Server(body(b"a"))
    request = Request(EXPECTING, server.receive)
    with anyio.fail_after(5), guard(watch_of(request), request):
        await anyio.sleep(GRACE * 4)
        assert server.calls == 0
        assert await request.receive() == body(b"a")
        await some_turns()
        assert (server.calls, server.pending) == (2, 1)


async def test_a_client_that_waits_for_100_continue_is_watched_once_its_body_was_read() -> None:
    server = Server(body(b"a"))
    request = Request(EXPECTING, server.receive)
    assert await request.body() == b"a"
    with anyio.fail_after(5), guard(watch_of(request), request):
        await anyio.sleep(GRACE * 4)
        assert (server.calls, server.pending) == (2, 1)


# A receive() that never waits.


class NeverSuspends:
    """Returns the same message each time without waiting, and the disconnect from the fifth call on."""

    def __init__(self, message: Message) -> None:
        self.message = message
        self.calls = 0

    async def receive(self) -> Message:
        self.calls += 1
        return self.message if self.calls < 5 else DISCONNECT


@pytest.mark.parametrize(
    ("message", "pauses"),
    [
        (body(b""), 3),
        (body(b"", more=True), 0),
        ({"type": "http.request"}, 3),
        ({"type": "http.unknown"}, 4),
    ],
    ids=["end", "empty", "bare", "unknown"],
)
async def test_a_receive_that_never_suspends_does_not_block_the_event_loop(message: Message, pauses: int) -> None:
    server = NeverSuspends(message)
    reader = make(Reader, server.receive)
    began = anyio.current_time()
    with anyio.fail_after(5), reading_ahead(reader):
        await some_turns()
        assert server.calls == 5 - pauses
        await reader.wait_for_disconnect()
    seconds = anyio.current_time() - began
    assert seconds == pytest.approx(max(pauses * PAUSE, GRACE), abs=0.001)


async def test_a_malformed_message_is_an_error_for_every_reader() -> None:
    server = NeverSuspends(MALFORMED)
    reader = make(Reader, server.receive)
    with reading_ahead(reader):
        for _ in range(4):
            with pytest.raises(KeyError):
                await taken(reader)
        assert await taken(reader) == DISCONNECT
    assert server.calls == 5


async def test_a_reader_of_a_receive_that_never_suspends_gets_the_body_once_and_then_the_disconnect() -> None:
    gone = False

    async def receive() -> Message:
        return DISCONNECT if gone else body(b"")

    reader = make(Reader, receive)
    assert await taken(reader) == body(b"")
    with anyio.move_on_after(PAUSE / 2) as scope:
        await reader.next_message()
    assert scope.cancelled_caught
    gone = True
    assert await taken(reader) == DISCONNECT


# Whether a receive() may be cancelled.


@pytest.mark.parametrize(("version", "pending"), [("2.0", 0), ("2.3", 0), ("2.4", 1), ("2.5", 1)])
async def test_no_receive_of_gunicorn_is_cancelled_because_it_would_then_report_a_disconnect_forever(
    version: str, pending: int
) -> None:
    server = Server(body(b""))
    reader = make(Reader, server.receive, {**SCOPE, "asgi": {"spec_version": version}})
    for _ in range(3):
        with reading_ahead(reader):
            await some_turns()
            assert server.pending == 1
        await some_turns()
        assert server.pending == pending
    assert server.most_pending == 1
    assert server.calls == (2 if pending else 4)


async def test_no_receive_is_cancelled_while_more_body_may_arrive() -> None:
    server = Server(body(b"a", more=True))
    reader = make(Reader, server.receive)
    for _ in range(3):
        with reading_ahead(reader):
            await some_turns()
        await some_turns()
        assert (server.calls, server.pending) == (2, 1)


async def test_a_receive_that_goes_on_ends_with_the_reader() -> None:
    server = Server(body(b"a", more=True))
    reader = make(Reader, server.receive)
    with reading_ahead(reader):
        await some_turns()
    assert server.pending == 1
    del reader
    await some_turns()
    assert server.pending == 0


async def test_a_read_waits_until_a_cancelled_receive_has_ended() -> None:
    server = Server(body(b""))

    async def slow() -> Message:
        try:
            return await server.receive()
        finally:
            server.pending += 1
            with anyio.CancelScope(shield=True):
                await anyio.sleep(GRACE)
            server.pending -= 1

    reader = make(Reader, slow)
    with reading_ahead(reader):
        await anyio.sleep(GRACE * 2)
        assert server.calls == 2
    server.gone.set()
    assert await taken(reader) == body(b"")
    assert await taken(reader) == DISCONNECT
    assert server.most_pending == 1

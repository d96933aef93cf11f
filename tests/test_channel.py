from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from starlette.types import Message

from cancelonleave._channel import READ_AHEAD, Channel
from work import on_trio

pytestmark = pytest.mark.anyio

DISCONNECT: Message = {"type": "http.disconnect"}


SCOPE: dict[str, Any] = {"type": "http"}  # Any: as ASGI has it
EXPECTING = {**SCOPE, "headers": [(b"host", b"test"), (b"expect", b"100-continue")]}


def body(data: bytes, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": data, "more_body": more}


class Server:
    """Gives its messages, raises its exceptions, and then waits until `more` is set and tells of the disconnect."""

    def __init__(self, *messages: Message | Exception) -> None:
        self.messages = list(messages)
        self.calls = 0
        self.left = anyio.Event()

    async def receive(self) -> Message:
        self.calls += 1
        await checkpoint()
        if not self.messages:
            await self.left.wait()
            return DISCONNECT
        message = self.messages.pop(0)
        if isinstance(message, Exception):
            raise message
        return message


def unwatched() -> bool:
    return False


async def taken(channel: Channel, watched: Callable[[], bool] = unwatched) -> Message:
    with anyio.fail_after(5):
        return await channel.take(watched)


class Watching:
    """Runs a channel's watch in the background."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.task_group = anyio.create_task_group()
        self.ended = False

    async def __aenter__(self) -> Watching:
        await self.task_group.__aenter__()
        self.task_group.start_soon(self.run)
        await anyio.wait_all_tasks_blocked()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.task_group.cancel_scope.cancel()
        await self.task_group.__aexit__(None, None, None)

    async def run(self) -> None:
        await self.channel.watch()
        self.ended = True

    def __call__(self) -> bool:
        return not self.ended

    async def until_ended(self) -> None:
        with anyio.fail_after(5):
            while not self.ended:
                await checkpoint()


async def test_without_a_watch_it_reads_as_it_is_asked() -> None:
    server = Server(body(b"a", more=True), body(b"b"))
    channel = Channel(server.receive, SCOPE)
    assert server.calls == 0
    assert await taken(channel) == body(b"a", more=True)
    assert server.calls == 1
    assert await taken(channel) == body(b"b")


async def test_what_the_watch_reads_ahead_is_given_in_order_and_before_the_disconnect() -> None:
    messages = [body(b"a", more=True), body(b"", more=True), body(b"b", more=True), body(b"")]
    server = Server(*messages)
    channel = Channel(server.receive, SCOPE)
    async with Watching(channel) as watching:
        server.left.set()
        await watching.until_ended()
        assert [await taken(channel, watching) for _ in messages] == messages
        assert await taken(channel, watching) == DISCONNECT
    assert await taken(channel) == DISCONNECT
    assert channel.left == DISCONNECT


async def test_the_disconnect_is_remembered_of_a_server_that_tells_it_once() -> None:
    server = Server(body(b""), DISCONNECT)
    channel = Channel(server.receive, SCOPE)
    for _ in range(2):
        await taken(channel)
    for _ in range(3):
        assert await taken(channel) == DISCONNECT
    assert server.calls == 2


async def test_the_watch_ends_after_those_who_were_reading_have_been_told() -> None:
    server = Server(body(b""))
    channel = Channel(server.receive, SCOPE)
    order: list[str] = []

    async def read() -> None:
        assert await taken(channel, lambda: True) == body(b"")
        assert await taken(channel, lambda: True) == DISCONNECT
        order.append("reader")

    async def watch() -> None:
        await channel.watch()
        order.append("watch")

    with anyio.fail_after(5):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(watch)
            task_group.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            server.left.set()
    assert order == ["reader", "watch"]


async def test_a_cancelled_reader_loses_nothing() -> None:
    server = Server()
    channel = Channel(server.receive, SCOPE)
    async with Watching(channel) as watching:
        with anyio.move_on_after(0.01):
            await channel.take(watching)
        assert server.calls == 1
        server.left.set()
        assert await taken(channel, watching) == DISCONNECT
    assert server.calls == 1


async def test_a_cancelled_reader_takes_no_piece_of_the_body() -> None:
    channel = Channel(Server(body(b"a")).receive, SCOPE)
    async with Watching(channel) as watching:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await channel.take(watching)
        assert scope.cancelled_caught
        assert await taken(channel, watching) == body(b"a")


async def test_a_cancelled_reader_is_told_of_the_disconnect_even_before_the_body_is_read() -> None:
    channel = Channel(Server(body(b"a"), DISCONNECT).receive, SCOPE)
    async with Watching(channel) as watching:
        await watching.until_ended()
        with anyio.CancelScope() as scope:
            scope.cancel()
            assert await channel.take(watching) == DISCONNECT
        assert not scope.cancelled_caught
        assert await taken(channel, watching) == body(b"a")


async def test_two_readers_share_the_messages_and_both_are_told_of_the_disconnect() -> None:
    server = Server(body(b"a", more=True), body(b"b"))
    channel = Channel(server.receive, SCOPE)
    got: list[Message] = []

    async def read() -> None:
        while (message := await channel.take(unwatched)) != DISCONNECT:
            got.append(message)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(read)
            task_group.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            server.left.set()
    assert got == [body(b"a", more=True), body(b"b")]
    assert server.calls == 3


async def test_a_reader_goes_on_by_itself_when_the_watch_ends_under_it() -> None:
    server = Server(body(b""))
    channel = Channel(server.receive, SCOPE)
    await taken(channel)
    async with anyio.create_task_group() as task_group:
        async with Watching(channel) as watching:
            task_group.start_soon(channel.take, lambda: not watching.task_group.cancel_scope.cancel_called)
            await anyio.wait_all_tasks_blocked()
        await anyio.wait_all_tasks_blocked()
        assert server.calls == 3
        server.left.set()


async def test_an_error_of_receive_is_for_the_reader_and_does_not_end_the_watch() -> None:
    error = RuntimeError("too large")
    server = Server(body(b"a", more=True), error, body(b"b"))
    channel = Channel(server.receive, SCOPE)
    async with Watching(channel) as watching:
        assert server.calls == 2  # and no more, until the error is taken
        assert await taken(channel, watching) == body(b"a", more=True)
        with pytest.raises(RuntimeError) as raised:
            await taken(channel, watching)
        assert raised.value is error
        assert await taken(channel, watching) == body(b"b")
        server.left.set()
        await watching.until_ended()


@pytest.mark.parametrize("size", [READ_AHEAD // 4, 1])
async def test_reading_ahead_is_bounded_and_goes_on_as_room_is_made(size: int) -> None:
    chunks = [body(bytes(size), more=True) for _ in range(1000)]
    server = Server(*chunks)
    channel = Channel(server.receive, SCOPE)
    async with Watching(channel) as watching:
        full = server.calls
        assert full * size <= READ_AHEAD
        assert full <= 300
        assert await taken(channel, watching) == chunks[0]
        await anyio.wait_all_tasks_blocked()
        assert server.calls == full + 1


async def test_nothing_is_read_ahead_of_a_client_that_waits_for_100_continue() -> None:
    server = Server(body(b"a"))
    channel = Channel(server.receive, EXPECTING)
    async with Watching(channel) as watching:
        assert server.calls == 0
        assert await taken(channel, watching) == body(b"a")
        server.left.set()
        await watching.until_ended()


@pytest.mark.parametrize(
    "message",
    [body(b""), body(b"", more=True), {"type": "http.request"}, {"type": "http.unknown"}, {"no": "type"}],
    ids=["end", "empty", "bare", "unknown", "malformed"],
)
async def test_a_receive_that_never_suspends_freezes_nothing(message: Message) -> None:
    calls = 0

    async def receive() -> Message:
        nonlocal calls
        calls += 1
        return message if calls < 5 else DISCONNECT

    channel = Channel(receive, SCOPE)
    async with Watching(channel) as watching:
        assert calls <= 2
        with anyio.fail_after(5):
            while not watching.ended:
                if "type" not in message:
                    with pytest.raises(KeyError):
                        await channel.take(watching)
                await anyio.sleep(0.01)


async def test_a_reader_of_such_a_channel_gets_the_body_once_and_then_the_disconnect() -> None:
    left = False

    async def receive() -> Message:
        return DISCONNECT if left else body(b"")

    channel = Channel(receive, SCOPE)
    assert await taken(channel) == body(b"")
    with anyio.move_on_after(0.02) as scope:
        await channel.take(unwatched)
    assert scope.cancelled_caught
    left = True
    assert await taken(channel) == DISCONNECT


async def test_messages_of_unknown_type_are_passed_on() -> None:
    unknown: Message = {"type": "http.early"}
    channel = Channel(Server(unknown, body(b"a")).receive, SCOPE)
    assert await taken(channel) == unknown
    assert await taken(channel) == body(b"a")


@pytest.mark.parametrize(("version", "is_believed"), [("2.3", True), ("2.4", False)])
async def test_gunicorn_is_not_believed_after_a_wait_was_cancelled(version: str, is_believed: bool) -> None:
    is_believed = is_believed or on_trio()  # which gunicorn has not
    interrupted = False

    async def receive() -> Message:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            await anyio.sleep_forever()
        return DISCONNECT

    channel = Channel(receive, {**SCOPE, "asgi": {"spec_version": version}})
    async with Watching(channel) as watching:
        assert not watching.ended
    async with Watching(channel) as watching:
        assert watching.ended == is_believed
        assert await taken(channel, watching) == DISCONNECT  # but for those who ask

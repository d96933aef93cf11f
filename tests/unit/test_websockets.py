"""WebSocket endpoints: they stop when their client disconnects, lose no message, and end without a traceback."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Annotated, Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from fastapi import APIRouter, Depends, FastAPI, Request, WebSocket, WebSocketDisconnect
from starlette.applications import Starlette
from starlette.endpoints import WebSocketEndpoint
from starlette.exceptions import WebSocketException
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, WebSocketRoute
from starlette.types import Message
from starlette.websockets import WebSocketState

from cancelonleave import cancel_on_disconnect
from cancelonleave._loop import GRACE
from cancelonleave._watch import Fate
from cancelonleave._websocket import WebSocketWatch
from cancelonleave.testing import Client
from tests.shared.asking import on_trio
from tests.shared.receiving import Receiving
from tests.shared.virtual_time import anyio_backend as anyio_backend
from tests.shared.virtual_time import stall
from tests.shared.websocket_in_memory import Socket, connected

pytestmark = pytest.mark.anyio

Endpoint = Callable[[WebSocket], Awaitable[None]]
STARTED = 0.06  # seconds, after which the client is watched


def starlette(endpoint: Any, **options: Any) -> Starlette:  # Any: of whatever kind
    return Starlette(routes=[WebSocketRoute("/", endpoint)], **options)


async def clean_up() -> None:
    with anyio.CancelScope(shield=on_trio()):
        await anyio.sleep(0.2)


async def wait(websocket: WebSocket) -> None:
    await anyio.sleep_forever()


async def send(websocket: WebSocket) -> None:
    while True:
        await websocket.send_text("price")
        await anyio.sleep(0.01)


async def work(websocket: WebSocket) -> None:
    while True:
        await checkpoint()
        await anyio.sleep(0.001)


@pytest.mark.parametrize("activity", [wait, send, work])
@pytest.mark.parametrize("after", [0, 0.01, STARTED])
async def test_an_endpoint_that_does_not_read_stops_when_its_client_disconnects(
    activity: Endpoint, after: float
) -> None:
    ends: list[str] = []

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            await activity(websocket)
        finally:
            ends.append("cancelled")
            await clean_up()
            ends.append("clean")

    async with connected(starlette(endpoint)) as socket:
        await anyio.sleep(after)
        socket.close(4001, "enough")
    assert ends == ["cancelled", "clean"]
    assert socket.error is None
    assert socket.sent[0]["type"] == "websocket.accept"
    assert {message["type"] for message in socket.sent[1:]} <= {"websocket.send"}


async def test_messages_that_come_with_the_disconnect_are_read_before_it_on_an_event_loop_that_lags() -> None:
    read: list[str] = []

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            read.append(text)
            stall(0.06 if text == "one" else 0)

    async with connected(starlette(endpoint)) as socket:
        await anyio.sleep(0.08)
        socket.say("one")
        await anyio.sleep(0.065)
        socket.say("two")
        socket.say("three")
        socket.close()
    assert read == ["one", "two", "three"]


class Failing(Socket):
    """Its send() fails in the way that is set, for which the server has a reason that it reports, or not."""

    way = "not at all"
    most_readers = 0

    def __init__(self) -> None:
        super().__init__()
        self.closed = anyio.Event()

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "websocket.send" and self.way == "OSError when it is closed":
            await self.closed.wait()
            raise OSError
        if kind == "websocket.send" and self.way != "not at all":
            if self.way == "RuntimeError":
                self.close(1006)
            raise OSError if self.way == "OSError" else RuntimeError
        if kind == "websocket.close":
            self.closed.set()
            await anyio.sleep(0.06)
            self.most_readers = max(self.most_readers, self._readers)
        await super().send(message)


async def test_a_send_that_fails_because_another_task_has_closed_the_websocket_is_no_disconnect() -> None:
    ends: list[str] = []

    @cancel_on_disconnect(on_disconnect=lambda websocket: ends.append("hook"))
    async def endpoint(websocket: WebSocket) -> None:
        async def send_price() -> None:
            with pytest.raises(WebSocketDisconnect):
                await websocket.send_text("price")

        await websocket.accept()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send_price)
            await anyio.sleep(STARTED)
            await websocket.close()
        await anyio.sleep(2)
        ends.append("saved")

    socket = Failing()
    socket.way = "OSError when it is closed"
    async with connected(starlette(endpoint), socket):
        pass
    assert ends == ["saved"]


@pytest.mark.parametrize("way", ["OSError", "RuntimeError"])
@pytest.mark.parametrize("tries_again", [False, True])
async def test_a_child_that_learns_of_the_disconnect_by_send_is_not_interrupted_in_its_cleanup(
    way: str, tries_again: bool
) -> None:
    ends: list[str] = []

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        async def send_prices() -> None:
            try:
                await send(websocket)
            except WebSocketDisconnect:
                if tries_again:
                    with pytest.raises((WebSocketDisconnect, RuntimeError)):
                        await websocket.send_text("price")
                await anyio.sleep(0.1)
                ends.append("clean")

        await websocket.accept()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send_prices)

    async with connected(starlette(endpoint), socket := Failing()):
        await anyio.sleep(0.08)
        socket.way = way
        await anyio.sleep(0.02)
        socket.close(1006)
    assert ends == ["clean"]


async def test_a_child_that_has_read_the_disconnect_is_not_interrupted_when_send_fails_in_another() -> None:
    ends: list[str] = []

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        async def read() -> None:
            await websocket.receive()
            await anyio.sleep(0.1)
            ends.append("clean")

        async def send_price() -> None:
            with pytest.raises(WebSocketDisconnect):
                await websocket.send_text("price")

        await websocket.accept()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            tasks.start_soon(send_price)

    socket = Failing()
    socket.way = "OSError when it is closed"
    async with connected(starlette(endpoint), socket):
        await anyio.sleep(0.08)
        socket.close(1006)
        await anyio.sleep(0.02)
        socket.closed.set()
    assert ends == ["clean"]


async def test_a_helper_runs_after_the_application_has_closed_the_websocket_and_reading_works() -> None:
    @cancel_on_disconnect
    async def helper(websocket: WebSocket) -> str:
        return "saved"

    results: list[object] = []

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()
        results.append(await helper(websocket))
        results.append((await websocket.receive())["type"])

    async with connected(starlette(endpoint)) as socket:
        await anyio.sleep(STARTED)
        socket.close()
    assert results == ["saved", "websocket.disconnect"]


@pytest.mark.parametrize("close", [False, True])
async def test_a_helper_is_refused_after_the_disconnect_was_read_whether_or_not_the_application_has_closed_too(
    close: bool,
) -> None:
    @cancel_on_disconnect
    async def helper(websocket: WebSocket) -> None: ...

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        with pytest.raises(WebSocketDisconnect):
            await websocket.receive_text()
        if close:
            await websocket.close()
        with pytest.raises(WebSocketDisconnect):
            await helper(websocket)

    async with connected(starlette(endpoint)) as socket:
        socket.close()
    assert socket.error is None


async def test_a_send_that_fails_for_its_own_reason_while_another_task_closes_raises_that() -> None:
    ends: list[str] = []

    class Refusing(Socket):
        async def send(self, message: Message) -> None:
            if message["type"] == "websocket.send":
                raise TypeError
            await super().send(message)
            if message["type"] == "websocket.close":
                self.close()

    @cancel_on_disconnect(on_disconnect=lambda websocket: ends.append("hook"))
    async def endpoint(websocket: WebSocket) -> None:
        async def send_price() -> None:
            with pytest.raises(TypeError):
                await websocket.send_text("price")

        await websocket.accept()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send_price)
            tasks.start_soon(websocket.receive)
            await anyio.sleep(0.005)
            await websocket.close()
        await anyio.sleep(2)
        ends.append("saved")

    async with connected(starlette(endpoint), Refusing()):
        pass
    assert ends == ["saved"]


async def test_no_receive_begins_while_a_close_is_being_sent() -> None:
    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await anyio.sleep(GRACE)  # when the watch is to begin, too
        await websocket.close()

    async with connected(starlette(endpoint), socket := Failing()):
        pass
    assert socket.most_readers == 0


@pytest.mark.parametrize("after", [0, STARTED])
async def test_a_disconnect_before_accept_cancels_the_endpoint(after: float) -> None:
    ends: list[str] = []

    @cancel_on_disconnect(on_disconnect=lambda websocket: ends.append("hook"))
    async def endpoint(websocket: WebSocket) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ends.append("cancelled")

    async with connected(starlette(endpoint)) as socket:
        await anyio.sleep(after)
        socket.close(1006)
    assert ends == ["cancelled", "hook"]
    # Without this message, uvicorn's `websockets` logs an error.
    assert [message["type"] for message in socket.sent] == ["websocket.close"]


async def test_a_late_accept_raises_a_disconnect_that_came_before_it() -> None:
    caught: list[WebSocketDisconnect] = []

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(1)
            try:
                await websocket.accept()
            except WebSocketDisconnect as error:
                caught.append(error)
                raise

    async with connected(starlette(endpoint)) as socket:
        await anyio.sleep(STARTED)
        socket.close(1006)
    assert [error.code for error in caught] == [1006]
    assert (socket.error, socket.sent) == (None, [])


async def test_a_shielded_section_is_not_interrupted() -> None:
    ends: list[str] = []

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        with anyio.CancelScope(shield=True):
            await anyio.sleep(1)
            ends.append("whole")
        await anyio.sleep_forever()

    async with connected(starlette(endpoint)) as socket:
        await anyio.sleep(STARTED)
        socket.close()
    assert ends == ["whole"]


async def test_dependencies_roll_back_and_see_code_and_reason() -> None:
    ends: list[object] = []

    async def transaction() -> AsyncGenerator[None]:
        try:
            yield
        except WebSocketDisconnect as error:
            ends.append((error.code, error.reason))
            raise

    app = FastAPI()

    @app.websocket("/")
    @cancel_on_disconnect(on_disconnect=lambda websocket: ends.append(websocket.url.path))
    async def endpoint(websocket: WebSocket, opened: Annotated[None, Depends(transaction)]) -> None:
        await websocket.accept()
        await anyio.sleep_forever()

    async with connected(app) as socket:
        await anyio.sleep(STARTED)
        socket.close(4001, "enough")
    assert ends == ["/", (4001, "enough")]
    assert socket.error is None


async def test_a_dependency_commits_if_the_endpoint_returns() -> None:
    ends: list[str] = []

    async def transaction() -> AsyncGenerator[None]:
        yield
        ends.append("commit")

    app = FastAPI()

    @app.websocket("/")
    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket, opened: Annotated[None, Depends(transaction)]) -> None:
        await websocket.accept()
        await anyio.sleep(STARTED)

    async with connected(app):
        pass
    assert ends == ["commit"]


MESSAGES = [f"text {number}" if number % 3 else b"bytes %d" % number for number in range(100)]


async def read_raw(websocket: WebSocket) -> list[object]:
    got: list[object] = []
    while (message := await websocket.receive())["type"] == "websocket.receive":
        got.append(message.get("text") or message.get("bytes"))
    return got


async def test_messages_that_arrive_while_the_endpoint_does_not_read_are_kept_in_order() -> None:
    got: list[object] = []

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await anyio.sleep(1)
        got.extend(await read_raw(websocket))

    async with connected(starlette(endpoint)) as socket:
        for message in MESSAGES:
            socket.say(message)
            await anyio.sleep(0.001)
        await anyio.sleep(1)
        assert got == []
        socket.close()
    assert got == MESSAGES


def iterated(name: str) -> Callable[[WebSocket], Awaitable[list[object]]]:
    async def read(websocket: WebSocket) -> list[object]:
        items: AsyncIterator[object] = getattr(websocket, name)()
        return [item async for item in items]

    return read


def one_by_one(name: str) -> Callable[[WebSocket], Awaitable[list[object]]]:
    async def read(websocket: WebSocket) -> list[object]:
        got: list[object] = []
        try:
            while True:
                got.append(await getattr(websocket, name)())
        except WebSocketDisconnect as error:
            got += [error.code, error.reason]
        return got

    return read


@pytest.mark.parametrize("form", ["text", "bytes", "json"])
@pytest.mark.parametrize("how", [iterated, one_by_one])
@pytest.mark.parametrize("wait_before", [0, STARTED])
async def test_every_way_to_read_gets_all_messages_and_then_the_disconnect(
    form: str, how: Callable[[str], Callable[[WebSocket], Awaitable[list[object]]]], wait_before: float
) -> None:
    name = f"iter_{form}" if how is iterated else f"receive_{form}"
    got: list[object] = []
    ends: list[str] = []
    items: list[Any] = [{"text": str(n), "bytes": b"%d" % n, "json": n}[form] for n in range(20)]  # Any: of JSON

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await anyio.sleep(wait_before)
        got.extend(await how(name)(websocket))
        await anyio.sleep(1)
        ends.append("not cancelled as well")

    async with connected(starlette(endpoint)) as socket:
        for number, item in enumerate(items):
            socket.say(json.dumps(item) if form == "json" else item)
            await anyio.sleep(0.01 if number % 7 == 0 else 0)
        await anyio.sleep(0.1)
        socket.close(4001, "enough")
    assert got == items + ([4001, "enough"] if how is one_by_one else [])
    assert ends == ["not cancelled as well"]


async def test_receiving_with_a_tiny_timeout_loses_nothing() -> None:
    got: list[str] = []

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        while len(got) < 100:
            with anyio.move_on_after(0.001):
                got.append(await websocket.receive_text())
            with anyio.move_on_after(0):
                got.append(await websocket.receive_text())

    async with connected(starlette(endpoint)) as socket:
        for number in range(100):
            socket.say(str(number))
            await anyio.sleep(0.0015)
    assert got == [str(number) for number in range(100)]


async def test_two_tasks_can_receive_at_the_same_time() -> None:
    got: list[str] = []

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()

        async def read() -> None:
            async for text in websocket.iter_text():
                got.append(text)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            tasks.start_soon(read)
            await anyio.sleep(0.01)
            socket.say("one")
            socket.say("two")
            await anyio.sleep(0.1)
            tasks.cancel_scope.cancel()

    async with connected(starlette(endpoint)) as socket:
        pass
    assert sorted(got) == ["one", "two"]


async def test_at_most_64_kib_are_read_ahead() -> None:
    ends: list[str] = []

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            await anyio.sleep(1)
            ends.append("not seen")
            for _ in range(200):
                await websocket.receive_bytes()
            await anyio.sleep_forever()
        finally:
            ends.append("cancelled")

    async with connected(starlette(endpoint)) as socket:
        for _ in range(200):
            socket.say(bytes(1000))
        socket.close()
        await anyio.sleep(0.5)
        assert 201 - len(socket.unread) == 53
    assert ends == ["not seen", "cancelled"]


async def test_messages_received_before_the_disconnect_are_read_before_it() -> None:
    got: list[str] = []

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                got.extend([text async for text in websocket.iter_text()])

    async with connected(starlette(endpoint)) as socket:
        socket.say("one")
        socket.say("two")
        await anyio.sleep(STARTED)
        socket.close()
    assert got == ["one", "two"]


async def test_a_disconnect_behind_messages_wakes_an_endpoint_that_waits_for_one() -> None:
    """The endpoint gets all messages, since its own task takes them without awaiting anything else."""
    got: list[str] = []

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await anyio.sleep(STARTED)
        got.extend([text async for text in websocket.iter_text()])

    async with connected(starlette(endpoint)) as socket:
        await anyio.sleep(2 * STARTED)
        for number in range(10):
            socket.say(str(number))
        socket.close()
    assert got == [str(number) for number in range(10)]


async def test_one_record_is_logged_and_the_hook_is_called_once_with_the_websocket(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "cancelonleave")
    hooked: list[object] = []

    async def hook(websocket: WebSocket) -> None:
        await checkpoint()
        hooked.append(websocket)

    @cancel_on_disconnect
    async def helper(websocket: WebSocket) -> None:
        await anyio.sleep_forever()

    app = FastAPI()
    sockets: list[WebSocket] = []

    @app.websocket("/prices/{name}")
    @cancel_on_disconnect(on_disconnect=hook)
    async def prices(websocket: WebSocket, name: str) -> None:
        sockets.append(websocket)
        await websocket.accept()
        await helper(websocket)

    async with connected(app, Socket("/prices/tea")) as socket:
        await anyio.sleep(STARTED)
        socket.close()
    assert hooked == sockets
    assert [record.getMessage().split(" s on")[0] for record in caplog.records] == [
        "WEBSOCKET /prices/{name}: stopped after 0.060"
    ]


@pytest.mark.parametrize("decorates", [True, False])
async def test_a_disconnect_that_the_endpoint_reads_and_does_not_catch_ends_it_quietly(decorates: bool) -> None:
    """Servers log the disconnect of an undecorated endpoint with a traceback."""
    caught: list[WebSocketDisconnect] = []

    async def dependency() -> AsyncGenerator[None]:
        try:
            yield
        except WebSocketDisconnect as error:
            caught.append(error)
            raise

    app = FastAPI()

    async def reads(websocket: WebSocket, opened: Annotated[None, Depends(dependency)]) -> None:
        await websocket.accept()
        while True:
            await websocket.receive_text()

    app.websocket("/")(cancel_on_disconnect(reads) if decorates else reads)
    async with connected(app) as socket:
        socket.say("one")
        socket.close(4001, "enough")
    assert [(each.code, each.reason) for each in caught] == [(4001, "enough")]
    assert (socket.error is None) is decorates


async def test_a_task_group_of_readers_and_writers_raises_one_disconnect() -> None:
    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()

        async def read() -> None:
            while True:
                await websocket.receive_text()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            tasks.start_soon(send, websocket)

    async with connected(starlette(endpoint)) as socket:
        await anyio.sleep(STARTED)
        socket.close(4001)
    assert socket.error is None


async def test_an_exception_handler_of_the_application_gets_code_and_reason() -> None:
    handled: list[object] = []

    async def handle(websocket: WebSocket, error: WebSocketDisconnect) -> None:
        handled.append((error.code, error.reason))

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await anyio.sleep_forever()

    async with connected(starlette(endpoint, exception_handlers={WebSocketDisconnect: handle})) as socket:
        await anyio.sleep(STARTED)
        socket.close(4001, "enough")
    assert handled == [(4001, "enough")]


async def test_without_an_application_the_exception_reaches_the_server() -> None:
    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await anyio.sleep_forever()

    async with connected(WebSocketRoute("/", endpoint).handle) as socket:
        await anyio.sleep(STARTED)
        socket.close(4001, "enough")
    assert isinstance(socket.error, WebSocketDisconnect)


@pytest.mark.parametrize("disconnect", [{}, {"code": 1001}, {"code": 1001, "reason": None}])
async def test_servers_can_omit_code_and_reason(disconnect: Message) -> None:
    caught: list[WebSocketDisconnect] = []

    async def handle(websocket: WebSocket, error: WebSocketDisconnect) -> None:
        caught.append(error)

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await anyio.sleep_forever()

    async with connected(starlette(endpoint, exception_handlers={WebSocketDisconnect: handle})) as socket:
        socket._deliver({"type": "websocket.disconnect", **disconnect})
    assert [(error.code, error.reason) for error in caught] == [(disconnect.get("code", 1005), "")]


@pytest.mark.parametrize("after", [0, STARTED])
async def test_closing_or_returning_is_not_a_disconnect(after: float, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cancelonleave")
    ends: list[str] = []

    @cancel_on_disconnect(on_disconnect=lambda websocket: ends.append("hook"))
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await anyio.sleep(after)
        await websocket.close(3000)
        socket.close(3000)  # as servers report it
        await anyio.sleep(1)
        await helper(websocket)
        ends.append("finished")

    @cancel_on_disconnect
    async def helper(websocket: WebSocket) -> None:
        await anyio.sleep(1)

    async with connected(starlette(endpoint)) as socket:
        pass
    assert (ends, caplog.records, socket.error) == (["finished"], [], None)
    assert [message["type"] for message in socket.sent] == ["websocket.accept", "websocket.close"]


async def test_a_denial_response_is_not_a_disconnect() -> None:
    ends: list[str] = []

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.send_denial_response(PlainTextResponse("no", 403))
        socket.close(1006)
        await anyio.sleep(1)
        ends.append("finished")

    socket = Socket()
    socket.scope["extensions"] = {"websocket.http.response": {}}
    async with connected(starlette(endpoint), socket):
        pass
    assert ends == ["finished"]


@pytest.mark.parametrize("receives", [True, False])
async def test_no_receive_is_pending_while_the_websocket_is_being_closed(receives: bool) -> None:
    """Otherwise granian doesn't send the close message."""
    pending: list[int] = []

    class Noted(Socket):
        async def send(self, message: Message) -> None:
            await super().send(message)
            if message["type"] == "websocket.close":
                await anyio.sleep(STARTED)
                pending.append(self._readers)

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await anyio.sleep(STARTED)
        await websocket.close()
        if receives:
            socket.close()
            assert (await websocket.receive())["type"] == "websocket.disconnect"

    socket = Noted()
    async with connected(starlette(endpoint), socket):
        pass
    assert (pending, socket.error) == ([0], None)


@pytest.mark.parametrize("activity", ["text", "accept"])
async def test_send_after_the_disconnect_raises_and_close_is_silent(activity: str) -> None:
    caught: list[object] = []

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        if activity == "text":
            await websocket.accept()
        try:
            await anyio.sleep_forever()
        finally:
            for _ in range(2 if activity == "text" else 1):
                try:
                    await (websocket.send_text("late") if activity == "text" else websocket.accept())
                except WebSocketDisconnect as error:
                    caught.append((error.code, error.reason))
            await websocket.close()

    async with connected(starlette(endpoint)) as socket:
        await anyio.sleep(STARTED)
        socket.close(4001, "enough")
    assert caught == [(4001, "enough")] * (2 if activity == "text" else 1)
    accepted = ["websocket.accept"] * (activity == "text")
    assert [message["type"] for message in socket.sent] == [*accepted, "websocket.close"]
    assert socket.error is None


async def test_an_endpoint_that_learns_of_the_disconnect_by_sending_is_not_cancelled_as_well() -> None:
    ends: list[str] = []

    @cancel_on_disconnect(on_disconnect=lambda websocket: ends.append("hook"))
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            while True:
                await websocket.send_text("price")
                await anyio.sleep(0.01)
        except WebSocketDisconnect as error:
            ends.append(str(error.code))
            await anyio.sleep(2)
            ends.append("clean")
            raise

    async with connected(starlette(endpoint)) as socket:
        await anyio.sleep(0.005)
        socket.failure = OSError("lost")
        await anyio.sleep(0.1)
        socket.close(1001)
    assert ends == ["1006", "clean", "hook"]
    assert socket.error is None


async def test_an_endpoint_is_cancelled_when_another_task_has_failed_to_send() -> None:
    """One endpoint sends to all clients here; the WebSocket must not be taken for one that was closed."""
    ends: list[str] = []
    sockets: list[WebSocket] = []

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        sockets.append(websocket)
        try:
            await anyio.sleep_forever()
        finally:
            ends.append("cancelled")

    async with connected(starlette(endpoint)) as socket:
        await anyio.sleep(STARTED)
        socket.failure = OSError("lost")
        with pytest.raises(WebSocketDisconnect):
            await sockets[0].send_text("to all")
    assert ends == ["cancelled"]
    assert socket.error is None


async def test_a_close_that_fails_reports_the_disconnect() -> None:
    hooked: list[WebSocket] = []

    @cancel_on_disconnect(on_disconnect=hooked.append)
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        socket.failure = OSError("lost")
        await websocket.close()

    async with connected(starlette(endpoint)) as socket:
        pass
    assert (len(hooked), socket.error) == (1, None)


async def test_the_states_are_the_same_as_undecorated() -> None:
    states: list[tuple[WebSocketState, WebSocketState]] = []

    def look(websocket: WebSocket) -> None:
        states.append((websocket.client_state, websocket.application_state))

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await anyio.sleep(STARTED)
        look(websocket)
        await websocket.accept()
        look(websocket)
        await anyio.sleep(STARTED)
        assert await websocket.receive_text() == "one"
        look(websocket)
        with pytest.raises(WebSocketDisconnect):
            await websocket.receive_text()
        look(websocket)

    async with connected(starlette(endpoint)) as socket:
        socket.say("one")
        await anyio.sleep(3 * STARTED)
        socket.close()
    connecting, open_, closed = WebSocketState.CONNECTING, WebSocketState.CONNECTED, WebSocketState.DISCONNECTED
    assert states == [(connecting, connecting), (open_, open_), (open_, open_), (closed, open_)]


def noted(ends: list[object], websocket: WebSocket) -> None:
    ends.append("started")


def test_noted_records_a_start() -> None:
    ends: list[object] = []
    noted(ends, WebSocket(Socket().scope, Socket().receive, Socket().send))
    assert ends == ["started"]


async def test_an_endpoint_whose_client_is_known_to_have_disconnected_is_not_started() -> None:
    ends: list[object] = []

    start: Callable[[WebSocket], object] = partial(noted, ends)
    helper: Any = cancel_on_disconnect(start)  # Any: it is to be awaited

    @cancel_on_disconnect
    async def first(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.receive()

    async def endpoint(websocket: WebSocket) -> None:
        await first(websocket)
        with pytest.raises(WebSocketDisconnect):
            await helper(websocket)

    async with connected(starlette(endpoint)) as socket:
        socket.close()
    assert ends == []


async def test_the_disconnect_may_have_been_read_before_the_decorated_function() -> None:
    ends: list[object] = []

    start: Callable[[WebSocket], object] = partial(noted, ends)
    helper: Any = cancel_on_disconnect(start)  # Any: it is to be awaited

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.receive()
        try:
            await helper(websocket)
        except WebSocketDisconnect as error:
            ends.append(error.code)

    async with connected(starlette(endpoint)) as socket:
        socket.close()
    assert ends == [1005]


async def test_a_decorated_function_runs_normally_after_the_websocket_was_closed() -> None:
    ends: list[str] = []

    @cancel_on_disconnect
    async def helper(websocket: WebSocket) -> None:
        await anyio.sleep(1)
        ends.append("finished")

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()
        socket.close()
        await helper(websocket)

    async with connected(starlette(endpoint)) as socket:
        pass
    assert ends == ["finished"]


async def wait_accepted(websocket: WebSocket) -> None:
    await websocket.accept()
    await anyio.sleep_forever()


class Methods:
    async def method(self, websocket: WebSocket) -> None:
        await wait_accepted(websocket)


# Unannotated, as in Starlette's documentation.
async def by_name(websocket) -> None:  # type: ignore[no-untyped-def]  # see above
    await wait_accepted(websocket)  # pyright: ignore[reportUnknownArgumentType]  # see above


async def by_position(ws) -> None:  # type: ignore[no-untyped-def]  # see above
    await wait_accepted(ws)  # pyright: ignore[reportUnknownArgumentType]  # see above


async def as_connection(connection: HTTPConnection) -> None:
    assert isinstance(connection, WebSocket)
    await connection.accept()
    await anyio.sleep_forever()


async def optional(websocket: WebSocket | None = None, request: Request | None = None) -> None:
    assert websocket is not None
    await websocket.accept()
    await anyio.sleep_forever()


ENDPOINTS: list[Any] = [Methods().method, by_name, by_position, as_connection, optional]  # Any: of every kind


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_the_websocket_is_found_when_it_is_passed_by_position(endpoint: Any) -> None:  # Any: of every kind
    hooked: list[object] = []
    async with connected(starlette(cancel_on_disconnect(on_disconnect=hooked.append)(endpoint))) as socket:
        await anyio.sleep(STARTED)
        socket.close()
    assert len(hooked) == 1


Ends = list[str]


def forms(ends: Ends) -> FastAPI:
    """Return endpoints that wait in their own body, in a dependency or in a helper, whichever is decorated."""
    app = FastAPI()
    router = APIRouter(prefix="/router")
    guard = cancel_on_disconnect(on_disconnect=lambda connection: ends.append("hook"))

    async def accepted(websocket: WebSocket) -> WebSocket:
        await websocket.accept()
        return websocket

    @app.websocket("/annotated")
    @guard
    async def annotated(socket: Annotated[WebSocket, "of whatever name"], text: str = "") -> None:
        await socket.accept()
        await anyio.sleep_forever()

    @app.websocket("/none")
    @guard
    async def without(accepted: Annotated[object, Depends(accepted)]) -> None:
        await anyio.sleep_forever()

    @app.websocket("/hidden")
    @guard
    async def hidden(text: str = "") -> None:
        await anyio.sleep_forever()

    @router.websocket("/prices")
    @guard
    async def in_router(websocket: WebSocket) -> None:
        await websocket.accept()
        await anyio.sleep_forever()

    @guard
    async def both(request: Request = None, websocket: WebSocket = None) -> None:  # type: ignore[assignment]  # FastAPI's way
        assert websocket is not None
        await websocket.accept()
        await anyio.sleep_forever()

    @app.websocket("/both")
    async def with_both(websocket: WebSocket, waited: Annotated[None, Depends(both)]) -> None: ...

    @guard
    async def neither() -> None:
        await anyio.sleep_forever()

    @app.websocket("/neither")
    async def with_neither(websocket: WebSocket, waited: Annotated[None, Depends(neither)]) -> None: ...

    @guard
    async def helper(text: str, websocket: WebSocket) -> None:
        await anyio.sleep_forever()

    @app.websocket("/helper")
    async def with_helper(websocket: WebSocket) -> None:
        await websocket.accept()
        await helper("", websocket)

    app.include_router(router)
    return app


FORMS = ["/annotated", "/none", "/hidden", "/router/prices", "/both", "/neither", "/helper"]


@pytest.mark.parametrize("path", FORMS)
async def test_endpoints_dependencies_and_helpers_of_every_form_stop(path: str) -> None:
    ends: Ends = []
    async with connected(forms(ends), Socket(path)) as socket:
        await anyio.sleep(STARTED)
        socket.close()
    assert (ends, socket.error) == (["hook"], None)


async def test_a_dependency_that_takes_both_kinds_serves_http_too() -> None:
    app = FastAPI()

    @cancel_on_disconnect
    async def both(connection: HTTPConnection) -> str:
        await anyio.sleep(STARTED)
        return type(connection).__name__

    @app.get("/")
    async def endpoint(kind: Annotated[str, Depends(both)]) -> str:
        return kind

    assert (await Client(app).get("/")).json() == "Request"


async def test_the_openapi_document_is_the_same_as_undecorated() -> None:
    app = forms([])
    assert app.openapi()["paths"] == {}


class Chat(WebSocketEndpoint):
    encoding = "text"
    ends: Ends

    @cancel_on_disconnect
    async def on_connect(self, websocket: WebSocket) -> None:
        await websocket.accept()
        if "slow" in websocket.url.path:
            await anyio.sleep_forever()

    @cancel_on_disconnect(on_disconnect=lambda websocket: Chat.ends.append("hook"))
    async def on_receive(self, websocket: WebSocket, data: str) -> None:
        Chat.ends.append(data)
        if data == "wait":
            await anyio.sleep_forever()

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        Chat.ends.append(f"on_disconnect {close_code}")


@pytest.mark.parametrize(
    ("path", "texts", "ends"),
    [
        ("/", ["one", "wait"], ["one", "wait", "hook", "on_disconnect 1011"]),
        ("/", ["one", "two"], ["one", "two", "on_disconnect 4001"]),
        ("/slow", [], []),
    ],
)
async def test_methods_of_an_endpoint_class_stop(path: str, texts: list[str], ends: Ends) -> None:
    Chat.ends = []
    app = Starlette(routes=[WebSocketRoute("/", Chat), WebSocketRoute("/slow", Chat)])
    async with connected(app, Socket(path)) as socket:
        for text in texts:
            socket.say(text)
        await anyio.sleep(STARTED)
        socket.close(4001)
    assert (Chat.ends, socket.error) == (ends, None)


async def test_a_disconnect_in_a_mounted_application_raises_no_error() -> None:
    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await anyio.sleep_forever()

    inner = FastAPI()
    inner.websocket("/prices")(endpoint)
    app = Starlette(routes=[Mount("/api", inner), Mount("/raw", starlette(endpoint))])
    for path in ("/api/prices", "/raw/"):
        async with connected(app, Socket(path)) as socket:
            await anyio.sleep(STARTED)
            socket.close()
        assert socket.error is None


@pytest.mark.parametrize("anyio_backend", [("asyncio", {})])
async def test_a_thread_with_an_event_loop_of_its_own_reads() -> None:
    texts: list[str] = []

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        texts.append(await anyio.to_thread.run_sync(lambda: asyncio.run(websocket.receive_text())))

    async with connected(starlette(endpoint)) as socket:
        socket.say("from the client")
    assert texts == ["from the client"]


async def test_a_dependency_with_yield_is_refused() -> None:
    async def dependency() -> AsyncGenerator[None]:
        yield

    assert [each async for each in dependency()] == [None]
    decorated = cancel_on_disconnect(dependency)
    app = FastAPI()

    @app.websocket("/")
    async def endpoint(websocket: WebSocket, opened: Annotated[None, Depends(decorated)]) -> None: ...

    async with connected(app) as socket:
        pass
    assert isinstance(socket.error, TypeError)
    assert "it is a generator" in str(socket.error)


async def test_other_exceptions_of_the_endpoint_are_passed_on_unchanged() -> None:
    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        raise WebSocketDisconnect(1234)

    async with connected(starlette(endpoint)) as socket:
        await anyio.sleep(STARTED)
    assert type(socket.error) is WebSocketDisconnect

    @cancel_on_disconnect
    async def closes(websocket: WebSocket) -> None:
        await websocket.accept()
        await anyio.sleep(STARTED)
        raise WebSocketException(4000, "own")

    async with connected(starlette(closes)) as socket:
        pass
    assert socket.sent[-1] == {"type": "websocket.close", "code": 4000, "reason": "own"}


async def test_cancellation_from_outside_is_passed_on() -> None:
    ends: Ends = []

    @cancel_on_disconnect(on_disconnect=lambda websocket: ends.append("hook"))
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            await websocket.receive_text()
        except anyio.get_cancelled_exc_class():
            ends.append("cancelled")
            raise

    socket = Socket()
    with anyio.move_on_after(1) as scope:
        await starlette(endpoint)(socket.scope, socket.receive, socket.send)
    assert scope.cancelled_caught
    assert ends == ["cancelled"]


async def test_a_task_reads_messages_that_a_cancelled_receive_might_lose() -> None:
    """On granian this happens, since its receive() returns no coroutine."""
    reads: list[bool | None] = []

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        watch = websocket._receive
        assert isinstance(watch, WebSocketWatch)
        reads.append(watch._reads_here)
        with anyio.move_on_after(0.01):
            await websocket.receive()
        reads.append(watch._reads_here)
        assert "runs" in repr(watch)
        assert watch.calls[0].fate is Fate.RUNS

    async with connected(starlette(endpoint)) as socket:
        pass
    socket = Socket()
    with anyio.fail_after(10):
        await starlette(endpoint)(socket.scope, lambda: Receiving(socket.receive), socket.send)
    assert reads == [True, False, False, False]


async def test_the_endpoint_reads_in_its_own_task_after_messages_that_arrived_while_it_worked() -> None:
    names: list[str | None] = []

    class Noted(Socket):
        async def receive(self) -> Message:
            names.append(anyio.get_current_task().name)
            return await super().receive()

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.receive_text()
        await anyio.sleep(STARTED)  # a task reads ahead
        await websocket.receive_text()
        del names[:]
        await websocket.receive_text()

    socket = Noted()
    async with connected(starlette(endpoint), socket):
        for _ in range(3):
            await anyio.sleep(2 * STARTED)
            socket.say("text")
    assert len(names) == 1
    assert "cancelonleave" not in str(names[0])


@pytest.mark.parametrize("after", [0.01, 1])
async def test_a_send_that_fails_just_before_the_disconnect_is_known_reports_it(after: float) -> None:
    """Daphne's send() raises an exception of its own; gunicorn's close() raises a RuntimeError."""

    @cancel_on_disconnect
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        socket.failure = RuntimeError("closed")
        await websocket.send_text("price")

    async with connected(starlette(endpoint)) as socket:
        await anyio.sleep(after)
        socket.close(4001)
    assert (socket.error is None) is (after < 1)

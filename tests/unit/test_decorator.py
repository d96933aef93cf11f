from __future__ import annotations

import asyncio
import gc
import logging
import pickle
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cancelonleave import ClientClosedRequest, cancel_on_disconnect
from cancelonleave.testing import Client
from tests.conftest import BACKENDS
from tests.shared.asking import ask

pytestmark = pytest.mark.anyio

SCOPE: dict[str, Any] = {"type": "http", "method": "GET", "path": "/", "headers": []}  # Any: as ASGI has it


def app_with(use: Callable[[Request], Awaitable[object]]) -> ASGIApp:
    """Return an application that passes its Request to a function of a test."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await use(Request(scope, receive))

    return app


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Iterator[list[logging.LogRecord]]:
    with caplog.at_level(logging.DEBUG, "cancelonleave"):
        records: list[logging.LogRecord] = []

        def keep(record: logging.LogRecord) -> bool:
            records.append(record)
            return True

        caplog.handler.addFilter(keep)
        yield records


class Endpoint:
    """Waits forever, and records what happens to it."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def __call__(self, request: Request) -> None:
        self.seen.append("started")
        try:
            await anyio.sleep_forever()
        finally:
            self.seen.append("clean")


def app_of(endpoint: Any) -> Starlette:  # Any: whatever Route takes
    return Starlette(routes=[Route("/", endpoint, methods=["GET", "POST"])])


async def test_a_cancelled_endpoint_answers_499() -> None:
    endpoint = Endpoint()
    exchange = await ask(app_of(cancel_on_disconnect(endpoint)), leave_after=0.06)
    assert exchange.status == 499
    assert endpoint.seen == ["started", "clean"]


async def test_on_disconnect_is_called_once_with_the_request_after_the_cleanup(
    records: list[logging.LogRecord],
) -> None:
    endpoint = Endpoint()

    def sync_hook(request: Request) -> None:
        endpoint.seen.append(f"hook called for {request.url.path}")

    async def async_hook(request: Request) -> None:
        await checkpoint()
        sync_hook(request)

    for hook in (sync_hook, async_hook):
        endpoint.seen.clear()
        await ask(app_of(cancel_on_disconnect(on_disconnect=hook)(endpoint)), leave_after=0.06)
        assert endpoint.seen == ["started", "clean", "hook called for /"]
    assert [record.levelno for record in records] == [logging.INFO] * 2


async def test_on_disconnect_is_not_called_for_a_client_that_stays() -> None:
    @cancel_on_disconnect(on_disconnect=lambda request: pytest.fail("the client stays"))
    async def endpoint(request: Request) -> Response:
        await anyio.sleep(0.06)
        return PlainTextResponse("here you are")

    assert (await ask(app_of(endpoint))).body == b"here you are"


async def test_a_failing_on_disconnect_is_logged_and_changes_nothing(records: list[logging.LogRecord]) -> None:
    def fails(request: Request) -> None:
        raise ValueError("out of ink")

    exchange = await ask(app_of(cancel_on_disconnect(on_disconnect=fails)(Endpoint())), leave_after=0.06)
    assert exchange.status == 499
    failure = records[-1]
    assert failure.levelno == logging.ERROR
    assert failure.exc_info is not None
    assert "out of ink" in str(failure.exc_info[1])
    names = ("/", "Endpoint")  # the name of the route, or, with older Starlette, of the endpoint
    assert failure.getMessage() in [f"GET {name}: on_disconnect failed" for name in names]


async def test_an_endpoint_that_reads_the_disconnect_ends_the_same_way(records: list[logging.LogRecord]) -> None:
    notified: list[Request] = []

    @cancel_on_disconnect(on_disconnect=notified.append)
    async def endpoint(request: Request) -> Response:
        return PlainTextResponse(await request.body())

    async def begun() -> AsyncIterator[bytes]:
        yield b"a"
        await anyio.sleep_forever()

    exchange = await ask(app_of(endpoint), method="POST", content=begun(), leave_after=0.06)
    assert exchange.status == 499
    assert len(notified) == 1
    assert len(records) == 1


async def test_a_task_group_that_reads_the_disconnect_ends_the_same_way() -> None:
    async def read(request: Request) -> None:
        await request.receive()
        await request.receive()
        raise ClientDisconnect

    @cancel_on_disconnect
    async def endpoint(request: Request) -> None:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(read, request)
            task_group.start_soon(read, request)

    exchange = await Client(app_with(endpoint)).get("/", leave_after=0.1)
    assert isinstance(exchange.error, ClientClosedRequest)
    assert isinstance(exchange.error.__cause__, ExceptionGroup)


async def test_a_client_disconnect_of_another_request_is_passed_on_unchanged() -> None:
    @cancel_on_disconnect
    async def endpoint(request: Request) -> None:
        raise ClientDisconnect

    exchange = await Client(app_with(endpoint)).get("/")
    assert type(exchange.error) is ClientDisconnect


async def test_an_endpoint_whose_client_is_known_to_have_disconnected_is_not_started(
    records: list[logging.LogRecord],
) -> None:
    endpoint = Endpoint()

    @cancel_on_disconnect
    async def reads(request: Request) -> None:
        await request.receive()

    async def use(request: Request) -> None:
        await reads(request)
        with pytest.raises(ClientClosedRequest):
            await cancel_on_disconnect(endpoint)(request)
        assert await request.is_disconnected()
        assert (await request.receive())["type"] == "http.disconnect"

    await ask(app_with(use), leave_after_sent=0)
    assert endpoint.seen == []
    assert len(records) == 1


async def test_on_disconnect_of_a_helper_is_called_if_its_caller_is_decorated_too(
    records: list[logging.LogRecord],
) -> None:
    notified: list[str] = []

    @cancel_on_disconnect(on_disconnect=lambda request: notified.append("inner"))
    async def inner(request: Request) -> None:
        await anyio.sleep_forever()

    @cancel_on_disconnect(on_disconnect=lambda request: notified.append("outer"))
    async def outer(request: Request) -> None:
        await inner(request)

    exchange = await ask(app_of(outer), leave_after=0.06)
    assert exchange.status == 499
    assert notified == ["inner", "outer"]
    assert len(records) == 1


async def test_decorating_twice_guards_once() -> None:
    @cancel_on_disconnect
    async def endpoint(request: Request) -> None: ...

    assert cancel_on_disconnect(endpoint) is endpoint
    assert cancel_on_disconnect()(endpoint) is endpoint
    notified: list[Request] = []
    twice = cancel_on_disconnect(on_disconnect=notified.append)(cancel_on_disconnect(Endpoint()))
    await ask(app_of(twice), leave_after=0.06)
    assert len(notified) == 1


@pytest.mark.parametrize("read", ["not at all", "body", "form"])
async def test_only_the_endpoint_asks_for_100_continue_until_the_body_was_read(read: str) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}

    @cancel_on_disconnect
    async def endpoint(request: Request) -> None:
        await anyio.sleep(0.2)

    async def use(request: Request) -> None:
        if read == "body":
            assert await request.body() == b"a=1"
        elif read == "form":
            assert (await request.form())["a"] == "1"
        await endpoint(request)

    headers = {"expect": "100-continue", **form}
    exchange = await Client(app_with(use)).post("/", headers=headers, content=[b"a=1"], leave_after=0.1)
    if read == "not at all":
        assert exchange.error is None
        assert not exchange.asked_for_body
    else:
        assert isinstance(exchange.error, ClientClosedRequest)


async def test_a_request_without_receive_or_without_headers_is_accepted() -> None:
    @cancel_on_disconnect
    async def endpoint(request: Request) -> str:
        await anyio.sleep(0.06)
        return "result"

    assert await endpoint(Request(SCOPE)) == "result"
    assert await endpoint(Request({"type": "http"})) == "result"
    with pytest.raises(RuntimeError, match="channel"):
        await Request(SCOPE).receive()


async def test_an_error_of_receive_reaches_the_endpoint_that_reads_and_no_other() -> None:
    async def receive() -> Message:
        raise HTTPException(413)

    @cancel_on_disconnect
    async def waits(request: Request) -> str:
        await anyio.sleep(0.06)
        return "result"

    @cancel_on_disconnect
    async def reads(request: Request) -> bytes:
        await anyio.sleep(0.06)
        return await request.body()

    assert await waits(Request(SCOPE, receive)) == "result"
    with pytest.raises(HTTPException) as raised:
        await reads(Request(SCOPE, receive))
    assert raised.value.status_code == 413


async def test_the_request_can_be_read_through_a_copy() -> None:
    @cancel_on_disconnect
    async def endpoint(request: Request) -> bytes:
        await anyio.sleep(0.06)
        return await Request(request.scope, request.receive).body()

    async def use(request: Request) -> None:
        assert await endpoint(request) == b"ab"

    await ask(app_with(use), method="POST", content=[b"a", b"b"])


async def test_starlette_keeps_receive_where_we_look_for_it() -> None:
    @cancel_on_disconnect
    async def endpoint(request: Request) -> None: ...

    async def use(request: Request) -> None:
        assert request._receive is request.receive
        before = request.receive
        await endpoint(request)
        assert request.receive is request._receive is not before

    await ask(app_with(use))


async def test_is_disconnected_is_true_from_the_first_call_after_the_disconnect() -> None:
    @cancel_on_disconnect
    async def endpoint(request: Request) -> bool:
        return await request.is_disconnected()

    async def use(request: Request) -> None:
        assert await endpoint(request)

    await ask(app_with(use), leave_after_sent=0)


async def test_is_disconnected_still_works_after_a_decorated_function_has_ended() -> None:
    @cancel_on_disconnect
    async def lookup(request: Request) -> None:
        await anyio.sleep(0.06)

    disconnect = anyio.Event()

    async def use(request: Request) -> None:
        await lookup(request)
        assert not await request.is_disconnected()
        disconnect.set()
        await anyio.sleep(0.06)
        assert await request.is_disconnected()
        assert await request.body() == b"a"

    # Not with gunicorn, and hence not by default: its reports can't be trusted after an interrupted wait.
    exchange = await Client(app_with(use), server="uvicorn").post("/", content=b"a", leave_when=disconnect)
    assert exchange.error is None


async def test_a_child_that_calls_is_disconnected_prevents_no_cancellation() -> None:
    async def progress(request: Request) -> None:
        while not await request.is_disconnected():
            await anyio.sleep(0.005)

    @cancel_on_disconnect
    async def endpoint(request: Request) -> None:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(progress, request)
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.2)
            await anyio.sleep_forever()

    exchange = await ask(app_of(endpoint), leave_after=0.06)
    assert exchange.status == 499


async def test_the_seconds_in_the_log_are_those_of_the_request(records: list[logging.LogRecord]) -> None:
    @cancel_on_disconnect
    async def helper(request: Request) -> None: ...

    @cancel_on_disconnect
    async def endpoint(request: Request) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            await helper(request)

    await ask(app_of(endpoint), leave_after=0.1)
    assert [vars(record)["seconds"] > 0.01 for record in records] == [True]


async def test_background_tasks_run_to_the_end_if_the_server_reports_a_disconnect_after_the_response() -> None:
    done: list[str] = []

    async def later() -> None:
        await anyio.sleep(0.1)
        done.append("later")

    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        await anyio.sleep(0.06)
        return PlainTextResponse("answer", background=BackgroundTask(later))

    exchange = await ask(app_of(endpoint))
    assert exchange.status == 200
    assert done == ["later"]


async def test_nothing_of_a_request_is_left_to_the_garbage_collector() -> None:
    @cancel_on_disconnect
    async def endpoint(request: Request) -> None:
        await anyio.sleep(0.06)

    async def use(request: Request) -> None:
        await endpoint(request)
        gone = weakref.ref(request.receive), weakref.ref(request)
        del request
        await anyio.sleep(0.06)  # until the event loop has released its references too
        assert [reference() for reference in gone] == [None, None]

    gc.collect()
    gc.disable()
    try:
        await ask(app_with(use))
    finally:
        gc.enable()


async def has_left_nothing(receive: Receive) -> bool:
    """Whether nothing of a request whose receive() fails is left to the garbage collector."""

    @cancel_on_disconnect
    async def endpoint(request: Request) -> None:
        await request.body()

    async def call(request: Request) -> None:
        with pytest.raises(ValueError, match="too large"):
            await endpoint(request)

    gc.collect()
    gc.disable()
    try:
        request = Request(SCOPE, receive)
        await call(request)
        gone = weakref.ref(request)
        del request
        await anyio.sleep(0.06)
        return gone() is None
    finally:
        gc.enable()


async def test_nothing_of_a_failing_request_is_left_to_the_garbage_collector() -> None:
    async def receive() -> Message:
        raise ValueError("too large")

    assert await has_left_nothing(receive)


@pytest.mark.parametrize("anyio_backend", [BACKENDS["asyncio"], BACKENDS["uvloop"]], ids=["asyncio", "uvloop"])
async def test_nothing_is_left_to_the_garbage_collector_where_receive_returns_a_future_that_fails() -> None:
    class Server:
        def receive(self) -> Awaitable[Message]:
            future: asyncio.Future[Message] = asyncio.Future()
            asyncio.get_running_loop().call_soon(future.set_exception, ValueError("too large"))
            return future

    assert await has_left_nothing(Server().receive)


def test_the_exception_has_both_base_classes_and_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(ClientClosedRequest()))
    assert isinstance(error, ClientDisconnect)
    assert isinstance(error, HTTPException)
    assert error.status_code == 499
    assert str(error) == "499: Client Closed Request"


REFUSED: list[tuple[Any, str, str]] = [  # Any: what the type checkers reject too
    (Endpoint, "a class", "methods"),
]


@pytest.mark.parametrize(("endpoint", "fault", "way_out"), REFUSED)
def test_a_wrong_use_is_refused_with_the_way_out(endpoint: Any, fault: str, way_out: str) -> None:
    for decorator in (cancel_on_disconnect, cancel_on_disconnect(on_disconnect=print)):
        with pytest.raises(TypeError) as raised:
            decorator(endpoint)
        message = str(raised.value)
        assert f"guard {endpoint.__module__}.{endpoint.__qualname__}: it is" in message
        assert fault in message
        assert way_out in message


def test_an_object_that_is_not_callable_is_refused() -> None:
    with pytest.raises(TypeError, match="guard 'endpoint': it is not a function"):
        cancel_on_disconnect("endpoint")  # type: ignore[call-overload]  # this is what the test is about

"""Streams: a response that is sent chunk by chunk ends when the client disconnects, and only then."""

from __future__ import annotations

import asyncio
import functools
import gc
import gzip
import hashlib
import logging
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, nullcontext
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import Unpack

from cancelonleave import ClientClosedRequest, cancel_on_disconnect
from cancelonleave.testing import SERVERS, Client, Exchange, Options
from tests.shared.asking import LONGER_THAN_GRACE, TRUSTS_SEND, ignore_middleware_garbage, on_trio
from tests.shared.virtual_time import anyio_backend as anyio_backend

pytestmark = [pytest.mark.anyio, ignore_middleware_garbage]

ALL_SERVERS = ("strict", "gunicorn-uvloop", *SERVERS)
KINDS = (StreamingResponse, EventSourceResponse)
IDLE = 60  # seconds: a stream whose upstream sends nothing


class Stream:
    """A stream that sends some chunks and then waits, and records what happens to it."""

    def __init__(self, *, chunks: int = 1, wait: float = IDLE) -> None:
        self.events: list[str] = []
        self.idle = anyio.Event()
        self.chunks = chunks
        self.wait = wait

    async def __call__(self) -> AsyncGenerator[str]:
        try:
            for number in range(self.chunks):
                yield str(number)
            self.idle.set()
            await anyio.sleep(self.wait)
            yield "last"
        except anyio.get_cancelled_exc_class():
            self.events.append("cancelled")
            raise
        except GeneratorExit:
            self.events.append("closed")
            raise
        finally:
            self.events.append("cleaning up")
            with anyio.CancelScope(shield=on_trio()):
                await checkpoint()
                await anyio.sleep(0.01)
            self.events.append("clean")

    async def after(self) -> None:
        self.events.append("background")
        await anyio.sleep(LONGER_THAN_GRACE)
        self.events.append("background done")

    def on_disconnect(self, request: Request) -> None:
        self.events.append("on_disconnect")


def application(endpoint: Callable[[Request], Awaitable[Response]], *middleware: Middleware) -> Starlette:
    return Starlette(routes=[Route("/", endpoint, methods=["GET", "POST"])], middleware=middleware)


def streaming(stream: Stream, kind: type[Response] = StreamingResponse) -> Callable[[Request], Awaitable[Response]]:
    @cancel_on_disconnect(on_disconnect=stream.on_disconnect)
    async def endpoint(request: Request) -> Response:
        return kind(stream(), background=BackgroundTask(stream.after))

    return endpoint


def client_of(app: ASGIApp, server: str = "strict") -> Client:
    return Client(app, server=server)


async def ask(app: ASGIApp, *, server: str = "strict", method: str = "GET", **options: Unpack[Options]) -> Exchange:
    exchange = await client_of(app, server).request(method, "/", **options)
    assert exchange.error is None, exchange
    return exchange


CUT = ["cancelled", "cleaning up", "clean", "on_disconnect", "background", "background done"]


@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_an_idle_stream_stops_when_its_client_disconnects(server: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cancelonleave")
    stream = Stream()
    exchange = await ask(application(streaming(stream)), server=server, leave_when=stream.idle)
    assert stream.events == CUT
    assert exchange.status == 200
    assert exchange.body == b"0"
    assert not exchange.complete
    assert [record.name for record in caplog.records] == ["cancelonleave"]


@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_a_response_that_listens_for_the_disconnect_itself_stops(
    server: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cancelonleave")
    stream = Stream()
    exchange = await ask(application(streaming(stream, EventSourceResponse)), server=server, leave_when=stream.idle)
    assert sorted(stream.events) == sorted(CUT)
    assert stream.events[:3] == ["cancelled", "cleaning up", "clean"]
    assert exchange.status == 200
    assert [record.name for record in caplog.records] == ["cancelonleave"]


async def test_an_undecorated_idle_stream_does_not_notice_the_disconnect_on_asgi_2_4() -> None:
    stream = Stream()

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(stream())

    client = Client(application(endpoint), server="gunicorn", timeout=0.2)
    goes_on = pytest.raises(AssertionError, match=r"still running 0\.2 s after the client disconnected")
    with goes_on if TRUSTS_SEND else nullcontext():
        await client.get("/", leave_when=stream.idle)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_a_stream_that_is_sending_is_closed_when_its_client_disconnects(
    kind: type[Response], server: str
) -> None:
    stream = Stream(chunks=100)
    exchange = await ask(application(streaming(stream, kind)), server=server, leave_after_received=50)
    ends = [event for event in stream.events if event in {"cancelled", "closed"}]
    assert len(ends) == 1
    assert stream.events.count("clean") == stream.events.count("on_disconnect") == 1
    assert stream.events.count("background done") == 1
    assert not exchange.complete


@pytest.mark.parametrize("server", ALL_SERVERS)
@pytest.mark.parametrize("delay", [0, LONGER_THAN_GRACE])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_stream_whose_client_stays_behaves_as_undecorated(
    kind: type[Response], delay: float, server: str
) -> None:
    def application_of(stream: Stream, *, decorated: bool) -> Starlette:
        async def endpoint(request: Request) -> Response:
            await anyio.sleep(delay)
            return kind(stream(), 202, {"x-own": "1"}, background=BackgroundTask(stream.after))

        return application(cancel_on_disconnect(endpoint) if decorated else endpoint)

    streams = [Stream(chunks=3, wait=delay), Stream(chunks=3, wait=delay)]
    exchanges = [
        await ask(application_of(stream, decorated=decorated), server=server)
        for stream, decorated in zip(streams, (True, False), strict=True)
    ]
    decorated, plain = ([sent.message for sent in exchange.messages] for exchange in exchanges)
    assert decorated == plain
    assert streams[0].events == streams[1].events
    assert streams[0].events == ["cleaning up", "clean", "background", "background done"]


async def test_a_disconnect_before_the_response_has_started_counts_as_one_during_the_endpoint() -> None:
    stream = Stream()
    gone = anyio.Event()

    @cancel_on_disconnect
    async def decorated(request: Request) -> Response:
        return StreamingResponse(stream(), background=BackgroundTask(stream.after))

    async def endpoint(request: Request) -> Response:
        response = await decorated(request)
        gone.set()
        assert await request.receive() == {"type": "http.request", "body": b"", "more_body": False}
        assert await request.receive() == {"type": "http.disconnect"}
        return response

    exchange = await Client(Route("/", endpoint)).get("/", leave_when=gone)
    assert isinstance(exchange.error, ClientClosedRequest)
    assert stream.events == ["background", "background done"]


async def test_a_disconnect_between_the_start_and_the_first_chunk_stops_the_stream() -> None:
    stream = Stream(chunks=0)
    exchange = await ask(application(streaming(stream)), leave_when=stream.idle)
    assert stream.events == CUT
    assert exchange.body == b""


async def test_the_response_stays_the_same_object_of_the_same_class() -> None:
    class OwnResponse(StreamingResponse):
        """Has an attribute of its own."""

    response = OwnResponse(iter(["a"]), 201, {"x-own": "1"}, "text/own", BackgroundTask(print))
    before = dict(vars(response))

    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        return response

    returned = await endpoint(Request({"type": "http", "headers": []}))
    assert returned is response
    assert isinstance(returned, OwnResponse)
    assert (type(returned).__name__, type(returned).__module__) == ("OwnResponse", __name__)
    assert {name: value for name, value in vars(returned).items() if name in before} == before


async def test_plain_and_file_responses_are_not_touched() -> None:
    @cancel_on_disconnect
    async def endpoint(request: Request, response: Response) -> Response:
        return response

    for response in (PlainTextResponse("a"), FileResponse(__file__)):
        before = dict(vars(response))
        returned = await endpoint(Request({"type": "http", "headers": []}), response)
        assert type(returned) in {PlainTextResponse, FileResponse}
        assert vars(returned) == before


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


MIDDLEWARE = {
    "one": [Middleware(BaseHTTPMiddleware, dispatch=pass_on)],
    "three": [Middleware(BaseHTTPMiddleware, dispatch=pass_on)] * 3,
    "gzip": [Middleware(GZipMiddleware, minimum_size=0)],
    "gzip inside": [Middleware(BaseHTTPMiddleware, dispatch=pass_on), Middleware(GZipMiddleware, minimum_size=0)],
    "gzip outside": [Middleware(GZipMiddleware, minimum_size=0), Middleware(BaseHTTPMiddleware, dispatch=pass_on)],
}


@pytest.mark.parametrize("chunks", [0, 1])
@pytest.mark.parametrize("middleware", MIDDLEWARE.values(), ids=MIDDLEWARE)
async def test_a_stream_stops_under_middleware(middleware: list[Middleware], chunks: int) -> None:
    stream = Stream(chunks=chunks)
    app = application(streaming(stream), *middleware)
    exchange = await ask(app, server="uvicorn", headers={"accept-encoding": "gzip"}, leave_when=stream.idle)
    assert stream.events == CUT
    assert exchange.status == 200


@pytest.mark.parametrize("middleware", MIDDLEWARE.values(), ids=MIDDLEWARE)
async def test_a_stream_is_whole_under_middleware(middleware: list[Middleware]) -> None:
    stream = Stream(chunks=3, wait=LONGER_THAN_GRACE)
    app = application(streaming(stream), *middleware)
    exchange = await ask(app, server="uvicorn", headers={"accept-encoding": "gzip"})
    is_packed = exchange.headers.get("content-encoding") == "gzip"
    assert (gzip.decompress(exchange.body) if is_packed else exchange.body) == b"012last"
    assert exchange.complete
    assert "on_disconnect" not in stream.events
    assert stream.events[-1] == "background done"


@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_a_stream_that_sends_what_it_reads_loses_no_byte(server: str) -> None:
    chunks = [hashlib.sha256(str(number).encode()).digest() * 40 for number in range(60)]

    async def slowly() -> AsyncIterator[bytes]:
        for number, chunk in enumerate(chunks):
            if number % 20 == 0:
                await anyio.sleep(LONGER_THAN_GRACE / 2)
            yield chunk

    @cancel_on_disconnect
    async def echo(request: Request) -> Response:
        await anyio.sleep(LONGER_THAN_GRACE)
        return StreamingResponse(request.stream())

    exchange = await ask(application(echo), server=server, method="POST", content=slowly())
    assert exchange.body == b"".join(chunks)
    assert exchange.complete


async def test_a_stream_that_has_read_the_disconnect_is_not_cancelled_as_well() -> None:
    stream = Stream()

    async def read(request: Request) -> AsyncGenerator[bytes]:
        try:
            body = request.stream()
            while True:
                yield await anext(body)
                stream.idle.set()
        except BaseException as error:
            stream.events.append(type(error).__name__)
            await anyio.sleep(LONGER_THAN_GRACE)
            stream.events.append("clean")
            raise

    @cancel_on_disconnect(on_disconnect=stream.on_disconnect)
    async def endpoint(request: Request) -> Response:
        return StreamingResponse(read(request))

    async def upload() -> AsyncIterator[bytes]:
        yield b"a"
        await anyio.sleep(IDLE)

    exchange = await ask(application(endpoint), method="POST", content=upload(), leave_when=stream.idle)
    assert stream.events == ["ClientDisconnect", "clean", "on_disconnect"]
    assert exchange.body == b"a"


async def test_an_error_of_the_stream_is_passed_on_unchanged() -> None:
    async def fail() -> AsyncGenerator[bytes]:
        yield b"a"
        raise FileNotFoundError("the stream's own")

    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        return StreamingResponse(fail())

    for server in ALL_SERVERS:
        exchange = await Client(application(endpoint), server=server).get("/")
        assert isinstance(exchange.error, FileNotFoundError)


async def test_an_error_of_items_is_passed_on_unchanged() -> None:
    async def fail() -> AsyncGenerator[str]:
        yield "a"
        raise FileNotFoundError("the stream's own")

    async def endpoint(request: Request) -> Response:
        return EventSourceResponse(fail())

    exchange = await client_of(application(cancel_on_disconnect(endpoint))).get("/")
    plain = await client_of(application(endpoint)).get("/")
    assert exchange.error is not None
    assert repr(exchange.error) == repr(plain.error)  # older sse-starlette raises it in a group


async def test_a_decorated_background_task_runs_after_a_complete_stream() -> None:
    stream = Stream(wait=0)

    @cancel_on_disconnect
    async def in_background(request: Request) -> None:
        await anyio.sleep(LONGER_THAN_GRACE)
        stream.events.append("decorated")

    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        return StreamingResponse(stream(), background=BackgroundTask(in_background, request))

    for server in ALL_SERVERS:
        await ask(application(endpoint), server=server)
        assert stream.events.pop() == "decorated"


async def test_the_hook_of_each_decorator_that_the_response_passes_through_is_called() -> None:
    stream = Stream()
    inner = streaming(stream)

    @cancel_on_disconnect(on_disconnect=lambda request: stream.events.append("outer"))
    async def endpoint(request: Request) -> Response:
        return await inner(request)

    await ask(application(endpoint), leave_when=stream.idle)
    assert stream.events == [*CUT[:4], "outer", *CUT[4:]]


async def test_a_body_that_is_only_iterable_works() -> None:
    class Body:
        def __aiter__(self) -> AsyncIterator[str]:
            return stream()

    stream = Stream()

    @cancel_on_disconnect(on_disconnect=stream.on_disconnect)
    async def endpoint(request: Request) -> Response:
        return StreamingResponse(Body())

    await ask(application(endpoint), leave_when=stream.idle)
    assert stream.events == CUT[:4]


async def test_an_iterator_that_cannot_be_closed_works() -> None:
    class Body:
        def __aiter__(self) -> Body:
            return self

        async def __anext__(self) -> str:
            if idle.is_set():
                await anyio.sleep(IDLE)
            idle.set()
            return "piece"

    idle = anyio.Event()

    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        return StreamingResponse(Body())

    await ask(application(endpoint), leave_when=idle)


@pytest.mark.parametrize("kind", KINDS)
async def test_cancellation_from_outside_is_passed_on_and_the_stream_closed(kind: type[Response]) -> None:
    stream = Stream()
    application_of_stream = application(streaming(stream, kind))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with anyio.CancelScope() as cancel_scope:
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(cancel_when_idle, cancel_scope)
                await application_of_stream(scope, receive, send)
        stream.events.append("passed on" if cancel_scope.cancelled_caught else "swallowed")

    async def cancel_when_idle(cancel_scope: anyio.CancelScope) -> None:
        await stream.idle.wait()
        cancel_scope.cancel()

    await ask(app)
    assert stream.events[0] == "cancelled"
    assert stream.events[-1] == "passed on"
    assert not {"on_disconnect", "background"} & set(stream.events)


async def test_an_unsent_response_leaves_nothing_behind() -> None:
    @cancel_on_disconnect
    async def decorated(request: Request) -> Response:
        await anyio.sleep(LONGER_THAN_GRACE)
        return StreamingResponse(Stream()())

    async def endpoint(request: Request) -> Response:
        await decorated(request)
        await checkpoint()
        await checkpoint()
        return PlainTextResponse("something else")

    exchange = await Client(application(endpoint)).get("/")  # the client checks for tasks left behind
    assert exchange.body == b"something else"


async def test_is_disconnected_is_still_true_after_an_aborted_stream() -> None:
    stream = Stream()
    results: list[bool] = []

    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        async def ask_again() -> None:
            results.append(await request.is_disconnected())

        return StreamingResponse(stream(), background=BackgroundTask(ask_again))

    await ask(application(endpoint), leave_when=stream.idle)
    assert results == [True]


async def test_the_client_is_known_to_have_disconnected_when_send_fails() -> None:
    results: list[bool] = []

    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        async def ask_again() -> None:
            results.append(await request.is_disconnected())

        return StreamingResponse(Stream()(), background=BackgroundTask(ask_again))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def fail(message: Message) -> None:
            if message["type"] == "http.response.body":
                raise BrokenPipeError
            await send(message)

        await application(endpoint)(scope, receive, fail)

    exchange = await ask(app, server="gunicorn-h2")
    assert exchange.status == 200
    assert results == [True]


def with_timeout(chunks: int) -> AsyncIterator[str]:
    async def stream() -> AsyncGenerator[str]:
        with anyio.move_on_after(60):
            for number in range(chunks):
                yield str(number)
                await anyio.sleep(0.001)

    return stream()


def with_task_group(chunks: int) -> AsyncIterator[str]:
    async def stream() -> AsyncGenerator[str]:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(anyio.sleep_forever)
            for number in range(chunks):
                yield str(number)
                await anyio.sleep(0.001)
            task_group.cancel_scope.cancel()

    return stream()


@pytest.mark.parametrize("make", [with_timeout, with_task_group])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_generator_can_hold_a_cancel_scope_from_one_chunk_to_the_next(
    kind: type[Response], make: Callable[[int], AsyncIterator[str]]
) -> None:
    async def endpoint(request: Request) -> Response:
        return kind(make(5))

    decorated = await ask(application(cancel_on_disconnect(endpoint)))
    plain = await ask(application(endpoint), server="uvicorn")
    assert decorated.complete
    assert decorated.body == plain.body


@pytest.mark.parametrize("make", [with_timeout, with_task_group])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("server", ["uvicorn", "strict"])
async def test_a_generator_that_holds_a_cancel_scope_is_stopped_cleanly(
    kind: type[Response], make: Callable[[int], AsyncIterator[str]], server: str
) -> None:
    if on_trio():  # on trio, other responses with a `body_iterator` are not guarded
        kind = StreamingResponse

    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        return kind(make(1_000_000))

    await ask(application(endpoint), server=server, leave_after_received=3)


async def test_a_disconnect_after_a_complete_response_is_ignored_even_if_items_remain() -> None:
    stream = Stream(chunks=10)

    class FirstTwo(StreamingResponse):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            chunks = aiter(self.body_iterator)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            for _ in range(2):
                chunk = str(await anext(chunks)).encode()
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
            await anyio.sleep(LONGER_THAN_GRACE)

    for server in ALL_SERVERS:
        exchange = await ask(application(streaming(stream, FirstTwo)), server=server)
        assert exchange.complete
        assert stream.events == ["closed", "cleaning up", "clean"]
        stream.events.clear()


@pytest.mark.parametrize("kind", KINDS)
async def test_an_os_error_of_a_middleware_is_not_a_disconnect(kind: type[Response]) -> None:
    app = application(streaming(Stream(wait=0), kind))

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        async def store_session(message: Message) -> None:
            raise ConnectionRefusedError("the session store is down")

        await app(scope, receive, store_session)

    exchange = await client_of(middleware, "uvicorn").get("/")
    assert "ConnectionRefusedError" in repr(exchange.error)


async def test_a_response_that_is_sent_twice_is_watched_twice() -> None:
    class Body:
        def __aiter__(self) -> AsyncIterator[str]:
            return stream()

    stream = Stream(wait=0)
    response = StreamingResponse(Body())

    @cancel_on_disconnect(on_disconnect=lambda request: stream.events.append("on_disconnect"))
    async def endpoint(request: Request) -> Response:
        return response

    assert (await ask(application(endpoint))).body == b"0last"
    stream.wait, stream.idle = IDLE, anyio.Event()
    await ask(application(endpoint), leave_when=stream.idle)
    assert stream.events[-1] == "on_disconnect"


class WithOwnCall(StreamingResponse):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, receive, send)


class WithOwnListener(StreamingResponse):
    async def listen_for_disconnect(self, receive: Receive) -> None:
        await super().listen_for_disconnect(receive)


@pytest.mark.parametrize("chunks", [1, 50])
@pytest.mark.parametrize("kind", [WithOwnCall, WithOwnListener])
@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_a_streaming_response_with_overridden_methods_stops(
    kind: type[Response], server: str, chunks: int
) -> None:
    stream = Stream(chunks=chunks)
    received = 20 if chunks == 50 else -1
    app = application(streaming(stream, kind))
    await ask(app, server=server, leave_when=stream.idle, leave_after_received=received)
    rest = set(stream.events) - {"cancelled", "closed"}
    assert len(stream.events) == len(CUT)  # in the order of CUT, except that it runs the background task itself
    assert rest == set(CUT[1:])


async def test_background_tasks_are_not_run_if_the_response_has_not_started() -> None:
    ran: list[str] = []
    gone = anyio.Event()

    @cancel_on_disconnect
    async def decorated(request: Request) -> Response:
        return StreamingResponse(Stream()())

    async def endpoint(request: Request) -> Response:
        response = await decorated(request)
        response.background = BackgroundTask(ran.append, "as FastAPI adds what was queued")
        gone.set()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        return response

    exchange = await Client(Route("/", endpoint)).get("/", leave_when=gone)
    assert isinstance(exchange.error, ClientClosedRequest)
    assert not ran


async def test_a_function_that_wraps_a_generator_is_guarded_by_the_kind_of_its_result() -> None:
    stream = Stream()

    def streamed(generate: Callable[[Request], AsyncIterator[str]]) -> Callable[[Request], Response]:
        @functools.wraps(generate)
        def wrapper(request: Request) -> Response:
            return StreamingResponse(generate(request))

        return wrapper

    async def generate(request: Request) -> AsyncGenerator[str]:
        async with aclosing(stream()) as chunks:
            async for chunk in chunks:
                yield chunk

    endpoint: Any = cancel_on_disconnect(on_disconnect=stream.on_disconnect)(streamed(generate))

    async def call(request: Request) -> Response:
        response: Response = endpoint(request)
        return response

    await ask(application(call), leave_when=stream.idle)
    assert stream.events == CUT[:4]


class FirstOnly(Response):
    def __init__(self, content: AsyncIterator[str]) -> None:
        super().__init__()
        self.body_iterator = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await anext(self.body_iterator)
        await super().__call__(scope, receive, send)


async def fails_in_cleanup() -> AsyncGenerator[str]:
    try:
        yield "a"
    finally:
        await checkpoint()
        raise ZeroDivisionError


async def fails_in_a_task_group() -> AsyncGenerator[str]:
    async with anyio.create_task_group(), aclosing(fails_in_cleanup()) as chunks:
        yield await anext(chunks)


@pytest.mark.parametrize("generate", [fails_in_cleanup, fails_in_a_task_group])
async def test_an_error_of_the_cleanup_is_passed_on(generate: Callable[[], AsyncGenerator[str]]) -> None:
    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        return FirstOnly(generate())

    exchange = await Client(application(endpoint)).get("/")
    assert "ZeroDivisionError" in repr(exchange.error)


@pytest.mark.parametrize("anyio_backend", ["asyncio", "uvloop"], indirect=True)
async def test_the_cancellation_of_all_tasks_reaches_the_response() -> None:
    idle = anyio.Event()
    tasks: list[asyncio.Task[object] | None] = []

    async def chunks() -> AsyncGenerator[str]:
        yield "a"
        tasks.append(asyncio.current_task())
        idle.set()
        await anyio.sleep(IDLE)

    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        return WithOwnCall(chunks())

    async def shut_down() -> None:
        await idle.wait()
        for task in asyncio.all_tasks():
            if task in tasks or task.get_name().startswith("cancelonleave"):
                task.cancel()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(shut_down)
            exchange = await client_of(application(endpoint)).get("/")
            assert not exchange.complete


@pytest.mark.parametrize("kind", [StreamingResponse, WithOwnCall])
async def test_nothing_is_left_to_the_garbage_collector(kind: type[Response]) -> None:
    seen: list[weakref.ref[object]] = []

    class OwnRequest(Request): ...

    stream = Stream()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        @cancel_on_disconnect
        async def endpoint(request: Request) -> Response:
            response = kind(stream())
            seen.extend([weakref.ref(request), weakref.ref(response)])
            return response

        request = OwnRequest(scope, receive)
        response = await endpoint(request)
        await response(scope, receive, send)

    gc.collect()
    gc.disable()
    try:
        await client_of(app).get("/", leave_when=stream.idle)
        await anyio.sleep(LONGER_THAN_GRACE)
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("anyio_backend", ["asyncio", "uvloop"], indirect=True)
async def test_a_task_that_reads_the_disconnect_after_send_has_failed_is_not_interrupted_in_its_cleanup() -> None:
    gone = anyio.Event()
    messages: list[Message] = [{"type": "http.request", "body": b"part", "more_body": True}]
    sent: list[Message] = []
    ends: list[str] = []

    class Server:
        async def receive(self) -> Message:
            if not messages:
                await gone.wait()
                return {"type": "http.disconnect"}
            return messages.pop()

        async def send(self, message: Message) -> None:
            sent.append(message)
            if len(sent) == 4:
                gone.set()
                raise OSError

    @cancel_on_disconnect
    async def read(request: Request) -> None:
        with pytest.raises(ClientDisconnect):
            await request.body()
        await anyio.sleep(0.1)
        ends.append("clean")

    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        async def items() -> AsyncGenerator[str]:
            task = asyncio.create_task(read(request))
            try:
                while True:
                    yield "item"
                    await anyio.sleep(0.01)
            finally:
                await asyncio.wait([task])

        return StreamingResponse(items())

    scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "asgi": {"spec_version": "2.4"}}
    with anyio.fail_after(10):
        await Starlette(routes=[Route("/", endpoint)])(scope, Server().receive, Server().send)
    assert ends == ["clean"]

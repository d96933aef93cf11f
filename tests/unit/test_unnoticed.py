"""A client that stays, its server, and the rest of the program don't notice that an endpoint is decorated."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextvars import Context, copy_context
from typing import Annotated, Any

import anyio
import pytest
from anyio.abc import TaskGroup
from fastapi import Body, Depends, FastAPI, Request
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cancelonleave import ClientClosedRequest, cancel_on_disconnect
from cancelonleave.testing import SERVERS, Client
from tests.shared.annotated_endpoints import Endpoint, Guard
from tests.shared.asking import LONGER_THAN_GRACE, ask, undecorated
from tests.shared.virtual_time import BACKENDS as VIRTUAL
from tests.shared.virtual_time import anyio_backend as anyio_backend

pytestmark = pytest.mark.anyio

ALL_SERVERS = ("strict", *SERVERS)
VERSIONS = ("2.3", "2.4")
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio", "uvloop"], indirect=True)


class Server:
    """One request of a client that stays, whose body has arrived or arrives message by message."""

    def __init__(self, chunks: list[bytes], *, version: str = "2.3", gap: float | None = None) -> None:
        self.messages: list[Message] = [
            {"type": "http.request", "body": chunk, "more_body": number < len(chunks)}
            for number, chunk in enumerate(chunks, start=1)
        ]
        self.version = version
        self.gap = gap
        self.received = 0  # calls of receive()
        self.pending = 0  # calls that have not returned
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        self.received += 1
        self.pending += 1
        try:
            if self.gap is not None:
                await anyio.sleep(self.gap)
            if not self.messages:
                await anyio.sleep_forever()
            return self.messages.pop(0)
        finally:
            self.pending -= 1

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def serve(self, app: ASGIApp, content_type: bytes = b"application/octet-stream") -> bytes:
        scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "query_string": b"",
            "headers": [(b"content-type", content_type)],
            "asgi": {"version": "3.0", "spec_version": self.version},
        }
        with anyio.fail_after(100):
            await app(scope, self.receive, self.send)
        assert self.sent[0]["status"] == 200
        return b"".join(message.get("body", b"") for message in self.sent)


def starlette(endpoint: Endpoint) -> ASGIApp:
    return Starlette(routes=[Route("/", endpoint, methods=["POST"])])


async def some_turns() -> None:
    """Wait until the event loop has released what has ended."""
    for _ in range(5):
        await anyio.sleep(0.01)


# Empty body messages, as a middleware that decompresses produces them.


def plain(guard: Guard) -> ASGIApp:
    @guard
    async def upload(request: Request) -> Response:
        return PlainTextResponse(str(sum([len(chunk) async for chunk in request.stream()])))

    return starlette(upload)


def after_a_dependency(guard: Guard) -> ASGIApp:
    app = FastAPI()

    @guard
    async def user(request: Request) -> None: ...

    @app.post("/", dependencies=[Depends(user)])
    async def upload(request: Request) -> int:
        return sum([len(chunk) async for chunk in request.stream()])

    return app


def after_a_dependency_that_lasts(guard: Guard) -> ASGIApp:
    app = FastAPI()

    @guard
    async def user(request: Request) -> None:
        await anyio.sleep(LONGER_THAN_GRACE)

    @app.post("/", dependencies=[Depends(user)])
    @guard
    async def upload(request: Request) -> int:
        return sum([len(chunk) async for chunk in request.stream()])

    return app


def late(guard: Guard) -> ASGIApp:
    @guard
    async def upload(request: Request) -> Response:
        await anyio.sleep(LONGER_THAN_GRACE)
        return PlainTextResponse(str(len(await request.body())))

    return starlette(upload)


@pytest.mark.parametrize("make", [plain, after_a_dependency, after_a_dependency_that_lasts, late])
@pytest.mark.parametrize("gap", [None, 0.002, 0.03], ids=["at once", "2 ms each", "30 ms each"])
@pytest.mark.parametrize("version", VERSIONS)
async def test_empty_body_messages_cause_no_delay(
    make: Callable[[Guard], ASGIApp], gap: float | None, version: str
) -> None:
    seconds: list[float] = []
    for guard in (undecorated, cancel_on_disconnect):
        server = Server([b"", b"", b"", b"x" * 100] * 10, version=version, gap=gap)
        began = anyio.current_time()
        assert await server.serve(make(guard)) == b"1000"
        seconds.append(anyio.current_time() - began)
    plain, decorated = seconds
    assert decorated <= plain + 0.001


# Endpoints that read a body that has already arrived.


async def reads_body(request: Request) -> None:
    await request.body()


async def reads_json(request: Request) -> None:
    await request.json()


async def reads_stream(request: Request) -> None:
    async for _ in request.stream():
        pass


async def reads_form(request: Request) -> None:
    await request.form()


async def reads_in_a_helper(request: Request) -> None:
    await cancel_on_disconnect(reads_body)(request)


async def reads_and_works(request: Request) -> None:
    await request.body()
    await anyio.sleep(0.01)


async def reads_between_works(request: Request) -> None:
    await anyio.sleep(0.005)
    await request.body()
    await anyio.sleep(0.005)


READS = (
    reads_body,
    reads_json,
    reads_stream,
    reads_form,
    reads_in_a_helper,
    reads_and_works,
    reads_between_works,
)
FORM = b"application/x-www-form-urlencoded"


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("chunks", [[b"{}"], [b"{", b"}"], [b"{", b"", b"}", b""]], ids=len)
@pytest.mark.parametrize("version", VERSIONS)
async def test_an_endpoint_that_reads_its_body_causes_no_further_receive(
    read: Callable[[Request], Awaitable[None]], chunks: list[bytes], version: str
) -> None:
    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        await read(request)
        return PlainTextResponse("read")

    server = Server(chunks, version=version)
    assert await server.serve(starlette(endpoint), FORM) == b"read"
    assert (server.received, server.pending) == (len(chunks), 0)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_fastapi_endpoint_with_a_parsed_body_causes_no_further_receive(version: str) -> None:
    app = FastAPI()

    @cancel_on_disconnect
    async def user(request: Request) -> int:
        return len(await request.body())

    needed = Depends(user)

    @app.post("/")
    @cancel_on_disconnect
    async def endpoint(item: Annotated[dict[str, int], Body()], size: int = needed) -> str:
        await anyio.sleep(0.01)
        return f"{item} of {size}"

    server = Server([b'{"a":1}'], version=version)
    assert await server.serve(app, b"application/json") == b"\"{'a': 1} of 7\""
    assert (server.received, server.pending) == (1, 0)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_quick_endpoint_that_does_not_read_causes_no_receive(version: str) -> None:
    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        await anyio.sleep(0.01)
        return PlainTextResponse("quick")

    server = Server([b""], version=version)
    assert await server.serve(starlette(endpoint)) == b"quick"
    assert server.received == 0


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("version", VERSIONS)
async def test_a_long_endpoint_leaves_no_receive_pending(
    read: Callable[[Request], Awaitable[None]], version: str
) -> None:
    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        await read(request)
        await anyio.sleep(LONGER_THAN_GRACE)
        return PlainTextResponse("read")

    server = Server([b"{}"], version=version)
    assert await server.serve(starlette(endpoint), FORM) == b"read"
    await some_turns()
    assert (server.received, server.pending) == (2, 0)


# Tasks that outlive their request.


class Upload:
    """An object that the request keeps alive."""


Outlive = Callable[[TaskGroup, Request], Awaitable[None]]


async def in_a_task_group(tasks: TaskGroup, request: Request) -> None:
    tasks.start_soon(anyio.sleep_forever)


async def in_a_task_group_while_the_request_lasts(tasks: TaskGroup, request: Request) -> None:
    await anyio.sleep(LONGER_THAN_GRACE)
    tasks.start_soon(anyio.sleep_forever)
    await anyio.sleep(LONGER_THAN_GRACE)


async def in_a_task_group_after_reading(tasks: TaskGroup, request: Request) -> None:
    await request.body()
    tasks.start_soon(anyio.sleep_forever)


async def in_a_helper(tasks: TaskGroup, request: Request) -> None:
    @cancel_on_disconnect
    async def helper(request: Request) -> None:
        await anyio.sleep(LONGER_THAN_GRACE)
        tasks.start_soon(anyio.sleep_forever)

    await helper(request)


kept_tasks: list[asyncio.Task[None]] = []


async def in_a_task(tasks: TaskGroup, request: Request) -> None:
    kept_tasks.append(asyncio.create_task(anyio.sleep_forever()))
    tasks.start_soon(end_kept_tasks)


async def in_a_task_while_the_request_lasts(tasks: TaskGroup, request: Request) -> None:
    await anyio.sleep(LONGER_THAN_GRACE)
    await in_a_task(tasks, request)
    await anyio.sleep(LONGER_THAN_GRACE)


async def in_a_timer(tasks: TaskGroup, request: Request) -> None:
    asyncio.get_running_loop().call_later(3600, kept_tasks.clear)


async def end_kept_tasks() -> None:
    try:
        await anyio.sleep_forever()
    finally:
        for task in kept_tasks:
            task.cancel()
        kept_tasks.clear()


async def keeps_nothing(outlive: Outlive, version: str, *, is_stream: bool) -> None:
    async with anyio.create_task_group() as tasks:

        async def chunks(request: Request) -> AsyncIterator[str]:
            yield "o"
            await outlive(tasks, request)
            yield "k"

        @cancel_on_disconnect
        async def endpoint(request: Request) -> Response:
            if is_stream:
                return StreamingResponse(chunks(request))
            await outlive(tasks, request)
            return PlainTextResponse("ok")

        def middleware(upload: Upload) -> ASGIApp:
            app = starlette(endpoint)

            async def call(scope: Scope, receive: Receive, send: Send) -> None:
                async def keeping() -> Message:
                    assert upload is not None
                    return await receive()

                await app({**scope, "upload": upload}, keeping, send)

            return call

        async def serve() -> weakref.ref[Upload]:
            upload = Upload()
            assert await Server([b"a"], version=version).serve(middleware(upload)) == b"ok"
            return weakref.ref(upload)

        gone = [await serve() for _ in range(3)]
        await some_turns()
        gc.collect()
        await some_turns()  # until the tasks that ended have released it too
        assert [reference() for reference in gone] == [None] * 3
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("is_stream", [False, True], ids=["endpoint", "stream"])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "outlive",
    [in_a_task_group, in_a_task_group_while_the_request_lasts, in_a_task_group_after_reading, in_a_helper],
)
async def test_a_task_that_outlives_its_request_keeps_nothing_of_it_alive(
    outlive: Outlive, version: str, is_stream: bool
) -> None:
    await keeps_nothing(outlive, version, is_stream=is_stream)


@pytest.mark.parametrize("is_stream", [False, True], ids=["endpoint", "stream"])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("outlive", [in_a_task, in_a_task_while_the_request_lasts, in_a_timer])
@on_asyncio
async def test_an_asyncio_task_or_timer_that_outlives_its_request_keeps_nothing_of_it_alive(
    outlive: Outlive, version: str, is_stream: bool
) -> None:
    await keeps_nothing(outlive, version, is_stream=is_stream)


# A server that runs the first step of a request in another context than the rest, as socketify does.


def call(function: Callable[..., Any], *args: Any) -> Any:  # Any: as Context.run()
    return function(*args)


class BegunElsewhere(Generator[Any, Any, None]):  # Any: what an event loop sends and yields
    """Runs the first step of a coroutine in a separate context."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], context: Context) -> None:
        self.coroutine = coroutine
        self.run: Callable[..., Any] = context.run

    def __await__(self) -> Generator[Any, Any, None]:
        return self

    def send(self, value: Any) -> Any:
        run, self.run = self.run, call
        return run(self.coroutine.send, value)

    def throw(self, *error: Any) -> Any:
        return self.coroutine.throw(*error)


def in_two_contexts(app: ASGIApp) -> ASGIApp:
    async def server(scope: Scope, receive: Receive, send: Send) -> None:
        coroutine: Any = app(scope, receive, send)  # Any: ASGIApp returns any awaitable
        await BegunElsewhere(coroutine, copy_context())

    return server


def waits(guard: Guard) -> ASGIApp:
    @guard
    async def endpoint(request: Request) -> Response:
        await anyio.sleep(LONGER_THAN_GRACE * 2)
        return PlainTextResponse("ok")

    return starlette(endpoint)


def reads(guard: Guard) -> ASGIApp:
    @guard
    async def endpoint(request: Request) -> Response:
        await anyio.sleep(LONGER_THAN_GRACE)
        body = await request.body()
        await anyio.sleep(LONGER_THAN_GRACE)
        return PlainTextResponse(body)

    return starlette(endpoint)


def helps(guard: Guard) -> ASGIApp:
    @guard
    async def helper(request: Request) -> None:
        await anyio.sleep(LONGER_THAN_GRACE * 2)

    async def child(request: Request) -> None:
        await helper(request)

    @guard
    async def endpoint(request: Request) -> Response:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child, request)
        return PlainTextResponse("ok")

    return starlette(endpoint)


def depends(guard: Guard) -> ASGIApp:
    app = FastAPI()

    @guard
    async def user(request: Request) -> None:
        await anyio.sleep(0.001)

    @app.post("/", dependencies=[Depends(user)], response_class=PlainTextResponse)
    @guard
    async def endpoint() -> str:
        await anyio.sleep(LONGER_THAN_GRACE * 2)
        return "ok"

    return app


def streams(guard: Guard) -> ASGIApp:
    async def chunks() -> AsyncIterator[str]:
        yield "o"
        await anyio.sleep(LONGER_THAN_GRACE * 2)
        yield "k"

    @guard
    async def endpoint(request: Request) -> Response:
        await anyio.sleep(0.001)
        return StreamingResponse(chunks())

    return starlette(endpoint)


MAKERS = (waits, reads, helps, depends, streams)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("guard", [undecorated, cancel_on_disconnect], ids=["plain", "decorated"])
@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_a_request_that_is_run_in_two_contexts_is_answered(
    make: Callable[[Guard], ASGIApp], guard: Guard, server: str
) -> None:
    with anyio.fail_after(10):
        exchange = await ask(in_two_contexts(make(guard)), method="POST", server=server, content=b"ok")
    assert exchange.status == 200
    assert exchange.body == b"ok"


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("server", ALL_SERVERS)
@pytest.mark.parametrize("leave_after", [0, 0.01, 0.1])
async def test_a_request_that_is_run_in_two_contexts_ends_when_its_client_disconnects(
    make: Callable[[Guard], ASGIApp], server: str, leave_after: float
) -> None:
    app = in_two_contexts(make(cancel_on_disconnect))
    with anyio.fail_after(10):
        exchange = await Client(app, server=server).post("/", content=b"ok", leave_after=leave_after)
    assert not (exchange.status == 200 and exchange.complete)
    assert exchange.ended_after <= max(leave_after, 0.05) + 0.05


async def does_not_read(request: Request) -> None: ...


@pytest.mark.parametrize("read", [reads_body, does_not_read])
def test_a_request_in_an_empty_context_is_guarded_as_any_other(read: Callable[[Request], Awaitable[None]]) -> None:
    """A server in which no context variable is set; `asyncio.run()` gives it such a context."""
    events: list[str] = []

    @cancel_on_disconnect
    async def endpoint(request: Request) -> None:
        await read(request)
        try:
            await asyncio.sleep(5)
        finally:
            events.append("ended")

    async def main() -> float:
        gone = asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, gone.set)
        messages: list[Message] = [{"type": "http.request", "body": b"a", "more_body": False}]

        async def receive() -> Message:
            if not messages:
                await gone.wait()
            return messages.pop() if messages else {"type": "http.disconnect"}

        began = asyncio.get_running_loop().time()
        with pytest.raises(ClientClosedRequest):
            await endpoint(Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive))
        return asyncio.get_running_loop().time() - began

    with asyncio.Runner(loop_factory=VIRTUAL["asyncio"][1]()["loop_factory"]) as runner:
        seconds = runner.run(main(), context=Context())
    assert events == ["ended"]
    assert seconds == pytest.approx(0.1, abs=0.05)

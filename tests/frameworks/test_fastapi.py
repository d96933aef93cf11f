"""What FastAPI users rely on: the decorator changes nothing until the client disconnects."""

import functools
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import aclosing, contextmanager
from typing import Annotated, Literal

import anyio
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from sse_starlette.sse import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cancelonleave import ClientClosedRequest, cancel_on_disconnect
from cancelonleave.testing import Client
from tests.frameworks.endpoints_of_each_shape import (
    IDS,
    INVALID_IDS,
    INVALID_REQUESTS,
    REQUESTS,
    Ask,
    application,
    post,
)
from tests.shared.annotated_endpoints import Guard, Work
from tests.shared.asking import ask, ignore_middleware_garbage, no_work, sent, some_work, undecorated

pytestmark = pytest.mark.anyio

FORM = "application/x-www-form-urlencoded"


class Recorder:
    def __init__(self, app: ASGIApp, statuses: list[int]) -> None:
        self.app = app
        self.statuses = statuses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def record(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.statuses.append(message["status"])
            await send(message)

        await self.app(scope, receive, record)


def stack(names: str, statuses: list[int]) -> list[Middleware]:
    async def dispatch(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        statuses.append(response.status_code)
        return response

    recorder = Middleware(Recorder, statuses)
    known = {
        "base": Middleware(BaseHTTPMiddleware, dispatch=dispatch),
        "gzip": Middleware(GZipMiddleware, minimum_size=0),
        "cors": Middleware(CORSMiddleware, allow_origins=["*"]),
        "session": Middleware(SessionMiddleware, secret_key="secret"),
    }
    return [recorder, *(middleware for name in names.split() for middleware in (known[name], recorder))]


cached_app = functools.cache(application)


def test_openapi_document_is_the_same_as_undecorated() -> None:
    documents = [json.dumps(application(guard, no_work).openapi()) for guard in (cancel_on_disconnect, undecorated)]
    assert documents[0] == documents[1]
    assert "cancelonleave" not in documents[0]


@pytest.mark.parametrize("request_", REQUESTS, ids=IDS)
@pytest.mark.parametrize("work", [no_work, some_work])
async def test_response_is_the_same_as_undecorated(request_: Ask, work: Work) -> None:
    decorated = await request_(cached_app(cancel_on_disconnect, work))
    plain = await request_(cached_app(undecorated, no_work))
    assert sent(decorated) == sent(plain)
    assert decorated.status in (200, 201, 202) or "future/result" in decorated.request


@pytest.mark.parametrize("request_", INVALID_REQUESTS, ids=INVALID_IDS)
async def test_response_to_an_invalid_request_is_the_same_as_undecorated(request_: Ask) -> None:
    decorated = await request_(cached_app(cancel_on_disconnect, no_work))
    plain = await request_(cached_app(undecorated, no_work))
    assert sent(decorated) == sent(plain)
    assert decorated.status == 422


@pytest.mark.parametrize("request_", REQUESTS, ids=IDS)
async def test_disconnect_cancels_an_endpoint_of_any_shape(request_: Ask) -> None:
    disconnect = anyio.Event()
    cleaned_up = 0

    async def work() -> None:
        nonlocal cleaned_up
        disconnect.set()
        try:
            await anyio.sleep_forever()
        finally:
            cleaned_up += 1

    exchange = await request_(application(cancel_on_disconnect, work), leave_when=disconnect)
    assert exchange.status == 499
    assert cleaned_up == 1


async def transaction_in_coroutine(log: list[str]) -> AsyncIterator[None]:
    with transaction(log):
        yield


def transaction_in_thread(log: list[str]) -> Iterator[None]:
    with transaction(log):
        yield


@contextmanager
def transaction(log: list[str]) -> Generator[None]:
    try:
        yield
    except BaseException as error:
        log.append(f"rollback after {type(error).__name__}")
        raise
    else:
        log.append("commit")


@pytest.mark.parametrize("scope", ["function", "request"])
@pytest.mark.parametrize("dependency", [transaction_in_coroutine, transaction_in_thread])
@pytest.mark.parametrize("disconnects", [True, False])
async def test_yield_dependency_rolls_back_only_when_the_client_disconnects(
    disconnects: bool, dependency: Callable[[list[str]], object], scope: Literal["function", "request"]
) -> None:
    app = FastAPI()
    log: list[str] = []
    disconnect = anyio.Event()

    @app.get("/")
    @cancel_on_disconnect
    async def endpoint(_: Annotated[None, Depends(functools.partial(dependency, log), scope=scope)]) -> None:
        if disconnects:
            disconnect.set()
            await anyio.sleep_forever()
        await some_work()

    exchange = await ask(app, leave_when=disconnect)
    assert (exchange.status, log) == (
        (499, ["rollback after ClientClosedRequest"]) if disconnects else (200, ["commit"])
    )


async def test_callable_instance_answers_and_is_cancelled() -> None:
    # Tested separately because FastAPI before 0.123 takes an undecorated instance for a sync function.
    exchange = await ask(application(cancel_on_disconnect, some_work), "/instance?q=a")
    assert (exchange.status, exchange.body) == (200, b'"a"')
    exchange = await ask(application(cancel_on_disconnect, anyio.sleep_forever), "/instance", leave_after=0)
    assert exchange.status == 499


@ignore_middleware_garbage
@pytest.mark.parametrize("names", ["", "base base"])
@pytest.mark.parametrize("work", [no_work, some_work])
async def test_background_task_is_not_cancelled_by_a_disconnect_after_the_response(work: Work, names: str) -> None:
    statuses: list[int] = []
    app = FastAPI(middleware=stack(names, statuses))
    done: list[str] = []

    async def task() -> None:
        await some_work()
        done.append("task")

    @app.get("/")
    @cancel_on_disconnect
    async def endpoint(tasks: BackgroundTasks) -> None:
        tasks.add_task(task)
        await work()

    exchange = await ask(app)
    assert exchange.status == 200
    assert done == ["task"]


async def test_background_task_does_not_run_when_the_client_has_disconnected() -> None:
    app = FastAPI()
    disconnect = anyio.Event()
    done: list[str] = []

    @app.get("/")
    @cancel_on_disconnect
    async def endpoint(tasks: BackgroundTasks) -> None:
        tasks.add_task(done.append, "task")
        disconnect.set()
        await anyio.sleep_forever()

    exchange = await ask(app, leave_when=disconnect)
    assert exchange.status == 499
    assert done == []


@ignore_middleware_garbage
@pytest.mark.parametrize(
    "names", ["", "base", "base base", "base base base", "gzip", "cors", "session", "base gzip base cors session base"]
)
@pytest.mark.parametrize("disconnects", [True, False])
async def test_every_middleware_sees_the_status(disconnects: bool, names: str) -> None:
    statuses: list[int] = []
    app = FastAPI(middleware=stack(names, statuses))
    disconnect = anyio.Event()
    headers = {"Accept-Encoding": "gzip", "Origin": "http://other"}

    @app.get("/")
    @cancel_on_disconnect
    async def endpoint(request: Request) -> str:
        if "session" in names:
            request.session["visited"] = True
        if disconnects:
            disconnect.set()
            await anyio.sleep_forever()
        await some_work()
        return "stayed"

    exchange = await ask(app, headers=headers, leave_when=disconnect)
    status = 499 if disconnects else 200
    assert exchange.status == status
    assert statuses == [status] * (len(names.split()) + names.count("base") + 1)


@pytest.mark.parametrize("handled", [ClientDisconnect, HTTPException, ClientClosedRequest, 499])
async def test_custom_handler_gets_the_exception(handled: int | type[Exception]) -> None:
    caught: list[Exception] = []
    disconnect = anyio.Event()

    async def handler(request: Request, error: Exception) -> Response:
        caught.append(error)
        return JSONResponse(None, 418)

    app = FastAPI(exception_handlers={handled: handler})

    @app.get("/")
    @cancel_on_disconnect
    async def endpoint() -> None:
        disconnect.set()
        await anyio.sleep_forever()

    exchange = await ask(app, leave_when=disconnect)
    assert exchange.status == 418
    assert [type(error) for error in caught] == [ClientClosedRequest]


@pytest.mark.parametrize("handled", [Exception, 500])
async def test_handler_for_server_errors_is_called_for_errors_only(handled: int | type[Exception]) -> None:
    caught: list[type[Exception]] = []
    disconnect = anyio.Event()

    async def handler(request: Request, error: Exception) -> Response:
        caught.append(type(error))
        return JSONResponse(None, 500)

    app = FastAPI(exception_handlers={handled: handler})

    @app.get("/wait")
    @cancel_on_disconnect
    async def wait() -> None:
        disconnect.set()
        await anyio.sleep_forever()

    @app.get("/fail")
    @cancel_on_disconnect
    async def fail() -> None:
        raise ValueError

    exchange = await ask(app, "/wait", leave_when=disconnect)
    assert (exchange.status, caught) == (499, [])
    exchange = await Client(app).get("/fail")
    assert isinstance(exchange.error, ValueError)
    assert caught == [ValueError]


@ignore_middleware_garbage
@pytest.mark.parametrize("names", ["", "base base"])
@pytest.mark.parametrize("work", [no_work, some_work])
@pytest.mark.parametrize("guard", [cancel_on_disconnect, undecorated])
async def test_http_exception_of_the_endpoint_keeps_its_status(guard: Guard, work: Work, names: str) -> None:
    app = FastAPI(middleware=stack(names, []))

    @app.get("/")
    @guard
    async def endpoint() -> None:
        await work()
        raise HTTPException(404, "nothing here", {"X-Reason": "none"})

    exchange = await ask(app)
    assert (exchange.status, exchange.body) == (404, b'{"detail":"nothing here"}')


@pytest.mark.parametrize("work", [no_work, some_work])
@pytest.mark.parametrize("guard", [cancel_on_disconnect, undecorated])
@pytest.mark.parametrize("error", [ValueError("own"), ExceptionGroup("own", [KeyError(), OSError()])], ids=type)
async def test_other_exception_of_the_endpoint_is_raised_unchanged(error: Exception, guard: Guard, work: Work) -> None:
    app = FastAPI()

    @app.get("/")
    @guard
    async def endpoint() -> None:
        await work()
        raise error

    exchange = await Client(app).get("/")
    assert exchange.status == 500
    assert exchange.error is error


async def read_body(request: Request) -> str:
    return (await request.body()).decode()


async def read_json(request: Request) -> str:
    return str((await request.json())["text"])


async def read_form(request: Request) -> str:
    return str((await request.form())["text"])


async def read_stream(request: Request) -> str:
    text = ""
    async for chunk in request.stream():
        text += chunk.decode()
        await anyio.sleep(0.01)
    return text


async def read_after_asking(request: Request) -> str:
    assert not await request.is_disconnected()
    return await read_body(request)


@ignore_middleware_garbage
@pytest.mark.parametrize("names", ["", "base", "base base", "base base base"])
@pytest.mark.parametrize(
    ("read", "around"),
    [
        (read_body, ""),
        (read_json, '{"text": "|"}'),
        (read_form, "text=|"),
        (read_stream, ""),
        (read_after_asking, ""),
    ],
)
async def test_body_read_after_a_while_is_complete(
    read: Callable[[Request], Awaitable[str]], around: str, names: str
) -> None:
    app = FastAPI(middleware=stack(names, []))
    text = "0123456789" * 20_000  # more than the decorator reads ahead
    before, _, after = around.partition("|")

    @app.post("/")
    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        await some_work()
        return Response(await read(request))

    chunks = [text[start : start + 30_000].encode() for start in range(0, len(text), 30_000)]
    chunks = [before.encode(), *chunks, after.encode()]
    exchange = await ask(app, method="POST", headers={"Content-Type": FORM}, content=chunks)
    assert exchange.status == 200
    assert exchange.text == text


async def test_body_that_fastapi_read_can_be_read_again() -> None:
    app = FastAPI()

    @app.post("/")
    @cancel_on_disconnect
    async def endpoint(numbers: list[int], request: Request) -> bool:
        await some_work()
        return bool(await request.json() == numbers)

    exchange = await post("/", b"[1, ", b"2]")(app)
    assert (exchange.status, exchange.body) == (200, b"true")


@ignore_middleware_garbage
@pytest.mark.parametrize("names", ["", "base", "base base base"])
async def test_endpoint_that_learns_of_the_disconnect_by_reading_is_not_cancelled_as_well(names: str) -> None:
    statuses: list[int] = []
    app = FastAPI(middleware=stack(names, statuses))
    disconnect = anyio.Event()
    log: list[str] = []

    @app.post("/")
    @cancel_on_disconnect
    async def endpoint(request: Request) -> None:
        try:
            async with aclosing(request.stream()) as chunks:
                async for _ in chunks:
                    disconnect.set()
        except ClientDisconnect:
            await some_work()
            log.append("cleaned up")
            raise

    exchange = await ask(app, method="POST", content=[b"x" * 70_000] * 3, leave_when=disconnect)
    assert exchange.status == 499
    assert log == ["cleaned up"]
    assert statuses == [499] * (2 * names.count("base") + 1)


async def test_log_names_the_template_of_the_route(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()
    router = APIRouter(prefix="/shops/{shop}")
    caplog.set_level(logging.INFO, logger="cancelonleave")

    @router.get("/items/{item_id}")
    @app.get("/items/{item_id}")
    @cancel_on_disconnect
    async def endpoint(item_id: int) -> None:
        await anyio.sleep_forever()

    app.include_router(router)
    await ask(app, "/items/3", leave_after=0)
    await ask(app, "/shops/north/items/3", leave_after=0)
    records = [record for record in caplog.records if record.name == "cancelonleave"]
    assert [getattr(record, "route", None) for record in records] == [
        "/items/{item_id}",
        "/shops/{shop}/items/{item_id}",
    ]


class Transactions:
    """Async and sync dependencies with `yield`, and how they end."""

    def __init__(self) -> None:
        self.ends: list[str] = []

    async def transaction(self) -> AsyncIterator[None]:
        try:
            yield
        except ClientClosedRequest:
            self.ends.append("rollback")
            raise
        self.ends.append("commit")

    def sync_transaction(self) -> Iterator[None]:
        try:
            yield
        except ClientClosedRequest:
            self.ends.append("sync rollback")
            raise
        self.ends.append("sync commit")

    def app(self, idle: anyio.Event, wait: float, kind: Callable[..., Response]) -> FastAPI:
        app = FastAPI(dependencies=[Depends(self.transaction), Depends(self.sync_transaction)])

        @app.get("/")
        @cancel_on_disconnect
        async def stream(tasks: BackgroundTasks) -> Response:
            async def chunks() -> AsyncIterator[str]:
                yield "piece"
                idle.set()
                await anyio.sleep(wait)

            tasks.add_task(self.ends.append, "background")
            return kind(chunks())

        return app


STREAMS = pytest.mark.parametrize("kind", [StreamingResponse, EventSourceResponse])


@STREAMS
async def test_dependencies_roll_back_when_the_client_disconnects_during_a_stream(
    kind: Callable[..., Response],
) -> None:
    transactions, idle = Transactions(), anyio.Event()
    client = Client(transactions.app(idle, 60, kind))
    exchange = await client.get("/", leave_when=idle)
    assert exchange.error is None
    assert transactions.ends == ["background", "sync rollback", "rollback"]


@STREAMS
async def test_dependencies_commit_when_a_stream_is_complete(kind: Callable[..., Response]) -> None:
    transactions = Transactions()
    client = Client(transactions.app(anyio.Event(), 0.06, kind))
    exchange = await client.get("/")
    assert exchange.complete
    assert transactions.ends == ["background", "sync commit", "commit"]


async def test_an_error_of_a_dependency_that_rolls_back_is_passed_on() -> None:
    async def transaction() -> AsyncIterator[None]:
        try:
            yield
        except ClientClosedRequest:
            raise ZeroDivisionError from None

    idle = anyio.Event()
    app = Transactions().app(idle, 60, StreamingResponse)
    app.router.dependencies.clear()
    outer = FastAPI(dependencies=[Depends(transaction)])
    outer.include_router(app.router)
    exchange = await Client(outer).get("/", leave_when=idle)
    assert isinstance(exchange.error, ZeroDivisionError)


async def test_dependencies_see_an_error_of_the_stream_itself() -> None:
    seen: list[BaseException] = []

    async def transaction() -> AsyncIterator[None]:
        try:
            yield
        except ZeroDivisionError as error:
            seen.append(error)
            raise

    app = FastAPI(dependencies=[Depends(transaction)])

    @app.get("/")
    @cancel_on_disconnect
    async def stream() -> Response:
        async def chunks() -> AsyncIterator[str]:
            yield "piece"
            raise ZeroDivisionError

        return StreamingResponse(chunks())

    exchange = await Client(app).get("/")
    assert seen == [exchange.error]


async def test_a_response_that_a_dependency_returns_too_late_is_dropped() -> None:
    async def transaction() -> AsyncIterator[None]:
        try:
            yield
        except Exception as error:
            raise HTTPException(503) from error

    idle = anyio.Event()
    app = Transactions().app(idle, 60, StreamingResponse)
    outer = FastAPI(dependencies=[Depends(transaction)])
    outer.include_router(app.router)
    exchange = await Client(outer).get("/", leave_when=idle)
    assert exchange.error is None

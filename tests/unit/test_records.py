"""What the log and `on_disconnect` report of a disconnect, and that errors in them don't replace it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import fastapi
import pytest
from fastapi import APIRouter, Depends, FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Host, Mount, Route, Router
from starlette.types import ASGIApp

from cancelonleave import ClientClosedRequest, cancel_on_disconnect
from cancelonleave.testing import Client
from tests.shared.asking import ask
from tests.shared.virtual_time import anyio_backend as anyio_backend

pytestmark = pytest.mark.anyio

on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio", "uvloop"], indirect=True)
FASTAPI = tuple(map(int, fastapi.__version__.split(".")[:2]))
Facts = dict[str, Any]  # Any: as in a scope


class Keeping(logging.Handler):
    """Keeps the records that it handles."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def handled_by(handler: logging.Handler) -> Generator[None]:
    logger = logging.getLogger("cancelonleave")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    keeping = Keeping()
    with handled_by(keeping):
        yield keeping.records


class FactsHook:
    """Keeps the facts that a hook finds in the scope."""

    def __init__(self) -> None:
        self.facts: list[Facts] = []

    def __call__(self, request: Request) -> None:
        self.facts.append(request.scope["cancelonleave"])


facts_hook = FactsHook()


@cancel_on_disconnect(on_disconnect=facts_hook)
async def waits(request: Request) -> None:
    await anyio.sleep_forever()


# The route.


async def quietly(request: Request, error: Exception) -> Response:
    """Answer as Starlette's handler does, but not in a thread as in older versions, since time is virtual here."""
    return Response(status_code=499)


def app_of(*routes: BaseRoute) -> Starlette:
    return Starlette(routes=routes, exception_handlers={ClientClosedRequest: quietly})


def starlette() -> ASGIApp:
    item = Route("/items/{item:int}", waits)
    return app_of(
        Route("/items/all", waits),
        item,
        Mount("/mount", routes=[item, Mount("/{inner:int}", routes=[item])]),
        Mount("/{tenant}", app_of(item, Route("/", waits)), middleware=[Middleware(GZipMiddleware)]),
    )


def hosts() -> ASGIApp:
    return Router(routes=[Host("{name}.example", Router(routes=[Mount("/mount", routes=[Route("/items", waits)])]))])


def fastapi_routers() -> ASGIApp:
    router = APIRouter(prefix="/router")
    router.get("/items/{item}")(waits)
    inner = FastAPI()
    inner.get("/own")(waits)
    inner.include_router(router, prefix="/in")
    app = FastAPI()
    outer_router = APIRouter()
    outer_router.get("")(waits)
    outer_router.include_router(router, prefix="/{shop}")
    app.get("/items/{item}")(waits)
    app.include_router(router)
    app.include_router(router, prefix="/more")
    app.include_router(outer_router, prefix="/outer")
    app.mount("/mount/{tenant}", inner)
    return app


def router_with_a_mount() -> ASGIApp:
    router = APIRouter()
    router.mount("/{tenant}", app_of(Route("/items", waits)))
    app = FastAPI()
    app.include_router(router, prefix="/api")
    return app


ROUTES = {
    ("/items/all", "/items/all"): starlette,
    ("/items/3", "/items/{item:int}"): starlette,
    ("/mount/items/3", "/mount/items/{item:int}"): starlette,
    ("/mount/7/items/3", "/mount/{inner:int}/items/{item:int}"): starlette,
    ("/north/items/3", "/{tenant}/items/{item:int}"): starlette,
    ("/north/", "/{tenant}/"): starlette,
    ("/mount/items", "/mount/items"): hosts,
    ("/items/3", "/items/{item}"): fastapi_routers,
    ("/router/items/3", "/router/items/{item}"): fastapi_routers,
    ("/more/router/items/3", "/more/router/items/{item}"): fastapi_routers,
    ("/outer", "/outer"): fastapi_routers,
    ("/outer/north/router/items/3", "/outer/{shop}/router/items/{item}"): fastapi_routers,
    ("/mount/north/own", "/mount/{tenant}/own"): fastapi_routers,
    ("/mount/north/in/router/items/3", "/mount/{tenant}/in/router/items/{item}"): fastapi_routers,
    # Older versions don't include mounted applications.
    **({("/api/north/items", "/api/{tenant}/items"): router_with_a_mount} if FASTAPI >= (0, 137) else {}),
}


@pytest.mark.parametrize("root_path", ["", "/proxied"])
@pytest.mark.parametrize(("path", "template", "make"), [(*names, make) for names, make in ROUTES.items()])
async def test_the_route_is_the_whole_template_with_router_and_mount_prefixes(
    records: list[logging.LogRecord], path: str, template: str, make: Callable[[], ASGIApp], root_path: str
) -> None:
    app = make()

    async def behind_a_proxy(scope: Any, receive: Any, send: Any) -> None:  # Any: as ASGI has it
        await app({**scope, "root_path": root_path, "path": root_path + path}, receive, send)

    facts_hook.facts.clear()
    exchange = await Client(behind_a_proxy).get("/", headers={"host": "shop.example"}, leave_after=0.1)
    assert exchange.status == 499 or isinstance(exchange.error, ClientClosedRequest)  # from a Router without handlers
    (record,) = records
    assert vars(record)["route"] == template
    assert record.getMessage().startswith(f"GET {template}: stopped after 0.1")
    assert facts_hook.facts == [{"method": "GET", "route": template, "seconds": vars(record)["seconds"]}]


async def test_without_a_router_the_route_is_unknown(records: list[logging.LogRecord]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await waits(Request(scope, receive))

    exchange = await Client(app).get("/", leave_after=0.1)
    assert isinstance(exchange.error, ClientClosedRequest)
    assert vars(records[0])["route"] is None


async def test_the_record_names_the_endpoint_if_a_middleware_has_changed_the_path(
    records: list[logging.LogRecord],
) -> None:
    outer = app_of(Route("/", waits))

    async def rewriting(scope: Any, receive: Any, send: Any) -> None:
        await Route("/old", waits)({**scope, "router": outer, "path": "/old"}, receive, send)

    await Client(rewriting).get("/", leave_after=0.1)
    assert vars(records[0])["route"] == "waits"


# Hooks.


async def test_hooks_of_helpers_and_endpoints_get_the_same_facts(records: list[logging.LogRecord]) -> None:
    helper = FactsHook()

    @cancel_on_disconnect
    async def endpoint(request: Request) -> None:
        try:
            await cancel_on_disconnect(waits, on_disconnect=helper)(request)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.5)

    facts_hook.facts.clear()
    await ask(app_of(Route("/{year}", endpoint)), "/2026", leave_after=0.1)
    (inner,) = facts_hook.facts
    (outer,) = helper.facts
    assert inner["route"] == outer["route"] == vars(records[0])["route"] == "/{year}"
    assert 0.09 < inner["seconds"] <= outer["seconds"] < 0.2
    assert vars(records[0])["seconds"] > 0.5


async def test_the_hook_of_a_stream_gets_the_route() -> None:
    async def chunks() -> AsyncIterator[str]:
        yield "piece"
        await anyio.sleep_forever()

    hook = FactsHook()

    @cancel_on_disconnect(on_disconnect=hook)
    async def endpoint(request: Request) -> Response:
        return StreamingResponse(chunks())

    await ask(app_of(Mount("/api", routes=[Route("/stream", endpoint)])), "/api/stream", leave_after=0.1)
    assert [facts["route"] for facts in hook.facts] == ["/api/stream"]


# Errors while the disconnect is reported.


class Transaction:
    def __init__(self) -> None:
        self.ends: list[str] = []

    async def __call__(self) -> AsyncIterator[None]:
        try:
            yield
        except BaseException as error:
            self.ends.append(type(error).__name__)
            raise

    def app(self, on_disconnect: Callable[[Request], object]) -> FastAPI:
        app = FastAPI()
        app.get("/", dependencies=[Depends(self)])(cancel_on_disconnect(waits, on_disconnect=on_disconnect))
        return app


async def ends_with_the_disconnect(on_disconnect: Callable[[Request], object]) -> None:
    transaction = Transaction()
    exchange = await ask(transaction.app(on_disconnect), leave_after=0.1)
    assert exchange.status == 499
    assert transaction.ends == ["ClientClosedRequest"]


@pytest.fixture
def factory() -> Iterator[None]:
    """Create each record with the attributes of an access log, as applications do for its formatter."""
    before = logging.getLogRecordFactory()

    def create(*args: Any, **kwargs: Any) -> logging.LogRecord:  # Any: as in logging
        record = before(*args, **kwargs)
        record.method = record.route = "of the access log"
        return record

    logging.setLogRecordFactory(create)
    yield
    logging.setLogRecordFactory(before)


def fails(request: Request) -> None:
    raise ValueError("out of ink")


@pytest.mark.usefixtures("factory")
async def test_a_record_factory_that_sets_the_same_attributes_does_no_harm(
    records: list[logging.LogRecord],
) -> None:
    await ends_with_the_disconnect(fails)
    texts = [record.getMessage() for record in records]
    assert [texts[0].partition(" after ")[0], *texts[1:]] == ["GET /: stopped", "GET /: on_disconnect failed"]
    assert [vars(record)["route"] for record in records] == ["of the access log"] * 2


class Failing(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise OSError("disk full")


@pytest.mark.parametrize("on_disconnect", [facts_hook, fails])
async def test_a_logging_handler_that_fails_does_no_harm(on_disconnect: Callable[[Request], object]) -> None:
    with handled_by(Failing()):
        await ends_with_the_disconnect(on_disconnect)


async def stop_job(request: Request) -> None:
    job = asyncio.create_task(asyncio.sleep(60))
    await asyncio.sleep(0)
    job.cancel()
    await job


def cancelled_future(request: Request) -> Awaitable[None]:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.cancel()
    return future


async def raises(request: Request) -> None:
    raise asyncio.CancelledError


@on_asyncio
@pytest.mark.parametrize("hook", [stop_job, cancelled_future, raises])
async def test_a_hook_that_awaits_what_it_has_cancelled_counts_as_failed(
    hook: Callable[[Request], object], records: list[logging.LogRecord]
) -> None:
    await ends_with_the_disconnect(hook)
    assert [record.levelno for record in records] == [logging.INFO, logging.ERROR]
    assert records[1].exc_info is not None


@pytest.mark.parametrize("how", ["task", "scope"])
@on_asyncio
async def test_a_cancellation_from_outside_while_a_hook_runs_is_passed_on(
    how: str, records: list[logging.LogRecord]
) -> None:
    await passes_on(how)
    assert [record.levelno for record in records] == [logging.INFO]


async def test_a_cancellation_from_outside_while_a_hook_runs_is_passed_on_on_trio(
    records: list[logging.LogRecord],
) -> None:
    await passes_on("scope")
    assert [record.levelno for record in records] == [logging.INFO]


async def passes_on(how: str) -> None:
    """Cancel an application from outside, through its task or an outer scope, while its hook runs."""
    seen: list[str] = []
    outside = anyio.CancelScope()

    async def hook(request: Request) -> None:
        seen.append("hook")
        if how == "scope":
            outside.cancel()
        else:
            task = asyncio.current_task()
            assert task is not None
            asyncio.get_running_loop().call_soon(task.cancel)
        await anyio.sleep_forever()

    transaction = Transaction()
    app = transaction.app(hook)

    async def server(scope: Any, receive: Any, send: Any) -> None:  # Any: as ASGI has it
        with outside:
            try:
                await app(scope, receive, send)
            except anyio.get_cancelled_exc_class():
                seen.append("cancelled")
                if how == "scope":
                    raise
                task = asyncio.current_task()
                assert task is not None
                task.uncancel()

    with anyio.fail_after(10):
        await Client(server).get("/", leave_after=0.1)
    assert seen == ["hook", "cancelled"]
    assert transaction.ends == ["CancelledError" if how == "task" else anyio.get_cancelled_exc_class().__name__]

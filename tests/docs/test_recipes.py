"""The recipes of the documents do what the documents say."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import anyio
import pytest
from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import StreamingResponse
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message, Scope

from cancelonleave import cancel_on_disconnect
from cancelonleave.testing import Client, Exchange
from tests.shared.asking import ask
from tests.shared.readme_code import SERVERS, TEXT, module
from tests.shared.virtual_time import anyio_backend as anyio_backend

pytestmark = pytest.mark.anyio
on_asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio", "uvloop"], indirect=True)


async def answered(method: str, path: str, leave_after: float) -> Exchange:
    return await ask(module("recipes.py")["app"], path, method, leave_after=leave_after)


@on_asyncio_only
async def test_an_endpoint_with_a_decorated_part_stops_in_that_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert (await answered("POST", "/orders", leave_after=0.1)).status == 408
    assert capsys.readouterr().out == ""


@on_asyncio_only
async def test_an_endpoint_with_a_decorated_part_runs_to_its_end_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert (await answered("POST", "/orders", leave_after=0.3)).status == 200
    assert capsys.readouterr().out == "ordered\n"


@on_asyncio_only
async def test_a_shielded_section_is_completed(capsys: pytest.CaptureFixture[str]) -> None:
    exchange = await answered("POST", "/payments", leave_after=0.1)
    assert exchange.status == 408
    assert capsys.readouterr().out == "charged and recorded\n"
    assert exchange.ended_after < 1


@on_asyncio_only
async def test_an_endpoint_learns_that_the_client_has_cancelled_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert (await answered("GET", "/report", leave_after=0.1)).status == 408
    assert capsys.readouterr().out == "cancelled by the client\n"


@on_asyncio_only
async def test_an_endpoint_learns_that_something_else_has_cancelled_it(capsys: pytest.CaptureFixture[str]) -> None:
    with anyio.move_on_after(0.1):
        await Client(module("recipes.py")["app"]).get("/report")
    assert capsys.readouterr().out == ""


@on_asyncio_only
async def test_a_time_limit_works_beside_the_decorator(capsys: pytest.CaptureFixture[str]) -> None:
    exchange = await Client(module("recipes.py")["app"], timeout=60).get("/report")
    assert exchange.status == 504
    assert exchange.ended_after == pytest.approx(30)
    assert capsys.readouterr().out == ""


async def sleep() -> None:
    await anyio.sleep(60)


async def test_the_log_record_is_as_the_readme_shows_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cancelonleave")
    app = FastAPI()
    app.get("/reports/{year}")(cancel_on_disconnect(sleep))
    await ask(app, "/reports/2026", leave_after=0.1)
    shown = re.search(r"`(GET .* on http.disconnect)`", TEXT)
    assert shown
    (record,) = caplog.records
    assert re.sub(r"\d+\.\d{3}", "0.000", record.getMessage()) == re.sub(r"\d+\.\d{3}", "0.000", shown[1])
    assert (record.name, record.levelname) == ("cancelonleave", "INFO")
    assert vars(record).keys() >= {"method", "route", "seconds"}


async def word() -> AsyncIterator[str]:
    yield "waited"


class Everywhere:
    """An application and a router that use the README's route class, and what their endpoints did."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.app.router.route_class = module("everywhere.py")["StoppingRoute"]
        router = APIRouter(route_class=module("everywhere.py")["StoppingRoute"])
        plain = APIRouter()
        self.did: list[str] = []
        for routes in (self.app.router, router):
            routes.get("/wait")(self.wait)
            routes.get("/stream")(self.stream)
            routes.get("/decorated")(cancel_on_disconnect(on_disconnect=self.on_disconnect)(self.quiet))
        plain.get("/plain")(self.plain)
        self.app.include_router(router, prefix="/router")
        self.app.include_router(plain)

    async def wait(self, seconds: float, done: Annotated[str, Depends(word)]) -> str:
        await anyio.sleep(seconds)
        return done

    async def stream(self, seconds: float) -> StreamingResponse:
        async def chunks() -> AsyncIterator[str]:
            try:
                yield "begun "
                await anyio.sleep(seconds)
                yield "ended"
            finally:
                self.did.append("closed")

        return StreamingResponse(chunks())

    async def quiet(self, seconds: float) -> str:
        await anyio.sleep(seconds)
        return "quiet"

    async def plain(self) -> None:
        await anyio.sleep(1)
        self.did.append("ran to its end")

    def on_disconnect(self, request: Request) -> None:
        self.did.append("on_disconnect")


@pytest.mark.parametrize("prefix", ["", "/router"])
async def test_a_route_class_changes_nothing_for_clients_that_stay(prefix: str) -> None:
    app = Everywhere().app
    texts = [(await ask(app, f"{prefix}/{path}?seconds=1")).text for path in ("wait", "stream", "decorated")]
    assert texts == ['"waited"', "begun ended", '"quiet"']
    parameters = [path["get"].get("parameters", []) for path in app.openapi()["paths"].values()]
    assert [[parameter["name"] for parameter in each] for each in parameters] == [*[["seconds"]] * 6, []]


def measured(route: str) -> list[float]:
    """Return how often the README's metrics have counted a route, and the sum of its seconds."""
    return [REGISTRY.get_sample_value(f"stopped_seconds_{name}", {"route": route}) or 0 for name in ("count", "sum")]


@pytest.mark.parametrize("prefix", ["", "/router"])
async def test_a_route_class_stops_every_endpoint(prefix: str) -> None:
    everywhere = Everywhere()
    before = {path: measured(f"{prefix}/{path}") for path in ("wait", "decorated", "stream")}
    for path in ("wait", "decorated"):
        exchange = await ask(everywhere.app, f"{prefix}/{path}?seconds=60", leave_after=0.1)
        assert exchange.status == 499
    exchange = await ask(everywhere.app, f"{prefix}/stream?seconds=60", leave_after_received=1)
    assert exchange.text == "begun "
    assert everywhere.did == ["on_disconnect", "closed"]
    for path, (count, seconds) in before.items():
        expected = 0.025 if path == "stream" else 0.1
        assert measured(f"{prefix}/{path}") == pytest.approx([count + 1, seconds + expected], abs=0.01)


async def test_a_router_without_the_route_class_is_not_affected() -> None:
    everywhere = Everywhere()
    await ask(everywhere.app, "/plain", leave_after=0.1)
    assert everywhere.did == ["ran to its end"]


async def test_a_route_class_of_starlette_stops_its_endpoints_only() -> None:
    async def work(request: Request) -> PlainTextResponse:
        await anyio.sleep(1)
        return PlainTextResponse("done")

    async def answer(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # older Starlette's handler would use a thread, whose time is real

    stopping = module("everywhere.py")["StoppingStarletteRoute"]
    before, _ = measured("/report")
    routes = [stopping("/report", work), Route("/payments", work)]
    app = Starlette(routes=routes, exception_handlers={499: answer})
    assert [(await ask(app, path, leave_after=0.1)).status for path in ("/report", "/payments")] == [499, 200]
    assert (await ask(app, "/report")).text == "done"
    assert [measured(path)[0] for path in ("/report", "/payments")] == [before + 1, 0]


@on_asyncio_only
async def test_a_websocket_endpoint_that_only_sends_stops() -> None:
    sent: list[str] = []
    messages = [{"type": "websocket.connect"}]

    async def receive() -> Message:
        if not messages:
            await anyio.sleep(0.25)
            return {"type": "websocket.disconnect", "code": 1001}
        return messages.pop()

    async def send(message: Message) -> None:
        sent.append(message["type"])

    scope: Scope = {
        "type": "websocket",
        "path": "/prices",
        "query_string": b"",
        "headers": [],
        "subprotocols": [],
    }
    with anyio.fail_after(10):
        await module("recipes.py")["app"](scope, receive, send)
    assert sent == ["websocket.accept", *["websocket.send"] * 3]


class MySQL:
    """Stands for a pool and for its connections; a query ends when it is killed."""

    def __init__(self) -> None:
        self.killed = anyio.Event()
        self.queries: list[str] = []

    async def execute(self, query: str) -> None:
        self.queries.append(query)
        if query.startswith("KILL"):
            self.killed.set()
        await self.killed.wait()
        if not query.startswith("KILL"):
            raise OSError("Query execution was interrupted")

    def thread_id(self) -> int:
        return 7

    @asynccontextmanager
    async def acquire(self) -> AsyncGenerator[MySQL]:
        yield self

    cursor = acquire


@on_asyncio_only
async def test_a_cancelled_query_is_killed() -> None:
    mysql = MySQL()
    app = FastAPI()

    @app.get("/report")
    @cancel_on_disconnect
    async def report() -> None:
        await module("kill_query.py", SERVERS)["execute"](mysql, mysql, "select sleep(8)", mysql)

    assert (await ask(app, "/report", leave_after=0.1)).status == 499
    assert mysql.queries == ["select sleep(8)", "KILL QUERY 7"]

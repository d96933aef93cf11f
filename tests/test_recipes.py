"""What the README says of its examples for FastAPI."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from typing import Annotated

import anyio
import pytest
from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import StreamingResponse
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from prometheus_client import REGISTRY
from starlette.requests import Request

from cancelonleave import cancel_on_disconnect
from readme import TEXT, module
from virtual import anyio_backend as anyio_backend
from work import ask

pytestmark = pytest.mark.anyio


async def test_the_payment_is_whole_when_the_client_leaves_in_its_middle() -> None:
    steps: list[str] = module("payment.py")["steps"]
    steps.clear()
    exchange = await ask(module("payment.py")["app"], "/payments", "POST", leave_after=0.3)
    assert exchange.status == 499
    assert steps == ["charged", "recorded"]


async def test_nothing_is_paid_when_the_client_leaves_before() -> None:
    steps: list[str] = module("payment.py")["steps"]
    steps.clear()
    exchange = await ask(module("payment.py")["app"], "/payments", "POST", leave_after=0.1)
    assert exchange.status == 499
    assert steps == []


async def test_the_metrics_count_a_leave_by_route_and_mark_its_span() -> None:
    def leaves() -> float:
        return REGISTRY.get_sample_value("client_leaves_total", {"route": "/reports/{year}"}) or 0

    before = leaves()
    with TracerProvider().get_tracer("test").start_as_current_span("GET /reports/{year}") as span:
        await ask(module("metrics.py")["app"], "/reports/2026", leave_after=0.1)
    assert leaves() == before + 1
    assert isinstance(span, ReadableSpan)
    assert span.attributes == {"client.left": True}


async def test_the_log_record_is_as_the_readme_shows_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cancelonleave")
    await ask(module("metrics.py")["app"], "/reports/2026", leave_after=0.1)
    shown = re.search(r"`(GET .*, the client left)`", TEXT)
    assert shown
    (record,) = caplog.records
    assert re.sub(r"\d+\.\d{3}", "0.000", record.getMessage()) == re.sub(r"\d+\.\d{3}", "0.000", shown[1])
    assert (record.name, record.levelname) == ("cancelonleave", "INFO")
    assert vars(record).keys() >= {"method", "route", "seconds"}


async def word() -> AsyncIterator[str]:
    yield "waited"


class Everywhere:
    """An application and a router of the README's route class, and what their endpoints did."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.app.router.route_class = module("everywhere.py")["StoppingRoute"]
        router = APIRouter(route_class=module("everywhere.py")["StoppingRoute"])
        self.did: list[str] = []
        for routes in (self.app.router, router):
            routes.get("/wait")(self.wait)
            routes.get("/stream")(self.stream)
            routes.get("/decorated")(cancel_on_disconnect(on_disconnect=self.on_disconnect)(self.quiet))
        self.app.include_router(router, prefix="/router")

    async def wait(self, seconds: float, done: Annotated[str, Depends(word)]) -> str:
        await anyio.sleep(seconds)
        return done

    async def stream(self, seconds: float) -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            try:
                yield "begun "
                await anyio.sleep(seconds)
                yield "ended"
            finally:
                self.did.append("closed")

        return StreamingResponse(pieces())

    async def quiet(self, seconds: float) -> str:
        await anyio.sleep(seconds)
        return "quiet"

    def on_disconnect(self, request: Request) -> None:
        self.did.append("on_disconnect")


@pytest.mark.parametrize("prefix", ["", "/router"])
async def test_a_route_class_leaves_every_endpoint_as_it_is(prefix: str) -> None:
    app = Everywhere().app
    texts = [(await ask(app, f"{prefix}/{path}?seconds=1")).text for path in ("wait", "stream", "decorated")]
    assert texts == ['"waited"', "begun ended", '"quiet"']
    parameters = [path["get"]["parameters"] for path in app.openapi()["paths"].values()]
    assert [[parameter["name"] for parameter in each] for each in parameters] == [["seconds"]] * 6


@pytest.mark.parametrize("prefix", ["", "/router"])
async def test_a_route_class_stops_every_endpoint(prefix: str) -> None:
    everywhere = Everywhere()
    for path in ("wait", "decorated"):
        exchange = await ask(everywhere.app, f"{prefix}/{path}?seconds=60", leave_after=0.1)
        assert exchange.status == 499
    exchange = await ask(everywhere.app, f"{prefix}/stream?seconds=60", leave_after_received=1)
    assert exchange.text == "begun "
    assert everywhere.did == ["on_disconnect", "closed"]

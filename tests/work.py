"""What the endpoints of tests do, and how they are asked."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Mapping
from typing import Any

import anyio
import pytest
import starlette
from starlette.types import ASGIApp

from cancelonleave.testing import Client, Exchange
from future_endpoints import Endpoint

LONGER_THAN_PATIENCE = 0.06
# From 0.42 on a StreamingResponse doesn't listen on servers of ASGI 2.4, but waits for send() to fail.
TRUSTS_SEND = tuple(map(int, starlette.__version__.split(".")[:2])) >= (0, 42)

# Older versions of Starlette leave generators and streams in BaseHTTPMiddleware to the garbage collector.
ignore_middleware_garbage = pytest.mark.filterwarnings(
    "ignore:Async generator 'starlette.(requests.Request.stream|middleware.base):ResourceWarning",
    "ignore:Unclosed <MemoryObject:ResourceWarning",
)


def undecorated(endpoint: Endpoint) -> Endpoint:
    return endpoint


async def no_work() -> None:
    pass


async def some_work() -> None:
    await anyio.sleep(LONGER_THAN_PATIENCE)


async def ask(app: ASGIApp, path: str = "/", method: str = "GET", **options: Any) -> Exchange:  # Any: see Client
    """Send a request to an application that must not raise anything."""
    exchange = await Client(app).request(method, path, **options)
    assert exchange.error is None, exchange
    return exchange


def on_trio() -> bool:
    return anyio.get_cancelled_exc_class() is not CancelledError


def sent(exchange: Exchange) -> list[Mapping[str, object]]:
    return [sent.message for sent in exchange.messages]

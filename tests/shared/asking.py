"""What the endpoints of tests do, and how the tests call them."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Mapping

import anyio
import pytest
import starlette
from starlette.types import ASGIApp
from typing_extensions import Unpack

from cancelonleave.testing import Client, Exchange, Options
from tests.shared.annotated_endpoints import Endpoint

LONGER_THAN_GRACE = 0.06
# Since 0.42 a StreamingResponse doesn't listen on servers with ASGI 2.4, but waits for send() to fail.
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
    await anyio.sleep(LONGER_THAN_GRACE)


async def ask(
    app: ASGIApp, path: str = "/", method: str = "GET", *, server: str = "strict", **options: Unpack[Options]
) -> Exchange:
    """Send a request to an application that must not raise an exception."""
    exchange = await Client(app, server=server).request(method, path, **options)
    # Behind gunicorn's HTTP/2, the 499 can't be sent: send() raises once the client has disconnected.
    assert exchange.error is None or (server == "gunicorn-h2" and isinstance(exchange.error, OSError)), exchange
    return exchange


def on_trio() -> bool:
    return anyio.get_cancelled_exc_class() is not CancelledError


def sent(exchange: Exchange) -> list[Mapping[str, object]]:
    return [sent.message for sent in exchange.messages]

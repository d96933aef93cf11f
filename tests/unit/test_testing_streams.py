"""Typical streams under the client of `cancelonleave.testing`, which reports no fault in them."""

from __future__ import annotations

import asyncio
from asyncio import IncompleteReadError, StreamReader, StreamWriter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import cast

import anyio
import httpx
import pytest
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from cancelonleave import cancel_on_disconnect
from cancelonleave.testing import SERVERS, Client, Options
from tests.conftest import BACKENDS

ASYNCIO = ("asyncio", "uvloop")  # on trio, an unclosed generator ends with a warning, and httpx has such generators
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize("anyio_backend", [BACKENDS[name] for name in ASYNCIO], ids=ASYNCIO, indirect=True),
]

WHEN: list[Options] = [
    {"leave_after": 0},
    {"leave_after": 0.02},
    {"leave_after_received": 0},
    {"leave_after_received": 1},
    {"leave_after_received": 4},
]


async def ticks(reader: StreamReader, writer: StreamWriter) -> None:
    """Answer like a language model: one chunk at a time, without end."""
    try:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"5\r\ntick \r\n")
            await writer.drain()
            await asyncio.sleep(0.002)
    except (ConnectionError, IncompleteReadError):
        pass
    finally:
        writer.close()


@asynccontextmanager
async def upstream() -> AsyncGenerator[httpx.AsyncClient]:
    """Start a server with an endless response, and yield a client for it."""
    async with await asyncio.start_server(ticks, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}", trust_env=False, verify=False) as client:
            yield client


def relay(client: httpx.AsyncClient) -> Response:
    async def body() -> AsyncIterator[bytes]:
        async with client.stream("GET", "/") as response:
            async for chunk in response.aiter_bytes():
                yield chunk

    return StreamingResponse(body())


def relay_that_closes(client: httpx.AsyncClient) -> Response:
    async def body() -> AsyncIterator[bytes]:
        async with client.stream("GET", "/") as response:
            chunks = cast("AsyncGenerator[bytes]", response.aiter_bytes())  # httpx declares less than it returns
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield chunk

    return StreamingResponse(body())


def events(client: httpx.AsyncClient) -> Response:
    async def body() -> AsyncIterator[dict[str, str]]:
        async with client.stream("GET", "/") as response:
            async for chunk in response.aiter_text():
                yield {"data": chunk}

    return EventSourceResponse(body())


@pytest.mark.parametrize("server", ["strict", "gunicorn-uvloop", *SERVERS])
@pytest.mark.parametrize("respond", [relay, relay_that_closes, events])
async def test_a_relay_of_another_stream_passes_whenever_the_client_disconnects(
    respond: Callable[[httpx.AsyncClient], Response], server: str
) -> None:
    async with AsyncExitStack() as stack:
        stack.enter_context(anyio.fail_after(60))
        client = await stack.enter_async_context(upstream())

        @cancel_on_disconnect
        async def endpoint(request: Request) -> Response:
            return respond(client)

        app = Starlette(routes=[Route("/", endpoint)])
        for when in WHEN:
            exchange = await Client(app, server=server).get("/", **when)
            assert exchange.left_after is not None
            assert not exchange.complete

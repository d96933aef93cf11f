"""Sends requests to the remote endpoints on a server, byte by byte, and has the endpoints make calls."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count

import anyio
import httpx
from anyio.abc import SocketAttribute, SocketStream
from h2.connection import H2Connection

from tests.servers.start import Server

TIMEOUT = 30  # seconds
_keys = count()


class Exchange:
    """A request in flight: the client's connection, and a way to have its endpoint make calls."""

    def __init__(self, control: httpx.AsyncClient, connection: SocketStream, key: str) -> None:
        self.connection = connection
        self.key = key
        self._control = control

    async def ask(self, call: str) -> str:
        """Have the endpoint make a call, and return its outcome, which is "nothing" if the call still waits."""
        response = await self._control.get("/ask", params={"key": self.key, "call": call})
        response.raise_for_status()
        return response.text

    async def disconnect(self, how: str = "FIN") -> None:
        if how == "RST":
            linger = struct.pack("ii", 1, 0)
            self.connection.extra(SocketAttribute.raw_socket).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        await self.connection.aclose()
        await self.let_it_sink_in()

    async def send_slowly(self, chunks: int) -> None:
        for _ in range(chunks):
            await self.connection.send(b"12345678")
            await anyio.sleep(0.001)

    async def let_it_sink_in(self) -> None:
        for _ in range(3):  # at least this many turns of the server's event loop
            await self._control.get("/")

    async def answer(self) -> str:
        """Return everything that the server sends within the next seconds."""
        with anyio.move_on_after(2), suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            return (await self.connection.receive()).decode()
        return ""


class Client:
    """Sends requests to the remote endpoints on one server, byte by byte."""

    def __init__(self, server: Server) -> None:
        self._address = server.address
        is_http2 = server.name == "gunicorn-http2"
        self._control = httpx.AsyncClient(base_url=server.url, http1=not is_http2, http2=is_http2, timeout=TIMEOUT)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._control.get("/drop")
        await self._control.aclose()

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[Exchange]:
        async with await anyio.connect_tcp(*self._address) as connection:
            yield Exchange(self._control, connection, str(next(_keys)))

    @asynccontextmanager
    async def request(self, path: str = "/plain", more: str = "", body: bytes = b"") -> AsyncGenerator[Exchange]:
        """Send a request, with `more` header lines, and wait until its endpoint has begun."""
        async with self.open() as exchange:
            await exchange.connection.send(head(path, exchange.key, more) + body)
            await exchange.ask("begun")
            yield exchange

    @asynccontextmanager
    async def streams(self) -> AsyncGenerator[tuple[Exchange, Exchange, Callable[[], Awaitable[None]]]]:
        """Send two requests as streams of one HTTP/2 connection; the third value resets the second."""
        http2 = H2Connection()
        http2.initiate_connection()
        async with self.open() as first:
            second = Exchange(self._control, first.connection, str(next(_keys)))
            for stream, exchange in ((1, first), (3, second)):
                target = f"/plain/?key={exchange.key}"
                headers = [(":method", "GET"), (":scheme", "http"), (":authority", "test"), (":path", target)]
                http2.send_headers(stream, headers, end_stream=True)
            await first.connection.send(http2.data_to_send())
            for exchange in (first, second):
                await exchange.ask("begun")

            async def reset() -> None:
                http2.reset_stream(3)
                await first.connection.send(http2.data_to_send())
                await first.let_it_sink_in()

            yield first, second, reset


def head(path: str = "/plain", key: str = "", more: str = "") -> bytes:
    method = "POST" if more else "GET"
    return f"{method} {path}/?key={key} HTTP/1.1\r\nHost: test\r\n{more}\r\n".encode()


def length(size: int) -> str:
    return f"Content-Length: {size}\r\n"

"""Calls an application in memory, as a server does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import ASGIApp, Message, Scope


async def get(app: ASGIApp, disconnected: Callable[[], Awaitable[object]], state: dict[str, Any] | None = None) -> None:
    """Send a GET whose client disconnects when `disconnected()` returns; until then receive() waits after the body."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "method": "GET",
        "path": "/",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"accept", b"*/*"), (b"user-agent", b"benchmark")],
        "state": state or {},
    }
    connection = Connection(disconnected)
    await app(scope, connection.receive, connection.send)


class Connection:
    """The server's side of a request without a body."""

    def __init__(self, disconnected: Callable[[], Awaitable[object]]) -> None:
        self.disconnected = disconnected
        self.asked = False

    async def receive(self) -> Message:
        if self.asked:
            await self.disconnected()
            return {"type": "http.disconnect"}
        self.asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(self, message: Message) -> None:
        pass

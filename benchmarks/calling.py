"""Calls an application in memory, as a server does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import ASGIApp, Message, Scope


async def get(app: ASGIApp, left: Callable[[], Awaitable[object]], state: dict[str, Any] | None = None) -> None:
    """Send a GET, whose client leaves when `left()` returns: until then receive() is pending, after the empty body."""
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
    asked = False

    async def receive() -> Message:
        nonlocal asked
        if asked:
            await left()
            return {"type": "http.disconnect"}
        asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        pass

    await app(scope, receive, send)

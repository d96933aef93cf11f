"""A WebSocket in memory: each action of its client is a method call, which the server reports to the application."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from starlette.types import ASGIApp, Message

TIMEOUT = 30  # seconds


class Socket:
    """A connection to an application, and what happened to it.

    Args:
        path: The path of the endpoint.
        spec_version: The version of ASGI that the server announces.
    """

    error: BaseException | None = None
    """What the application has raised."""

    def __init__(self, path: str = "/", spec_version: str = "2.3") -> None:
        self.scope: dict[str, Any] = {  # Any: see ASGI
            "type": "websocket",
            "asgi": {"version": "3.0", "spec_version": spec_version},
            "scheme": "ws",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"testserver")],
            "subprotocols": [],
            "client": ("127.0.0.1", 50000),
            "server": ("testserver", 80),
        }
        self.sent: list[Message] = []
        self.faults: list[str] = []
        self.unread: deque[Message] = deque([{"type": "websocket.connect"}])
        self.failure: Exception | None = None  # raised by send()
        self.ended = anyio.Event()
        self._said = anyio.Event()
        self._readers = 0

    def say(self, data: str | bytes) -> None:
        """Send a message to the application."""
        self._deliver({"type": "websocket.receive", "text" if isinstance(data, str) else "bytes": data})

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Close the WebSocket as the client."""
        self._deliver({"type": "websocket.disconnect", "code": code, "reason": reason})

    def _deliver(self, message: Message) -> None:
        self.unread.append(message)
        self._said.set()
        self._said = anyio.Event()

    async def receive(self) -> Message:
        self.faults += ["receive() was called by two at once"] * self._readers
        self._readers += 1
        try:
            while not self.unread:
                await self._said.wait()
        finally:
            self._readers -= 1
        return self.unread.popleft()

    async def send(self, message: Message) -> None:
        if self.failure is not None:
            raise self.failure
        self.sent.append(message)

    async def run(self, app: ASGIApp) -> None:
        """Run an application for this WebSocket until the application ends."""
        try:
            await app(self.scope, self.receive, self.send)
        except Exception as error:
            self.error = error
        finally:
            self.ended.set()


@asynccontextmanager
async def connected(app: ASGIApp, socket: Socket | None = None) -> AsyncGenerator[Socket]:
    """Run an application for a WebSocket during the block, and wait for both to end."""
    socket = socket or Socket()
    with anyio.fail_after(TIMEOUT):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(socket.run, app)
            yield socket
    assert socket.faults == []

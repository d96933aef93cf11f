"""A client in memory that sends a body in pieces and leaves when told to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
from starlette.types import ASGIApp, Message


@dataclass
class Client:
    """One request to an ASGI application.

    `leave_after` is in seconds; without it the client stays. `left` may be set to leave at once. A server that tells
    of the disconnect only once is modelled by `once`.
    """

    method: str = "GET"
    path: str = "/"
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: Sequence[bytes] = ()
    leave_after: float | None = None
    once: bool = False
    sent: list[Message] = field(default_factory=list[Message])

    def __post_init__(self) -> None:
        self.left = anyio.Event()
        self.answered = anyio.Event()
        self.unsent = list(self.body) or [b""]
        self.receiving = 0
        self.told = False

    async def request(self, app: ASGIApp) -> Client:
        with anyio.fail_after(10):
            async with anyio.create_task_group() as task_group:
                if self.leave_after is not None:
                    task_group.start_soon(self._leave_later)
                await app(self.scope, self.receive, self.send)
                task_group.cancel_scope.cancel()
        return self

    async def _leave_later(self) -> None:
        assert self.leave_after is not None
        await anyio.sleep(self.leave_after)
        self.left.set()

    @property
    def scope(self) -> dict[str, Any]:  # Any: ASGI's own type for a scope
        path, _, query = self.path.partition("?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(b"host", b"test"), *((k.lower().encode(), v.encode()) for k, v in self.headers.items())],
            "client": ("127.0.0.1", 1234),
            "server": ("test", 80),
        }

    async def receive(self) -> Message:
        self.receiving += 1
        assert self.receiving == 1, "receive() was called by two at once"
        try:
            if self.unsent and not self.left.is_set():
                chunk = self.unsent.pop(0)
                return {"type": "http.request", "body": chunk, "more_body": bool(self.unsent)}
            assert not (self.told and self.once), "receive() was called again, which would wait for ever"
            if not self.left.is_set():
                await self.left.wait()
            self.told = True
            return {"type": "http.disconnect"}
        finally:
            self.receiving -= 1

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.answered.set()
            self.left.set()  # as servers say after a complete response

    @property
    def status(self) -> int:
        return next(int(m["status"]) for m in self.sent if m["type"] == "http.response.start")

    @property
    def content(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent if m["type"] == "http.response.body")

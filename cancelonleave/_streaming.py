"""Extends the watch over the body of a streaming response."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from contextlib import aclosing, contextmanager, suppress
from functools import lru_cache
from types import new_class
from typing import Any
from weakref import finalize

from anyio import move_on_after
from starlette.background import BackgroundTask
from starlette.concurrency import iterate_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from ._cancellation import run
from ._exceptions import ClientClosedRequest
from ._items import Stream, close
from ._patience import PATIENCE
from ._request import OnDisconnect, Watched

_Call = Callable[[Any, Scope, Receive, Send], Coroutine[Any, Any, None]]  # Any: a response of any class


def watch_response(response: Any, watched: Watched, request: Request, on_disconnect: OnDisconnect | None) -> None:
    """Have a response with a `body_iterator` end when the client leaves, although its endpoint has returned it."""
    body: _Body | None = getattr(response, "_cancelonleave", None)
    if body is None:
        body = response._cancelonleave = _Body(watched, request)
        response.__class__ = _watched_class(response.__class__)
        if watched.watch.task is not None:  # it goes on until the response has been sent, or thrown away
            finalize(response, watched.watch.drop).atexit = False
    body.hooks.append(on_disconnect)


class _Body(Stream):
    """The body of a response."""

    started = sent = is_held = False

    async def stream(self, response: Any, send: Send) -> None:
        """Send a response as `StreamingResponse` does, but without a listener of its own, and all under one guard."""
        chunks = response.body_iterator = aiter(response.body_iterator)
        in_threads = getattr(chunks, "ag_code", None) is iterate_in_threadpool.__code__
        with self._ending():
            await run(self.watch, self._send_body(response, send), level=in_threads)
        await self._end(send, response.background)

    async def _send_body(self, response: Any, send: Send) -> None:
        try:
            await response.stream_response(self._sender(send, raises=True))
        finally:
            await close(response.body_iterator)

    async def respond(self, response: Any, call: _Call, scope: Scope, send: Send) -> None:
        """Let a response that has its own way send itself, and guard the items that it sends."""
        items = response.body_iterator = self.items(aiter(response.body_iterator))
        async with self.watch.held() as self.is_held, aclosing(items):
            with self._ending():
                await call(response, scope, self._listen, self._sender(send, raises=False))
        await self._end(send)

    def _sender(self, send: Send, *, raises: bool) -> Send:
        async def watched_send(message: Message) -> None:
            if not await self._send(send, message) and raises:
                self.watch.tell()
                raise ClientDisconnect

        return watched_send

    async def _send(self, send: Send, message: Message) -> bool:
        """Return false if the client is known to have left."""
        if self.channel.left is not None:
            return False
        self.started = True
        is_body = message["type"] == "http.response.body"
        if is_body and not message.get("more_body", False):
            self.watch.finish()  # first: on most servers the disconnect that now comes is none
            self.sent = True
        try:
            await send(message)
            self.sent = is_body
        except OSError:  # ASGI 2.4 has it mean that the client has left
            self.channel.lose()
            self.cut = True
        return not self.cut

    async def _listen(self) -> Message:
        """Be the receive() of a response that listens for the disconnect itself, and cancels by level then."""
        if not self.is_held:
            await self.channel.watch()
        while self.channel.left is None or self.pulling:
            await self.channel.next_change().wait()
        return self.channel.left

    @contextmanager
    def _ending(self) -> Generator[None]:
        try:
            yield
        except Exception as error:
            if not self.watched.is_end(error):
                raise
            self.cut = True
        self.cut = self.cut or (self.channel.left is not None and not self.watch.finished)
        self.watch.finish()

    async def _end(self, send: Send, background: BackgroundTask | None = None) -> None:
        if self.cut:
            await self.report()
        if background is not None:
            await background()
        if self.cut and not self.started:
            raise ClientClosedRequest
        if self.cut and not self.sent:
            # GZipMiddleware may still hold the start back, and BaseHTTPMiddleware around it would miss a response.
            with suppress(OSError), move_on_after(PATIENCE):
                await send({"type": "http.response.body", "body": b"", "more_body": True})


@lru_cache(maxsize=64)
def _watched_class(kind: Any) -> Any:  # Any: whatever class a response is of
    is_streaming_response = kind.__call__ is StreamingResponse.__call__

    async def call(response: Any, scope: Scope, receive: Receive, send: Send) -> None:
        body: _Body = response._cancelonleave
        if is_streaming_response:
            await body.stream(response, send)
        else:
            await body.respond(response, kind.__call__, scope, send)

    names = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return new_class(kind.__name__, (kind,), exec_body=lambda namespace: namespace.update(names))

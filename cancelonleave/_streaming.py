"""Extends the watch over the body of a streaming response."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import suppress
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
from ._watch import asyncio_task

_Call = Callable[[Any, Scope, Receive, Send], Coroutine[Any, Any, None]]  # Any: a response of any class


def watch_response(response: Any, watched: Watched, request: Request, on_disconnect: OnDisconnect | None) -> None:
    """Have a response with a `body_iterator` end when the client leaves, although its endpoint has returned it."""
    body: _Body | None = getattr(response, "_cancelonleave", None)
    if body is None:
        response.__class__ = _watched_class(response.__class__)
    if body is None or body.watched is not watched:  # a response may be sent more than once
        body = response._cancelonleave = _Body(watched, request)
        body.background = getattr(response, "background", None)
        if watched.watch.task is not None:  # it goes on until the response has been sent, or thrown away
            finalize(response, watched.watch.drop).atexit = False
    body.hooks.append(on_disconnect)


class _Body(Stream):
    """The body of a response."""

    background: BackgroundTask | None = None  # the response's own: FastAPI adds what was queued elsewhere
    started = sent = False

    async def stream(self, response: Any, send: Send) -> None:
        """Send a response as `StreamingResponse` does, but without a listener of its own, and all under one guard."""
        given = response.body_iterator
        chunks = response.body_iterator = aiter(given)
        in_threads = getattr(chunks, "ag_code", None) is iterate_in_threadpool.__code__
        try:
            await run(self.watch, self._send_body(response, send), level=in_threads)
        except Exception as error:
            if not self.watched.is_end(error):
                raise
            self.cut = True
        finally:
            response.body_iterator = given
        await self._end(send, response.background if self.started else self.background)

    async def _send_body(self, response: Any, send: Send) -> None:
        try:
            await response.stream_response(self._sender(send, raises=True))
        finally:
            await close(response.body_iterator)

    async def respond(self, response: Any, call: _Call, scope: Scope, send: Send) -> None:
        """Let a response that has its own way send itself and listen for the disconnect, and guard what it iterates."""
        given = response.body_iterator
        source = aiter(given)
        # trio cancels by level, as such a response does: it needn't be spared that.
        items = response.body_iterator = source if asyncio_task() is None else self.items(source)
        asgi = {**scope.get("asgi", {}), "spec_version": "2.3"}  # or StreamingResponse would not listen
        try:
            await call(response, {**scope, "asgi": asgi}, self._listen, self._sender(send, raises=False))
        except Exception as error:
            if not self.watched.is_end(error):
                raise
            self.cut = True
        finally:
            response.body_iterator = given
            await close(items)
            await self.watch.stop()
        await self._end(send)

    def _sender(self, send: Send, *, raises: bool) -> Send:
        async def watched_send(message: Message) -> None:
            if not await self._send(send, message) and raises:
                self.watch.tell()
                raise ClientDisconnect

        return watched_send

    async def _send(self, send: Send, message: Message) -> bool:
        """Return false if the client is known to have left."""
        if self.is_left:
            return False
        self.started = True
        is_body = message["type"] == "http.response.body"
        if is_body and not message.get("more_body", False):
            self.watch.finish()  # first: on most servers the disconnect that now comes is none
        try:
            await send(message)
        except OSError:
            if not await self._is_gone():
                raise
            self.cut = True
            return False
        self.sent = self.sent or is_body
        return True

    async def _is_gone(self) -> bool:
        """Whether send() has failed since the client left, as ASGI 2.4 has it; else it may be a middleware's error."""
        if self.request.scope.get("asgi", {}).get("spec_version", "") < "2.4":
            with move_on_after(PATIENCE):
                await self.channel.watch()
            return self.channel.left is not None
        self.channel.lose()
        return True

    async def _listen(self) -> Message:
        """Be the receive() of a response that listens for the disconnect itself: first its items end, once."""
        if asyncio_task() is None:
            await self.channel.watch()
        while self.channel.left is None or not self.rests:
            await self.channel.next_change().wait()
        return self.channel.left

    async def _end(self, send: Send, background: BackgroundTask | None = None) -> None:
        is_complete = self.watch.finished
        self.cut = self.cut or self.is_left
        self.watch.finish()
        if self.cut:
            await self.end()
        if background is not None:
            await background()
        if self.cut and not self.started:
            raise ClientClosedRequest
        if self.cut and not self.sent and not is_complete:
            # GZipMiddleware may still hold the start back, and BaseHTTPMiddleware around it would miss a response.
            with suppress(OSError), move_on_after(PATIENCE):
                await send({"type": "http.response.body", "body": b"", "more_body": True})


@lru_cache(maxsize=64)
def _watched_class(kind: Any) -> Any:  # Any: whatever class a response is of
    is_streaming_response = kind.__call__ is StreamingResponse.__call__ and (
        kind.listen_for_disconnect is StreamingResponse.listen_for_disconnect
    )

    async def call(response: Any, scope: Scope, receive: Receive, send: Send) -> None:
        body: _Body = response._cancelonleave
        if is_streaming_response:
            await body.stream(response, send)
        else:
            await body.respond(response, kind.__call__, scope, send)

    names = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return new_class(kind.__name__, (kind,), exec_body=lambda namespace: namespace.update(names))

"""Has a streaming response send itself under guard."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from copy import copy
from enum import Enum
from functools import lru_cache
from typing import Any, cast
from weakref import WeakValueDictionary

from anyio import move_on_after
from anyio.lowlevel import checkpoint_if_cancelled
from starlette.background import BackgroundTask
from starlette.concurrency import iterate_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from ._endpoint import OnDisconnect, asyncio_task, guard, is_disconnect, refuse_if_disconnected
from ._exceptions import ClientClosedRequest
from ._fastapi import tell_dependencies
from ._loop import GRACE
from ._receive import spec_version
from ._stream import Items, State, Stream, close
from ._watch import Connection, Watch


def is_stream(response: object) -> bool:
    """Whether it is a response whose body is still to be made."""
    return isinstance(response, Response) and hasattr(response, "body_iterator")


def guard_response(response: Any, watch: Watch, request: Connection, on_disconnect: OnDisconnect | None) -> None:
    """Have a stream end when the client disconnects, although its endpoint has returned it; leave the rest alone."""
    if not is_stream(response) or not isinstance(request, Request):
        return
    bodies: WeakValueDictionary[int, Body]  # one for each request that it is the answer to
    if isinstance(response, _Guarded):
        bodies = response.cancelonleave_bodies
    else:
        bodies = WeakValueDictionary()
        response.cancelonleave_bodies = bodies
        response.__class__ = _guarded_class(response.__class__)
    body = bodies.get(id(request.scope))
    if body is None:
        body = bodies[id(request.scope)] = Body(watch, request)
        body.background = getattr(response, "background", None)
        body.release_with(response)
        tell_dependencies(body)
    body.hooks.append(on_disconnect)


class Progress(Enum):
    """How much of a response has been sent."""

    NOTHING = "nothing"
    STARTED = "started"
    SENT = "some of its body sent"
    COMPLETE = "complete"


class Body(Stream):
    """The body of a response, and its way to the server."""

    background: BackgroundTask | None = None  # the response's own: FastAPI adds what was queued elsewhere
    progress = Progress.NOTHING
    _items: Items[Any] | None = None
    _sending = 0  # messages just now

    def __repr__(self) -> str:
        return f"<Body {self.progress.value}>"

    async def respond(self, response: Any, scope: Scope, send: Send) -> None:  # Any: a response of any class
        """Have a response send itself, with a guard around each item and each send()."""
        is_plain = _is_plain(type(response))
        items = aiter(response.body_iterator)
        guarded_send = self._send_guarded
        context: Any = nullcontext()  # Any: whatever is entered
        if asyncio_task() is not None:
            in_thread = getattr(items, "ag_code", None) is iterate_in_threadpool.__code__
            items = self._items = Items(self, items, in_thread=in_thread)
        else:  # on trio all is cancelled by level, so one guard does
            guarded_send = self._send
            context = guard(self.watch, self.request) if is_plain else context
        response.body_iterator = items
        try:
            with context:
                await self._run(response, scope, lambda message: guarded_send(send, message), is_plain=is_plain)
        except Exception as error:
            if not await is_disconnect(error, self.watch):
                raise
            self.is_cut = True
        finally:
            self._items = None  # they know each other
            self.release()
        background = self.background if self.progress is Progress.NOTHING else response.background
        await self._end(send, background if is_plain else None)

    async def _run(self, response: Any, scope: Scope, send: Send, *, is_plain: bool) -> None:
        try:
            if is_plain:  # without its own listener, which would run beside ours and cancel by level
                refuse_if_disconnected(self.watch)
                await response.stream_response(send)
            else:
                asgi = {**scope.get("asgi", {}), "spec_version": "2.3"}  # or it may not listen
                await response({**scope, "asgi": asgi}, self._listen, send)
        finally:
            await close(response.body_iterator)

    async def _send_guarded(self, send: Send, message: Message) -> None:
        """Send a message, or drop it, as servers do: the next item that is asked for closes the source."""
        self._sending += 1
        try:
            with guard(self.watch, self.request):
                await self._send(send, message)
        except ClientClosedRequest:
            await checkpoint_if_cancelled()  # a cancellation from outside goes first
        finally:
            self._sending -= 1
            if self.is_gone:
                self.watch.change()

    async def _listen(self) -> Message:
        """Be the receive() of a response that listens for the disconnect: first its items end, cancelled once."""
        while (disconnect := self.watch.disconnect) is None or self._is_busy:
            await self.watch.next_change().wait()
        return disconnect

    @property
    def _is_busy(self) -> bool:
        """Whether an item is being made or sent, or its source closed."""
        is_making = self._items is not None and self._items.state in (State.RUNS, State.CLOSES)
        return is_making or self._sending > 0

    async def _send(self, send: Send, message: Message) -> None:
        if self.is_gone:
            return
        is_body = message["type"] == "http.response.body"
        if is_body and not message.get("more_body", False):
            self.watch.close()  # before it is sent: after it, servers report a disconnect that isn't one
            self.progress = Progress.COMPLETE
        elif self.progress is Progress.NOTHING:
            self.progress = Progress.STARTED
        try:
            await send(message)
        except OSError:
            if not await self._is_send_believed():
                raise
            self.is_cut = True
        else:
            if is_body and self.progress is Progress.STARTED:
                self.progress = Progress.SENT

    async def _is_send_believed(self) -> bool:
        """Whether send() has failed because of the disconnect, as ASGI 2.4 has it; else a middleware may have."""
        if spec_version(self.request.scope) < (2, 4):
            self.watch.start()
            with move_on_after(GRACE):
                await self.watch.wait_for_disconnect()
            return self.watch.disconnect is not None
        self.watch.mark_disconnected({"type": "http.disconnect"})
        return True

    async def _end(self, send: Send, background: BackgroundTask | None = None) -> None:
        self.is_cut = self.is_cut or self.is_gone
        self.watch.close()
        if self.is_cut:
            await self.cut()
        if background is not None:
            await background()
        if self.is_cut and self.progress is Progress.NOTHING:
            raise ClientClosedRequest
        if self.is_cut and self.progress is Progress.STARTED:
            # GZipMiddleware may still hold the start back, and BaseHTTPMiddleware around it would miss a response.
            with suppress(OSError), move_on_after(GRACE):
                await send({"type": "http.response.body", "body": b"", "more_body": True})


class _Guarded(Response):
    """Stands before a response's own class, so that the response sends itself under guard."""

    cancelonleave_bodies: WeakValueDictionary[int, Body]

    def __init_subclass__(cls) -> None:
        """Keep the response's own class from learning of this one: it may register its subclasses."""

    async def __call__(self: Any, scope: Scope, receive: Receive, send: Send) -> None:  # Any: a response, too
        kind = type(self).__mro__[2]
        # A copy, for the response may be sent to two clients at once.
        response = copy(self)
        response.__class__ = kind
        body = self.cancelonleave_bodies.get(id(scope))
        if body is None:  # it was guarded for another request
            await response(scope, receive, send)
        else:
            await body.respond(response, scope, send)


def _is_plain(kind: Any) -> bool:  # Any: whatever class a response is of
    """Whether it sends itself and listens as `StreamingResponse` does."""
    is_plain: bool = kind.__call__ is StreamingResponse.__call__
    return is_plain and kind.listen_for_disconnect is StreamingResponse.listen_for_disconnect


@lru_cache(maxsize=64)
def _guarded_class(kind: Any) -> Any:  # Any: whatever class a response is of
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    metaclass = cast(Any, type(kind))  # not called, for that may have effects, too
    return type.__new__(metaclass, kind.__name__, (_Guarded, kind), names)

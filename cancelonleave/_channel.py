"""The one reader of a request's receive(): keeps what it read ahead, remembers the disconnect; has no tasks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from anyio import Event, current_effective_deadline, get_cancelled_exc_class, move_on_after
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled
from starlette.types import Message, Receive, Scope

READ_AHEAD = 64 * 1024  # bytes: unread body kept at most, give or take the last message
MESSAGE_SIZE = 256  # bytes: what a message takes beside its body, so that many small ones don't pile up either
PAUSE = 0.05  # seconds: before asking again a receive() that says nothing and says it at once (pyvoy 1.3)


class Channel:
    """A request's receive(), as its endpoint reads it, and as the watch reads ahead of the endpoint.

    Servers disagree about being called by two at once, and some lose body when a pending receive() is cancelled
    and called again. So whoever reads, reads for all, and what was read is kept until somebody takes it.

    Args:
        receive: The server's, or a middleware's.
        scope: The request's.
    """

    left: Message | None = None  # the disconnect, once it is known
    _ended = False  # the body has
    _idle = False  # receive() had nothing to say last time
    _reading = False
    _size = 0  # of what is kept
    _takers = 0  # those who wait in take()
    _changed: Event | None = None

    _interrupted = False

    def __init__(self, receive: Receive, scope: Scope) -> None:
        self.invited = not _waits_for_continue(scope)
        self._receive = receive
        self._scope = scope
        self._kept: deque[Message | Exception] = deque()

    async def take(self, watched: Callable[[], bool]) -> Message:
        """Return the next message in the server's order, or raise what receive() raised in its place.

        Args:
            watched: Says whether `watch()` is running or about to; then that one reads, and this one waits.
        """
        if self.left is not None and current_effective_deadline() == -math.inf:
            return self.left  # a cancelled scope: is_disconnected() asks, and would throw away a piece of body
        self.invited = True
        self._takers += 1
        self._change()
        try:
            while not self._kept and self.left is None:
                changed = self._next_change()  # first: an eager task may read before watched() returns
                await (changed.wait() if watched() or self._reading else self._read())
        finally:
            self._takers -= 1
        if not self._kept:
            assert self.left is not None
            return self.left
        await checkpoint_if_cancelled()
        message = self._kept.popleft()
        self._change()
        if isinstance(message, Exception):
            raise message
        self._size -= _size(message)
        return message

    async def watch(self) -> None:
        """Return when the client has left, and those who were reading have been told so."""
        while self.left is None:
            if self._reading or self._full or not (self.invited and self._may_be_asked):
                await self._next_change().wait()
            else:
                await self._read()
        while self._takers:
            await checkpoint()

    def unwatch(self) -> None:
        """Have those whom `watch()` was reading for read for themselves."""
        self._change()

    def _change(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    def _next_change(self) -> Event:
        if self._changed is None:
            self._changed = Event()
        return self._changed

    @property
    def _full(self) -> bool:
        return self._size >= READ_AHEAD or (bool(self._kept) and isinstance(self._kept[-1], Exception))

    @property
    def _may_be_asked(self) -> bool:
        """False for gunicorn (27, HTTP/1.1) once a wait was cancelled: from then on it says the client has left."""
        return not self._interrupted or self._takers > 0 or self._scope.get("asgi", {}).get("spec_version", "") < "2.4"

    async def _read(self) -> None:
        self._reading = True
        try:
            if self._idle:
                with move_on_after(PAUSE):
                    await self._next_change().wait()
            self._keep(await self._receive())
        except get_cancelled_exc_class():
            self._interrupted = True
            raise
        except Exception as error:  # as 413 of max_body_size: for who reads, not for an endpoint that doesn't
            self._kept.append(error)
        finally:
            self._reading = False
            self._change()

    def _keep(self, message: Message) -> None:
        if message["type"] == "http.disconnect":
            self.left = message
            return
        is_body = message["type"] == "http.request"
        self._idle = not is_body or self._ended or (not message.get("body") and message.get("more_body", False))
        if is_body and self._ended:
            return
        self._ended = self._ended or (is_body and not message.get("more_body", False))
        self._kept.append(message)
        self._size += _size(message)


def _waits_for_continue(scope: Scope) -> bool:
    for name, _ in scope.get("headers", ()):  # a loop, since any() would cost each request twice as much
        if name == b"expect":
            return True
    return False


def _size(message: Message) -> int:
    return len(message.get("body") or b"") + MESSAGE_SIZE

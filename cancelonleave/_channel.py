"""The one reader of a request's receive(): keeps what it read ahead, remembers the disconnect; has no tasks."""

from __future__ import annotations

import math
from asyncio import CancelledError
from collections.abc import Callable
from typing import cast

from anyio import Event, current_effective_deadline, move_on_after
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint, checkpoint_if_cancelled
from starlette.types import Message, Receive, Scope

READ_AHEAD = 64 * 1024  # bytes: unread body kept at most, give or take the last message
MESSAGE_SIZE = 256  # bytes: what a message takes beside its body, so that many small ones don't pile up either
NO_BODY = {"type": "http.request", "body": b"", "more_body": False}
PAUSE = 0.05  # seconds: before asking again a receive() that says nothing and says it at once (pyvoy 1.3)


class Channel:
    """A request's receive(), as its endpoint reads it, and as the watch reads ahead of the endpoint.

    Servers disagree about being called by two at once, and some lose body when a pending receive() is cancelled
    and called again. So whoever reads, reads for all, and what was read is kept until somebody takes it.

    Args:
        receive: The server's, or a middleware's.
        scope: The request's.
    """

    # Slots, here and wherever each request has one: they take half the memory.
    __slots__ = (
        "_asgi",
        "_changed",
        "_ended",
        "_idle",
        "_interrupted",
        "_kept",
        "_reading",
        "_receive",
        "_size",
        "_takers",
        "invited",
        "left",
    )

    def __init__(self, receive: Receive, scope: Scope) -> None:
        self.left: Message | None = None  # the disconnect, once it is known
        # A client that waits for "100 Continue" gets it at the first receive(), which is left to the endpoint.
        self.invited = b"expect" not in [name for name, _ in scope.get("headers", ())]
        self._receive = receive
        self._asgi = scope.get("asgi", {})
        self._kept: list[Message | Exception] = []  # at most some 250, so that taking the first is cheap
        self._size = self._takers = 0  # of what is kept; those who wait for more
        self._changed: Event | None = None
        self._ended = False  # the body has
        self._idle = False  # receive() had nothing to say last time
        self._reading = self._interrupted = False

    async def take(self, start_watch: Callable[[], bool]) -> Message:
        """Return the next message in the server's order, or raise what receive() raised in its place.

        Args:
            start_watch: Starts `watch()` if there is a call to watch, and says whether there is: that reads for all.
        """
        self.invited = True
        if is_cancelled():  # is_disconnected() asks: it would throw away a piece of the body
            await self._look_ahead(start_watch)
            if self.left is not None:
                return self.left
        self._takers += 1
        self.change()
        try:
            while not self._kept and self.left is None:
                changed = self.next_change()  # first: an eager task reads before start_watch() returns
                await (changed.wait() if start_watch() or self._reading else self._read())
        finally:
            self._takers -= 1
        if self.left is not None and not self._kept:
            return self.left
        await checkpoint_if_cancelled()
        self.change()
        if isinstance(self._kept[0], Exception):
            raise cast(Exception, self._kept.pop(0))  # a name for it here would make a cycle with its traceback
        message = cast(Message, self._kept.pop(0))  # it can't be anything else now
        self._size -= _size(message)
        return dict(message)

    async def _look_ahead(self, start_watch: Callable[[], bool]) -> None:
        """Find out about the disconnect as far as that takes no waiting."""
        if start_watch():
            for _ in range(4):  # turns of the event loop until the watch has asked receive()
                await cancel_shielded_checkpoint()
        elif self._kept and self.left is None and not self._reading and self._may_read_ahead:
            await self._read()  # nobody else looks behind what is kept

    async def watch(self) -> None:
        """Return when the client has left, and those who were reading have been told so."""
        while self.left is None:
            if self._reading or not self._may_read_ahead:
                await self.next_change().wait()
            else:
                await self._read()
        while self._takers:
            await checkpoint()

    def change(self) -> None:
        """Have those who wait look again, as when `watch()` has ended and they must read for themselves."""
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    def lose(self) -> None:
        """Note that the client has left, as send() has said."""
        if self.left is None:
            self.left = {"type": "http.disconnect"}
            self.change()

    def next_change(self) -> Event:
        if self._changed is None:
            self._changed = Event()
        return self._changed

    @property
    def _may_read_ahead(self) -> bool:
        full = self._size >= READ_AHEAD or (bool(self._kept) and isinstance(self._kept[-1], Exception))
        # gunicorn (27, HTTP/1.1) says at once that the client has left, if a wait for that was cancelled before.
        lies = self._interrupted and not self._takers and self._asgi.get("spec_version", "") >= "2.4"
        return self.invited and not full and not lies

    async def _read(self) -> None:
        self._reading = True
        try:
            if self._idle:
                await self._pause()
            self._keep(await self._receive())
        except CancelledError:  # asyncio's, as gunicorn has no trio
            self._interrupted = True
            raise
        except Exception as error:  # as 413 of max_body_size: for who reads, not for an endpoint that doesn't
            self._kept.append(error)
        finally:
            self._reading = False
            self.change()

    async def _pause(self) -> None:
        with move_on_after(PAUSE):
            await self.next_change().wait()

    def _keep(self, message: Message) -> None:
        if message["type"] == "http.disconnect":
            self.left = message
            return
        is_body = message["type"] == "http.request"
        self._idle = not is_body or self._ended or (not message.get("body") and message.get("more_body", False))
        if is_body and self._ended:
            return
        self._ended = self._ended or (is_body and not message.get("more_body", False))
        # Most who wait have no body: to keep one message for all of them, not each its own, takes 0.2 KiB less.
        self._kept.append(NO_BODY if message == NO_BODY else message)
        self._size += _size(message)


def is_cancelled() -> bool:
    """Whether the code running now is in a cancelled scope, as in Request.is_disconnected()."""
    return current_effective_deadline() == -math.inf


def _size(message: Message) -> int:
    return len(message.get("body") or b"") + MESSAGE_SIZE

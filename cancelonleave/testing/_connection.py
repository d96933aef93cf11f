"""The server's side of one request: what receive() says, what send() does, and when the client has left."""

from __future__ import annotations

from asyncio import CancelledError
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable
from typing import Literal

from anyio import Event, current_time, get_cancelled_exc_class, sleep_forever
from anyio.lowlevel import checkpoint
from starlette.types import Message

from ._exchange import Sent
from ._messages import Order
from ._request import Body
from ._servers import Server

Check = Literal["tasks left behind", "unbalanced cancelling", "concurrent receive", "message order"]


class Connection:
    """One request between a client and an application.

    Args:
        server: Whose behaviour it has.
        leave_after_received: Pieces of the response's body; 0 is its start.
        leave_after_sent: Pieces of the request's body; 0 is before the first.
    """

    left_after: float | None = None  # seconds from the request
    ended_after: float | None = None  # the application
    error: BaseException | None = None
    body_sent = asked_for_body = body_consumed = False
    _receiving = _received = _sent = 0
    _told = _interrupted = False

    def __init__(self, server: Server, leave_after_received: int | None, leave_after_sent: int | None) -> None:
        self.messages: list[Sent] = []
        self.faults: list[tuple[Check | None, str]] = []  # which check, if it can be left out, and what it found
        self.server = server
        self._leave_after_received = leave_after_received
        self._leave_after_sent = leave_after_sent
        self._order = Order(server.extensions or ())
        self._arrived: deque[Message] = deque()
        self._began = current_time()
        self._changed = Event()
        self._count_sent(0)

    @property
    def over(self) -> bool:
        """Whether the client has left or the application has ended."""
        return self.left_after is not None or self.ended_after is not None

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def leave(self) -> None:
        """Have the client leave, unless it has its response."""
        if not self.over and not self._order.complete:
            self.left_after = current_time() - self._began
            self._change()

    def end(self) -> None:
        self.ended_after = current_time() - self._began
        self._change()

    async def upload(self, body: Body, *, invited: bool) -> None:
        """Have the client send its body, no faster than the application receives it, until it leaves."""
        await self.until(lambda: invited or self.asked_for_body or self.over)
        if self.over:
            return
        if isinstance(body, bytes):
            self.arrive(body, more=False)
            return
        pieces = body if isinstance(body, AsyncIterable) else _one_by_one(body)
        try:
            async for piece in pieces:
                self.arrive(piece, more=True)
                await self.until(lambda: self.over or self.server.takes_body_first or not self._arrived)
                if self.over:
                    return
            self.arrive(b"", more=False)
        finally:
            if isinstance(pieces, AsyncGenerator):  # else its cleanup would be the garbage collector's
                await pieces.aclose()

    def arrive(self, piece: bytes, *, more: bool) -> None:
        """Take a piece of the request's body from the client, for the application to receive."""
        if not self.over:
            self._arrived.append({"type": "http.request", "body": piece, "more_body": more})
            self.body_sent = not more
            self._change()
            if self.server.takes_body_first:
                self._count_sent(len(piece))

    async def receive(self) -> Message:
        self.asked_for_body = True
        self._change()
        if self._receiving:
            self.faults.append(("concurrent receive", "receive() was called while another call of it was waiting."))
        self._receiving += 1
        try:
            await self.until(lambda: self._next() is not None)
            return await self._take()
        except CancelledError:  # asyncio's, as the servers that mind have no trio
            self._interrupted = self._interrupted or self.body_consumed
            raise
        finally:
            self._receiving -= 1

    def _next(self) -> str | None:
        """Say what receive() has to tell: the type of a message."""
        is_told = self._order.complete and self.server.disconnects_after_response
        is_gone = is_told or self.left_after is not None
        if self._arrived and not (is_gone and self.server.drops_body):
            return "http.request"
        is_false = self._interrupted and self.server.disconnects_after_cancel
        return "http.disconnect" if is_false or (is_gone and not self._told) else None

    async def _take(self) -> Message:
        if self._next() == "http.disconnect":
            self._told = not self.server.repeats_disconnect
            return {"type": "http.disconnect"}
        message = self._arrived.popleft()
        self._change()
        if not self.server.takes_body_first:
            self._count_sent(len(message["body"]))
        if self.server.loses_body_by_cancel and get_cancelled_exc_class() is CancelledError:  # as above
            try:
                await checkpoint()
            except CancelledError:
                self._arrived.appendleft({**message, "body": b""})
                raise
        self.body_consumed = not message["more_body"]
        return message

    async def send(self, message: Message) -> None:
        fault = self._order.fault_in(message)
        if fault is not None:
            self.faults.append(("message order", f"send() was called in a way that ASGI forbids: {fault}."))
        self.messages.append(Sent(current_time() - self._began, dict(message)))
        if self.left_after is None:
            await self._deliver(message)
        elif self.server.raises_in_send:
            raise OSError("The client has left.")
        await checkpoint()  # so that an application that only sends doesn't hold up all others

    async def _deliver(self, message: Message) -> None:
        self._change()
        self._received += bool(message.get("body"))
        if self._received == self._leave_after_received:
            self.leave()
            if self.left_after is not None and self._received and self.server.blocks_in_send:
                await sleep_forever()

    def _count_sent(self, size: int) -> None:
        """Count a piece of the request's body of so many bytes."""
        self._sent += bool(size)
        if self._sent == self._leave_after_sent:
            self.leave()

    def _change(self) -> None:
        """Have those who wait look again."""
        self._changed.set()
        self._changed = Event()


async def _one_by_one(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece

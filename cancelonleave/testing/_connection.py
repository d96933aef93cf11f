"""The server's side of one request: what receive() returns, what send() does, and when the client disconnects."""

from __future__ import annotations

from asyncio import CancelledError
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable

from anyio import Event, current_time, get_cancelled_exc_class, sleep_forever
from anyio.lowlevel import checkpoint
from starlette.types import Message

from ._exchange import Sent
from ._faults import Fault
from ._frames import caller
from ._messages import Order
from ._request import Body
from ._servers import Server


class Connection:
    """One request between a client and an application.

    Args:
        server: The server whose behaviour it has.
        leave_after_received: Disconnect after so many chunks of the response's body; 0 is its start.
        leave_after_sent: Disconnect after so many chunks of the request's body; 0 is before the first.
    """

    left_after: float | None = None  # seconds from the request to the disconnect
    ended_after: float | None = None  # seconds from the request to the end of the application
    error: BaseException | None = None
    body_sent = asked_for_body = body_consumed = False
    blocks = False  # a send() that will never return
    _receiving = _received = _sent = 0
    _reported = _interrupted = False

    def __init__(self, server: Server, leave_after_received: int | None, leave_after_sent: int | None) -> None:
        self.messages: list[Sent] = []
        self.faults: list[Fault] = []
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
        """Whether the client has disconnected or the application has ended."""
        return self.left_after is not None or self.ended_after is not None

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def disconnect(self) -> None:
        """Have the client disconnect, unless it has its response."""
        if not self.over and not self._order.complete:
            self.left_after = current_time() - self._began
            self._change()

    def end(self) -> None:
        self.ended_after = current_time() - self._began
        self._change()

    async def upload(self, body: Body, *, at_once: bool) -> None:
        """Have the client send its body, no faster than the application receives it, until it disconnects."""
        await self.until(lambda: at_once or self.asked_for_body or self.over)
        if self.over:
            return
        if isinstance(body, bytes):
            self.arrive(body, more=False)
            return
        chunks = body if isinstance(body, AsyncIterable) else _one_by_one(body)
        try:
            async for chunk in chunks:
                self.arrive(chunk, more=True)
                await self.until(lambda: self.over or self.server.takes_body_first or not self._arrived)
                if self.over:
                    return
            self.arrive(b"", more=False)
        finally:
            if isinstance(chunks, AsyncGenerator):  # else the garbage collector would close it
                await chunks.aclose()

    def arrive(self, chunk: bytes, *, more: bool) -> None:
        """Take a chunk of the request's body from the client, for the application to receive."""
        if not self.over:
            self._arrived.append({"type": "http.request", "body": chunk, "more_body": more})
            self.body_sent = not more
            self._change()
            if self.server.takes_body_first:
                self._count_sent(len(chunk))

    async def receive(self) -> Message:
        self.asked_for_body = True
        self._change()
        if self._receiving:
            fault = f"receive() was called while another call was waiting. The second call was by {caller()}."
            self.faults.append(Fault("concurrent receive", fault))
        self._receiving += 1
        try:
            await self.until(lambda: self._next() is not None)
            return await self._take()
        except CancelledError:  # asyncio's, since the servers to which this matters don't run on trio
            self._interrupted = self._interrupted or self.body_consumed
            raise
        finally:
            self._receiving -= 1

    def _next(self) -> str | None:
        """Return the type of the message that receive() has to return, if there is one."""
        is_over = self._order.complete and self.server.disconnects_after_response
        is_gone = is_over or self.left_after is not None
        if self._arrived and not (is_gone and self.server.drops_body):
            return "http.request"
        is_false = self._interrupted and self.server.disconnects_after_cancel
        return "http.disconnect" if is_false or (is_gone and not self._reported) else None

    async def _take(self) -> Message:
        if self._next() == "http.disconnect":
            self._reported = not self.server.repeats_disconnect
            return {"type": "http.disconnect"}
        message = self._arrived.popleft()
        self._change()
        if not self.server.takes_body_first:
            self._count_sent(len(message["body"]))
        if self.server.loses_body_by_cancel and get_cancelled_exc_class() is CancelledError:  # see receive()
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
            fault = f"send() was called in a way that ASGI forbids, by {caller()}: {fault}."
            self.faults.append(Fault("message order", fault))
        self.messages.append(Sent(current_time() - self._began, dict(message)))
        if self.left_after is None:
            await self._deliver(message)
        elif self.server.raises_in_send:
            raise OSError("The client has disconnected.")
        await checkpoint()  # else an application that only sends would keep all other tasks from running

    async def _deliver(self, message: Message) -> None:
        self._change()
        self._received += bool(message.get("body"))
        if self._received == self._leave_after_received:
            self.disconnect()
            if self.left_after is not None and self._received and self.server.blocks_in_send:
                await self._block()

    async def _block(self) -> None:
        self.blocks = True
        try:
            await sleep_forever()
        finally:
            self.blocks = False

    def _count_sent(self, size: int) -> None:
        """Count a chunk of the request's body of so many bytes."""
        self._sent += bool(size)
        if self._sent == self._leave_after_sent:
            self.disconnect()

    def _change(self) -> None:
        """Have those who wait look again."""
        self._changed.set()
        self._changed = Event()


async def _one_by_one(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk

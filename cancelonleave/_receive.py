"""The only reader of a request's receive(): keeps what nobody has read yet, and remembers the disconnect."""

from __future__ import annotations

from asyncio import CancelledError, current_task
from collections.abc import Awaitable, Callable
from contextvars import Context
from types import CoroutineType, MethodType
from typing import cast
from weakref import ReferenceType, ref

from anyio import Event, get_cancelled_exc_class, sleep
from anyio.lowlevel import cancel_shielded_checkpoint
from starlette.types import Message, Receive, Scope

from ._loop import Loop

READ_AHEAD = 64 * 1024  # bytes: unread body kept at most, give or take the last message
MESSAGE_SIZE = 256  # bytes: what a message takes beside its body, so that many small ones don't pile up either
PAUSE = 0.05  # seconds: before asking again a receive() that repeats the end of the body at once (pyvoy 1.3)
TURNS = 4  # of the event loop, after which a receive() that has begun has said what it knows already


class Reader:
    """Reads for the endpoint of a request, and ahead of it to learn of the disconnect.

    Servers disagree about being called by two at once, so one task reads for all, and what was read is kept until
    somebody takes it. At first the task that asks does it, which costs the least. Once it was cancelled there, to read
    ahead, and where it does harm to cancel a receive(), a separate task reads.
    """

    loop: Loop  # which runs that task
    disconnect: Message | None = None
    # Not if the client waits for "100 Continue", which the first receive() has the server send; None is not known yet.
    may_read_ahead: bool | None = None
    _reads_ahead = False
    _asking = 0  # those who ask whether the client has disconnected
    _reads_here: bool | None = None  # in the task that asks; None is not known yet
    _is_reading = False
    _is_body_complete = False
    _waiting = 0  # those who wait for a message that another task reads
    _size = 0
    _kept: tuple[Message | BaseException, ...] = ()  # at most some 250, so that taking the first is cheap
    _cancel_task: Callable[[], object] | None = None
    _changed: Event | None = None

    def __init__(self, receive: Receive, scope: Scope) -> None:
        self._receive = receive
        self.scope = scope

    async def next_message(self) -> Message:
        """Return the next message in the server's order, or raise what receive() raised in its place."""
        self.may_read_ahead = True
        while not (self._kept or self.disconnect):
            receiving = self._receive_here()
            if not isinstance(receiving, CoroutineType):
                await self._wait_for_message(receiving)
                del receiving  # it would make a cycle with what it raises
                continue
            self._is_reading = True
            try:
                message = self.note(await receiving)
            except get_cancelled_exc_class():
                self._reads_here = False
                raise
            finally:
                self._end_here()
            if message is not self.disconnect:
                return message
            # The disconnect comes after what was given back meanwhile.
        if self._kept:
            return self._take()
        self.learn()
        return cast(Message, self.disconnect)  # which is known if nothing is kept

    def _receive_here(self) -> Awaitable[Message] | None:
        """Call receive() and return what is to be awaited, or return None if another task reads, or must."""
        if self._reads_here is None:
            # A server's own is a method. A middleware's is mostly a closure, and the one of Starlette's
            # BaseHTTPMiddleware loses body when it is cancelled, as granian's does, which returns no coroutine.
            self._reads_here = isinstance(self._receive, MethodType)
        can_read = self._reads_here and not self._is_reading and not self._is_body_complete
        return self._receive() if can_read else None

    def _end_here(self) -> None:
        """Let others go on, since this task no longer reads."""
        self._is_reading = False
        if self._changed is not None:
            self.change()
        if self._reads_ahead:
            self.read_on()
        elif self._asking:
            self._start_if_wanted()

    async def _wait_for_message(self, receiving: Awaitable[Message] | None) -> None:
        """Wait until another task has read, and start one if there is none."""
        self._waiting += 1
        try:
            if not self._is_reading:
                self._reads_here = False
                self._start_reading(receiving)
            while self._is_reading and not self._kept and self.disconnect is None:
                await self.next_change().wait()
        finally:
            self._waiting -= 1
            if self._cancel_task is not None:
                self.stop()

    def give_back(self, message: Message) -> None:
        """Keep a message for whoever asks next, since the one who asked for it has given up."""
        if message is self.disconnect:
            return  # it is remembered already, and whoever asks next learns of it
        self._kept = (message, *self._kept)
        self._size += self.size_of(message)
        self.change()

    def _take(self) -> Message:
        message, self._kept = self._kept[0], self._kept[1:]
        if isinstance(message, BaseException):
            try:
                raise message
            finally:
                del message  # which would make a cycle with its traceback
        self._size -= self.size_of(message)
        if self._reads_ahead:
            self.read_on()
        return message

    async def ask(self) -> Message | None:
        """Return the disconnect if it is known by now, for `is_disconnected()`, which would throw away a message."""
        self.may_read_ahead = True
        self._asking += 1
        self._start_if_wanted()
        try:
            for _ in range(TURNS):
                if self._is_reading and self.disconnect is None:
                    await cancel_shielded_checkpoint()
        finally:
            self._asking -= 1
            self.stop()
        return self.disconnect

    def read_ahead(self, context: Context | None = None) -> None:
        """Read from now on for as long as there is room, until the disconnect."""
        self._reads_ahead = True
        self._start_if_wanted(context)

    def read_on(self) -> None:
        """Read ahead again, now that somebody has read."""
        self.read_ahead()

    def stop_reading_ahead(self) -> None:
        self._reads_ahead = False
        if self._cancel_task is not None:
            self.stop()

    def stop(self) -> None:
        """Cancel the task that reads, if nobody needs it, and the server doesn't mind."""
        # granian and pyvoy lose body when a receive() that waits for it is cancelled; gunicorn (27, HTTP/1.1) reports
        # a disconnect once a receive() that waits for it was cancelled. So these go on until the request is over.
        is_needed = self._waiting or self._asking or self._reads_ahead or not self._is_body_complete
        if not is_needed and spec_version(self.scope) < (2, 4):
            self.cancel()

    def cancel(self) -> None:
        """Cancel the task that reads."""
        cancel_task, self._cancel_task = self._cancel_task, None
        if cancel_task is not None:
            cancel_task()

    async def wait_for_disconnect(self) -> None:
        while self.disconnect is None:
            await self.next_change().wait()

    def mark_disconnected(self, disconnect: Message) -> Message:
        """Remember the disconnect, and return the one that came first."""
        if self.disconnect is None:
            self.disconnect = disconnect
            self.change()
            self.came()
        return self.disconnect

    def came(self) -> None:
        """Do what is to be done when the client has disconnected."""

    def learn(self) -> None:
        """Do what is to be done when the code that runs now has learned of it."""

    @property
    def _is_wanted(self) -> bool:
        """Whether anybody wants another message."""
        if self.disconnect is not None or (self._waiting and not self._kept):
            return self.disconnect is None
        reads_ahead = self._reads_ahead or self._asking
        if not reads_ahead or not self.may_read_ahead or self._size >= READ_AHEAD:
            return False
        return not self._kept or not isinstance(self._kept[-1], BaseException)

    def _start_if_wanted(self, context: Context | None = None) -> None:
        if not self._is_reading and self._is_wanted:
            self._start_reading(context=context)

    def _start_reading(self, receiving: Awaitable[Message] | None = None, context: Context | None = None) -> None:
        loop = self.loop
        self._is_reading = True
        reader: ReferenceType[Reader] = ref(self, lambda _: loop.call_from_anywhere(cancel_task))
        cancel_task = loop.start_task(read(self._receive, receiving, reader), context)
        self._cancel_task = cancel_task if self._is_reading else None  # it may have ended already

    def keep(self, outcome: Message | BaseException | None) -> float | None:
        """Keep what receive() has returned or raised, if it was not cancelled.

        Return the seconds until the task that reads is to call it again, or None if that ends.
        """
        pause = 0.0
        if isinstance(outcome, BaseException):
            self._kept += (outcome,)  # such as a 413 (max_body_size): it is for an endpoint that reads
        elif outcome is not None:
            pause = self.keep_message(outcome)
        self.change()
        is_wanted = self._is_wanted
        if is_wanted and outcome is not None:
            return pause
        # Otherwise others have cancelled it, as at shutdown, and a new task would stay behind.
        may_start_again = self._cancel_task is None
        self._is_reading = False
        self._cancel_task = None
        if is_wanted and may_start_again:
            self._start_reading()
        return None

    def keep_message(self, message: Message) -> float:
        """Keep it for whoever asks next; return the seconds after which receive() may have more to say."""
        is_body = message["type"] == "http.request"
        if is_body and self._is_body_complete:
            return PAUSE
        message = self.note(message)
        if message is self.disconnect:
            return 0
        self._kept += (message,)
        self._size += self.size_of(message)
        return 0 if is_body else PAUSE

    def note(self, message: Message) -> Message:
        """Note what a message says about the request; return it, or the disconnect as it was first known."""
        if message["type"] == "http.disconnect":
            return self.mark_disconnected(message)
        if message["type"] == "http.request":
            self._is_body_complete = not message.get("more_body", False)
        return message

    def size_of(self, message: Message) -> int:
        return len(message.get("body") or b"") + MESSAGE_SIZE

    def change(self) -> None:
        """Have those look again who wait for a change."""
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    def next_change(self) -> Event:
        self._changed = self._changed or Event()
        return self._changed


async def read(receive: Receive, receiving: Awaitable[Message] | None, reference: ReferenceType[Reader]) -> None:
    """Read for a reader as long as anybody wants a message.

    It holds the reader, and so the request, by a weak reference only: it is cancelled when the request is over.
    """
    pause: float | None = 0.0
    while pause is not None:
        try:
            if pause:
                await sleep(pause)
            message = await (receiving or receive())
            receiving, reader = None, reference()
            pause = None if reader is None else reader.keep(message)
        except (Exception, get_cancelled_exc_class()) as error:
            receiving, reader = None, reference()
            pause = None if reader is None else reader.keep(None if _is_cancelled(error) else error)
        del reader


def _is_cancelled(error: BaseException) -> bool:
    """Whether this task was cancelled, rather than something in the server's receive() (tremolo 0.5, in mid-body)."""
    if isinstance(error, CancelledError):
        task = current_task()
        return task is None or task.cancelling() > 0
    return not isinstance(error, Exception)


def spec_version(scope: Scope) -> tuple[int, ...]:
    """Return the version of ASGI's HTTP specification that the server says it follows."""
    return tuple(map(int, scope.get("asgi", {}).get("spec_version", "2.0").split(".")))

"""One for each request: waits for the disconnect, and cancels the calls that still run."""

from __future__ import annotations

from contextvars import Context, copy_context
from enum import Enum
from typing import Any, cast

from anyio import CancelScope
from anyio.lowlevel import checkpoint_if_cancelled
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive
from starlette.websockets import WebSocket

from ._anyio import is_cancelled
from ._exceptions import ClientClosedRequest
from ._loop import Loop
from ._receive import Reader

Connection = Request | WebSocket

RETRY = 0.025  # seconds: until a call is looked at again that could not be cancelled, as within a shield
LEARN = 1.0  # seconds: for those who wait for a task that has read of the disconnect, to learn of it from that task


class Phase(Enum):
    """What a disconnect means to a request."""

    OPEN = "open"  # none has come
    CAME = "disconnected"  # before the response was complete
    CLOSED = "closed"  # the response is complete: servers report a disconnect after each


class Fate(Enum):
    """What is to become of a call when the client disconnects."""

    RUNS = "runs"  # it is to be cancelled
    KNOWS = "knows"  # its task has read of the disconnect: it isn't cancelled as well
    CANCELLED = "cancelled"


class Call:
    """One awaitable that ends when the client disconnects.

    It knows the task that awaits it, and the request, which the watch must not hold, as that would make a cycle.
    """

    fate = Fate.RUNS
    cancels_host = True  # so of the calls in one task only the outermost need be cancelled

    def __init__(self, watch: Watch, request: Connection, host: Any) -> None:  # Any: a task, asyncio's or trio's
        self.watch = watch
        self.request = request
        self.host = host

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.fate.value}>"

    def is_due(self) -> bool:
        """Whether it is to be cancelled, now that the client has disconnected."""
        return self.fate is Fate.RUNS

    def cancel(self) -> list[float]:
        """Cancel it; or return the seconds until that can be tried again."""
        self.fate = Fate.CANCELLED
        return []


class Watch(Reader):
    """Stands in the place of a request's receive(), and knows the calls that end when the client disconnects."""

    read_as: type[Exception] = ClientDisconnect  # what Starlette raises to those who read the disconnect
    phase = Phase.OPEN
    calls: tuple[Call, ...] = ()
    began = 0.0  # when the first call did, by the clock of its event loop
    is_logged = False
    _context: Context | None = None
    _learn: float | None = None  # seconds that others are given to learn of it, once a task has read of it
    _is_first_look = True

    def __repr__(self) -> str:
        return f"<Watch {self.phase.value}, calls: {self.calls}>"

    async def __call__(self) -> Message:
        """Be the request's receive(), also for a thread that runs an event loop of its own, as by asyncio.run()."""
        is_here = self.loop.is_running_here()
        if is_cancelled():
            disconnect: Message | None = None
            with CancelScope(shield=not is_here):
                disconnect = await (self.ask() if is_here else self.loop.run(self.ask, lambda _: None))
            if disconnect is not None:
                return disconnect
            await checkpoint_if_cancelled()
        if not is_here:
            return await self.loop.run(self.__call__, self.give_back)
        return await self.next_message()

    def begin(self, call: Call, loop: Loop) -> None:
        """Count a call among those to be cancelled."""
        self.calls += (call,)
        if len(self.calls) == 1:
            self.loop = loop
            self._context = copy_context()
            now = loop.add(self)
            self.began = self.began or now

    def end(self, call: Call) -> None:
        self.calls = tuple(each for each in self.calls if each is not call) if len(self.calls) > 1 else ()
        if not self.calls:
            self._context = None
            self.loop.discard(self)
            self.stop_reading_ahead()

    def start(self) -> None:
        """Wait for the disconnect from now on, for a call lasts."""
        if not self.calls:  # they have ended since this was due
            return
        if self.may_read_ahead is None:
            expects_continue = any(name == b"expect" for name, _ in self.scope.get("headers", ()))
            self.may_read_ahead = not expects_continue or is_read(cast(Request, self.calls[0].request))
        self.read_ahead(self._context)

    def close(self) -> None:
        """Note that the response is complete, so a disconnect means nothing from now on."""
        self.phase = Phase.CLOSED

    def exception(self) -> Exception:
        """Return what is to be raised in the place of a call that the disconnect has ended."""
        return ClientClosedRequest()

    def came(self) -> None:
        if self.phase is not Phase.OPEN:
            return  # so that there is one look after another, and not two at a time
        self.phase = Phase.CAME
        if self.calls:
            # Not from here: this may be a step of the host's, in which it can't be cancelled (eager tasks, 3.12).
            self.loop.call_later(0, self._look)

    def learn(self) -> None:
        """Note that the code that runs now has learned of the disconnect, so its task isn't cancelled as well."""
        if self._learn is None:
            self._learn = LEARN
        host = self.loop.current_task()
        for call in self.calls:
            if call.host is host and call.fate is Fate.RUNS:
                call.fate = Fate.KNOWS

    def _look(self) -> None:
        """Cancel the calls that still run, or look again when that can be done."""
        if self.phase is not Phase.CAME or not (due := self._due()):
            return
        if self._learn:
            delays, self._learn = [self._learn], 0.0
        else:
            # Calls in other tasks are left for the next look: by then, cancelling the first may have reached them.
            now = [call for call in due if call is due[0] or not (call.cancels_host and self._is_first_look)]
            delays = [delay for call in now for delay in call.cancel()] + [RETRY] * (len(now) < len(due))
            self._is_first_look = self._is_first_look and 0.0 in delays
        if delays:
            self.loop.call_later(min(delays), self._look)

    def _due(self) -> list[Call]:
        """Return the calls to be cancelled: of each task the outermost only, which takes those within along."""
        hosts: set[object] = set()
        due: list[Call] = []
        for call in self.calls:
            if call.is_due() and not (call.cancels_host and call.host in hosts):
                due.append(call)
            if call.cancels_host:
                hosts.add(call.host)
        return due


def watch_of(request: Request) -> Watch:
    """Return what stands in the place of the request's receive(), now at the latest."""
    # Not by `request.receive`, which a class of the user's may wrap.
    receive = request._receive  # pyright: ignore[reportPrivateUsage]  # see _replace_receive()
    if isinstance(receive, Watch):
        return receive
    watch = Watch(receive, request.scope)
    # Somebody asked it before, and some servers say it once only (hypercorn, daphne). Starlette has no public way to
    # see that without asking the server again; without this name, they are asked again.
    if getattr(request, "_is_disconnected", False):
        watch.mark_disconnected({"type": "http.disconnect"})
    _replace_receive(request, watch)
    return watch


def is_read(request: Request) -> bool:
    """Whether the body was read already, as FastAPI does before it calls an endpoint that takes it."""

    async def unread() -> Message:
        raise EOFError

    receive = request._receive  # pyright: ignore[reportPrivateUsage]  # see _replace_receive()
    _replace_receive(request, unread)
    try:
        request.body().send(None)  # by hand, for there is nothing to await
    except EOFError:
        return False
    except Exception:  # StopIteration with the whole body; or "Stream consumed", as after form()
        pass
    finally:
        _replace_receive(request, receive)
    return True


def _replace_receive(request: Request, receive: Receive) -> None:
    # The endpoint, and whoever reads this request after it, must get what was read ahead. A new Request would lack the
    # body, the form and the attributes that dependencies left here.
    request._receive = receive  # pyright: ignore[reportPrivateUsage]  # see above

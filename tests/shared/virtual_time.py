"""Virtual time: the clock jumps to the next timer as soon as nothing else can run, so sleeping takes no time."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from contextvars import Context, copy_context
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVarTuple

import pytest
import trio
import uvloop
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from trio.testing import MockClock

if TYPE_CHECKING:
    EventLoop = asyncio.SelectorEventLoop
else:
    EventLoop = object

Ts = TypeVarTuple("Ts")


class VirtualTime(EventLoop):
    """Makes an event loop's time virtual: the clock moves when a whole turn of the loop has scheduled nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        # Keyed by time in whole nanoseconds, so that timers of the same instant run in the order in which
        # they were set up, whatever the rounding.
        self._timers: list[tuple[float, int, asyncio.TimerHandle, Callable[[], object]]] = []
        self._number = count()
        self._busy = self._looking = False
        self._busy_turns = 0

    def time(self) -> float:
        return self._now

    def stall(self, seconds: float) -> None:
        """Let time pass in which nothing runs, as if the code that calls this had blocked the loop."""
        self._now += seconds

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        self._busy = True
        return super().call_soon(callback, *args, context=context)

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        self._busy = True
        return super().call_soon_threadsafe(callback, *args, context=context)

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        context = copy_context() if context is None else context
        handle = asyncio.TimerHandle(when, callback, args, self, context)

        def run() -> None:
            if not handle.cancelled():
                callback(*args)

        def go_off() -> None:
            self._now = max(self._now, when)
            self.call_soon(run, context=context)

        heapq.heappush(self._timers, (round(when, 9), next(self._number), handle, go_off))
        if not self._looking:
            self._looking = True
            super().call_soon(self._look)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Called by `TimerHandle.cancel()`; uvloop, which has timers of its own, lacks it."""

    def _look(self) -> None:
        # Time passes in a busy loop too: anyio cancels again at each turn while a child of gather cleans up.
        self._busy_turns = self._busy_turns + 1 if self._busy else 0
        if not self._busy or self._busy_turns > 100:
            self._busy_turns = 0
            while self._timers and self._timers[0][2].cancelled():
                heapq.heappop(self._timers)
            if self._timers:
                self._now = max(self._now, self._timers[0][2].when())
        # Overdue timers, as after a stall, don't wait until nothing else can run: no event loop does that.
        while self._timers and self._timers[0][0] <= round(self._now, 9):
            heapq.heappop(self._timers)[3]()
        self._busy = False
        self._looking = bool(self._timers)
        if self._looking:
            super().call_soon(self._look)


def stall(seconds: float) -> None:
    """Let time pass in which nothing runs, on the current event loop or trio run."""
    try:
        loop: object = asyncio.get_running_loop()
    except RuntimeError:
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, MockClock)
        clock.jump(seconds)
    else:
        assert isinstance(loop, VirtualTime)
        loop.stall(seconds)


# Made by type(), since the type checkers know that uvloop's methods are typed unlike asyncio's.
AsyncioLoop: Callable[[], asyncio.AbstractEventLoop] = type("AsyncioLoop", (VirtualTime, asyncio.SelectorEventLoop), {})
UvloopLoop: Callable[[], asyncio.AbstractEventLoop] = type("UvloopLoop", (VirtualTime, uvloop.Loop), {})

BACKENDS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {  # Any: anyio's own type for backend options
    "asyncio": ("asyncio", lambda: {"loop_factory": AsyncioLoop}),
    "uvloop": ("asyncio", lambda: {"loop_factory": UvloopLoop}),
    "trio": ("trio", lambda: {"clock": MockClock(autojump_threshold=0)}),
}


async def answer(_: ExceptionMiddleware, request: Request, error: Exception) -> Response:
    """Answer as Starlette does, but not in a thread as it does before 0.47."""
    assert isinstance(error, HTTPException)
    return Response(error.detail, error.status_code)


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    """Run the tests of a module that imports this in virtual time, with no thread or socket, whose time is real."""
    monkeypatch.setattr(ExceptionMiddleware, "http_exception", answer)
    library, options = BACKENDS[request.param]
    return library, options()

"""What all calls of one event loop share: the timer that starts the watch of those that last."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from contextvars import Context
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ._watch import Watch

T = TypeVar("T")

_EAGER: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}  # Any: as for Task()
GRACE = 0.025  # seconds: a call that ends within this time never has its client watched


class Loop:
    """An event loop, here one of asyncio's: the timer for its calls, and what a watch needs to run on it.

    One timer serves all calls. A timer for each would cost it 2 to 4 microseconds, a place in a set a tenth of that.
    """

    def __init__(self, native: Any, time: Callable[[], float]) -> None:  # Any: asyncio's, or trio's token
        self._native = native
        self.time = time
        self._new: set[Watch] = set()
        self._old: set[Watch] = set()
        self._due: float | None = None  # when the timer ticks next
        self._is_lagging = False  # it came late

    def add(self, watch: Watch) -> float:
        """Have a watch started in 25 to 50 ms, or at once if the event loop lags; return the time."""
        now = self.time()
        if self._due is None:
            self._old.add(watch)
            self._tick_later(now)
        elif self._is_lagging or now > self._due + GRACE:
            watch.start()  # the timer would be late, too, and under overload most clients have given up by then
        else:
            self._new.add(watch)
        return now

    def discard(self, watch: Watch) -> None:
        self._new.discard(watch)
        self._old.discard(watch)

    def _tick_later(self, now: float) -> None:
        self._due = now + GRACE
        self.call_later(GRACE, self._tick)

    def _tick(self) -> None:
        due, self._old, self._new = self._old, self._new, set()
        now = self.time()
        self._is_lagging = self._due is not None and now > self._due + GRACE
        self._due = None
        if self._old or self._is_lagging:
            self._tick_later(now)
        for watch in due:
            self.call_later(0, watch.start)  # not from here, where the first that fails would keep the others from it

    def is_running_here(self) -> bool:
        """Whether the code that asks runs on this event loop; a sync endpoint's thread may have one of its own."""
        return asyncio.get_running_loop() is self._native

    def current_task(self) -> Any:  # Any: asyncio's or trio's
        return asyncio.current_task()

    def call_later(self, seconds: float, callback: Callable[[], object]) -> None:
        self._native.call_later(seconds, callback, context=Context())  # not in the request's, which would be kept

    def call_from_anywhere(self, callback: Callable[[], object]) -> None:
        """Call it soon, if the event loop still runs, from whichever thread the garbage collector runs in."""
        with suppress(RuntimeError):
            self._native.call_soon_threadsafe(callback, context=Context())

    def start_task(self, coroutine: Coroutine[Any, Any, None], context: Context | None) -> Callable[[], object]:
        """Run it in a task, at once as far as it goes if Python can do that (3.12); return what cancels the task."""
        # Not by loop.create_task(): its task factory may not take a context, or start the task when it likes.
        task = asyncio.Task(coroutine, loop=self._native, name="cancelonleave: receive", context=context, **_EAGER)
        # One that has not begun is given a turn, or it would end without its `except` having run.
        return task.cancel if _EAGER else lambda: self._native.call_soon(task.cancel)

    async def run(self, function: Callable[[], Coroutine[Any, Any, T]], give_back: Callable[[T], object]) -> T:
        """Run a function on this event loop, wait for it on another, and give back its result if nobody takes it."""
        outcome: Future[T] = Future()

        async def call() -> None:
            try:
                result = await function()
            except Exception as error:
                with suppress(InvalidStateError):
                    outcome.set_exception(error)
            else:
                try:
                    outcome.set_result(result)
                except InvalidStateError:  # the other side has given up
                    give_back(result)

        running = asyncio.run_coroutine_threadsafe(call(), self._native)
        running.add_done_callback(lambda _: outcome.cancel())  # it may be cancelled before it begins
        try:
            return await asyncio.wrap_future(outcome)
        except asyncio.CancelledError:
            running.cancel()
            if not outcome.cancel() and outcome.exception() is None:
                self._native.call_soon_threadsafe(give_back, outcome.result())
            raise


@lru_cache(maxsize=16)  # where there are more event loops, some calls get a timer for themselves
def loop_of(native: asyncio.AbstractEventLoop) -> Loop:
    return Loop(native, native.time)

"""A wait for one event, shared by all the calls that end when it comes; knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context, ContextVar
from typing import Any, Protocol

from ._patience import PATIENCE
from ._tasks import tasks_of


class Event(Protocol):
    """What is waited for."""

    def watch(self) -> Coroutine[Any, Any, None]:  # Any: what `async def` returns
        """Return when it has come, and those who awaited it by other means have been told."""
        ...

    def change(self) -> None:
        """Do what is to be done when `watch()` has ended, however it ended."""


class Watch:
    """A wait for one event, shared by all the calls that end when it comes.

    Args:
        event: What is waited for.
        error: Makes the exception that a cancelled call ends with.
        goes_on_after: Says of a call's result whether the wait, once begun, is to go on without a call, until there is
            another, or somebody calls `stop()` or `drop()`. (On trio a wait can't outlive its call.)
    """

    __slots__ = ("calls", "error", "event", "finished", "goes_on_after", "is_held", "over", "task")

    def __init__(self, event: Event, error: Callable[[], Exception], goes_on_after: Callable[[object], bool]) -> None:
        self.event = event
        self.error = error
        self.goes_on_after = goes_on_after
        self.is_held = False  # from one call to the next, as far as that can be done on trio
        self.over = self.finished = False
        self.task: asyncio.Task[None] | None = None
        self.calls: list[Call] = []

    def start(self) -> bool:
        """Wait from now on, if there is a call that needs it; return whether there is."""
        for call in self.calls:
            call.watch_now()
        return bool(self.calls) and not self.over

    def tell(self) -> None:
        """Note that the code running now has learned of the event by itself, so it isn't cancelled on top."""
        call = innermost.get()
        while call is not None:
            if call.watch is self:
                call.tell()
            call = call.around

    def finish(self) -> None:
        """From now on the event means nothing to any call."""
        self.over = self.finished = True
        for call in self.calls:
            call.tell()

    async def stop(self) -> None:
        """End the wait, if no call needs it."""
        if self.task is not None and not self.calls:
            await self._stop_task(self.task)

    def drop(self) -> None:
        """End a wait that went on without a call, from anywhere, as from a finalizer."""
        if self.task is not None and not self.calls:
            with suppress(RuntimeError):  # the event loop is closed
                self.task.get_loop().call_soon_threadsafe(self.task.cancel)

    def start_task(self, loop: asyncio.AbstractEventLoop, context: Context) -> None:
        if self.task is None and not self.over:
            self.task = loop.create_task(self._wait_and_cancel(), name="cancelonleave: watch", context=context)
            self.task.add_done_callback(self._task_done)

    async def _wait_and_cancel(self) -> None:
        await asyncio.sleep(0)  # an eager task (3.12) begins in a step of the host's, which must not be cancelled there
        await self.event.watch()
        self.over = True
        await self._cancel()

    async def _cancel(self) -> None:
        loop = asyncio.get_running_loop()
        pause = 0.0  # at first: one whose future had just completed goes on, and can be cancelled then
        while True:
            loop.call_soon(self._cancel_due)  # in a task anyio would describe it in each exception, which takes 0.1 ms
            await asyncio.sleep(0)
            due = self._due()
            if not due:
                return
            for call in due:
                call.rest()
            await asyncio.sleep(pause)
            pause = tasks_of(loop).until_next_try()

    def _cancel_due(self) -> None:
        for call in self._due():
            call.cancel()

    def _due(self) -> list[Call]:
        return [call for call in self.calls if not (call.told or call.cancelled)]

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self.event.change()
        if task is self.task:
            self.task = None

    async def _stop_task(self, task: asyncio.Task[None]) -> None:
        """Cancel the wait and see it end."""
        self.task = None
        while not task.done():
            task.cancel()  # again, for a receive() that swallowed it
            # Awaiting the task itself would confuse its cancellation with one that comes from outside meanwhile.
            await asyncio.wait((task,), timeout=PATIENCE)


class Call:
    """One awaitable under a watch: what asyncio and trio have in common."""

    __slots__ = ("_token", "around", "at_once", "cancelled", "ended", "level", "told", "watch")

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.told = self.cancelled = self.ended = self.level = self.at_once = False
        self.around = innermost.get()
        self._token = innermost.set(self)
        watch.calls.append(self)

    def end(self) -> None:
        self.ended = True
        self.watch.calls.remove(self)
        innermost.reset(self._token)

    def tell(self) -> None:
        self.told = True

    def is_first(self) -> bool:
        """Whether no call around this one is still to be cancelled, and this one with it."""
        around = self.around
        return around is None or around.watch is not self.watch or around.ended or around.told

    def watch_now(self) -> None:
        """Don't wait for the end of `PATIENCE`."""

    def cancel(self) -> None:
        """Cancel it if that can be done now, for `Watch`, which tries again; trio's calls cancel themselves."""

    def rest(self) -> None:
        """Having just tried in vain, let it be until the next try."""


innermost: ContextVar[Call | None] = ContextVar("cancelonleave", default=None)


def asyncio_task() -> asyncio.Task[Any] | None:  # Any: whatever it returns
    try:
        return asyncio.current_task()
    except RuntimeError:  # under trio; in its guest mode there is an asyncio loop, but it runs no task just now
        return None

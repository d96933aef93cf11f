"""Runs a coroutine and cancels it once when told to; knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from functools import lru_cache
from typing import Any, TypeVar

from anyio import (
    CancelScope,
    Event,
    create_task_group,
    get_cancelled_exc_class,
    get_running_tasks,
    move_on_after,
    sleep,
)

T = TypeVar("T")
Wait = Callable[[], Coroutine[Any, Any, None]]  # Any: what create_task() takes

# Seconds. A call that ends sooner never starts the wait, and a cancellation that can't be delivered yet is tried
# again after as long (every 10 ms would cost 2 % of a core during somebody's long shield).
PATIENCE = 0.025


class Watch:
    """A wait for one event, shared by all the calls that end when it comes.

    Args:
        wait: Returns when the event has come, and those who awaited it by other means have been told.
        ended: Called when `wait()` has ended, however it ended.
        error: Makes the exception that a cancelled call ends with.
    """

    over = False
    task: asyncio.Task[None] | None = None

    def __init__(self, wait: Wait, ended: Callable[[], None], error: Callable[[], Exception]) -> None:
        self.wait = wait
        self.ended = ended
        self.error = error
        self.calls: set[_Call] = set()

    def run(self, awaitable: Awaitable[T]) -> Coroutine[Any, Any, T]:  # Any: what an `async def` returns
        """Await `awaitable` in the caller's task; if the event comes, cancel it once and raise `error()`."""
        try:
            host = asyncio.current_task()
        except RuntimeError:
            host = None
        # Under trio there is no asyncio loop; in its guest mode there is one, but it runs no task just now.
        return _TrioCall(self).run(awaitable) if host is None else _AsyncioCall(self, host).run(awaitable)

    def start(self) -> bool:
        """Wait from now on, if there is a call that needs it; return whether there is."""
        for call in self.calls:
            call.watch_now()
        return bool(self.calls) and not self.over

    def tell(self) -> None:
        """Note that the code running now has learned of the event by itself, so it isn't cancelled on top."""
        call = _innermost.get()
        while call is not None:
            call.told = call.told or call.watch is self
            call = call.around

    def start_task(self, loop: asyncio.AbstractEventLoop, context: Context) -> None:
        if self.task is None and not self.over:
            self.task = loop.create_task(self._wait_and_cancel(), name="cancelonleave: watch", context=context)
            self.task.add_done_callback(self._task_done)

    async def _wait_and_cancel(self) -> None:
        await self.wait()
        self.over = True
        await asyncio.sleep(0)  # an eager task (3.12) may be in a step of the host's, which must not be cancelled there
        while due := [call for call in self.calls if not (call.told or call.cancelled)]:
            for call in due:
                call.cancel()
            await asyncio.sleep(PATIENCE)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self.ended()
        if task is self.task:
            self.task = None

    async def stop_task(self, task: asyncio.Task[None]) -> None:
        """Cancel the wait and see it end."""
        self.task = None
        while not task.done():
            task.cancel()  # again, for a receive() that swallowed it
            # Awaiting the task itself would confuse its cancellation with one that comes from outside meanwhile.
            await asyncio.wait((task,), timeout=PATIENCE)


class _Call:
    """One awaitable under a watch: what asyncio and trio have in common."""

    told = cancelled = ended = False

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.around = _innermost.get()
        self._token = _innermost.set(self)
        watch.calls.add(self)

    def end(self) -> None:
        self.ended = True
        self.watch.calls.discard(self)
        _innermost.reset(self._token)

    def is_first(self) -> bool:
        """Whether no call around this one is still to be cancelled, and this one with it."""
        around = self.around
        return around is None or around.watch is not self.watch or around.ended or around.told

    def watch_now(self) -> None:
        """Don't wait for the end of `PATIENCE`."""

    def cancel(self) -> None:
        """Cancel it if that can be done now, for `Watch`, which tries again; trio's calls cancel themselves."""


_innermost: ContextVar[_Call | None] = ContextVar("cancelonleave", default=None)


class _AsyncioCall(_Call):
    """Cancels exactly once, and never inside a shield.

    anyio cancels the task in a scope again at each turn of the event loop until it leaves the scope, so no cleanup
    could await anything. Therefore two scopes: cancelling the outer one reaches the task, unless that is shielded, and
    the inner one becomes a shield in the same breath, so nothing follows. `Task.cancelling()` tells if it arrived.
    """

    def __init__(self, watch: Watch, host: asyncio.Task[Any]) -> None:  # Any: whatever the host returns
        # For the watch: the request's own context, copied before this call is in it, which would make a cycle.
        self._context = copy_context()
        super().__init__(watch)
        self._host = host
        self._base = host.cancelling()
        latecomers = _latecomers(host.get_loop())
        self._cancel_scope, self._shield = latecomers.scope_class(), latecomers.scope_class()
        self._place = latecomers.add(self)

    async def run(self, awaitable: Awaitable[T]) -> T:
        try:
            with self._cancel_scope, self._shield:
                try:
                    return await awaitable
                finally:
                    self.end()
        except asyncio.CancelledError:
            # TaskGroup (3.13) cancels anew, without the message by which anyio knows its own: count instead.
            if not self.cancelled or self._host.cancelling() > self._base:
                raise
        finally:
            del self._host  # its exception may come to hold this frame
            if self.watch.task is not None and not self.watch.calls:
                await self.watch.stop_task(self.watch.task)
        raise self.watch.error()

    def end(self) -> None:
        super().end()
        self._place.discard(self)

    def watch_now(self) -> None:
        self.watch.start_task(self._host.get_loop(), self._context)

    def cancel(self) -> None:
        if self._shield.shield or not self._cancel_scope.cancel_called:
            if not self.is_first() or self._host.cancelling() > self._base:  # somebody else is just cancelling the task
                return
            self._cancel_scope.cancel()
            self._shield.shield = False  # delivers once more, if it was up
        self.cancelled = self._host.cancelling() > self._base
        # A shielded host may have children in a task group of anyio's that were reached now. It must not leave that as
        # if they had ended well, so until it is reached, too, there is no shield, and anyio goes on trying.
        has_children = any(task.parent_id == id(self._host) for task in get_running_tasks())
        self._shield.shield = self.cancelled or not has_children


class _Latecomers:
    """Starts the watch of each call that still runs 25 to 50 ms after it began, by one timer for a whole loop.

    A timer of its own would cost each call 2 to 4 microseconds; a place in a set costs a tenth of that.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.scope_class = type(CancelScope())  # asyncio's: anyio looks for it for longer than it takes to make one
        self._loop = loop
        self._new: set[_AsyncioCall] = set()
        self._old: set[_AsyncioCall] = set()
        self._ticking = False

    def add(self, call: _AsyncioCall) -> set[_AsyncioCall]:
        """Return the set that the call is to be discarded from when it ends."""
        place = self._new
        place.add(call)
        if not self._ticking:
            self._tick()
        return place

    def _tick(self) -> None:
        late, self._old, self._new = self._old, self._new, set()
        self._ticking = bool(self._old)
        if self._ticking:
            self._loop.call_later(PATIENCE, self._tick, context=Context())  # not that of the request that came first
        for call in late:
            call.watch_now()


_latecomers = lru_cache(maxsize=16)(_Latecomers)  # by loop; where there are more loops, some calls get a timer alone


class _TrioCall(_Call):
    """Cancels as trio does: again and again, until the call has ended."""

    def __init__(self, watch: Watch) -> None:
        super().__init__(watch)
        self._asked = Event()
        self._cancel_scope = CancelScope()

    async def run(self, awaitable: Awaitable[T]) -> T:
        results: list[T] = []
        failure: BaseException | None = None
        with CancelScope() as joining:
            async with create_task_group() as task_group:
                task_group.start_soon(self._watch)
                try:
                    with self._cancel_scope:
                        results.append(await awaitable)
                except get_cancelled_exc_class():
                    raise
                except BaseException as error:  # the task group would wrap it
                    failure = error
                finally:
                    self.end()
                joining.shield = True  # nothing may take the place of the result while the watch ends
                task_group.cancel_scope.cancel()
        if results:
            return results[0]
        try:
            raise failure or self.watch.error()
        finally:
            del failure  # it would keep itself alive: exception, traceback, this frame

    def watch_now(self) -> None:
        self._asked.set()

    async def _watch(self) -> None:
        with move_on_after(PATIENCE):
            await self._asked.wait()
        while not self.is_first():  # until then, what cancels the one around cancels this one
            await sleep(PATIENCE)
        try:
            await self.watch.wait()
        finally:
            self.watch.ended()
        if not self.told:
            self.cancelled = True
            self._cancel_scope.cancel()

"""Runs a coroutine and cancels it once when told to; knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from contextvars import copy_context
from typing import Any, TypeVar

from anyio import (
    CancelScope,
    Event,
    create_task_group,
    get_cancelled_exc_class,
    move_on_after,
    sleep,
)
from anyio.lowlevel import checkpoint

from ._patience import PATIENCE, latecomers
from ._tasks import tasks_of
from ._watch import Call, Watch, asyncio_task

T = TypeVar("T")


def run(
    watch: Watch, awaitable: Awaitable[T], *, level: bool = False, at_once: bool = False
) -> Coroutine[Any, Any, T]:  # Any: what an `async def` returns
    """Await `awaitable` in the caller's task; if the event comes, cancel it once and raise `error()`.

    Args:
        watch: For the event.
        awaitable: What to await.
        level: Cancel by level, since it is a thread that asks by `anyio.from_thread.check_cancelled()`.
        at_once: Have the wait begin first, on trio.
    """
    host = asyncio_task()
    call = _TrioCall(watch) if host is None else _AsyncioCall(watch, host)
    call.level, call.at_once = level, at_once
    return call.run(awaitable)


class _AsyncioCall(Call):
    """Cancels exactly once, and never inside a shield.

    anyio cancels the task in a scope again at each turn of the event loop until it leaves the scope, so no cleanup
    could await anything. Therefore two scopes: cancelling the outer one reaches the task, unless that is shielded, and
    the inner one becomes a shield in the same breath, so nothing follows. `Task.cancelling()` tells if it arrived.
    """

    __slots__ = ("_base", "_cancel_scope", "_context", "_has_children", "_host", "_place", "_shield")

    def __init__(self, watch: Watch, host: asyncio.Task[Any]) -> None:  # Any: whatever the host returns
        # For the watch: the request's own context, copied before this call is in it, which would make a cycle.
        self._context = copy_context()
        super().__init__(watch)
        self._host = host
        self._base = host.cancelling()
        self._has_children = False  # that were reached
        others = latecomers(host.get_loop())
        self._cancel_scope, self._shield = others.scope_class(), others.scope_class()
        self._place = others.add(self)

    async def run(self, awaitable: Awaitable[T]) -> T:
        result: T | None = None
        try:
            with self._cancel_scope, self._shield:
                try:
                    result = await awaitable
                    return result
                finally:
                    self.end()
        except asyncio.CancelledError:
            # TaskGroup (3.13) cancels anew, without the message by which anyio knows its own: count instead.
            if not self.cancelled or self._host.cancelling() > self._base:
                raise
        finally:
            del self._host  # its exception may come to hold this frame
            if self.watch.task is not None and not self.watch.goes_on_after(result):
                await self.watch.stop()
        if self.level:
            self.watch.tell()  # calls around this one couldn't be cancelled while the thread ran
        raise self.watch.error()

    def end(self) -> None:
        super().end()
        self._place.discard(self)

    def tell(self) -> None:
        super().tell()
        if self._is_open():
            self._shield.shield = True

    def watch_now(self) -> None:
        self.watch.start_task(self._host.get_loop(), self._context)

    def cancel(self) -> None:
        if self.level:
            self._cancel_scope.cancel()
            self.cancelled = True
            return
        if not self._is_open():
            if not self.is_first() or self._host.cancelling() > self._base:  # somebody else is just cancelling the task
                return
            self._cancel_scope.cancel()
            self._shield.shield = False  # delivers once more, if it was up
        self.cancelled = self._shield.shield = self._host.cancelling() > self._base

    def rest(self) -> None:
        # A shielded host may have children in a task group of anyio's that were reached. It must not leave that as if
        # they had ended well, so until it is reached, too, there is no shield, and anyio goes on trying.
        if self._is_open() and not self._has_children:
            self._has_children = id(self._host) in tasks_of(self._host.get_loop()).reached_parents()
            self._shield.shield = not self._has_children

    def _is_open(self) -> bool:
        """Whether anyio tries to cancel the host in each turn of the event loop."""
        return self._cancel_scope.cancel_called and not self._shield.shield


class _TrioCall(Call):
    """Cancels as trio does: again and again, until the call has ended."""

    __slots__ = ("_asked", "_cancel_scope", "_waits")

    def __init__(self, watch: Watch) -> None:
        super().__init__(watch)
        self._waits = False
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
                        results.append(await (self._later(awaitable) if self.at_once else awaitable))
                except get_cancelled_exc_class():
                    raise
                except BaseException as error:  # the task group would wrap it
                    failure = error
                finally:
                    self.end()
                joining.shield = True  # nothing may take the place of the result while the watch ends
                if self._waits and (self.watch.is_held or self.watch.goes_on_after(results and results[0])):
                    # BaseHTTPMiddleware takes some turns to pass a message on, and loses it if cancelled there.
                    await _turns()
                task_group.cancel_scope.cancel()
        if results:
            return results[0]
        try:
            raise failure or self.watch.error()
        finally:
            del failure  # it would keep itself alive: exception, traceback, this frame

    async def _later(self, awaitable: Awaitable[T]) -> T:
        try:
            await _turns()
        except BaseException:
            getattr(awaitable, "close", bool)()  # or Python warns that it was never awaited
            raise
        return await awaitable

    def watch_now(self) -> None:
        self._asked.set()

    async def _watch(self) -> None:
        if not self.at_once:
            with move_on_after(PATIENCE):
                await self._asked.wait()
        while not self.is_first():  # until then, what cancels the one around cancels this one
            await sleep(PATIENCE)
        self._waits = True
        try:
            await self.watch.event.watch()
        finally:
            self.watch.event.change()
        if not self.told:
            self.cancelled = True
            self._cancel_scope.cancel()


async def _turns() -> None:
    """Let trio's loop turn often enough for a wait that has just begun to find out what is known already."""
    for _ in range(20):
        await checkpoint()

"""Starts the watch of each call that still runs 25 to 50 ms after it began, by one timer for a whole event loop."""

from __future__ import annotations

import asyncio
from contextvars import Context
from functools import lru_cache
from typing import Any, Protocol

from anyio import CancelScope, get_running_tasks

# Seconds. A call that ends sooner never starts the wait, and a cancellation that can't be delivered yet is tried
# again after as long (every 10 ms would cost 2 % of a core during somebody's long shield).
PATIENCE = 0.025


class Latecomer(Protocol):
    """What may come to need a watch."""

    def watch_now(self) -> None:
        """Start it."""


class Latecomers:
    """Those of one event loop.

    A timer of its own would cost each call 2 to 4 microseconds; a place in a set costs a tenth of that.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.scope_class = type(CancelScope())  # asyncio's: anyio looks for it for longer than it takes to make one
        self._loop = loop
        self._new: set[Latecomer] = set()
        self._old: set[Latecomer] = set()
        self._ticking = False
        self._tasks: set[asyncio.Task[Any]] = set()  # Any: whatever they return
        self._parents: set[int | None] = set()

    def add(self, latecomer: Latecomer) -> set[Latecomer]:
        """Return the set that the call is to be discarded from when it ends."""
        place = self._new
        place.add(latecomer)
        if not self._ticking:
            self._tick()
        return place

    def _tick(self) -> None:
        late, self._old, self._new = self._old, self._new, set()
        self._ticking = bool(self._old)
        if self._ticking:
            self._loop.call_later(PATIENCE, self._tick, context=Context())  # not that of the request that came first
        for latecomer in late:
            latecomer.watch_now()

    def reached_parents(self) -> set[int | None]:
        """Return the ids of tasks that have children in task groups of anyio's, if any task is being cancelled."""
        if not any(task.cancelling() for task in self._all_tasks()):
            return set()
        if not self._parents:
            self._parents = {task.parent_id for task in get_running_tasks()}  # takes anyio 10 microseconds a task
        return self._parents

    def until_next_try(self) -> float:
        """Return the seconds until all who could not be cancelled yet are tried again, in one turn of the event loop.

        To look at a hundred tasks for them takes 1 ms (see `reached_parents()`), which is to stay some 6 % of the time.
        """
        longest = PATIENCE * (1 + len(self._all_tasks()) // 100)
        interval = longest * 2 / 3
        shortest = longest / 3  # for in no time at all a clock may not move
        return shortest + interval - (self._loop.time() + shortest) % interval

    def _all_tasks(self) -> set[asyncio.Task[Any]]:  # Any: whatever they return
        """Look once in a turn of the event loop, for all who ask: what has begun since can't have been reached yet."""
        if not self._tasks:
            self._tasks = asyncio.all_tasks(self._loop)
            self._loop.call_soon(self._forget, context=Context())
        return self._tasks

    def _forget(self) -> None:
        self._tasks, self._parents = set(), set()


latecomers = lru_cache(maxsize=16)(Latecomers)  # by loop; where there are more loops, some calls get a timer alone

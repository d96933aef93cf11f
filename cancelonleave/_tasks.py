"""Looks at all tasks of an event loop, once a turn for all who ask."""

from __future__ import annotations

import asyncio
from contextvars import Context
from functools import lru_cache
from typing import Any

from anyio import get_running_tasks

from ._patience import PATIENCE


class Tasks:
    """Those of one event loop, as they were when somebody first asked in this turn: none begun since can matter."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._all: set[asyncio.Task[Any]] = set()  # Any: whatever they return
        self._parents: set[int | None] = set()

    def reached_parents(self) -> set[int | None]:
        """Return the ids of tasks that have children in task groups of anyio's, if any task is being cancelled."""
        if not any(task.cancelling() for task in self._look()):
            return set()
        if not self._parents:
            self._parents = {task.parent_id for task in get_running_tasks()}  # takes anyio 10 microseconds a task
        return self._parents

    def until_next_try(self) -> float:
        """Return the seconds until all who could not be cancelled yet are tried again, in one turn of the event loop.

        To find the parents among a hundred tasks takes 1 ms, which is to stay some 6 % of the time.
        """
        longest = PATIENCE * (1 + len(self._look()) // 100)
        interval = longest * 2 / 3
        shortest = longest / 3  # for in no time at all a clock may not move
        return shortest + interval - (self._loop.time() + shortest) % interval

    def _look(self) -> set[asyncio.Task[Any]]:  # Any: as above
        if not self._all:
            self._all = asyncio.all_tasks(self._loop)
            self._loop.call_soon(self._forget, context=Context())
        return self._all

    def _forget(self) -> None:
        self._all, self._parents = set(), set()


tasks_of = lru_cache(maxsize=16)(Tasks)  # where there are more loops, some look more often

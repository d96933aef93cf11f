"""Starts the watch of each call that still runs 25 to 50 ms after it began, by one timer for a whole event loop."""

from __future__ import annotations

import asyncio
from contextvars import Context
from functools import lru_cache
from typing import Protocol

from anyio import CancelScope

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


latecomers = lru_cache(maxsize=16)(Latecomers)  # by loop; where there are more loops, some calls get a timer alone

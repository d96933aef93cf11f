"""The same by trio's rules: cancels one awaited call by level, as everything on trio is cancelled."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context
from functools import lru_cache
from types import TracebackType
from typing import Any, TypeVar

import trio

from ._loop import Loop
from ._watch import Call, Connection, Watch

T = TypeVar("T")


class TrioCall(Call):
    """Cancels by a cancel scope around the call."""

    def __init__(self, watch: Watch, request: Connection) -> None:
        super().__init__(watch, request, trio.lowlevel.current_task())
        self._cancel_scope = trio.CancelScope()

    def __enter__(self) -> TrioCall:
        self.watch.begin(self, _loop_of(trio.lowlevel.current_trio_token()))
        self._cancel_scope.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._cancel_scope.__exit__(kind, error, traceback)
        finally:
            self.watch.end(self)
        if self._cancel_scope.cancelled_caught:
            raise self.watch.exception()

    def cancel(self) -> list[float]:
        self._cancel_scope.cancel()
        return super().cancel()

    def has_entered_scope(self) -> bool:
        """Whether a generator may hold a cancel scope at its `yield`, which nobody can tell on trio."""
        return True


class TrioLoop(Loop):
    """A run of trio's, whose system tasks do what tasks and timers do on asyncio."""

    def is_running_here(self) -> bool:
        with suppress(RuntimeError):
            return trio.lowlevel.current_trio_token() is self._native
        return False

    def current_task(self) -> trio.lowlevel.Task:
        return trio.lowlevel.current_task()

    def call_later(self, seconds: float, callback: Callable[[], object]) -> None:
        async def call() -> None:
            await trio.sleep(seconds)
            callback()

        trio.lowlevel.spawn_system_task(call, name="cancelonleave: timer", context=Context())

    def call_from_anywhere(self, callback: Callable[[], object]) -> None:
        with suppress(trio.RunFinishedError):
            self._native.run_sync_soon(callback)

    def start_task(self, coroutine: Coroutine[Any, Any, None], context: Context | None) -> Callable[[], object]:
        cancel_scope = trio.CancelScope()

        async def run() -> None:
            with cancel_scope:
                await coroutine

        trio.lowlevel.spawn_system_task(run, name="cancelonleave: receive", context=context)
        return cancel_scope.cancel

    async def run(self, function: Callable[[], Coroutine[Any, Any, T]], give_back: Callable[[T], object]) -> T:
        return trio.from_thread.run(function, trio_token=self._native)


@lru_cache(maxsize=16)
def _loop_of(token: trio.lowlevel.TrioToken) -> TrioLoop:
    return TrioLoop(token, trio.current_time)

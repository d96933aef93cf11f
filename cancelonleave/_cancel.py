"""Cancels one awaited call exactly once, on asyncio."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

from anyio import CancelScope

from ._anyio import cancel_scopes
from ._loop import loop_of
from ._watch import RETRY, Call, Connection, Fate, Watch

NEXT_TURN = 0.0  # seconds: in the next turn of the event loop


class AsyncioCall(Call):
    """Cancels by `Task.cancel()`, and tells by `Task.cancelling()` whose cancellation has arrived.

    A cancel scope of anyio's would cancel the task again at each turn of the event loop, so no cleanup could await.
    """

    def __init__(self, watch: Watch, request: Connection, host: asyncio.Task[Any]) -> None:  # Any: of any result
        self.watch = watch
        self.request = request
        self.host = host
        self._base = host.cancelling()
        self._outer_scopes = len(cancel_scopes(host))  # whose shields are not the endpoint's

    def __enter__(self) -> AsyncioCall:
        self.watch.begin(self, loop_of(self.host.get_loop()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.watch.end(self)
        if self.fate is Fate.CANCELLED:
            self.host.uncancel()
            if isinstance(error, asyncio.CancelledError) and self.host.cancelling() <= self._base:
                raise self.watch.exception()

    def cancel(self) -> list[float]:
        if self.host.cancelling() > self._base:
            return [RETRY]  # somebody else is just cancelling the task, whose cleanup would be cut
        future = getattr(self.host, "_fut_waiter", None)
        if isinstance(future, asyncio.Future) and future.done():
            return [NEXT_TURN]  # the task would lose what it is about to get; anyio looks at this, too
        scopes = cancel_scopes(self.host)
        if any(scope.shield for scope in scopes[: len(scopes) - self._outer_scopes]):
            return [RETRY]
        self.host.cancel()
        return super().cancel()

    def has_entered_scope(self) -> bool:
        """Whether what was awaited has entered a cancel scope that it hasn't left, as a generator may at a `yield`."""
        return len(cancel_scopes(self.host)) > self._outer_scopes


class ThreadCall(AsyncioCall):
    """Waits for a thread, which asks by `anyio.from_thread.check_cancelled()` about the cancel scope around it."""

    cancels_host = False

    def __enter__(self) -> ThreadCall:
        super().__enter__()
        self._cancel_scope = CancelScope()
        self._cancel_scope.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        is_ours = self._cancel_scope.__exit__(kind, error, traceback)
        self.watch.end(self)
        # anyio's scope lets out a CancelledError that the thread has raised itself, though nobody outside cancels.
        was_told = isinstance(error, asyncio.CancelledError) and self.host.cancelling() <= self._base
        if is_ours or (self.fate is Fate.CANCELLED and was_told):
            self.watch.learn()  # calls around this one, which could not be cancelled meanwhile
            raise self.watch.exception()

    def cancel(self) -> list[float]:
        self._cancel_scope.cancel()
        return Call.cancel(self)

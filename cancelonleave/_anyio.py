"""All that leans on anyio's internals: which cancel scopes a task of asyncio's is in."""

from __future__ import annotations

import asyncio
import math
import warnings
from functools import cache
from typing import Any

from anyio import CancelScope, current_effective_deadline

try:
    import anyio._backends._asyncio as records
except ImportError:  # of an anyio that has moved them
    records: Any = None  # type: ignore[no-redef]  # for the same name, either way


def cancel_scopes(task: asyncio.Task[Any]) -> list[CancelScope]:  # Any: whatever it returns
    """Return the cancel scopes of anyio's that a task is in, the innermost first.

    anyio has no public way to ask that about another task. Its records have kept their names since 2021; without
    them, the list is empty, so that a disconnect interrupts shielded sections, as `Task.cancel()` does.
    """
    scopes: list[CancelScope] = []
    try:
        state = records._task_states.get(task)
        scope = None if state is None else state.cancel_scope
        while scope is not None:
            scopes.append(scope)
            scope = scope._parent_scope
    except AttributeError:
        _warn()
    return scopes


def is_cancelled() -> bool:
    """Whether the code that runs now is in a cancelled scope, as within `Request.is_disconnected()`."""
    try:
        task = asyncio.current_task()
        if task is not None and records._task_states.get(task) is None:
            return False  # it is in no scope: this is four times as fast as asking anyio
    except (AttributeError, RuntimeError):  # without records, or on trio
        pass
    return current_effective_deadline() == -math.inf


@cache
def _warn() -> None:
    message = (
        "cancelonleave can't see the shields of this version of anyio, so a disconnect interrupts them, as "
        "Task.cancel() does. Install a newer cancelonleave, or an older anyio."
    )
    warnings.warn(message, RuntimeWarning, stacklevel=1)

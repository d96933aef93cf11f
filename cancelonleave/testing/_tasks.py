"""Finds the tasks of one request, on asyncio and trio, and says where they wait."""

from __future__ import annotations

import asyncio
import gc
import sys
import sysconfig
from collections.abc import Iterator
from contextvars import Context, ContextVar
from os.path import dirname
from traceback import FrameSummary, format_list
from typing import TYPE_CHECKING, Any

from . import _connection

if TYPE_CHECKING:
    import trio

_owner: ContextVar[object] = ContextVar("owner")
_SERVER = _connection.__file__
_LIBRARIES = (dirname(__file__), *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")))


def own_tasks(owner: object) -> None:
    """Count the current task, and those that it and its children start from now on, among the owner's."""
    _owner.set(owner)


def asyncio_task() -> asyncio.Task[Any] | None:  # Any: of whatever result
    """Return the current task; None on trio."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def asyncio_tasks(owner: object) -> list[asyncio.Task[Any]]:  # Any: of whatever result
    """Return the owner's tasks that have not ended; none on trio."""
    if asyncio_task() is None:
        return []
    return [task for task in asyncio.all_tasks() if _context(task).get(_owner) is owner]


def descriptions(owner: object) -> list[str]:
    """Return the owner's tasks that have not ended by name and, on asyncio, where they wait."""
    if asyncio_task() is None:
        return [task.name for task in _trio_tasks() if task.context.get(_owner) is owner]
    return [f"{task.get_name()}\n{where(task)}".rstrip() for task in asyncio_tasks(owner)]


def where(task: asyncio.Task[Any]) -> str:  # Any: of whatever result
    """Format the innermost frame of a task, and the innermost five outside of libraries or in the server's part."""
    frames = list(_frames(task.get_coro()))
    own = [frame for frame in frames[:-1] if frame.filename == _SERVER or not frame.filename.startswith(_LIBRARIES)]
    return "".join(format_list([*own[-5:], *frames[-1:]]))


def _frames(awaited: object) -> Iterator[FrameSummary]:
    while awaited is not None:
        for kind in ("cr", "gi", "ag"):
            frame = getattr(awaited, f"{kind}_frame", None)
            if frame is not None:
                yield FrameSummary(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        awaited = _awaited_by(awaited)


def _awaited_by(awaited: object) -> object:
    for name in ("cr_await", "gi_yieldfrom", "ag_await"):
        if hasattr(awaited, name):
            return getattr(awaited, name)
    # Neither `async for` nor __await__() shows by an attribute what it waits for.
    inner = (each for each in gc.get_referents(awaited) if hasattr(each, "ag_frame") or hasattr(each, "cr_frame"))
    return next(inner, None)


def _context(task: asyncio.Task[Any]) -> Context:  # Any: of whatever result
    referents = gc.get_referents(task)  # before Python 3.12 nothing else leads there
    return task.get_context() if sys.version_info >= (3, 12) else next(r for r in referents if isinstance(r, Context))


def _trio_tasks() -> Iterator[trio.lowlevel.Task]:
    import trio  # here, since it need not be installed

    root = trio.lowlevel.current_root_task()
    tasks = [root] if root is not None else []
    while tasks:
        task = tasks.pop()
        yield task
        tasks += [child for nursery in task.child_nurseries for child in nursery.child_tasks]

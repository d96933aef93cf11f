"""Finds the tasks of one request, on asyncio and trio."""

from __future__ import annotations

import asyncio
import gc
import inspect
import sys
from collections.abc import Iterable, Iterator
from contextvars import Context, ContextVar
from typing import TYPE_CHECKING, Any, TypeAlias

from ._frames import INSTALLED, describe

if TYPE_CHECKING:
    import trio

# A string, since trio need not be installed. Any: of whatever result.
Task: TypeAlias = "asyncio.Task[Any] | trio.lowlevel.Task"

_owner: ContextVar[object] = ContextVar("owner")


def own_tasks(owner: object) -> None:
    """Give the current task, and those that it and its children start from now on, to the owner."""
    _owner.set(owner)


def asyncio_task() -> asyncio.Task[Any] | None:  # Any: of whatever result
    """Return the current task; None on trio."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def tasks_of(owner: object) -> list[Task]:
    """Return the owner's tasks that have not ended, without those that a library started for the whole process."""
    if asyncio_task() is None:
        return [task for task in _trio_tasks() if task.context.get(_owner) is owner]
    running = asyncio.all_tasks()
    return [task for task in running if _context(task).get(_owner) is owner and not _is_process_wide(task, running)]


def cancel_tasks(owner: object) -> None:
    """Cancel the owner's asyncio tasks natively, since a cancel scope's cancellation would wait for shields to end."""
    for task in tasks_of(owner):
        if isinstance(task, asyncio.Task):
            task.cancel()


def closes_generator(task: Task) -> bool:
    """Whether the task only closes an async generator, as the event loop does when one is garbage collected."""
    return type(_coroutine(task)).__name__ == "async_generator_athrow"  # the type has no public name


def description(task: Task) -> str:
    """Name the task and its coroutine, with where that is defined and where it waits."""
    name = task.get_name() if isinstance(task, asyncio.Task) else task.name
    return f"{name}, which runs {describe(_coroutine(task))}"


def _is_process_wide(task: asyncio.Task[Any], running: Iterable[asyncio.Task[Any]]) -> bool:
    """Whether a library started the task once: its coroutine takes nothing from a request and runs only here.

    The watcher of sse-starlette is one. The first request starts it, and it runs until the server shuts down.
    """
    code = getattr(task.get_coro(), "cr_code", None)
    if code is None or not code.co_filename.startswith(INSTALLED):
        return False
    takes_nothing = inspect.getargs(code) == ([], None, None) and not code.co_freevars
    return takes_nothing and [getattr(other.get_coro(), "cr_code", None) for other in running].count(code) == 1


def _coroutine(task: Task) -> object:
    return task.get_coro() if isinstance(task, asyncio.Task) else task.coro


def _context(task: asyncio.Task[Any]) -> Context:
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

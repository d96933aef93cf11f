"""Runs an application for one request, beside a client that sends and leaves, and looks at what it leaves behind."""

from __future__ import annotations

import math
from functools import partial

from anyio import Event, create_task_group, current_effective_deadline, get_cancelled_exc_class, move_on_after, sleep
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint
from starlette.types import ASGIApp, Scope

from ._connection import Connection
from ._request import Body, Options
from ._tasks import asyncio_task, asyncio_tasks, descriptions, own_tasks

GRACE = 3  # turns of the event loop, in which cancelled tasks that nobody awaits come to their end


async def run(app: ASGIApp, connection: Connection, scope: Scope, body: Body, options: Options, timeout: float) -> None:
    """Return when the application has ended, by itself or because it was cancelled after the timeout."""
    try:
        async with create_task_group() as tasks:
            _start_client(tasks, connection, scope, body, options)
            tasks.start_soon(_serve, app, connection, scope, name="application")
            await _wait_for_end(connection, options.get("leave_after") or 0, timeout)
            for task in asyncio_tasks(connection) if connection.ended_after is None else ():
                task.cancel()  # natively, since anyio's cancellation waits for the end of shields
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None  # the test's own, as from the iterable that it sends
    for _ in range(GRACE):
        await checkpoint()
    for description in descriptions(connection):
        connection.faults.append(("tasks left behind", f"The application ended without its task {description}"))


def _start_client(tasks: TaskGroup, connection: Connection, scope: Scope, body: Body, options: Options) -> None:
    invited = connection.server.invites_body or all(name != b"expect" for name, _ in scope["headers"])
    if invited and isinstance(body, bytes):
        connection.arrive(body, more=False)  # it is there before the application asks
    else:
        tasks.start_soon(partial(connection.upload, body, invited=invited))
    seconds, event = options.get("leave_after"), options.get("leave_when")
    if (seconds is not None and seconds <= 0) or (event is not None and event.is_set()):
        connection.leave()
    if seconds is not None:
        tasks.start_soon(_leave_after, connection, seconds)
    if event is not None:
        tasks.start_soon(_leave_when, connection, event)


async def _leave_after(connection: Connection, seconds: float) -> None:
    await sleep(seconds)
    connection.leave()


async def _leave_when(connection: Connection, event: Event) -> None:
    await event.wait()
    connection.leave()


async def _serve(app: ASGIApp, connection: Connection, scope: Scope) -> None:
    """Call the application, in the task that it is called in."""
    own_tasks(connection)
    at_once = not connection.server.takes_body_first
    try:
        await connection.until(lambda: at_once or connection.body_sent or connection.over)
        if at_once or connection.body_sent:
            await app(scope, connection.receive, connection.send)
    except (Exception, BaseExceptionGroup, get_cancelled_exc_class()) as error:
        if isinstance(error, get_cancelled_exc_class()) and current_effective_deadline() == -math.inf:
            raise  # ours, or the test's
        connection.error = error
    finally:
        connection.end()
    cancelling = 0 if (task := asyncio_task()) is None else task.cancelling()
    if cancelling:
        fault = f"The application caught {cancelling} cancellation(s) of its task without calling task.uncancel()."
        connection.faults.append(("unbalanced cancelling", fault))


async def _wait_for_end(connection: Connection, leave_after: float, timeout: float) -> None:
    patience = f"{leave_after + timeout:g} s though the client stayed"
    with move_on_after(leave_after + timeout):
        await connection.until(lambda: connection.over)
    if connection.left_after is not None:
        patience = f"{timeout:g} s after the client left"
        with move_on_after(timeout):
            await connection.until(lambda: connection.ended_after is not None)
    if connection.ended_after is None:
        waiting = "".join(f"\nin task {description}" for description in descriptions(connection))
        connection.faults.append((None, f"The application still ran {patience}, waiting{waiting}"))

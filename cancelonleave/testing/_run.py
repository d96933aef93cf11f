"""Runs an application for one request, beside a client that sends and disconnects, and finds what it leaves behind."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from functools import partial
from traceback import format_tb

from anyio import Event, create_task_group, current_effective_deadline, get_cancelled_exc_class, move_on_after, sleep
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint
from starlette.types import ASGIApp, Scope

from ._connection import Connection
from ._faults import Fault
from ._frames import endpoint_of
from ._request import Body, Options
from ._tasks import Task, asyncio_task, cancel_tasks, closes_generator, description, own_tasks, tasks_of

STEPS = 100  # of the timeout
MOMENT = 0.05  # seconds for the tasks that end with the request, which a thread may hold a little longer
PAUSE = 0.005  # seconds between two looks at them
TURNS = 3  # of the event loop, for each look
LONGER = "If it is meant to take longer, raise the limit: Client(app, timeout=...)"
BLOCKED = (
    "It waits in send(), which never returns on this server, chosen by name, once the client has disconnected. "
    "The decorator interrupts the send() of a StreamingResponse, but not the one that FastAPI itself calls for its "
    "generator endpoints (JSON Lines, server-sent events). Choose another server for them."
)


async def run(app: ASGIApp, connection: Connection, scope: Scope, body: Body, options: Options, timeout: float) -> None:
    """Return when the application has ended, by itself or because it was cancelled after the timeout."""
    try:
        async with create_task_group() as tasks:
            _start_client(tasks, connection, scope, body, options)
            tasks.start_soon(_serve, app, connection, scope, name="application")
            await _wait_for_end(connection, options.get("leave_after") or 0, timeout)
            if connection.ended_after is None:
                cancel_tasks(connection)
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None  # the test's own, as from the iterable that it sends
    await _wait_for_tasks(connection, timeout)
    for task in tasks_of(connection):
        if not closes_generator(task):
            fault = f"The application ended, but left a task behind: {description(task)}"
            connection.faults.append(Fault("tasks left behind", fault))


def _start_client(tasks: TaskGroup, connection: Connection, scope: Scope, body: Body, options: Options) -> None:
    at_once = connection.server.continues_at_once or all(name != b"expect" for name, _ in scope["headers"])
    if at_once and isinstance(body, bytes):
        connection.arrive(body, more=False)  # it is there before the application asks
    else:
        tasks.start_soon(partial(connection.upload, body, at_once=at_once))
    seconds, event = options.get("leave_after"), options.get("leave_when")
    if (seconds is not None and seconds <= 0) or (event is not None and event.is_set()):
        connection.disconnect()
    if seconds is not None:
        tasks.start_soon(_disconnect_after, connection, seconds)
    if event is not None:
        tasks.start_soon(_disconnect_when, connection, event)


async def _disconnect_after(connection: Connection, seconds: float) -> None:
    await sleep(seconds)
    connection.disconnect()


async def _disconnect_when(connection: Connection, event: Event) -> None:
    await event.wait()
    connection.disconnect()


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
        caught = f"{cancelling} cancellation(s) of its task without calling task.uncancel()"
        fault = f"The application caught {caught}, during a request for {endpoint_of(scope, app)}."
        connection.faults.append(Fault("unbalanced cancelling", fault))


async def _wait_for_end(connection: Connection, leave_after: float, timeout: float) -> None:
    """Wait for the end of the application, until the timeout, and report it if it goes on."""
    since = f"after {leave_after + timeout:g} s, and the client had not disconnected"
    await _wait(lambda: connection.over, connection, leave_after + timeout)
    if connection.left_after is not None:
        since = f"{timeout:g} s after the client disconnected"
        await _wait(lambda: connection.ended_after is not None, connection, timeout)
    if connection.ended_after is None:
        tasks = "".join(f"\n- {description(task)}" for task in tasks_of(connection))
        fault = f"The application was still running {since}. Its tasks wait here:{tasks}"
        connection.faults.append(Fault(None, fault, BLOCKED if connection.blocks else LONGER))


async def _wait(condition: Callable[[], bool], connection: Connection, seconds: float) -> None:
    """Wait for the condition, in steps, of which a busy machine or a debugger that halts everything takes only one."""
    for _ in range(STEPS):
        with move_on_after(seconds / STEPS):
            await connection.until(condition)
        if condition():
            break


def _forget_frames(error: BaseException | None) -> None:
    """Turn tracebacks into notes: a server drops them, but here they would keep the request, and with it a task."""
    if error is not None and error.__traceback__ is not None:
        error.add_note("".join(format_tb(error.__traceback__)))
        error.__traceback__ = None
        inner: tuple[BaseException, ...] = getattr(error, "exceptions", ())  # if it is a group
        for each in (error.__cause__, error.__context__, *inner):
            _forget_frames(each)


async def _wait_for_tasks(connection: Connection, timeout: float) -> None:
    """Wait a moment for the tasks that end with the request, and until the timeout for generators that are closed."""
    looks = 0
    while True:
        tasks: list[Task] = []
        for _ in range(TURNS):  # between two generators that are closed one after the other, there is no task
            await checkpoint()
            tasks += tasks_of(connection)
        if not tasks or looks * PAUSE >= (timeout if any(map(closes_generator, tasks)) else MOMENT):
            break
        if looks == 1:
            _forget_frames(connection.error)
            gc.collect()  # the request may be part of a reference cycle
        await sleep(PAUSE)
        looks += 1

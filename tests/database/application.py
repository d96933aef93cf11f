"""An application that does all kinds of work in PostgreSQL, for clients that may disconnect at any time."""

from __future__ import annotations

import functools
import socket
from asyncio import CancelledError
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from math import inf
from typing import Annotated, Any

import anyio
from fastapi import Depends, FastAPI, Request, Response
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cancelonleave import cancel_on_disconnect
from tests.database.drivers import POOL_SIZE, POOLS, Execute, Transaction
from tests.shared.annotated_endpoints import Endpoint, Guard

SCHEMA = """
    CREATE TABLE entries (pair int, side text);
    CREATE TABLE locks (holder int);
    CREATE TABLE jobs (number int, state text);
"""
Step = Callable[[], None]

notifier = socket.socket(type=socket.SOCK_DGRAM)
numbers = count()
transactions: dict[str, Transaction] = {}
counts = Counter({"under way": 0, "holders": 0})


async def steps(port: int, disconnect_at: int) -> Step:
    """Return a function that the work calls at each step; it notifies the client at the step of the disconnect."""
    remaining = count(disconnect_at, -1)

    def step() -> None:
        if next(remaining) == 0:
            notifier.sendto(b"disconnect", ("127.0.0.1", port))

    return step


Steps = Annotated[Step, Depends(steps)]


async def of_driver(driver: str, step: Steps) -> Transaction:
    @asynccontextmanager
    async def transaction() -> AsyncGenerator[Execute]:
        step()
        async with transactions[driver]() as execute:

            async def step_and_execute(statement: str) -> None:
                step()
                await execute(statement)

            yield step_and_execute

    return transaction


Database = Annotated[Transaction, Depends(of_driver)]


async def work_elsewhere(step: Step, times: float = inf) -> None:
    while (times := times - 1) >= 0:
        step()
        await anyio.sleep(0.01)


async def transfers(request: Request, transaction: Database) -> None:
    """Insert one pair of entries after another, each in a transaction, forever."""
    while True:
        pair = next(numbers)
        async with transaction() as execute:
            await execute(f"SELECT pg_advisory_xact_lock({pair % 5})")
            await execute(f"INSERT INTO entries VALUES ({pair}, 'debit')")
            await execute("SELECT pg_sleep(0.01)")
            await execute(f"INSERT INTO entries VALUES ({pair}, 'credit')")


async def unit_of_work(transaction: Database) -> AsyncGenerator[Execute]:
    async with transaction() as execute:
        yield execute


async def order(request: Request, execute: Annotated[Execute, Depends(unit_of_work)], step: Steps) -> None:
    """Insert one pair of entries, in the transaction of a dependency."""
    pair = next(numbers)
    await execute(f"INSERT INTO entries VALUES ({pair}, 'debit')")
    await work_elsewhere(step, times=15)
    await execute(f"INSERT INTO entries VALUES ({pair}, 'credit')")


async def lock(request: Request, transaction: Database, step: Steps) -> None:
    """Hold a lock forever."""
    holder = next(numbers)
    try:
        async with transaction() as execute:
            await execute(f"INSERT INTO locks VALUES ({holder})")
        counts["holders"] += 1
        await work_elsewhere(step)
    finally:
        async with transaction() as execute:
            await execute(f"DELETE FROM locks WHERE holder = {holder}")


async def job(request: Request, transaction: Database) -> None:
    """Have PostgreSQL work for half a minute, and mark the job as failed if it is cancelled."""
    number = next(numbers)
    try:
        async with transaction() as execute:
            await execute(f"INSERT INTO jobs VALUES ({number}, 'running')")
        async with transaction() as execute:
            await execute("SELECT pg_sleep(30)")
    except CancelledError:
        async with transaction() as execute:
            await execute(f"UPDATE jobs SET state = 'failed' WHERE number = {number}")
        raise


async def use_all(driver: str) -> None:
    """Open all connections of the pool, by using them at the same time."""
    async with AsyncExitStack() as stack:
        for _ in range(POOL_SIZE):
            execute = await stack.enter_async_context(transactions[driver]())
            await execute("SELECT 1")


def cancel_by_level(endpoint: Endpoint) -> Endpoint:
    """Cancel in the usual way: by level, and with a response, which looks like success to dependencies."""

    @functools.wraps(endpoint)
    async def guarded(request: Request, **arguments: Any) -> object:  # Any: the endpoint's own
        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            task_group.cancel_scope.cancel()

        async with anyio.create_task_group() as task_group:
            task_group.start_soon(watch)
            result = await endpoint(request=request, **arguments)
            task_group.cancel_scope.cancel()
            return result
        return Response(status_code=499)

    return guarded


class Counted:
    """Counts requests: those in progress, and those that have ended, by status; `GET /` returns the counts."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] == "/":
            await JSONResponse(counts)(scope, receive, send)
        else:
            await self._count(scope, receive, send)

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                counts[str(message["status"])] += 1
            await send(message)

        counts["under way"] += 1
        try:
            await self._app(scope, receive, counting_send)
        finally:
            counts["under way"] -= 1


@asynccontextmanager
async def open_pools(_: FastAPI) -> AsyncGenerator[None]:
    async with AsyncExitStack() as stack:
        for driver, pool in POOLS.items():
            transactions[driver] = await stack.enter_async_context(pool())
        yield


def make(guard: Guard) -> ASGIApp:
    app = FastAPI(lifespan=open_pools)
    for work in (transfers, order, lock, job):
        app.post(f"/{{driver}}/{work.__name__}")(guard(work))
    app.post("/{driver}/use_all")(use_all)
    return Counted(app)


guarded = make(cancel_on_disconnect)
guarded_by_level = make(cancel_by_level)

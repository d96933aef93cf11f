"""Three common drivers for PostgreSQL: each opens a pool, and yields a function that begins a transaction on it."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import import_module
from typing import Any

from psycopg_pool import AsyncConnectionPool
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

asyncpg: Any = import_module("asyncpg")  # Any: it has no types
POOL_SIZE = 10

Execute = Callable[[str], Awaitable[object]]
Transaction = Callable[[], AbstractAsyncContextManager[Execute]]


@asynccontextmanager
async def asyncpg_pool() -> AsyncGenerator[Transaction]:
    settings = {"application_name": "asyncpg"}
    async with asyncpg.create_pool(min_size=POOL_SIZE, max_size=POOL_SIZE, server_settings=settings) as pool:

        @asynccontextmanager
        async def transaction() -> AsyncGenerator[Execute]:
            async with pool.acquire() as connection, connection.transaction():
                yield connection.execute

        yield transaction


@asynccontextmanager
async def psycopg_pool() -> AsyncGenerator[Transaction]:
    settings = "application_name=psycopg"
    async with AsyncConnectionPool(settings, min_size=POOL_SIZE, max_size=POOL_SIZE, open=False) as pool:

        @asynccontextmanager
        async def transaction() -> AsyncGenerator[Execute]:
            async with pool.connection() as connection:
                yield lambda statement: connection.execute(statement.encode())

        yield transaction


@asynccontextmanager
async def sqlalchemy_pool() -> AsyncGenerator[Transaction]:
    settings = {"server_settings": {"application_name": "sqlalchemy"}}
    engine = create_async_engine("postgresql+asyncpg://", connect_args=settings, pool_size=POOL_SIZE, max_overflow=0)
    sessions = async_sessionmaker(engine)

    @asynccontextmanager
    async def transaction() -> AsyncGenerator[Execute]:
        async with sessions.begin() as session:
            yield lambda statement: session.execute(text(statement))

    yield transaction
    await engine.dispose()


POOLS = {"asyncpg": asyncpg_pool, "psycopg": psycopg_pool, "sqlalchemy": sqlalchemy_pool}
# psycopg's pool waits with asyncio.wait_for(), which in Python 3.11 may swallow a cancellation, be it task.cancel() or
# ours: the endpoint goes on, or the pool loses a connection.
DRIVERS = [driver for driver in POOLS if driver != "psycopg" or sys.version_info >= (3, 12)]

"""Runs PostgreSQL for the servers that are compared, and opens a pool of connections to it."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from benchmarks.shared.postgres import postgres

POOL_SIZE = 10

Pool = AsyncConnectionPool[AsyncConnection]


def open_pool() -> Pool:
    return Pool(kwargs={"autocommit": True}, min_size=POOL_SIZE, max_size=POOL_SIZE, timeout=600, open=False)


@contextmanager
def database() -> Generator[None]:
    """Run PostgreSQL, and set the environment variables that say where it is."""
    with postgres() as directory:
        os.environ |= {"PGHOST": str(directory), "PGUSER": "postgres"}
        yield

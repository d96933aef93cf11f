"""What remains in a database when clients disconnect in the middle of a request."""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any, LiteralString

from fastapi import Depends, FastAPI, Request
from psycopg import AsyncConnection
from starlette.types import ASGIApp

from benchmarks import report
from benchmarks.shared.database import POOL_SIZE, Pool, database, open_pool
from benchmarks.shared.implementations import Endpoint, implementations
from benchmarks.shared.servers import TIMEOUT, Server, serve

CLIENTS = 10  # at the same time
DISCONNECT_AFTER = (0.1, 0.3)  # seconds after which a client disconnects: at random between these
WORK = 0.4  # seconds that an endpoint takes
TABLES = """
CREATE TABLE locks (id int PRIMARY KEY);
CREATE TABLE jobs (id int PRIMARY KEY, state text);
CREATE TABLE postings (id int, side text);
CREATE TABLE computed (id int);
"""
FOUND: dict[str, LiteralString] = {
    "locks left held": "SELECT count(*) FROM locks",
    "jobs left running": "SELECT count(*) FROM jobs WHERE state = 'running'",
    "half-committed": "SELECT count(*) FROM (SELECT id FROM postings GROUP BY id HAVING count(*) = 1) halves",
    "queries run to their end": "SELECT count(*) FROM computed",
}

Counts = dict[str, int]

counts = {"begun": 0, "ended": 0, "endpoints run to their end": 0}


@contextmanager
def counted() -> Generator[None]:
    """Count an endpoint when it begins and when it ends."""
    counts["begun"] += 1
    try:
        yield
        counts["endpoints run to their end"] += 1
    finally:
        counts["ended"] += 1


async def lock(request: Request, key: int) -> None:
    """Hold a lock that is a row, as a lock in Redis is a key."""
    pool: Pool = request.state.pool
    with counted():
        async with pool.connection() as connection:
            try:
                await connection.execute("INSERT INTO locks VALUES (%s)", [key])
                await asyncio.sleep(WORK)
            finally:
                await connection.execute("DELETE FROM locks WHERE id = %s", [key])


async def job(request: Request, key: int) -> None:
    """Keep a job's state in a row, and hold a connection only to write it."""
    pool: Pool = request.state.pool
    with counted():
        try:
            async with pool.connection() as connection:
                await connection.execute("INSERT INTO jobs VALUES (%s, 'running')", [key])
            await asyncio.sleep(WORK)
        finally:
            async with pool.connection() as connection:
                await connection.execute("UPDATE jobs SET state = 'stopped' WHERE id = %s", [key])


async def transaction(request: Request) -> AsyncGenerator[AsyncConnection]:
    """Commit what the endpoint has done, unless it fails: FastAPI's own pattern for a session."""
    pool: Pool = request.state.pool
    async with pool.connection() as connection, connection.transaction():
        yield connection


async def transfer(request: Request, key: int, connection: Annotated[AsyncConnection, Depends(transaction)]) -> None:
    """Write two rows that belong together, some time apart."""
    with counted():
        await connection.execute("INSERT INTO postings VALUES (%s, 'debit')", [key])
        await asyncio.sleep(WORK)
        await connection.execute("INSERT INTO postings VALUES (%s, 'credit')", [key])


async def query(request: Request, key: int) -> None:
    """Have the database compute; it inserts a row if it finishes."""
    pool: Pool = request.state.pool
    with counted():
        async with pool.connection() as connection:
            await connection.execute(f"SELECT pg_sleep({WORK}); INSERT INTO computed VALUES ({key})".encode())


CASES: dict[str, Endpoint] = {"/lock": lock, "/job": job, "/transfer": transfer, "/query": query}


async def show(request: Request) -> Counts:
    pool: Pool = request.state.pool
    return {**counts, "connections replaced": pool.get_stats()["connections_num"] - POOL_SIZE}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[dict[str, Any]]:  # Any: as Starlette has it
    async with open_pool() as pool:
        yield {"pool": pool}


def app(implementation: str, framework: str) -> ASGIApp:
    guard = implementations()[implementation]
    api = FastAPI(lifespan=lifespan)
    for path, endpoint in CASES.items():
        api.get(path, response_model=None)(guard.decorate(endpoint))
    api.get("/state")(show)
    return guard.wrap(api)


async def disconnect(server: Server, path: str, disconnects: int) -> None:
    """Send this many requests, and disconnect in the middle of each."""
    keys = iter(range(disconnects))

    async def client() -> None:
        for key in keys:
            connection = await server.open(f"{path}?key={key}")
            await asyncio.sleep(random.uniform(*DISCONNECT_AFTER))
            connection.close()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


async def at_rest(server: Server) -> Counts:
    """Return the server's own counts once every endpoint that began has ended, and a second has passed."""
    async with asyncio.timeout(TIMEOUT):
        before: Counts = {}
        while True:
            counts: Counts = await server.get("/state")
            if counts == before and counts["begun"] == counts["ended"]:
                return counts
            before = counts
            await asyncio.sleep(1)


async def measure(implementation: str, disconnects: int) -> Counts:
    """Serve an implementation with an empty database, and count what remains at the end."""
    connection = await AsyncConnection.connect(autocommit=True)
    async with connection, serve("uvicorn", "damage", implementation, "FastAPI") as server:
        await connection.execute(f"DROP SCHEMA public CASCADE; CREATE SCHEMA public; {TABLES}".encode())
        for path in CASES:
            await disconnect(server, path, disconnects)
            await at_rest(server)
        counts = await at_rest(server)
        found = {name: await _count(connection, query) for name, query in FOUND.items()}
    return found | {name: number for name, number in counts.items() if name not in ("begun", "ended")}


async def _count(connection: AsyncConnection, query: LiteralString) -> int:
    row = await (await connection.execute(query)).fetchone()
    assert row is not None
    number: int = row[0]
    return number


def main() -> None:
    """Measure every implementation on uvicorn and FastAPI."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--disconnects", type=int, default=200, help="of each case (default: %(default)s)")
    options = parser.parse_args()
    with database():
        results = {name: asyncio.run(measure(name, options.disconnects)) for name in implementations()}
    columns = list(next(iter(results.values())))
    rows = {name: [str(number) for number in counts.values()] for name, counts in results.items()}
    report.save("damage", [report.table(f"of {options.disconnects} disconnects each", columns, rows)], results)


if __name__ == "__main__":
    main()

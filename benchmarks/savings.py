"""How many useful responses a server gives when other clients give up and retry."""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from statistics import median, quantiles
from time import monotonic
from typing import Any, NamedTuple

import httpx
from fastapi import FastAPI
from starlette.requests import Request
from starlette.types import ASGIApp

from benchmarks import report
from benchmarks.shared import charts
from benchmarks.shared.database import Pool, database, open_pool
from benchmarks.shared.implementations import implementations
from benchmarks.shared.servers import Server, serve

QUERY = 2  # seconds that the database works for a response: the server gives at most 5 a second
WAITING = 8  # clients that wait up to `TIMEOUT` for each response, and send the next request
RETRYING = [0, 10, 20, 40, 80]  # clients that disconnect after `GIVE_UP_AFTER`, and retry
TIMEOUT = 15.0  # seconds
GIVE_UP_AFTER = 0.2  # seconds
RETRY_AFTER = (0.2, 0.6)  # seconds between a client's disconnect and its next request: at random between these


class Outcome(NamedTuple):
    """What the waiting clients got."""

    useful: float  # responses a second
    waits: list[float]  # seconds, of each request


def app(implementation: str, framework: str) -> ASGIApp:
    guard = implementations()[implementation]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[dict[str, Any]]:  # Any: as Starlette has it
        async with open_pool() as pool:
            yield {"pool": pool}

    async def slow(request: Request) -> str:
        pool: Pool = request.state.pool
        async with pool.connection() as connection:
            await connection.execute("SELECT pg_sleep(%s)", [QUERY])
        return "the answer"

    api = FastAPI(lifespan=lifespan)
    api.get("/slow", response_model=None)(guard.decorate(slow))
    return guard.wrap(api)


async def wait(client: httpx.AsyncClient, until: float, waits: list[float], answered: list[float]) -> None:
    """Send one request after another until the end, and wait for each response."""
    while (asked := monotonic()) < until:
        try:
            answer = await client.get("/slow", timeout=TIMEOUT)
        except httpx.TimeoutException:
            waits.append(TIMEOUT)
        else:
            answer.raise_for_status()
            waits.append(monotonic() - asked)
            answered.append(monotonic())


async def give_up_and_retry(server: Server) -> None:
    """Send a request, disconnect, and retry, forever."""
    while True:
        await asyncio.sleep(random.uniform(*RETRY_AFTER))
        connection = await server.open("/slow")
        await asyncio.sleep(GIVE_UP_AFTER)
        connection.close()


async def storm(implementation: str, number: int, seconds: float) -> Outcome:
    """Run this many retrying clients beside the waiting ones, on a server that has just started."""
    async with (
        serve("uvicorn", "savings", implementation, "FastAPI") as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client,
    ):
        others = [asyncio.create_task(give_up_and_retry(server)) for _ in range(number)]
        waits: list[float] = []
        answered: list[float] = []
        until = monotonic() + seconds
        await asyncio.gather(*(wait(client, until, waits, answered) for _ in range(WAITING)))
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    return Outcome(sum(time < until for time in answered) / seconds, waits)


async def measure(rounds: int, seconds: float) -> dict[str, dict[int, list[Outcome]]]:
    """Run the storm on all servers at the same time, since they mostly wait."""
    names = list(implementations())
    outcomes: dict[str, dict[int, list[Outcome]]] = {name: {number: [] for number in RETRYING} for name in names}
    for _ in range(rounds):
        for number in RETRYING:
            found = await asyncio.gather(*(storm(name, number, seconds) for name in names))
            for name, outcome in zip(names, found, strict=True):
                outcomes[name][number].append(outcome)
    return outcomes


def main() -> None:
    """Measure every implementation on uvicorn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30, help="of each storm (default: %(default)s)")
    options = parser.parse_args()
    with database():
        outcomes = asyncio.run(measure(options.rounds, options.seconds))
    useful: charts.Numbers = {}
    worst: charts.Numbers = {}
    for name, by_number in outcomes.items():
        useful[name] = {str(number): median(each.useful for each in found) for number, found in by_number.items()}
        waits = {number: [wait for each in found for wait in each.waits] for number, found in by_number.items()}
        worst[name] = {str(n): quantiles(each, n=100, method="inclusive")[98] for n, each in waits.items()}
    columns = [f"{number} retrying" for number in RETRYING]
    tables = [
        report.table(title, columns, {name: [f"{each:.1f}" for each in row.values()] for name, row in numbers.items()})
        for title, numbers in {"useful responses a second": useful, "seconds that the others wait, p99": worst}.items()
    ]
    charts.lines("savings", "Useful responses a second", "clients that give up and retry", useful)
    charts.lines("savings-p99", "Seconds that the other clients wait, p99", "clients that give up and retry", worst)
    pictures = {"savings": "Useful responses a second", "savings-p99": "Seconds that the other clients wait, p99"}
    report.save("savings", tables, outcomes, pictures)


if __name__ == "__main__":
    main()

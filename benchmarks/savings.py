"""How many answers anybody still waits for a server gives, when impatient clients leave and ask again."""

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

import charts
import report
from contestants import contestants
from database import Pool, database, open_pool
from serving import Server, serve

QUERY = 2  # seconds that the database works for an answer: at most 5 of them a second
PATIENT = 8  # clients that wait up to `GIVE_UP` for each answer, and ask again
IMPATIENT = [0, 10, 20, 40, 80]  # clients that leave after `PATIENCE`, and ask again
GIVE_UP = 15.0  # seconds
PATIENCE = 0.2  # seconds
AGAIN = (0.2, 0.6)  # seconds between an impatient client's leave and its next request: at random between these


class Outcome(NamedTuple):
    """What became of the patient clients."""

    useful: float  # answers a second
    waits: list[float]  # seconds, of each


def app(contestant: str, framework: str) -> ASGIApp:
    guard = contestants()[contestant]

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


async def patient(client: httpx.AsyncClient, until: float, waits: list[float], answered: list[float]) -> None:
    """Ask until the end, and wait."""
    while (asked := monotonic()) < until:
        try:
            answer = await client.get("/slow", timeout=GIVE_UP)
        except httpx.TimeoutException:
            waits.append(GIVE_UP)
        else:
            answer.raise_for_status()
            waits.append(monotonic() - asked)
            answered.append(monotonic())


async def impatient(server: Server) -> None:
    """Ask, leave, and ask again, for ever."""
    while True:
        await asyncio.sleep(random.uniform(*AGAIN))
        connection = await server.open("/slow")
        await asyncio.sleep(PATIENCE)
        connection.close()


async def storm(contestant: str, number: int, seconds: float) -> Outcome:
    """Let so many impatient clients ask beside the patient ones, on a server that has just started."""
    async with (
        serve("uvicorn", "savings", contestant, "FastAPI") as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client,
    ):
        others = [asyncio.create_task(impatient(server)) for _ in range(number)]
        waits: list[float] = []
        answered: list[float] = []
        until = monotonic() + seconds
        await asyncio.gather(*(patient(client, until, waits, answered) for _ in range(PATIENT)))
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    return Outcome(sum(time < until for time in answered) / seconds, waits)


async def measure(rounds: int, seconds: float) -> dict[str, dict[int, list[Outcome]]]:
    """Have the storm on all servers at the same time: what they do there is wait."""
    names = list(contestants())
    outcomes: dict[str, dict[int, list[Outcome]]] = {name: {number: [] for number in IMPATIENT} for name in names}
    for _ in range(rounds):
        for number in IMPATIENT:
            found = await asyncio.gather(*(storm(name, number, seconds) for name in names))
            for name, outcome in zip(names, found, strict=True):
                outcomes[name][number].append(outcome)
    return outcomes


def main() -> None:
    """Measure everybody on uvicorn."""
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
    columns = [f"{number} impatient" for number in IMPATIENT]
    tables = [
        report.table(title, columns, {name: [f"{each:.1f}" for each in row.values()] for name, row in numbers.items()})
        for title, numbers in {"useful answers a second": useful, "p99 of patient clients, seconds": worst}.items()
    ]
    charts.lines("savings", "Useful answers a second", "impatient clients", useful)
    charts.lines("savings-p99", "Seconds that patient clients wait, p99", "impatient clients", worst)
    pictures = {"savings": "Useful answers a second", "savings-p99": "What patient clients wait"}
    report.save("savings", tables, outcomes, pictures)


if __name__ == "__main__":
    main()

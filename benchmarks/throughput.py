"""How many requests a second a server answers, with endpoints decorated and not."""

from __future__ import annotations

import argparse
import asyncio
import random
import re
from contextlib import AsyncExitStack
from statistics import median
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

import charts
import report
from contestants import BARE, FRAMEWORKS, OURS, Endpoint, application, contestants
from serving import Server, serve

SERVERS = ["uvicorn", "hypercorn", "granian"]
CONNECTIONS = [1, 64]
ANSWER = {"name": "report", "rows": [1, 2, 3], "done": True}

Rates = dict[str, dict[str, list[float]]]  # by column and contestant: requests a second, of each round


async def report_json(request: Request) -> JSONResponse:
    return JSONResponse(ANSWER)


async def report_dict(request: Request) -> dict[str, Any]:  # Any: JSON
    return ANSWER


def app(contestant: str, framework: str) -> ASGIApp:
    endpoint: Endpoint = report_json if framework == "Starlette" else report_dict
    return application(framework, contestants()[contestant], {"/": endpoint})


async def load(server: Server, connections: int, seconds: int) -> float:
    """Return the requests a second that wrk gets answered, by its own count."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", f"http://127.0.0.1:{server.port}/"]
    wrk = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output = (await wrk.communicate())[0].decode()
    if wrk.returncode or "Non-2xx" in output or "Socket errors" in output:
        raise RuntimeError(f"wrk says:\n{output}")
    found = re.search(r"Requests/sec: +([\d.]+)", output)
    assert found is not None
    return float(found[1])


async def measure(server: str, framework: str, rounds: int, seconds: int) -> Rates:
    """Serve everybody, and load one after the other in each round, in random order."""
    names = list(contestants())
    rates: Rates = {f"{framework}, {number} at a time": {name: [] for name in names} for number in CONNECTIONS}
    async with AsyncExitStack() as stack:
        running = {
            name: await stack.enter_async_context(serve(server, "throughput", name, framework)) for name in names
        }
        for name in names:
            await load(running[name], max(CONNECTIONS), 1)  # warm up
        for _ in range(rounds):
            for number, column in zip(CONNECTIONS, rates.values(), strict=True):
                for name in random.sample(names, len(names)):
                    column[name].append(await load(running[name], number, seconds))
    return rates


def share(rates: dict[str, list[float]], name: str) -> float:
    """Return the median of what a contestant answers for each request of the undecorated one in the same round."""
    return median(mine / bare for mine, bare in zip(rates[name], rates[BARE], strict=True))


def table(server: str, rates: Rates) -> str:
    columns = list(rates.values())
    rows = {f"{BARE}: requests a second": [f"{median(column[BARE]):.0f}" for column in columns]}
    for name in columns[0]:
        if name != BARE:
            rows[f"{name}: share of that"] = [f"{share(column, name):.3f}" for column in columns]
    return report.table(server, list(rates), rows)


def main() -> None:
    """Measure everything; `wrk` must be installed, as by `apt install wrk`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="of each contestant (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=5, help="of load (default: %(default)s)")
    parser.add_argument("--servers", nargs="+", default=SERVERS, help="some of: %(default)s")
    options = parser.parse_args()
    results: dict[str, Rates] = {}
    for server in options.servers:
        results[server] = {}
        for framework in FRAMEWORKS:
            results[server] |= asyncio.run(measure(server, framework, options.rounds, options.seconds))
    tables = [table(server, rates) for server, rates in results.items()]
    first = next(iter(results.values()))
    names = [OURS, *(name for name in next(iter(first.values())) if name not in (BARE, OURS))]
    numbers = {name: {column: 100 * share(rates, name) for column, rates in first.items()} for name in names}
    title = f"Requests a second on {next(iter(results))}, in percent of the undecorated"
    charts.bars("throughput", title, numbers)
    report.save("throughput", tables, results, {"throughput": title})


if __name__ == "__main__":
    main()

"""How many requests a second a server answers, and what each costs, with decorated and undecorated endpoints."""

from __future__ import annotations

import argparse
import asyncio
import random
import re
from statistics import median
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from benchmarks import report
from benchmarks.shared import charts
from benchmarks.shared.implementations import BARE, FRAMEWORKS, OURS, Endpoint, application, implementations
from benchmarks.shared.servers import Server, serve_each

SERVERS = ["uvicorn", "hypercorn", "granian"]
CONNECTIONS = [1, 64]
BLOCKS = 3  # of each implementation in each round, in turn: many short ones decide more surely than a few long ones
ANSWER = {"name": "report", "rows": [1, 2, 3], "done": True}


class Load(NamedTuple):
    """What a server did under load."""

    rate: float  # requests a second
    cost: float  # microseconds of processor time a request


Loads = dict[str, dict[str, list[Load]]]  # by column and implementation, of each block


async def report_json(request: Request) -> JSONResponse:
    return JSONResponse(ANSWER)


async def report_dict(request: Request) -> dict[str, Any]:  # Any: JSON
    return ANSWER


def app(implementation: str, framework: str) -> ASGIApp:
    endpoint: Endpoint = report_json if framework == "Starlette" else report_dict
    return application(framework, implementations()[implementation], {"/": endpoint})


async def load(server: Server, connections: int, seconds: int) -> Load:
    """Load the server with wrk, and return its rate by wrk's count and its cost by the operating system's."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", f"http://127.0.0.1:{server.port}/"]
    before = server.processor_time()
    wrk = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output = (await wrk.communicate())[0].decode()
    if wrk.returncode or "Non-2xx" in output or "Socket errors" in output:
        raise RuntimeError(f"wrk says:\n{output}")
    rate = re.search(r"Requests/sec: +([\d.]+)", output)
    requests = re.search(r"(\d+) requests in", output)
    assert rate is not None
    assert requests is not None
    return Load(float(rate[1]), (server.processor_time() - before) / int(requests[1]) * 1e6)


async def measure(server: str, framework: str, rounds: int, seconds: int) -> Loads:
    """In each round serve every implementation anew, and load one after another in turn, in random order.

    Anew, since one process can be faster than the next of the same program.
    """
    names = list(implementations())
    loads: Loads = {f"{framework}, {number} at a time": {name: [] for name in names} for number in CONNECTIONS}
    for _ in range(rounds):
        async with serve_each(server, "throughput", names, framework) as running:
            for name in names:
                await load(running[name], max(CONNECTIONS), 1)  # warm up
            for number, column in zip(CONNECTIONS, loads.values(), strict=True):
                for _ in range(BLOCKS):
                    for name in random.sample(names, len(names)):
                        column[name].append(await load(running[name], number, seconds))
    return loads


def share(loads: dict[str, list[Load]], name: str) -> float:
    """Return the median of an implementation's rate relative to the undecorated one of the same turn."""
    return median(mine.rate / bare.rate for mine, bare in zip(loads[name], loads[BARE], strict=True))


def added(loads: dict[str, list[Load]], name: str) -> float:
    """Return the median of what a request costs more than undecorated in the same turn."""
    return median(mine.cost - bare.cost for mine, bare in zip(loads[name], loads[BARE], strict=True))


def tables(server: str, loads: Loads) -> list[str]:
    columns = list(loads.values())
    others = [name for name in columns[0] if name != BARE]
    rates = {f"{BARE}: requests a second": [f"{median(each.rate for each in column[BARE]):.0f}" for column in columns]}
    rates |= {f"{name}: share of that": [f"{share(column, name):.3f}" for column in columns] for name in others}
    costs = {BARE: [f"{median(each.cost for each in column[BARE]):.1f}" for column in columns]}
    costs |= {f"added by {name}": [f"{added(column, name):+.1f}" for column in columns] for name in others}
    title = f"{server}: microseconds of processor time a request"
    return [report.table(server, list(loads), rates), report.table(title, list(loads), costs)]


def main() -> None:
    """Measure everything; `wrk` must be installed, as by `apt install wrk`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of new servers (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=2, help="of load (default: %(default)s)")
    parser.add_argument("--servers", nargs="+", default=SERVERS, help="some of: %(default)s")
    options = parser.parse_args()
    results: dict[str, Loads] = {}
    for server in options.servers:
        results[server] = {}
        for framework in FRAMEWORKS:
            results[server] |= asyncio.run(measure(server, framework, options.rounds, options.seconds))
    written = [each for server, loads in results.items() for each in tables(server, loads)]
    first = next(iter(results.values()))
    names = [OURS, *(name for name in next(iter(first.values())) if name not in (BARE, OURS))]
    numbers = {name: {column: 100 * share(loads, name) for column, loads in first.items()} for name in names}
    title = f"Requests a second on {next(iter(results))}, in percent of the undecorated"
    charts.bars("throughput", title, numbers)
    report.save("throughput", written, results, {"throughput": title})


if __name__ == "__main__":
    main()

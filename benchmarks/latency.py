"""How soon an endpoint learns that its client has disconnected, on each server, while other requests wait."""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
from collections import deque
from itertools import count
from statistics import quantiles
from time import monotonic

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from benchmarks import report
from benchmarks.shared import charts
from benchmarks.shared.implementations import BARE, OURS, Guard, application, disconnected, implementations
from benchmarks.shared.servers import SERVERS, TIMEOUT, Server, serve_each

WAITING = [1, 100, 1000]
FLOOR = "receive()"  # an endpoint that awaits nothing else
PAUSE = 0.004  # seconds, at least, between two disconnects
AGE = 0.1  # seconds, at least, that a request has waited when its client disconnects: by then every watch has begun

Seconds = dict[str, list[float]]  # by implementation

keys = count()
notified: dict[str, float] = {}  # by key: the time on the monotonic clock, which all processes share


async def wait(request: Request) -> Response:
    key = request.query_params["key"]
    notified[key] = -1
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        notified[key] = monotonic()
        raise
    return Response()


async def receive(request: Request) -> Response:
    key = request.query_params["key"]
    notified[key] = -1
    await disconnected(request)
    notified[key] = monotonic()
    return Response()


async def show(request: Request) -> Response:
    return JSONResponse(notified)


def app(implementation: str, framework: str) -> ASGIApp:
    endpoint = receive if implementation == FLOOR else wait
    guard = Guard() if implementation == FLOOR else implementations()[implementation]
    return application(framework, guard, {"/": endpoint, "/notified": show})


async def ask(server: Server) -> tuple[str, socket.socket]:
    key = str(next(keys))
    return key, await server.open(f"/?key={key}")


async def disconnect(server: Server, waiting: int, disconnects: int) -> list[float]:
    """Keep this many requests waiting, and disconnect the oldest again and again. Return the seconds each took."""
    requests = deque([await ask(server) for _ in range(waiting)])
    disconnected_at: dict[str, float] = {}
    await all_notified(server, [key for key, _ in requests], begun=True)
    await asyncio.sleep(AGE)
    pause = max(PAUSE, AGE / waiting)
    for _ in range(disconnects):
        key, connection = requests.popleft()
        disconnected_at[key] = monotonic()
        connection.close()
        await asyncio.sleep(pause * random.uniform(0.4, 0.6))
        requests.append(await ask(server))
        await asyncio.sleep(pause * random.uniform(0.4, 0.6))
    for _, connection in requests:
        connection.close()
    times = await all_notified(server, [*disconnected_at, *(key for key, _ in requests)])
    return [times[key] - time for key, time in disconnected_at.items()]


async def all_notified(server: Server, keys: list[str], *, begun: bool = False) -> dict[str, float]:
    """Return the times at which these requests were notified, or, if `begun`, return once they have all begun."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            times: dict[str, float] = await server.get("/notified")
            if all(key in times if begun else times.get(key, -1) > 0 for key in keys):
                return times
            await asyncio.sleep(0.05)


async def measure(server: str, rounds: int, disconnects: int) -> dict[int, Seconds]:
    """Serve every implementation that notices a disconnect, and disconnect from each in each round, in random order."""
    names = [FLOOR, *(name for name in implementations() if name != BARE)]
    seconds: dict[int, Seconds] = {waiting: {name: [] for name in names} for waiting in WAITING}
    async with serve_each(server, "latency", names) as running:
        for _ in range(rounds):
            for waiting in WAITING:
                for name in random.sample(names, len(names)):
                    seconds[waiting][name] += await disconnect(running[name], waiting, disconnects)
    return seconds


def percentiles(seconds: list[float]) -> tuple[float, float]:
    """Return the 50th and the 99th percentile, in milliseconds."""
    hundredths = quantiles(seconds, n=100, method="inclusive")
    return hundredths[49] * 1000, hundredths[98] * 1000


def table(server: str, results: dict[int, Seconds]) -> str:
    rows: report.Rows = {name: [] for name in results[WAITING[0]]}
    for seconds in results.values():
        for name, each in seconds.items():
            rows[name] += [f"{milliseconds:.2f}" for milliseconds in percentiles(each)]
    ours, floor = ([float(cell) for cell in rows[name]] for name in (OURS, FLOOR))
    rows[f"{OURS} / {FLOOR}"] = [f"{mine / raw:.2f}" for mine, raw in zip(ours, floor, strict=True)]
    columns = [f"{percentile} of {waiting}" for waiting in results for percentile in ("p50", "p99")]
    return report.table(f"{server}: milliseconds", columns, rows)


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument(
        "--disconnects", type=int, default=100, help="of each implementation in each round (default: %(default)s)"
    )
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), help="some of: %(default)s")
    options = parser.parse_args()
    results = {server: asyncio.run(measure(server, options.rounds, options.disconnects)) for server in options.servers}
    numbers = {
        name: {server: percentiles(result[100][name])[0] for server, result in results.items()}
        for name in next(iter(results.values()))[100]
        if name != "polling"
    }
    title = "From the client's close to the endpoint's CancelledError, median of 100 waiting, in milliseconds"
    charts.bars("latency", title, numbers)
    tables = [table(server, result) for server, result in results.items()]
    report.save("latency", tables, results, {"latency": title})


if __name__ == "__main__":
    main()

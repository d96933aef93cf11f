"""How long after its client has left an endpoint learns of it, on each server, while others wait."""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
from collections import deque
from contextlib import AsyncExitStack
from itertools import count
from statistics import quantiles
from time import monotonic

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

import charts
import report
from contestants import BARE, OURS, Guard, application, contestants, disconnected
from serving import SERVERS, TIMEOUT, Server, serve

WAITING = [1, 100, 1000]
FLOOR = "receive()"  # an endpoint that awaits nothing else
PAUSE = 0.004  # seconds at least, between two that leave
AGE = 0.1  # seconds, at least, that a request has waited when its client leaves: all that notice do by then

Seconds = dict[str, list[float]]  # by contestant

keys = count()
told: dict[str, float] = {}  # the time on the monotonic clock, which all processes share


async def wait(request: Request) -> Response:
    key = request.query_params["key"]
    told[key] = -1
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        told[key] = monotonic()
        raise
    return Response()


async def receive(request: Request) -> Response:
    key = request.query_params["key"]
    told[key] = -1
    await disconnected(request)
    told[key] = monotonic()
    return Response()


async def show(request: Request) -> Response:
    return JSONResponse(told)


def app(contestant: str, framework: str) -> ASGIApp:
    endpoint = receive if contestant == FLOOR else wait
    guard = Guard() if contestant == FLOOR else contestants()[contestant]
    return application(framework, guard, {"/": endpoint, "/told": show})


async def ask(server: Server) -> tuple[str, socket.socket]:
    key = str(next(keys))
    return key, await server.open(f"/?key={key}")


async def leave(server: Server, waiting: int, leaves: int) -> list[float]:
    """Have so many requests wait; time after time the oldest leaves, and a new one comes. Return what each took."""
    requests = deque([await ask(server) for _ in range(waiting)])
    left: dict[str, float] = {}
    await all_told(server, [key for key, _ in requests], begun=True)
    await asyncio.sleep(AGE)
    pause = max(PAUSE, AGE / waiting)
    for _ in range(leaves):
        key, connection = requests.popleft()
        left[key] = monotonic()
        connection.close()
        await asyncio.sleep(pause * random.uniform(0.4, 0.6))
        requests.append(await ask(server))
        await asyncio.sleep(pause * random.uniform(0.4, 0.6))
    for _, connection in requests:
        connection.close()
    times = await all_told(server, [*left, *(key for key, _ in requests)])
    return [times[key] - time for key, time in left.items()]


async def all_told(server: Server, keys: list[str], *, begun: bool = False) -> dict[str, float]:
    """Return the times at which these requests were told of the leave, or just when they have all begun."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            times: dict[str, float] = await server.get("/told")
            if all(key in times if begun else times.get(key, -1) > 0 for key in keys):
                return times
            await asyncio.sleep(0.05)


async def measure(server: str, rounds: int, leaves: int) -> dict[int, Seconds]:
    """Serve everybody who notices, and let the clients of one after the other leave in each round, in random order."""
    names = [FLOOR, *(name for name in contestants() if name != BARE)]
    seconds: dict[int, Seconds] = {waiting: {name: [] for name in names} for waiting in WAITING}
    async with AsyncExitStack() as stack:
        running = {name: await stack.enter_async_context(serve(server, "latency", name)) for name in names}
        for _ in range(rounds):
            for waiting in WAITING:
                for name in random.sample(names, len(names)):
                    seconds[waiting][name] += await leave(running[name], waiting, leaves)
    return seconds


def percentiles(seconds: list[float]) -> tuple[float, float]:
    """Return the 50th and the 99th, in milliseconds."""
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
    parser.add_argument("--leaves", type=int, default=100, help="of each contestant in each (default: %(default)s)")
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), help="some of: %(default)s")
    options = parser.parse_args()
    results = {server: asyncio.run(measure(server, options.rounds, options.leaves)) for server in options.servers}
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

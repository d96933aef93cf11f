"""How much memory a waiting request takes, with 5,000 of them in one process."""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import re
from pathlib import Path
from statistics import median

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from benchmarks import report
from benchmarks.shared import charts
from benchmarks.shared.implementations import BARE, application, implementations
from benchmarks.shared.servers import TIMEOUT, serve

AGE = 1  # seconds that the newest request has waited when memory is measured

Sizes = dict[str, list[float]]  # by implementation: bytes a request, of each round

waiting = 0


async def wait(request: Request) -> Response:
    global waiting
    waiting += 1
    await asyncio.sleep(3600)
    return Response()


async def show(request: Request) -> Response:
    gc.collect()
    return JSONResponse({"waiting": waiting, "bytes": private_memory()})


def private_memory() -> int:
    """Return how many bytes of memory only this process uses."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(map(int, re.findall(r"^Private_\w+: +(\d+) kB", rollup, re.MULTILINE)))


def app(implementation: str, framework: str) -> ASGIApp:
    return application(framework, implementations()[implementation], {"/": wait, "/memory": show})


async def size(implementation: str, requests: int) -> float:
    """Return the bytes that a request takes, including its connection."""
    async with serve("uvicorn", "memory", implementation) as server:
        before = await server.get("/memory")
        connections = [await server.open("/") for _ in range(requests)]
        async with asyncio.timeout(TIMEOUT):
            while (await server.get("/memory"))["waiting"] < requests:
                await asyncio.sleep(0.1)
        await asyncio.sleep(AGE)
        after = await server.get("/memory")
        for connection in connections:
            connection.close()
        taken: int = after["bytes"] - before["bytes"]
        return taken / requests


async def measure(rounds: int, requests: int) -> Sizes:
    """Serve each implementation in each round, in random order."""
    # With this many requests, polling every 10 ms would give the server no time to accept new connections.
    names = [name for name in implementations() if name != "polling"]
    sizes: Sizes = {name: [] for name in names}
    for _ in range(rounds):
        for name in random.sample(names, len(names)):
            sizes[name].append(await size(name, requests))
    return sizes


def main() -> None:
    """Measure every implementation on uvicorn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--requests", type=int, default=5000, help="that wait at once (default: %(default)s)")
    options = parser.parse_args()
    sizes = asyncio.run(measure(options.rounds, options.requests))
    kib = {name: median(each) / 1024 for name, each in sizes.items()}
    added = {name: each - kib[BARE] for name, each in kib.items()}
    rows = {name: [f"{kib[name]:.1f}", f"{added[name]:+.1f}" if name != BARE else ""] for name in kib}
    title = "KiB that a waiting request takes in addition to an undecorated one"
    charts.bars("memory", title, {name: {"": each} for name, each in added.items() if name != BARE})
    tables = [report.table("uvicorn: KiB a request", ["in all", "added"], rows)]
    report.save("memory", tables, sizes, {"memory": title})


if __name__ == "__main__":
    main()

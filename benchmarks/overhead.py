"""How many microseconds `cancel_on_disconnect`, and each other implementation, adds to one request."""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
from collections.abc import Awaitable, Callable
from statistics import median
from time import process_time
from typing import Any, NamedTuple

import anyio
import trio
import uvloop
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from benchmarks import report
from benchmarks.shared import charts
from benchmarks.shared.implementations import (
    ARTICLE,
    BARE,
    FASTAPI_DISCONNECT,
    OURS,
    Endpoint,
    Guard,
    application,
    implementations,
)
from benchmarks.shared.in_memory import get

Blocks = dict[str, list[float]]  # by implementation: the mean microseconds a request, of each block
Call = Callable[[], Awaitable[None]]


class Backend(NamedTuple):
    """What runs the benchmark."""

    name: str
    options: dict[str, Any]  # Any: anyio's own type for them
    in_task: Callable[[Call], Awaitable[None]]  # runs a call in a task, as servers do for each request
    forever: Callable[[], Awaitable[None]]


async def asyncio_task(call: Call) -> None:
    async def run() -> None:
        await call()

    await asyncio.create_task(run())


async def asyncio_forever() -> None:
    await asyncio.get_running_loop().create_future()


async def trio_task(call: Call) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)


BACKENDS = {
    "asyncio": Backend("asyncio", {}, asyncio_task, asyncio_forever),
    "uvloop": Backend("asyncio", {"loop_factory": uvloop.new_event_loop}, asyncio_task, asyncio_forever),
    "trio": Backend("trio", {}, trio_task, trio.sleep_forever),
}
ON_TRIO = [BARE, OURS, ARTICLE]


async def at_once(request: Request) -> Response:
    """Never suspend: the event loop doesn't turn."""
    return JSONResponse({"done": True})


async def reads(request: Request) -> Response:
    """Read the body first; it has already arrived."""
    return JSONResponse({"bytes": len(await request.body())})


async def three_awaits(request: Request) -> Response:
    """Suspend for a turn of the event loop, three times."""
    for _ in range(3):
        await anyio.lowlevel.checkpoint()
    return JSONResponse({"done": True})


async def one_millisecond(request: Request) -> Response:
    """Wait as if for a fast database, while the other requests run."""
    await anyio.sleep(0.001)
    return JSONResponse({"done": True})


class Case(NamedTuple):
    """One column: an endpoint, what is around it, and how many clients call it, each again after its response."""

    endpoint: Endpoint
    framework: str = "Starlette"
    concurrent: int = 1
    middleware: bool = False
    reads: bool = False  # only some implementations support it: the watchers of the others take the body


CASES = {
    "at once": Case(at_once),
    "3 awaits": Case(three_awaits),
    "1 ms, 100 at a time": Case(one_millisecond, concurrent=100),
    "under BaseHTTPMiddleware": Case(at_once, middleware=True),
    "FastAPI": Case(at_once, "FastAPI"),
    "reads its body": Case(reads, reads=True),
}
READERS = [BARE, OURS]


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


def build(case: Case, guard: Guard) -> ASGIApp:
    app = application(case.framework, guard, {"/": case.endpoint})
    return BaseHTTPMiddleware(app, pass_on) if case.middleware else app


async def block(app: ASGIApp, backend: Backend, requests: int, concurrent: int) -> float:
    """Return the microseconds of processor time that a request takes on average; waiting doesn't count."""
    each = max(requests // concurrent, 1)

    async def client() -> None:
        for _ in range(each):
            await backend.in_task(lambda: get(app, backend.forever))

    began = process_time()
    async with anyio.create_task_group() as clients:
        for _ in range(concurrent):
            clients.start_soon(client)
    return (process_time() - began) / (each * concurrent) * 1e6


async def measure(case: Case, guards: dict[str, Guard], backend: Backend, rounds: int, requests: int) -> Blocks:
    """Run a block for each implementation in each round, in random order, so that its predecessor varies."""
    apps = {name: build(case, guard) for name, guard in guards.items()}
    blocks: Blocks = {name: [] for name in apps}
    names = list(apps)
    async with anyio.create_task_group() as ticking:
        ticking.start_soon(anyio.sleep, 3600)  # servers always have a timer, such as uvicorn's
        for app in apps.values():
            await block(app, backend, requests, case.concurrent)  # warm up
        for _ in range(rounds):
            random.shuffle(names)
            for name in names:
                gc.collect()  # so that no block collects the garbage of the one before
                blocks[name].append(await block(apps[name], backend, requests, case.concurrent))
        ticking.cancel_scope.cancel()
    return blocks


def added(blocks: Blocks, name: str) -> float:
    """Return the median of how much longer a block took than the undecorated one of the same round."""
    return median(mine - bare for mine, bare in zip(blocks[name], blocks[BARE], strict=True))


def table(backend: str, results: dict[str, Blocks]) -> str:
    """Return what each implementation adds in each case."""
    columns = list(results.values())
    rows = {BARE: [f"{median(blocks[BARE]):.1f}" for blocks in columns]}
    for name in columns[0]:
        if name != BARE:
            rows[f"added by {name}"] = [f"{added(blocks, name):+.1f}" if name in blocks else "" for blocks in columns]
    for name in (ARTICLE, FASTAPI_DISCONNECT):
        if name in columns[0]:
            rows[f"{OURS} / {name}"] = [
                f"{added(blocks, OURS) / added(blocks, name):.2f}" if name in blocks else "" for blocks in columns
            ]
    return report.table(f"{backend}: microseconds a request", list(results), rows)


def main() -> None:
    """Measure everything on all backends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21, help="blocks of each implementation (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=1000, help="requests in a block (default: %(default)s)")
    options = parser.parse_args()
    results: dict[str, dict[str, Blocks]] = {}
    for title, backend in BACKENDS.items():
        guards = {name: guard for name, guard in implementations().items() if title != "trio" or name in ON_TRIO}
        results[title] = {}
        for column, case in CASES.items():
            chosen = {name: guard for name, guard in guards.items() if name in READERS or not case.reads}
            arguments = (case, chosen, backend, options.rounds, options.requests)
            results[title][column] = anyio.run(
                measure, *arguments, backend=backend.name, backend_options=backend.options
            )
    on_uvloop = results["uvloop"]
    names = [name for name in next(iter(on_uvloop.values())) if name != BARE]
    numbers = {
        name: {column: added(blocks, name) for column, blocks in on_uvloop.items() if not CASES[column].reads}
        for name in names
    }
    charts.bars("overhead", "Added to a request on uvloop, in microseconds of processor time", numbers)
    tables = [table(title, columns) for title, columns in results.items()]
    report.save("overhead", tables, results, {"overhead": "What each implementation adds to a request on uvloop"})


if __name__ == "__main__":
    main()

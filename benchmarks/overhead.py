"""How many microseconds one request costs more under `cancel_on_disconnect`, and under three other ways to its end."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import platform
import random
from collections.abc import Callable, Coroutine
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any, NamedTuple

import anyio
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Scope

from cancelonleave import cancel_on_disconnect

Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]  # Any: nothing is sent into an endpoint, nor yielded
Decorator = Callable[[Endpoint], Endpoint]
Blocks = dict[str, list[float]]  # by contestant: the mean microseconds a request, of each block

BARE, OURS, ARTICLE, FASTAPI_DISCONNECT = "undecorated", "cancelonleave", "article", "fastapi-disconnect"
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


# The contestants: each as short as the job allows, so none is slower here than it need be.


def article(endpoint: Endpoint) -> Endpoint:
    """Run endpoint and watcher in a task group, the pattern of "Understanding client disconnection in FastAPI"."""

    async def guarded(request: Request) -> Response:
        response = Response()

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        async def respond() -> None:
            nonlocal response
            response = await endpoint(request)

        async with anyio.create_task_group() as task_group:

            async def wrap(call: Callable[[], Coroutine[Any, Any, None]]) -> None:  # Any: as for an endpoint
                await call()
                task_group.cancel_scope.cancel()

            task_group.start_soon(wrap, watch)
            await wrap(respond)
        return response

    return guarded


def polling(endpoint: Endpoint) -> Endpoint:
    """Run the endpoint in a task, and ask every 10 ms whether the client is gone."""

    async def guarded(request: Request) -> Response:
        task = asyncio.create_task(endpoint(request))
        while not (await asyncio.wait((task,), timeout=0.01))[0]:
            if await request.is_disconnected():
                task.cancel()
        return await task

    return guarded


def contestants() -> dict[str, Decorator]:
    """Return those that are installed, each under its name in the tables."""
    decorators: dict[str, Decorator] = {BARE: lambda endpoint: endpoint, OURS: cancel_on_disconnect, ARTICLE: article}
    try:
        # By name, so that type checkers don't miss it where it can't be installed.
        decorators[FASTAPI_DISCONNECT] = import_module("fastapi_disconnect").cancel_on_disconnect
    except ImportError:
        print(f"Without {FASTAPI_DISCONNECT}, which is not installed. (It needs Python 3.12 or newer.)\n")
    decorators["polling"] = polling
    return decorators


async def at_once(request: Request) -> Response:
    """Never suspend: the event loop doesn't turn."""
    return PlainTextResponse("done")


async def three_awaits(request: Request) -> Response:
    """Suspend for a turn of the event loop, three times."""
    for _ in range(3):
        await asyncio.sleep(0)
    return PlainTextResponse("done")


async def one_millisecond(request: Request) -> Response:
    """Wait as for a fast database, while the others run."""
    await asyncio.sleep(0.001)
    return PlainTextResponse("done")


class Case(NamedTuple):
    """One column: an endpoint, and how many clients call it, each again as soon as it has its answer."""

    endpoint: Endpoint
    concurrent: int


CASES = {
    "at once": Case(at_once, 1),
    "3 awaits": Case(three_awaits, 1),
    "1 ms, 100 at a time": Case(one_millisecond, 100),
}


async def request_once(app: ASGIApp) -> None:
    """Send a GET whose client stays: after the empty body, receive() is pending for as long as anybody waits."""
    scope: Scope = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"accept", b"*/*"), (b"user-agent", b"benchmark")],
    }
    asked = False

    async def receive() -> Message:
        nonlocal asked
        if asked:
            await asyncio.get_running_loop().create_future()
        asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        pass

    await app(scope, receive, send)


async def block(app: ASGIApp, requests: int, concurrent: int) -> float:
    """Return the microseconds of processor time that a request takes on average; what it waits doesn't count."""
    each = max(requests // concurrent, 1)

    async def client() -> None:
        for _ in range(each):
            await request_once(app)

    began = process_time()
    await asyncio.gather(*(client() for _ in range(concurrent)))
    return (process_time() - began) / (each * concurrent) * 1e6


async def measure(case: Case, decorators: dict[str, Decorator], rounds: int, requests: int) -> Blocks:
    """Run a block for each contestant in each round, in random order, so that nobody has the same neighbour always."""
    apps = {name: Starlette(routes=[Route("/", decorate(case.endpoint))]) for name, decorate in decorators.items()}
    blocks: Blocks = {name: [] for name in apps}
    names = list(apps)
    for app in apps.values():
        await block(app, requests, case.concurrent)  # warm up
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            gc.collect()  # the garbage of the one before is not for this one to clear away
            blocks[name].append(await block(apps[name], requests, case.concurrent))
    return blocks


def added(blocks: Blocks, name: str) -> float:
    """Return the median of what a block took longer than the undecorated one of the same round."""
    return median(mine - bare for mine, bare in zip(blocks[name], blocks[BARE], strict=True))


def print_table(loop: str, results: dict[str, Blocks]) -> None:
    """Print what each contestant adds in each case, as Markdown."""

    def row(title: str, cells: list[str]) -> None:
        print(f"| {title:36} |", "".join(f" {cell:>19} |" for cell in cells), sep="")

    columns = list(results.values())
    row(f"{loop}: microseconds a request", list(results))
    print(f"|{'-' * 38}|{'--------------------:|' * len(columns)}")
    row(BARE, [f"{median(blocks[BARE]):.1f}" for blocks in columns])
    for name in columns[0]:
        if name != BARE:
            row(f"added by {name}", [f"+{added(blocks, name):.1f}" for blocks in columns])
    for name in (ARTICLE, FASTAPI_DISCONNECT):
        if name in columns[0]:
            row(f"{OURS} / {name}", [f"{added(blocks, OURS) / added(blocks, name):.2f}" for blocks in columns])
    print()


def main() -> None:
    """Measure everything on both loops, printing each loop's table when it is done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21, help="blocks of each contestant (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=1000, help="requests in a block (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the raw numbers there")
    options = parser.parse_args()
    decorators = contestants()
    packages = ["anyio", "starlette", "uvloop"] + [FASTAPI_DISCONNECT] * (FASTAPI_DISCONNECT in decorators)
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    print(", ".join(f"{name} {number}" for name, number in versions.items()), end="\n\n")
    microseconds: dict[str, dict[str, Blocks]] = {}
    for loop, factory in LOOPS.items():
        microseconds[loop] = {}
        for title, case in CASES.items():
            with asyncio.Runner(loop_factory=factory) as runner:
                microseconds[loop][title] = runner.run(measure(case, decorators, options.rounds, options.requests))
        print_table(loop, microseconds[loop])
    if options.json:
        options.json.write_text(json.dumps({"versions": versions, "microseconds": microseconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()

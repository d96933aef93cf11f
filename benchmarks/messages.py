"""How many messages a second a WebSocket endpoint echoes, or sends, decorated and undecorated."""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from statistics import median

from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.types import ASGIApp
from starlette.websockets import WebSocket
from websockets.asyncio.client import ClientConnection, connect

from benchmarks import report
from benchmarks.shared.implementations import BARE, OURS
from benchmarks.shared.servers import Server, serve_each
from cancelonleave import cancel_on_disconnect

SERVERS = ["uvicorn", "hypercorn", "granian"]
MESSAGES = 1_000  # in each block
BLOCKS = 9  # of each, in turn, in each round

Rates = dict[str, dict[str, list[float]]]  # by path and implementation: messages a second, of each block


async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)


async def sender(websocket: WebSocket) -> None:
    await websocket.accept()
    async for price in prices():
        await websocket.send_json(price)
    await websocket.receive()


async def prices() -> AsyncGenerator[dict[str, object]]:
    """Have one price after another, each in a turn of the event loop of its own, as from a queue."""
    for number in range(MESSAGES):
        await asyncio.sleep(0)
        yield {"name": "tea", "price": number}


def app(implementation: str, framework: str) -> ASGIApp:
    guard = cancel_on_disconnect if implementation == OURS else undecorated
    return Starlette(routes=[WebSocketRoute("/echo", guard(echo)), WebSocketRoute("/sender", guard(sender))])


def undecorated(endpoint: Callable[[WebSocket], Awaitable[None]]) -> Callable[[WebSocket], Awaitable[None]]:
    return endpoint


async def ping_pong(connection: ClientConnection) -> None:
    for _ in range(MESSAGES):
        await connection.send("x" * 20)
        await connection.recv()


async def take(connection: ClientConnection) -> None:
    for _ in range(MESSAGES):
        await connection.recv()


LOADS = {"/echo": ping_pong, "/sender": take}


async def load(server: Server, path: str) -> float:
    """Return how many messages a second one client receives."""
    url = f"ws://127.0.0.1:{server.port}{path}"
    async with connect(url, proxy=None, compression=None, ping_interval=None) as connection:
        began = time.perf_counter()
        await LOADS[path](connection)
        return MESSAGES / (time.perf_counter() - began)


async def measure(server: str, rounds: int) -> Rates:
    """Serve both in new processes in each round, since one process can be faster than the next of the same program."""
    rates: Rates = {path: {BARE: [], OURS: []} for path in LOADS}
    for _ in range(rounds):
        async with serve_each(server, "messages", (BARE, OURS)) as running:
            for path, column in rates.items():
                for name in column:
                    await load(running[name], path)  # warm up
                for _ in range(BLOCKS):
                    for name in random.sample([BARE, OURS], 2):
                        column[name].append(await load(running[name], path))
    return rates


def table(server: str, rates: Rates) -> str:
    shares = [
        median(mine / bare for mine, bare in zip(column[OURS], column[BARE], strict=True)) for column in rates.values()
    ]
    rows = {
        f"{BARE}: messages a second": [f"{median(column[BARE]):.0f}" for column in rates.values()],
        f"{OURS}: share of that": [f"{share:.3f}" for share in shares],
    }
    return report.table(server, list(rates), rows)


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="of each (default: %(default)s)")
    parser.add_argument("--servers", nargs="+", default=SERVERS, help="some of: %(default)s")
    options = parser.parse_args()
    results = {server: asyncio.run(measure(server, options.rounds)) for server in options.servers}
    report.save("messages", [table(server, rates) for server, rates in results.items()], results)


if __name__ == "__main__":
    main()

"""What a request costs when many are in flight, and how long the event loop is blocked when 5,000 disconnect."""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
from collections import deque
from collections.abc import Callable
from statistics import median
from time import perf_counter, process_time

import uvloop
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from benchmarks import report
from benchmarks.shared import charts
from benchmarks.shared.implementations import BARE, Guard, application, implementations
from benchmarks.shared.in_memory import get

IN_FLIGHT = [1, 10, 100, 1000]  # and `--requests`
DURATION = 1.0  # seconds in which all connect, and in which all disconnect
TICK = 0.001  # seconds

Costs = dict[str, dict[int, list[float]]]  # by implementation and requests in flight: microseconds of processor time
Blocks = dict[str, dict[str, list[float]]]  # by implementation and phase: milliseconds of the longest block


async def wait(request: Request) -> Response:
    await request.state.end.wait()
    return Response()


class Crowd:
    """Requests to one application, and their clients."""

    def __init__(self, guard: Guard) -> None:
        self._app: ASGIApp = application("Starlette", guard, {"/": wait})
        self._tasks: list[asyncio.Task[None]] = []
        self._disconnects: deque[asyncio.Future[None]] = deque()
        self.end = asyncio.Event()

    def connect(self) -> None:
        """Begin one more request."""
        disconnect: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._disconnects.append(disconnect)
        request = get(self._app, lambda: asyncio.shield(disconnect), {"end": self.end})
        self._tasks.append(asyncio.create_task(request))

    def disconnect(self) -> None:
        """Disconnect the client of the oldest request."""
        self._disconnects.popleft().set_result(None)

    async def join(self) -> None:
        self.end.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def cost(guard: Guard, in_flight: int) -> float:
    """Return the microseconds of processor time that a request takes while this many wait."""
    crowds = min(1 + 1000 // in_flight, 20)
    spent = 0.0
    for _ in range(crowds):
        crowd = Crowd(guard)
        gc.collect()
        began = process_time()
        for _ in range(in_flight):
            crowd.connect()
        await asyncio.sleep(0.06)  # by now every watch has begun
        await crowd.join()
        spent += process_time() - began
    return spent / (crowds * in_flight) * 1e6


class Ticker:
    """Records the longest block of the event loop, in processor time, so that other processes don't count."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._longest = 0.0
        self._last = process_time()
        self._tick()

    def _tick(self) -> None:
        now = process_time()
        self._longest, self._last = max(self._longest, now - self._last), now
        self._handle = self._loop.call_later(TICK, self._tick)

    def stop(self) -> float:
        """Return the longest block, in milliseconds."""
        self._handle.cancel()
        return self._longest * 1000


async def spread(step: Callable[[], None], times: int) -> None:
    """Repeat a step this many times, evenly over `DURATION`."""
    began, done = perf_counter(), 0
    while done < times:
        await asyncio.sleep(TICK)
        due = min(times, int((perf_counter() - began) / DURATION * times))
        for _ in range(due - done):
            step()
        done = due


async def longest_blocks(guard: Guard, requests: int) -> dict[str, float]:
    """Connect this many requests within a second, wait for a second, and disconnect them within a second."""
    crowd = Crowd(guard)
    gc.collect()
    gc.disable()  # with this many live objects, its pauses are longer than any block measured here
    longest: dict[str, float] = {}
    for phase, step in {
        "all connect": crowd.connect,
        "all wait": lambda: None,
        "all disconnect": crowd.disconnect,
    }.items():
        ticker = Ticker()
        await spread(step, requests)
        longest[phase] = ticker.stop()
    gc.enable()
    await crowd.join()
    return longest


def measure(rounds: int, most: int) -> tuple[Costs, Blocks]:
    """Measure every implementation in each round, in random order."""
    guards = implementations()
    numbers = [number for number in IN_FLIGHT if number < most] + [most]
    costs: Costs = {name: {number: [] for number in numbers} for name in guards}
    blocks: Blocks = {name: {} for name in guards}
    for _ in range(rounds):
        for name in random.sample(list(guards), len(guards)):
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(cost(guards[name], 100))  # warm up
                for number in numbers:
                    costs[name][number].append(runner.run(cost(guards[name], number)))
                for phase, milliseconds in runner.run(longest_blocks(guards[name], most)).items():
                    blocks[name].setdefault(phase, []).append(milliseconds)
    return costs, blocks


def main() -> None:
    """Measure every implementation on uvloop, in memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--requests", type=int, default=5000, help="in flight at most (default: %(default)s)")
    options = parser.parse_args()
    costs, blocks = measure(options.rounds, options.requests)
    microseconds = {name: {str(n): median(each) for n, each in costs[name].items()} for name in costs}
    milliseconds = {name: {phase: median(each) for phase, each in blocks[name].items()} for name in blocks}
    title = "Microseconds of processor time a request, by requests in flight"
    charts.lines("scale", title, "requests in flight", microseconds)
    columns = [f"{number} in flight" for number in costs[BARE]]
    cost_rows = {name: [f"{each:.0f}" for each in found.values()] for name, found in microseconds.items()}
    block_rows = {name: [f"{each:.1f}" for each in found.values()] for name, found in milliseconds.items()}
    tables = [
        report.table("microseconds a request", columns, cost_rows),
        report.table(f"longest block in ms, {options.requests} requests", list(milliseconds[BARE]), block_rows),
    ]
    report.save("scale", tables, {"costs": costs, "blocks": blocks}, {"scale": title})


if __name__ == "__main__":
    main()

"""What a request costs as more and more are in flight, and how long the event loop is blocked when 5,000 leave."""

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

import charts
import report
from calling import get
from contestants import BARE, Guard, application, contestants

IN_FLIGHT = [1, 10, 100, 1000]  # and as many as there are at most
DURATION = 1.0  # seconds in which all come, and in which all leave
TICK = 0.001  # seconds

Costs = dict[str, dict[int, list[float]]]  # by contestant and requests in flight: microseconds of processor time each
Blocks = dict[str, dict[str, list[float]]]  # by contestant and phase: the longest block of the event loop, milliseconds


async def wait(request: Request) -> Response:
    await request.state.end.wait()
    return Response()


class Crowd:
    """Requests to one application, and their clients."""

    def __init__(self, guard: Guard) -> None:
        self._app: ASGIApp = application("Starlette", guard, {"/": wait})
        self._tasks: list[asyncio.Task[None]] = []
        self._leaves: deque[asyncio.Future[None]] = deque()
        self.end = asyncio.Event()

    def come(self) -> None:
        """Have one more request begin."""
        left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._leaves.append(left)
        request = get(self._app, lambda: asyncio.shield(left), {"end": self.end})
        self._tasks.append(asyncio.create_task(request))

    def leave(self) -> None:
        """Have the client that came first leave."""
        self._leaves.popleft().set_result(None)

    async def join(self) -> None:
        self.end.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def cost(guard: Guard, in_flight: int) -> float:
    """Return the microseconds of processor time that a request takes while so many wait."""
    crowds = min(1 + 1000 // in_flight, 20)
    spent = 0.0
    for _ in range(crowds):
        crowd = Crowd(guard)
        gc.collect()
        began = process_time()
        for _ in range(in_flight):
            crowd.come()
        await asyncio.sleep(0.06)  # all that watch do so by now
        await crowd.join()
        spent += process_time() - began
    return spent / (crowds * in_flight) * 1e6


class Ticker:
    """Notes the longest that the event loop is kept from turning, in processor time: other processes don't count."""

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
        """Return it, in milliseconds."""
        self._handle.cancel()
        return self._longest * 1000


async def spread(step: Callable[[], None], times: int) -> None:
    """Do it so many times, evenly over `DURATION`."""
    began, done = perf_counter(), 0
    while done < times:
        await asyncio.sleep(TICK)
        due = min(times, int((perf_counter() - began) / DURATION * times))
        for _ in range(due - done):
            step()
        done = due


async def longest_blocks(guard: Guard, requests: int) -> dict[str, float]:
    """Have so many requests come within a second, wait for one, and leave within one."""
    crowd = Crowd(guard)
    gc.collect()
    gc.disable()  # its pauses, for so much that lives, are longer than any of these
    longest: dict[str, float] = {}
    for phase, step in {"all come": crowd.come, "all wait": lambda: None, "all leave": crowd.leave}.items():
        ticker = Ticker()
        await spread(step, requests)
        longest[phase] = ticker.stop()
    gc.enable()
    await crowd.join()
    return longest


def measure(rounds: int, most: int) -> tuple[Costs, Blocks]:
    """Measure everybody in each round, in random order."""
    guards = contestants()
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
    """Measure everybody on uvloop, in memory."""
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
        report.table(f"longest block in ms, of {options.requests}", list(milliseconds[BARE]), block_rows),
    ]
    report.save("scale", tables, {"costs": costs, "blocks": blocks}, {"scale": title})


if __name__ == "__main__":
    main()

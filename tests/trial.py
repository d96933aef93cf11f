"""What all random trials share: a server in virtual time, and how they are run."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import anyio
import trio
from anyio.lowlevel import checkpoint
from starlette.types import Message

from virtual import BACKENDS

# All times are in milliseconds of virtual time, on a coarse grid, so that many things happen in the same instant.
GRID = (0, 1, 5, 10, 20, 25, 30, 50, 60, 75, 100, 150)
STARTED = 50  # a watch is on by then
LATE = 30  # a cancellation that had to wait for something is delivered this much after it, at the latest

CUT = "receive() was cancelled and called again while body may come"


class BrokenPromise(AssertionError):
    """A promise was broken."""


@dataclass
class Traffic:
    """What comes from a client, how a server passes it on, and when the client leaves."""

    seed: int
    native: bool
    chunks: list[tuple[float, bytes]]
    final_is_empty: bool
    leave: int | None
    once: bool
    drops_body: bool
    checkpoints: bool


TrafficT = TypeVar("TrafficT", bound=Traffic)


class Trial(Protocol):
    """One random request; `unhandled` is where the event loop collects what nobody has handled."""

    async def __call__(self, seed: int, unhandled: list[dict[str, Any]], *, native: bool) -> None: ...  # Any: asyncio's


class Server(Generic[TrafficT]):
    """Gives the messages of a plan at their times, and notes how it should not have been called."""

    def __init__(self, plan: TrafficT, began: float) -> None:
        self.plan = plan
        self.began = began
        self.faults: list[str] = []
        self.receiving = self.interrupted = self.told = False
        last = len(plan.chunks) - 1
        self.messages: list[tuple[float, Message]] = [
            (time, {"type": "http.request", "body": data, "more_body": index < last or plan.final_is_empty})
            for index, (time, data) in enumerate(plan.chunks)
        ]
        if plan.final_is_empty or not plan.chunks:
            self.messages.append((plan.chunks[-1][0] if plan.chunks else 0, {"type": "http.request", "body": b""}))

    @property
    def now(self) -> float:
        return round((anyio.current_time() - self.began) * 1000, 3)

    @property
    def gone(self) -> bool:
        return self.plan.leave is not None and self.plan.leave <= self.now

    async def receive(self) -> Message:
        self.faults += ["receive() was called by two at once"] * self.receiving
        self.faults += [CUT] * bool(self.interrupted and self.messages)
        self.receiving = self.interrupted = True
        try:
            if self.plan.checkpoints:
                await checkpoint()
            while (message := self._next()) is None:
                times = [time for time, _ in self.messages[:1]]
                if self.plan.leave is not None:
                    times.append(self.plan.leave)
                await self.wait(min((time for time in times if time > self.now), default=math.inf))
            self.interrupted = False
            return message
        finally:
            self.receiving = False

    async def wait(self, until: float) -> None:
        await anyio.sleep_until(self.began + until / 1000)

    def _next(self) -> Message | None:
        if self.gone and self.plan.drops_body:
            self.messages.clear()
        if self.messages:
            time = self.messages[0][0]
            if time <= self.now and (self.plan.leave is None or time <= self.plan.leave):
                return self.messages.pop(0)[1]
        if self.gone and not (self.told and self.plan.once):
            self.messages.clear()
            self.told = True
            return {"type": "http.disconnect"}
        return None


class Records(logging.Handler):
    """Counts the records of a logger."""

    number = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.number += 1


@contextmanager
def recorded() -> Generator[Records]:
    """Count what is logged within the block."""
    records = Records()
    logger = logging.getLogger("cancelonleave")
    logger.setLevel(logging.INFO)
    logger.addHandler(records)
    try:
        yield records
    finally:
        logger.removeHandler(records)


def living_tasks(*, native: bool) -> int:
    return len(asyncio.all_tasks()) if native else trio.lowlevel.current_statistics().tasks_living


def run_trials(trial: Trial, backend: str, seeds: Iterable[int]) -> None:
    """Run trials one after the other in virtual time.

    Raises:
        BrokenPromise: For the first that failed, with its seed.
    """
    library, options = BACKENDS[backend]
    unhandled: list[dict[str, Any]] = []  # Any: asyncio's own type

    async def main() -> None:
        native = library == "asyncio"
        if native:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        for seed in seeds:
            await trial(seed, unhandled, native=native)

    anyio.run(main, backend=library, backend_options=options())


def main(trial: Trial) -> None:
    """Run trials as the command line says."""
    parser = argparse.ArgumentParser(description=trial.__doc__)
    parser.add_argument("--backend", choices=BACKENDS, default="asyncio")
    parser.add_argument("--trials", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; each has the next number")
    arguments = parser.parse_args()
    run_trials(trial, arguments.backend, range(arguments.seed, arguments.seed + arguments.trials))
    print(f"{arguments.trials} trials on {arguments.backend}: no fault")

"""What all random trials share: a server in virtual time, and the functions that run them."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import math
from collections.abc import Awaitable, Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import anyio
import trio
from anyio.lowlevel import checkpoint
from starlette.types import Message

from tests.shared.receiving import Receiving
from tests.shared.virtual_time import BACKENDS, stall

# All times are in milliseconds of virtual time, on a coarse grid, so that many things happen in the same instant.
GRID = (0, 1, 5, 10, 20, 25, 30, 50, 60, 75, 100, 150)
STARTED = 50  # by then a watch has begun
RETRY = 25  # until the next look at a call that could not be cancelled at once
LEARN = 1000  # a call that waits for a task that has read the disconnect has this long to learn of it from the task
LATE = 30  # a cancellation that had to wait for something is delivered at most this much later

CUT = "receive() was cancelled and called again while body may come"


class BrokenPromise(AssertionError):
    """A promise was broken."""


@dataclass
class Traffic:
    """What a client sends, how a server passes it on, and when the client disconnects."""

    seed: int
    native: bool
    chunks: list[tuple[float, bytes]]
    final_is_empty: bool
    disconnect: int | None
    once: bool
    drops_body: bool
    checkpoints: bool
    spec_version: str | None
    loses: bool  # loses body when a receive() that waits for it is cancelled; returns no coroutine, as on granian
    lies: bool  # reports a disconnect once a receive() after the whole body was cancelled

    @property
    def asgi(self) -> dict[str, str]:
        return {"version": "3.0"} | ({"spec_version": self.spec_version} if self.spec_version else {})


TrafficT = TypeVar("TrafficT", bound=Traffic)


class Trial(Protocol):
    """One random request; `unhandled` is where the event loop collects unhandled errors."""

    async def __call__(self, seed: int, unhandled: list[dict[str, Any]], *, native: bool) -> None: ...  # Any: asyncio's


class Server(Generic[TrafficT]):
    """Returns the messages of a plan at their times, and records calls that it should not get."""

    def __init__(self, plan: TrafficT, began: float) -> None:
        self.plan = plan
        self.began = began
        self.faults: list[str] = []
        self.receiving = self.interrupted = self.reported = self.lying = False
        self.stalled = 0.0  # milliseconds in which nothing could run
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
        return self.plan.disconnect is not None and self.plan.disconnect <= self.now

    def receive(self) -> Awaitable[Message]:
        return Receiving(self._receive) if self.plan.loses else self._receive()

    async def _receive(self) -> Message:
        self.faults += ["receive() was called by two at once"] * self.receiving
        self.faults += [CUT] * bool(self.interrupted and self.messages and self.plan.loses)
        self.receiving = self.interrupted = True
        try:
            if self.plan.checkpoints:
                await checkpoint()
            while (message := self._next()) is None:
                times = [time for time, _ in self.messages[:1]]
                if self.plan.disconnect is not None:
                    times.append(self.plan.disconnect)
                await self.wait(min((time for time in times if time > self.now), default=math.inf))
            self.interrupted = False
            return message
        finally:
            self.receiving = False
            # gunicorn does this, which is why the wait for a disconnect must not be cancelled there.
            self.lying |= self.plan.lies and self.interrupted and not self.messages

    async def wait(self, until: float) -> None:
        await self.sleep_until(self.began + until / 1000)

    def after(self, time: float) -> float:
        """Return the event loop's time in this many milliseconds, the same for everything due in one instant."""
        return self.began + round(self.now + time, 3) / 1000

    async def sleep(self, time: float) -> None:
        """Sleep until exactly that instant."""
        if time:
            await self.sleep_until(self.after(time))
        else:
            await checkpoint()

    async def sleep_until(self, when: float) -> None:
        # On trio, anyio adds up the time, so that the deadlines of one instant would differ by rounding errors.
        await (anyio if self.plan.native else trio).sleep_until(when)

    def stall(self, time: float) -> None:
        """Block the event loop."""
        stall(time / 1000)
        self.stalled += time

    def _next(self) -> Message | None:
        if self.gone and self.plan.drops_body:
            self.messages.clear()
        if self.messages:
            time = self.messages[0][0]
            if time <= self.now and (self.plan.disconnect is None or time <= self.plan.disconnect):
                return self.messages.pop(0)[1]
        if self.lying or (self.gone and not (self.reported and self.plan.once)):
            self.messages.clear()
            self.reported = True
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


class Run(Protocol):
    """One run of a plan, which notes its faults."""

    def require(self, fulfilled: bool, otherwise: str) -> None: ...


def compare(world: Run, plain: Run, names: Iterable[str]) -> None:
    """Record in which of these a run whose client stayed differs from the same one undecorated."""
    for name in names:
        end, plain_end = (getattr(one, name) for one in (world, plain))
        world.require(end == plain_end, f"{name}: {end!r}, undecorated {plain_end!r}")


async def run_until(run: Callable[[], Awaitable[None]], outside: int | None) -> bool:
    """Run it, for as long as nobody outside cancels it after so many milliseconds; return whether it has ended."""
    with anyio.move_on_after(100) as limit:
        if outside is None:
            await run()
        else:
            with anyio.move_on_after(outside / 1000):
                await run()
    return not limit.cancelled_caught


def living_tasks(*, native: bool) -> int:
    return len(asyncio.all_tasks()) if native else trio.lowlevel.current_statistics().tasks_living


def run_trials(trial: Trial, backend: str, seeds: Iterable[int]) -> None:
    """Run trials one after another in virtual time.

    Raises:
        BrokenPromise: For the first that failed, with its seed.
    """
    library, options = BACKENDS[backend]
    unhandled: list[dict[str, Any]] = []  # Any: asyncio's own type

    async def main() -> None:
        native = library == "asyncio"
        if native:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        else:
            trio.lowlevel.current_trio_token().run_sync_soon(bool)  # starts a trio task that lives as long as the run
        for seed in seeds:
            try:
                await trial(seed, unhandled, native=native)
            except asyncio.CancelledError as error:  # the cancellation was meant for the request
                raise BrokenPromise(f"seed {seed}: cancels on after the request") from error

    gc.freeze()  # collecting the garbage of each trial is a hundred times as fast without the existing objects
    try:
        anyio.run(main, backend=library, backend_options=options())
    finally:
        gc.unfreeze()


def main(trial: Trial) -> None:
    """Run trials as the command line says."""
    parser = argparse.ArgumentParser(description=trial.__doc__)
    parser.add_argument("--backend", choices=BACKENDS, default="asyncio")
    parser.add_argument("--trials", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; each has the next number")
    arguments = parser.parse_args()
    run_trials(trial, arguments.backend, range(arguments.seed, arguments.seed + arguments.trials))
    print(f"{arguments.trials} trials on {arguments.backend}: no fault")

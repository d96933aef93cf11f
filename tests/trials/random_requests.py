"""Random requests against an oracle: the promises, tested on endpoints that no one would think of.

Run a million of them with `python -m tests.trials.random_requests --backend asyncio --trials 1000000`.
"""

from __future__ import annotations

import asyncio
import gc
import math
import random
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, cast  # cast: isinstance() can't check the contents of a group

import anyio
from anyio.lowlevel import checkpoint
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from cancelonleave import ClientClosedRequest, cancel_on_disconnect
from tests.trials.common import (
    CUT,
    GRID,
    LATE,
    LEARN,
    RETRY,
    STARTED,
    BrokenPromise,
    Server,
    Traffic,
    living_tasks,
    main,
    recorded,
)

TIMEOUTS = ("move_on_after", "fail_after", "timeout")
NEVER = 50_000.0  # milliseconds: the time of an outside that interferes on request

Step = tuple[Any, ...]  # Any: the name of a step, its numbers, and steps inside it


@dataclass
class Plan(Traffic):
    """One random request: its traffic, its endpoint, and what interferes from outside."""

    outside: tuple[str, float] | None
    ending: str  # when the outside interferes: at its "time", at the planned "end" of the endpoint, or on its "return"
    armed: float  # at its "end": when the timer is set up, since of two timers of one instant the older runs first
    decorated: bool  # whether the endpoint itself is decorated, or only the helpers that it calls
    steps: list[Step]


class Planner:
    """Draws plans. `native` allows what only asyncio has: gather, TaskGroup, timeout, Task.cancel()."""

    def __init__(self, seed: int, *, native: bool) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.native = native
        self.outside: tuple[str, float] | None = None
        self.disconnect: int | None = None
        self.in_body = 0
        self.child_reads = False  # only one child of the whole plan reads, since a stream has one reader
        self.lags = self.random.random() < 0.25

    def plan(self) -> Plan:
        draw = self.random
        self.disconnect = draw.choice((*GRID, 200, 300)) if draw.random() < 0.7 else None
        # Without a disconnect the run is compared with the undecorated one, so there must be no ties.
        thousandths = 1000 if self.disconnect is None else 1
        if draw.random() < 0.3:
            kinds = ("cancel", "timeout", "fail_after") if self.native else ("fail_after",)
            self.outside = draw.choice(kinds), round(draw.choice(GRID[1:]) + draw.randrange(thousandths) / 1000, 3)
        ending = draw.choice(("time", "time", "return", "end"))
        if self.outside is None or (ending == "end" and self.disconnect is not None):
            ending = "time"  # the end of an endpoint is known only without a disconnect
        elif ending != "time":
            self.outside = self.outside[0], NEVER
        moments = [round(draw.choice(GRID) + draw.randrange(thousandths) / 1000, 3) for _ in range(draw.randint(0, 5))]
        spec_version = draw.choice((None, "2.3", "2.4"))
        decorated = draw.random() < 0.75
        return Plan(
            seed=self.seed,
            native=self.native,
            chunks=[(time, draw.randbytes(draw.randint(1, 9))) for time in sorted(moments)],
            final_is_empty=draw.random() < 0.5,
            disconnect=self.disconnect,
            once=draw.random() < 0.5,
            drops_body=draw.random() < 0.3,
            checkpoints=draw.random() < 0.5 or self.disconnect is None,  # we always have them in a cancelled scope
            spec_version=spec_version,
            lies=spec_version == "2.4" and draw.random() < 0.7,
            outside=self.outside,
            ending=ending,
            armed=draw.choice(GRID),
            decorated=decorated,
            steps=self.steps(depth=3, most=5) if decorated else self.helpers(),
            loses=draw.random() < 0.5,
        )

    def helpers(self) -> list[Step]:
        """Draw calls of decorated helpers, one after another and concurrently."""
        draw = self.random
        steps: list[Step] = []
        for _ in range(draw.randint(1, 3)):
            if draw.random() < 0.5:
                children = [[self.helper(child=True)] for _ in range(2)]
                steps.append(("gather", children) if self.native else ("nursery", children, []))
            else:
                steps.append(self.helper(child=False))
            steps.append(("sleep", draw.choice(GRID)))
        return [*steps, self.helper(child=False)]

    def helper(self, *, child: bool) -> Step:
        reads = not child or self.may_read()
        return "inner", self.random.random() < 0.3, self.steps(depth=2, child=child, reads=reads)

    def steps(self, depth: int, most: int = 3, *, child: bool = False, reads: bool = True) -> list[Step]:
        return [self.step(depth, child=child, reads=reads) for _ in range(self.random.randint(1, most))]

    def children(self, depth: int, *, reads: bool) -> tuple[list[list[Step]], bool]:
        """Draw what the children of a group do, and whether none of them reads."""
        draws = [reads and self.may_read() for _ in range(self.random.randint(1, 3))]
        return [self.steps(depth, child=True, reads=each) for each in draws], not any(draws)

    def may_read(self) -> bool:
        """Whether the next child is the one that reads."""
        if self.child_reads or self.random.random() < 0.5:
            return False
        self.child_reads = True
        return True

    def step(self, depth: int, *, child: bool, reads: bool) -> Step:
        draw = self.random
        simple = ["tick", "sleep", "sleep", "sleep", "shield"]
        # The order of tasks around a stall means nothing, so no other task runs then if runs are compared.
        simple += ["stall"] * (self.lags and (self.disconnect is not None or not (child or self.in_body)))
        if reads:
            simple += ["read", "body"] * (1 + 2 * child)
        if not child and self.disconnect is not None:  # undecorated, it would lose a chunk of the body
            simple += ["poll"]
        nested = ["cleanup", "cleanup", "nursery", "inner"] + ["carry_on"] * (1 + child) * reads
        if not child:  # anyio 4.16 may uncancel a nursery's own task for a timeout of its child's
            nested += ["move_on_after", "fail_after"]
        if self.native:
            nested += ["gather", "task_group", "timeout"]
            # A reading child that outlives its gather would go on beside the next reader.
            if self.outside is None and not (child and reads):
                nested += ["swallow"]
        kind = draw.choice(simple + nested * 2 if depth else simple)
        # A child's error would abandon gather's other children; in a nursery's body, which children began is random.
        if draw.random() < 0.04 and not child and not self.in_body:
            kind = draw.choice(("http_error", "error"))
        match kind:
            case "sleep" | "shield":
                return kind, draw.choice(GRID)
            case "stall":
                return kind, draw.choice(GRID[1:])
            case "read":
                return kind, draw.randint(1, 3)
            case "cleanup" | "move_on_after" | "fail_after" | "timeout":
                # No timeout of 0: it interrupts only reads with a checkpoint, which a read from the buffer lacks.
                return kind, draw.choice(GRID[1:]), self.steps(depth - 1, child=child, reads=reads)
            case "carry_on":
                return kind, draw.choice((*GRID, 900, 1500)), self.steps(depth - 1, child=child, reads=reads)
            case "gather" | "task_group":
                return kind, self.children(depth - 1, reads=reads)[0]
            case "nursery":
                children, none_reads = self.children(depth - 1, reads=reads)
                self.in_body += 1
                body_reads = reads and none_reads
                body = self.steps(depth - 1, child=child, reads=body_reads) if draw.random() < 0.5 else []
                self.in_body -= 1
                return kind, children, body
            case "inner":
                return kind, child or draw.random() < 0.5, self.steps(depth - 1, child=child, reads=reads)
            case "swallow":
                return kind, self.steps(depth - 1, child=child, reads=reads)
            case _:
                return (kind,)


@dataclass(frozen=True)
class Place:
    """Where in an endpoint a step is, as far as that excuses what would be a fault elsewhere."""

    guarded: float | None = None  # since when this task has been the host task of a decorated call
    is_child: bool = False  # the step runs in another task than the endpoint
    fired: tuple[Callable[[], bool], ...] = ()  # timeouts around the step: each cancels independently
    natively: tuple[Callable[[], bool], ...] = ()  # timeouts that ignore anyio's shields
    in_nursery: bool = False  # anyio cancels a task group's children again and again
    in_task: bool = False  # gather and TaskGroup cancel their children natively

    def inside(self, *fired: Callable[[], bool], natively: bool = False) -> Place:
        return replace(self, fired=self.fired + fired, natively=self.natively + (fired if natively else ()))

    def call(self, now: float) -> Place:
        """Return the place within a decorated call."""
        return self if self.guarded is not None else replace(self, guarded=now)

    def child(self, *, in_task: bool = False) -> Place:
        return replace(self, guarded=None, is_child=True, in_task=self.in_task or in_task)


class World:
    """One run of a plan: what the endpoint does, and the faults that it saw."""

    def __init__(self, plan: Plan, *, decorated: bool) -> None:
        self.plan = plan
        self.decorated = decorated
        self.steps = repr(plan.steps)
        self.gathers = "'gather'" in self.steps
        self.reads = any(name in self.steps for name in ("'read'", "'body'"))
        self.has_timeouts = any(name in self.steps for name in TIMEOUTS)
        # These raise their own CancelledError, or hide one, which an anyio timeout around them can't distinguish.
        self.recancels = any(name in self.steps for name in ("'gather'", "'task_group'", "'timeout'"))
        self.server = Server(plan, anyio.current_time())
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/", "headers": []}  # Any: as ASGI has it
        scope["asgi"] = plan.asgi
        self.request = Request(scope, self.server.receive)
        self.faults = self.server.faults
        self.trace: list[tuple[object, ...]] = []
        self.body = b""
        self.stream: AsyncGenerator[bytes] | None = None
        self.whole = False  # the body was read to its end
        self.knowing: set[int] = set()  # the tasks that have learned of the disconnect, and may go on
        self.is_known = False  # one of them has learned of it from a report
        self.learned_by_reading = False  # the endpoint's own task
        self.child_read = math.inf  # when a child read it; the others have a second to learn of it
        self.child_read_when_cut = False
        self.child_failed = False  # so its group cancels the other children
        self.read_when_cancelled = False
        self.child_was_cut = False
        self.by_level = False
        self.in_care = 0  # cleanups and shields in progress
        self.settled = 0.0  # when the last of them ended
        self.hooks: list[str] = []
        self.end: object = None  # how the endpoint ended: its result or its exception
        self.outcome: object = None  # what its caller got
        self.final: object = None  # the outcome of the timeout around the call
        self.cancelling = 0
        self.left_behind = 0
        self.ended = 0.0
        self.task: asyncio.Task[Any] | None = None  # the task that calls the endpoint
        self.interfere: Callable[[], object] = lambda: None  # makes the outside cancel now
        self.outside_fired: Callable[[], bool] = lambda: False
        self.outside_was_first = False

    def note(self, *event: object) -> None:
        self.trace.append((self.server.now, *event))

    def require(self, fulfilled: bool, otherwise: str) -> None:
        self.faults += [f"at {self.server.now} ms: {otherwise}"] * (not fulfilled)

    def hook(self, request: Request) -> None:
        self.hooks.append("endpoint")
        self.require(self.gathers or not self.in_care, "on_disconnect was called before the cleanup had ended")

    def learn(self) -> None:
        self.knowing.add(anyio.get_current_task().id)

    def child_learns(self) -> None:
        host_is_cut = self.task is not None and self.task.cancelling() > 0
        self.child_read_when_cut |= host_is_cut or anyio.current_effective_deadline() == -math.inf
        self.child_read = min(self.child_read, self.server.now)

    @property
    def counts_wrongly(self) -> bool:
        """Whether a TaskGroup has cancelled a task without uncancelling it, as if it were still being cancelled."""
        # Before Python 3.13 it does so if a child fails while it is waited for (python/cpython#116720).
        return sys.version_info < (3, 13) and self.child_failed and "'task_group'" in self.steps

    def require_prompt(self, place: Place) -> None:
        """Require that a call that should have been cancelled doesn't go on."""
        knows = anyio.get_current_task().id in self.knowing
        if self.plan.disconnect is None or place.guarded is None or knows or self.in_care or self.counts_wrongly:
            return
        due = max(self.plan.disconnect, place.guarded + STARTED, self.settled) + LATE
        # Calls in other tasks are cancelled later, because the cancellation of their caller usually ends them too.
        due += RETRY * (place.is_child or not self.plan.decorated)
        # A child that has read the disconnect usually informs the others by its end, so they have a second for that.
        if self.child_read < math.inf:
            due = max(due, self.child_read + LEARN + LATE)
        # Everything in progress is late by at most the time in which the event loop was blocked.
        due += self.server.stalled
        self.require(self.server.now <= due, f"the call should have been cancelled by {due} ms, but goes on")

    async def endpoint(self, request: Request) -> str:
        try:
            await self.run(self.plan.steps, Place(guarded=0 if self.plan.decorated else None))
            await checkpoint()
        except BaseException as error:
            self.end = error
            raise
        else:
            self.end = "result"
            if self.plan.ending == "return":
                self.interfere()
            return "result"
        finally:
            self.outside_was_first = self.outside_fired()
            self.ended = self.server.now

    def set_up(self, set_deadline: Callable[[float], object], when: float) -> None:
        """Set a deadline of the outside, at the time that the plan says."""
        if self.plan.native and self.plan.ending == "end" and self.plan.armed:
            asyncio.get_running_loop().call_at(self.server.after(self.plan.armed), set_deadline, when)
        else:
            set_deadline(when)

    async def run(self, steps: list[Step], place: Place) -> None:
        for name, *rest in steps:
            self.note(name)
            await getattr(self, f"do_{name}")(place, *rest)

    async def do_tick(self, place: Place) -> None:
        await checkpoint()

    async def do_sleep(self, place: Place, time: int) -> None:
        self.require_prompt(place)
        await self.server.sleep(time)
        self.require_prompt(place)

    async def do_stall(self, place: Place, time: int) -> None:
        self.server.stall(time)

    async def do_shield(self, place: Place, time: int) -> None:
        with anyio.CancelScope(shield=True), self.care("a shield") as done:
            try:
                await self.server.sleep(time)
                done()
            finally:
                native_outside = self.plan.outside is not None and self.plan.outside[0] != "fail_after"
                if native_outside or place.in_task or any(fired() for fired in place.natively):
                    done()
        await checkpoint()

    async def do_cleanup(self, place: Place, time: int, steps: list[Step]) -> None:
        cut = False
        try:
            await self.run(steps, place)
        except (anyio.get_cancelled_exc_class(), ClientDisconnect):
            cut = True
            raise
        finally:
            with self.care("a cleanup") as done:
                try:
                    await self.server.sleep(time)
                    await checkpoint()
                    done()
                finally:
                    level = not self.plan.native or place.in_nursery or self.read_when_cancelled or self.by_level
                    if not cut or level or self.plan.outside is not None or any(fired() for fired in place.fired):
                        done()

    @contextmanager
    def care(self, what: str) -> Generator[Callable[[], None]]:
        excused = False

        def done() -> None:
            nonlocal excused
            excused = True

        self.in_care += 1
        try:
            yield done
        finally:
            self.in_care -= 1
            self.settled = self.server.now
            self.require(excused, f"{what} was cut short")

    async def do_read(self, place: Place, chunks: int) -> None:
        if place.is_child:
            await self.read_in_child(place, chunks)
            return
        for _ in range(chunks):
            if not await self.read():
                break

    async def do_body(self, place: Place) -> None:
        await self.do_read(place, 1000)

    async def read(self) -> bool:
        if self.stream is None:
            self.stream = self.request.stream()
        try:
            return await self.chunk(self.stream)
        except ClientDisconnect:
            self.stream = None
            # In a cancelled scope a read looks like is_disconnected(), which notifies no call.
            self.read_when_cancelled = anyio.current_effective_deadline() == -math.inf
            self.learned_by_reading = True
            raise
        except BaseException:
            self.stream = None  # an interrupted generator has ended
            raise

    async def read_in_child(self, place: Place, chunks: int) -> None:
        async with aclosing(self.request.stream()) as stream:
            try:
                for _ in range(chunks):
                    if not await self.chunk(stream):
                        break
            except ClientDisconnect:
                self.child_learns()
                raise

    async def chunk(self, stream: AsyncGenerator[bytes]) -> bool:
        """Read a chunk of the body; return whether there was one."""
        if self.whole:
            return False
        try:
            chunk = await anext(stream)
        except StopAsyncIteration:
            self.whole = True
            return False
        except RuntimeError as error:  # another stream got the last chunk, but was not read to its end
            self.require(str(error) == "Stream consumed", repr(error))
            self.whole = True
            return False
        except ClientDisconnect:
            self.learn()
            self.is_known = True
            self.require(self.server.gone, "a disconnect, but the client is there")
            raise
        self.body += chunk
        self.note("piece", chunk)
        return True

    async def do_carry_on(self, place: Place, time: int, steps: list[Step]) -> None:
        try:
            await self.run(steps, place)
        except ClientDisconnect:
            self.learn()
            began = self.server.now
            try:
                await self.server.sleep(time)
            except anyio.get_cancelled_exc_class():
                others = self.plan.outside is not None or any(fired() for fired in place.fired)
                cut_before = self.child_read_when_cut if place.is_child else self.read_when_cancelled
                # A group cancels its children when one has failed, and when it is cancelled itself a second later.
                by_group = place.is_child and (self.child_failed or self.server.now >= self.child_read + LEARN)
                self.require(
                    others or cut_before or by_group, f"cancelled although it had read the disconnect by {began} ms"
                )
                raise

    async def do_poll(self, place: Place) -> None:
        if await self.request.is_disconnected():
            self.require(self.server.gone, "a disconnect, but the client is there")

    async def do_move_on_after(self, place: Place, time: int, steps: list[Step]) -> None:
        with anyio.move_on_at(self.server.after(time)) as scope:
            await self.run(steps, place.inside(lambda: scope.cancel_called))
        self.note("moved on", scope.cancelled_caught)

    async def do_fail_after(self, place: Place, time: int, steps: list[Step]) -> None:
        with suppress(TimeoutError), anyio.fail_at(self.server.after(time)) as scope:
            await self.run(steps, place.inside(lambda: scope.cancel_called))

    async def do_timeout(self, place: Place, time: int, steps: list[Step]) -> None:
        deadline = self.server.after(time)

        def fired() -> bool:
            return anyio.current_time() >= deadline

        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self.run(steps, place.inside(fired, natively=True))

    async def do_nursery(self, place: Place, children: list[list[Step]], body: list[Step]) -> None:
        place = replace(place, in_nursery=True)
        self.by_level |= "'shield'" in repr(body)  # then anyio also repeats until it reaches the task
        async with anyio.create_task_group() as task_group:
            for steps in children:
                task_group.start_soon(self.run_in_nursery, steps, place.child())
            await self.run(body, place)

    async def run_in_nursery(self, steps: list[Step], place: Place) -> None:
        try:
            await self.run_child(steps, place)
        except anyio.get_cancelled_exc_class():
            self.child_was_cut |= not any(fired() for fired in place.fired)
            raise

    async def run_child(self, steps: list[Step], place: Place) -> None:
        try:
            await self.run(steps, place)
        except Exception:
            self.child_failed = True
            raise

    async def do_gather(self, place: Place, children: list[list[Step]]) -> None:
        await asyncio.gather(*(self.run_child(steps, place.child(in_task=True)) for steps in children))
        self.require_prompt(place)

    async def do_task_group(self, place: Place, children: list[list[Step]]) -> None:
        async with asyncio.TaskGroup() as task_group:
            for steps in children:
                task_group.create_task(self.run_child(steps, place.child(in_task=True)))
        self.require_prompt(place)

    async def do_swallow(self, place: Place, steps: list[Step]) -> None:
        try:
            await self.run(steps, place)
        except asyncio.CancelledError:
            self.learn()

    async def do_inner(self, place: Place, catches: bool, steps: list[Step]) -> None:
        started = False

        async def inner(request: Request) -> None:
            nonlocal started
            started = True
            self.require(not self.is_known, "a call was started after the disconnect")
            await self.run(steps, place.call(self.server.now))

        called = cancel_on_disconnect(inner) if self.decorated else inner
        try:
            await called(self.request)
            await checkpoint()
        except ClientClosedRequest:
            self.learn()
            self.is_known = True
            self.require(self.server.gone, "a disconnect, but the client is there")
            if place.is_child and not started:  # refused, which informs its task as a read does
                self.child_learns()
            if not catches:
                raise

    async def do_http_error(self, place: Place) -> None:
        raise HTTPException(418)

    async def do_error(self, place: Place) -> None:
        raise ValueError("the endpoint's own")


async def run_plan(plan: Plan, *, decorated: bool) -> World:
    """Run a plan once, and return the world that recorded it."""
    world = World(plan, decorated=decorated)
    tasks = living_tasks(native=plan.native)
    endpoint = world.endpoint
    if decorated and plan.decorated:
        endpoint = cancel_on_disconnect(on_disconnect=world.hook)(endpoint)

    async def call() -> None:
        try:
            world.outcome = await endpoint(world.request)
        except BaseException as error:
            world.outcome = error
            raise

    async def host() -> None:
        try:
            await call_from_outside(world, call)
        except BaseException as error:
            world.final = error
        else:
            world.final = world.outcome
        if plan.native:
            assert world.task is not None
            world.cancelling = world.task.cancelling()

    with anyio.move_on_after(100) as limit:
        await (in_task(world, host) if plan.native else host())
    world.require(not limit.cancelled_caught, "it hangs")
    if world.stream is not None:
        await world.stream.aclose()
    await until_over(world, tasks)
    world.left_behind = max(living_tasks(native=plan.native) - tasks, 0)
    await anyio.sleep(10)  # after the first cancelled child, gather doesn't wait for the others
    if world.gathers and plan.outside is not None:  # one of these may have held the request until now
        gc.collect()
        await anyio.sleep(0.1)
    return world


def forget(error: object) -> None:
    """Remove the tracebacks of an error and those in its group, whose frames hold the request."""
    if isinstance(error, BaseException):
        error.__traceback__ = error.__context__ = error.__cause__ = None
    if isinstance(error, BaseExceptionGroup):
        for each in cast("BaseExceptionGroup[BaseException]", error).exceptions:
            forget(each)


async def until_over(world: World, tasks: int) -> None:
    """Wait until everything that belongs to a request has ended, which is when nothing holds it any more."""
    if not isinstance(world.outcome, ClientClosedRequest):
        del world.request
        for error in (world.end, world.outcome, world.final):
            forget(error)
        # A task of an earlier trial may have ended meanwhile, so counting tasks is not enough.
        if world.server.receiving or living_tasks(native=world.plan.native) > tasks:
            gc.collect()
    await anyio.sleep(1.1)


async def call_from_outside(world: World, call: Callable[[], Awaitable[None]]) -> None:
    """Call under the timeout that the plan puts around the endpoint, if it has one."""
    match world.plan.outside:
        case "fail_after", time:
            with anyio.fail_at(world.server.after(NEVER)) as scope:

                def set_deadline(when: float) -> None:
                    scope.deadline = when

                world.outside_fired = lambda: scope.cancel_called
                world.interfere = lambda: set_deadline(anyio.current_time())
                world.set_up(set_deadline, world.server.after(time))
                await call()
        case "timeout", time:
            async with asyncio.timeout(None) as timeout:
                world.outside_fired = lambda: world.server.now > time
                world.interfere = lambda: timeout.reschedule(anyio.current_time())
                world.set_up(timeout.reschedule, world.server.after(time))
                await call()
        case _:
            await call()


async def in_task(world: World, host: Callable[[], Coroutine[Any, Any, None]]) -> None:  # Any: as create_task() has it
    """Run `host` in a task, cancelled from outside at the time that the plan has for it."""
    world.task = task = asyncio.create_task(host())
    fired = False

    def cancel() -> None:
        nonlocal fired
        fired = task.cancel()

    def cancel_at(when: float) -> None:
        timers.append(asyncio.get_running_loop().call_at(when, cancel))

    timers: list[asyncio.TimerHandle] = []
    match world.plan.outside:
        case "cancel", time:
            world.outside_fired = lambda: fired
            world.interfere = cancel
            world.set_up(cancel_at, world.server.after(time))
            await asyncio.wait([task])
            for timer in timers:
                timer.cancel()
        case _:
            await asyncio.wait([task])
    world.cancelling -= fired


def is_disconnect(end: object) -> bool:
    if isinstance(end, BaseExceptionGroup):
        rest = cast("BaseExceptionGroup[BaseException]", end).split(anyio.get_cancelled_exc_class())[1]
        return rest is not None and all(is_disconnect(error) for error in rest.exceptions)
    return isinstance(end, ClientDisconnect)


def judge(world: World) -> None:
    """Record what contradicts the promises in the end of a decorated run."""
    plan, end, outcome = world.plan, world.end, world.outcome
    cancelled = anyio.get_cancelled_exc_class()
    disconnected = isinstance(outcome, ClientClosedRequest)
    stopped = isinstance(outcome, cancelled)
    nested = world.steps.count("'nursery'") > 1  # then anyio 4.16 may uncancel its host task once too often
    if isinstance(end, cancelled):
        may_be_passed_on = plan.outside is not None or world.recancels or not world.server.gone
        right = stopped if world.outside_was_first and not nested else disconnected or (stopped and may_be_passed_on)
    elif is_disconnect(end):
        right = disconnected or (plan.outside is not None and (stopped or outcome is end))
    else:
        # trio takes its own cancellations out of a group.
        same = outcome is end or (isinstance(outcome, ExceptionGroup) and isinstance(end, BaseExceptionGroup))
        right = same or (stopped and plan.outside is not None)
    right |= not plan.decorated and outcome is end  # an undecorated caller gets what its helpers raised
    world.require(right, f"the endpoint ended with {end!r}, its caller got {outcome!r}")
    world.require(world.server.gone or not disconnected, "the request was cancelled, but the client is there")
    world.require(
        world.hooks == ["endpoint"] * (disconnected and plan.decorated),
        f"on_disconnect was called {len(world.hooks)} times",
    )
    calm = plan.outside is None and not world.recancels and not world.has_timeouts
    notified_twice = world.learned_by_reading and isinstance(end, cancelled) and calm
    world.require(not notified_twice, "the endpoint had read the disconnect, and was cancelled as well")
    hurried = isinstance(end, cancelled) and world.ended < world.child_read + LEARN and not world.child_read_when_cut
    world.require(
        not (hurried and calm and world.child_read < math.inf),
        "a child had read of the disconnect, and the endpoint was not given a second to learn of it",
    )
    world.require(plan.decorated or plan.outside is not None or not stopped, "a helper ended with a bare cancellation")
    if plan.ending == "return" and end == "result":
        delivered = outcome == world.final == "result"
        world.require(delivered, f"cut as it returned, its caller got {outcome!r}, and in the end {world.final!r}")
    # A task that has read the disconnect raises it through such a group, and it may have been caught.
    excused = plan.outside is not None or world.recancels or "'swallow'" in world.steps or world.is_known
    world.require(
        excused or not (world.child_was_cut and end == "result"),
        "the endpoint got past a task group whose children were cut as if they had ended well",
    )
    in_timeout = plan.outside is not None and plan.outside[0] != "cancel" and not world.recancels
    timed_out = isinstance(world.final, TimeoutError)
    world.require(timed_out or not (stopped and in_timeout), f"the timeout around it ended with {world.final!r}")
    is_counted = nested or world.counts_wrongly
    world.require(is_counted or not world.cancelling, f"Task.cancelling() is off by {world.cancelling}")
    whole = b"".join(data for _, data in plan.chunks)
    complete = world.body == whole or not world.whole
    world.require(whole.startswith(world.body) and complete, f"the endpoint read {world.body!r} of {whole!r}")


async def judge_afterwards(world: World) -> None:
    """Record whether this request and other decorated functions remember the disconnect."""
    if isinstance(world.outcome, ClientClosedRequest):
        with anyio.fail_after(1):
            remembered = await world.request.is_disconnected()
            world.require(remembered, "is_disconnected() is false after the disconnect")
            world.end = None
            with suppress(ClientClosedRequest):
                await cancel_on_disconnect(world.endpoint)(world.request)
            world.require(world.end is None, "an endpoint was started after the disconnect")


def compare(world: World, plain: World) -> None:
    """Record how a run whose client stayed differs from the same run undecorated."""
    # Tasks that run in the same instant do so in no particular order; trio even shuffles them.
    events, plain_events = Counter(world.trace), Counter(plain.trace)
    world.require(
        events == plain_events, f"only decorated {events - plain_events}, only undecorated {plain_events - events}"
    )
    same_end = (type(world.outcome), type(world.final)) == (type(plain.outcome), type(plain.final))
    same_body = (world.body, world.whole) == (plain.body, plain.whole)
    world.require(
        same_end and same_body, f"it read {world.body!r} and ended with {world.final!r}, undecorated otherwise"
    )


async def run_trial(seed: int, unhandled: list[dict[str, Any]], *, native: bool) -> None:  # Any: asyncio's own type
    """Run one trial; `unhandled` is where the event loop collects unhandled errors.

    Raises:
        BrokenPromise: If a promise was broken.
    """
    plan = Planner(seed, native=native).plan()
    if plan.ending == "end" and plan.outside is not None:
        plain = await run_plan(replace(plan, outside=None), decorated=False)
        plan.outside = plan.outside[0], plain.ended
        plan.armed *= plan.armed < plain.ended
    tasks = living_tasks(native=native)
    with recorded() as records:
        world = await run_plan(plan, decorated=True)
    world.require(world.gathers or not world.left_behind, "a task was left behind")
    world.require(living_tasks(native=native) <= tasks, "a task was left behind for good")
    # Tasks that outlived their gather may have called a decorated function.
    world.faults[:] = [fault for fault in world.faults if fault != CUT or not world.left_behind]
    world.require(not world.server.receiving, "a receive() was left pending")
    least = isinstance(world.outcome, ClientClosedRequest)
    world.require(least <= records.number <= 1, f"{records.number} log records")
    world.require(not unhandled, f"the event loop reports {unhandled}")
    judge(world)
    await judge_afterwards(world)
    # An anyio timeout cancels at each turn of the loop, so with these inside, the outcome is random.
    chaos = plan.outside is not None and plan.outside[0] == "fail_after" and world.recancels
    # A read takes an additional turn, so a timeout that passed during a stall may interrupt the next read.
    lag = "'stall'" in world.steps and world.reads and (plan.outside is not None or world.has_timeouts)
    if plan.disconnect is None and not (chaos or lag):
        plain = await run_plan(plan, decorated=False)
        # The order of a chunk that a read waits for and a deadline of the same instant isn't checked either.
        tie = plan.ending == "end" and any(event[0] == plain.ended and "piece" in event for event in plain.trace)
        if not tie:
            compare(world, plain)
    if world.faults:
        raise BrokenPromise("\n".join([f"seed {seed}", *world.faults, repr(plan), *map(str, world.trace)]))


if __name__ == "__main__":
    main(run_trial)

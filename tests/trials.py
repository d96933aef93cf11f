"""Random requests against an oracle: the promises, tried on endpoints that nobody would think of.

Run a million of them with `python tests/trials.py --backend asyncio --trials 1000000`.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, cast  # cast: isinstance() can't tell what is in a group

import anyio
from anyio.lowlevel import checkpoint
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from cancelonleave import ClientClosedRequest, cancel_on_disconnect
from trial import CUT, GRID, LATE, STARTED, BrokenPromise, Server, Traffic, living_tasks, main, recorded

TIMEOUTS = ("move_on_after", "fail_after", "timeout")

Step = tuple[Any, ...]  # Any: the name of a step, its numbers, and steps inside it


@dataclass
class Plan(Traffic):
    """One random request: its traffic, its endpoint, and what interferes from outside."""

    outside: tuple[str, float] | None
    steps: list[Step]


class Planner:
    """Draws plans. `native` allows what only asyncio has: gather, TaskGroup, timeout, Task.cancel()."""

    def __init__(self, seed: int, *, native: bool) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.native = native
        self.outside: tuple[str, float] | None = None
        self.leave: int | None = None
        self.in_body = 0

    def plan(self) -> Plan:
        draw = self.random
        self.leave = draw.choice((*GRID, 200, 300)) if draw.random() < 0.7 else None
        # Without a leave the request is compared with the undecorated one: no ties there, whose order means nothing.
        thousandths = 1000 if self.leave is None else 1
        if draw.random() < 0.3:
            kinds = ("cancel", "timeout", "fail_after") if self.native else ("fail_after",)
            self.outside = draw.choice(kinds), round(draw.choice(GRID[1:]) + draw.randrange(thousandths) / 1000, 3)
        moments = [round(draw.choice(GRID) + draw.randrange(thousandths) / 1000, 3) for _ in range(draw.randint(0, 5))]
        return Plan(
            seed=self.seed,
            native=self.native,
            chunks=[(time, draw.randbytes(draw.randint(1, 9))) for time in sorted(moments)],
            final_is_empty=draw.random() < 0.5,
            leave=self.leave,
            once=draw.random() < 0.5,
            drops_body=draw.random() < 0.3,
            checkpoints=draw.random() < 0.5 or self.leave is None,  # under a cancelled scope, we always do
            outside=self.outside,
            steps=self.steps(depth=3, most=5),
        )

    def steps(self, depth: int, most: int = 3, *, child: bool = False) -> list[Step]:
        return [self.step(depth, child=child) for _ in range(self.random.randint(1, most))]

    def step(self, depth: int, *, child: bool) -> Step:
        draw = self.random
        simple = ["tick", "sleep", "sleep", "sleep", "shield"]
        if not child:  # one stream has one reader
            simple += ["read", "body"]
        if not child and self.leave is not None:  # undecorated, it would eat a piece of the body
            simple += ["poll"]
        nested = ["cleanup", "cleanup", "nursery", "inner"]
        if not child:  # anyio 4.16 may uncancel a nursery's own task for a timeout of its child's
            nested += ["move_on_after", "fail_after"]
        if self.native:
            nested += ["gather", "task_group", "timeout"]
            if self.outside is None:
                nested += ["swallow"]
        kind = draw.choice(simple + nested * 2 if depth else simple)
        # A child's would leave gather's others behind, and in a nursery's body it hangs on chance which children began.
        if draw.random() < 0.04 and not child and not self.in_body:
            kind = draw.choice(("http_error", "error"))
        match kind:
            case "sleep" | "shield":
                return kind, draw.choice(GRID)
            case "read":
                return kind, draw.randint(1, 3)
            case "cleanup" | "move_on_after" | "fail_after" | "timeout":
                # No timeout of 0: whether it cuts a read hangs on whether that has a checkpoint, ahead it has none.
                return kind, draw.choice(GRID[1:]), self.steps(depth - 1, child=child)
            case "gather" | "task_group":
                return kind, [self.steps(depth - 1, child=True) for _ in range(draw.randint(1, 3))]
            case "nursery":
                children = [self.steps(depth - 1, child=True) for _ in range(draw.randint(1, 3))]
                self.in_body += 1
                body = self.steps(depth - 1, child=child) if draw.random() < 0.5 else []
                self.in_body -= 1
                return kind, children, body
            case "inner":
                return kind, child or draw.random() < 0.5, self.steps(depth - 1, child=child)
            case "swallow":
                return kind, self.steps(depth - 1, child=child)
            case _:
                return (kind,)


@dataclass(frozen=True)
class Place:
    """Where in an endpoint a step stands, as far as it excuses what would be a fault elsewhere."""

    fired: tuple[Callable[[], bool], ...] = ()  # timeouts around it: each cancels for itself
    natively: tuple[Callable[[], bool], ...] = ()  # those that cut through anyio's shields
    in_nursery: bool = False  # anyio cancels a task group's children again and again
    in_task: bool = False  # gather and TaskGroup cancel their children natively

    def inside(self, *fired: Callable[[], bool], natively: bool = False) -> Place:
        return replace(self, fired=self.fired + fired, natively=self.natively + (fired if natively else ()))


class World:
    """One run of a plan: what the endpoint does, and what it should not have seen."""

    def __init__(self, plan: Plan, *, decorated: bool) -> None:
        self.plan = plan
        self.decorated = decorated
        self.steps = repr(plan.steps)
        self.gathers = "'gather'" in self.steps
        # These raise a CancelledError of their own, or hide one, which a timeout of anyio's around them can't tell.
        self.recancels = any(name in self.steps for name in ("'gather'", "'task_group'", "'timeout'"))
        self.server = Server(plan, anyio.current_time())
        self.request = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, self.server.receive)
        self.faults = self.server.faults
        self.trace: list[tuple[object, ...]] = []
        self.body = b""
        self.stream: AsyncGenerator[bytes] | None = None
        self.whole = False  # the body was read to its end
        self.told = False  # the endpoint has learned of the leave, and goes on
        self.told_by_reading = False
        self.read_when_cancelled = False
        self.child_was_cut = False
        self.by_level = False
        self.in_care = 0  # cleanups and shields under way
        self.settled = 0.0  # when the last of them ended
        self.hooks: list[str] = []
        self.end: object = None  # how the endpoint ended: its result or its exception
        self.outcome: object = None  # what its caller got
        self.final: object = None  # what came out of the timeout around that
        self.cancelling = 0
        self.left_behind = 0
        self.outside_fired: Callable[[], bool] = lambda: False
        self.outside_was_first = False

    def note(self, *event: object) -> None:
        self.trace.append((self.server.now, *event))

    def require(self, fulfilled: bool, otherwise: str) -> None:
        self.faults += [f"at {self.server.now} ms: {otherwise}"] * (not fulfilled)

    def hook(self, request: Request) -> None:
        self.hooks.append("endpoint")
        self.require(self.gathers or not self.in_care, "on_disconnect was called before the cleanup had ended")

    async def endpoint(self, request: Request) -> str:
        try:
            await self.run(self.plan.steps, Place())
            await checkpoint()
        except BaseException as error:
            self.end = error
            raise
        else:
            self.end = "result"
            return "result"
        finally:
            self.outside_was_first = self.outside_fired()

    async def run(self, steps: list[Step], place: Place) -> None:
        for name, *rest in steps:
            self.note(name)
            await getattr(self, f"do_{name}")(place, *rest)

    async def do_tick(self, place: Place) -> None:
        await checkpoint()

    async def do_sleep(self, place: Place, time: int) -> None:
        if self.plan.leave is not None and not (self.told or self.in_care or place.in_task or place.in_nursery):
            due = max(self.plan.leave, STARTED, self.settled) + LATE
            self.require(self.server.now <= due, f"the endpoint should have been cancelled by {due} ms, but goes on")
        await anyio.sleep(time / 1000)

    async def do_shield(self, place: Place, time: int) -> None:
        with anyio.CancelScope(shield=True), self.care("a shield") as done:
            try:
                await anyio.sleep(time / 1000)
                done()
            finally:
                native_outside = self.plan.outside is not None and self.plan.outside[0] != "fail_after"
                if native_outside or place.in_task or any(fired() for fired in place.natively):
                    done()
        await checkpoint()

    async def do_cleanup(self, place: Place, time: int, steps: list[Step]) -> None:
        told = False
        try:
            await self.run(steps, place)
        except (anyio.get_cancelled_exc_class(), ClientDisconnect):
            told = True
            raise
        finally:
            with self.care("a cleanup") as done:
                try:
                    await anyio.sleep(time / 1000)
                    await checkpoint()
                    done()
                finally:
                    level = not self.plan.native or place.in_nursery or self.read_when_cancelled or self.by_level
                    if not told or level or self.plan.outside is not None or any(fired() for fired in place.fired):
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
        for _ in range(chunks):
            if not await self.read():
                break

    async def do_body(self, place: Place) -> None:
        while await self.read():
            pass

    async def read(self) -> bool:
        if self.stream is None:
            self.stream = self.request.stream()
        try:
            piece = await anext(self.stream)
        except StopAsyncIteration:
            self.whole = True
            return False
        except ClientDisconnect:
            self.stream = None
            # In a cancelled scope a read can't be told from is_disconnected(), which tells nobody.
            self.read_when_cancelled = anyio.current_effective_deadline() == -math.inf
            self.told_by_reading = self.told = True
            self.require(self.server.gone, "a disconnect, but the client is there")
            raise
        except BaseException:
            self.stream = None  # a generator that was cut is over
            raise
        self.body += piece
        self.note("piece", piece)
        return True

    async def do_poll(self, place: Place) -> None:
        if await self.request.is_disconnected():
            self.require(self.server.gone, "a disconnect, but the client is there")

    async def do_move_on_after(self, place: Place, time: int, steps: list[Step]) -> None:
        with anyio.move_on_after(time / 1000) as scope:
            await self.run(steps, place.inside(lambda: scope.cancel_called))
        self.note("moved on", scope.cancelled_caught)

    async def do_fail_after(self, place: Place, time: int, steps: list[Step]) -> None:
        with suppress(TimeoutError), anyio.fail_after(time / 1000) as scope:
            await self.run(steps, place.inside(lambda: scope.cancel_called))

    async def do_timeout(self, place: Place, time: int, steps: list[Step]) -> None:
        deadline = anyio.current_time() + time / 1000

        def fired() -> bool:
            return anyio.current_time() >= deadline

        with suppress(TimeoutError):
            async with asyncio.timeout(time / 1000):
                await self.run(steps, place.inside(fired, natively=True))

    async def do_nursery(self, place: Place, children: list[list[Step]], body: list[Step]) -> None:
        place = replace(place, in_nursery=True)
        self.by_level |= "'shield'" in repr(body)  # then anyio goes on until the task is reached, too
        async with anyio.create_task_group() as task_group:
            for steps in children:
                task_group.start_soon(self.run_in_nursery, steps, place)
            await self.run(body, place)

    async def run_in_nursery(self, steps: list[Step], place: Place) -> None:
        try:
            await self.run(steps, place)
        except anyio.get_cancelled_exc_class():
            self.child_was_cut |= not any(fired() for fired in place.fired)
            raise

    async def do_gather(self, place: Place, children: list[list[Step]]) -> None:
        await asyncio.gather(*(self.run(steps, replace(place, in_task=True)) for steps in children))

    async def do_task_group(self, place: Place, children: list[list[Step]]) -> None:
        async with asyncio.TaskGroup() as task_group:
            for steps in children:
                task_group.create_task(self.run(steps, replace(place, in_task=True)))

    async def do_swallow(self, place: Place, steps: list[Step]) -> None:
        try:
            await self.run(steps, place)
        except asyncio.CancelledError:
            self.told = True

    async def do_inner(self, place: Place, catches: bool, steps: list[Step]) -> None:
        async def inner(request: Request) -> None:
            await self.run(steps, place)

        called = cancel_on_disconnect(inner) if self.decorated else inner
        try:
            await called(self.request)
            await checkpoint()
        except ClientClosedRequest:
            self.told = True
            if not catches:
                raise

    async def do_http_error(self, place: Place) -> None:
        raise HTTPException(418)

    async def do_error(self, place: Place) -> None:
        raise ValueError("the endpoint's own")


async def run_plan(plan: Plan, *, decorated: bool) -> World:
    """Run a plan once; the world it returns knows how it went."""
    world = World(plan, decorated=decorated)
    tasks = living_tasks(native=plan.native)
    endpoint = cancel_on_disconnect(on_disconnect=world.hook)(world.endpoint) if decorated else world.endpoint

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
            task = asyncio.current_task()
            assert task is not None
            world.cancelling = task.cancelling()

    with anyio.move_on_after(100) as limit:
        await (in_task(world, host) if plan.native else host())
    world.require(not limit.cancelled_caught, "it hangs")
    if world.stream is not None:
        await world.stream.aclose()
    world.left_behind = living_tasks(native=plan.native) - tasks
    await anyio.sleep(10)  # gather, when its first child has been cancelled, leaves the others to end by themselves
    return world


async def call_from_outside(world: World, call: Callable[[], Awaitable[None]]) -> None:
    """Call under the timeout that the plan has around the endpoint, if it has one."""
    match world.plan.outside:
        case "fail_after", time:
            with anyio.fail_after(time / 1000) as scope:
                world.outside_fired = lambda: scope.cancel_called
                await call()
        case "timeout", time:
            async with asyncio.timeout(time / 1000):
                world.outside_fired = lambda: world.server.now > time
                await call()
        case _:
            await call()


async def in_task(world: World, host: Callable[[], Coroutine[Any, Any, None]]) -> None:  # Any: as create_task() has it
    """Run `host` in a task, cancelled from outside at the time that the plan has for it."""
    task = asyncio.create_task(host())
    fired = False

    def cancel() -> None:
        nonlocal fired
        fired = task.cancel()

    match world.plan.outside:
        case "cancel", time:
            timer = asyncio.get_running_loop().call_later(time / 1000, cancel)
            world.outside_fired = lambda: fired
            await asyncio.wait([task])
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
    """Note what contradicts the promises in how a decorated run ended."""
    plan, end, outcome = world.plan, world.end, world.outcome
    cancelled = anyio.get_cancelled_exc_class()
    left = isinstance(outcome, ClientClosedRequest)
    stopped = isinstance(outcome, cancelled)
    nested = world.steps.count("'nursery'") > 1  # then anyio 4.16 may uncancel its host once too often
    if isinstance(end, cancelled):
        may_be_passed_on = plan.outside is not None or world.recancels or not world.server.gone
        right = stopped if world.outside_was_first and not nested else left or (stopped and may_be_passed_on)
    elif is_disconnect(end):
        right = left or (plan.outside is not None and (stopped or outcome is end))
    else:
        # trio takes its own cancellations out of a group.
        same = outcome is end or (isinstance(outcome, ExceptionGroup) and isinstance(end, BaseExceptionGroup))
        right = same or (stopped and plan.outside is not None)
    world.require(right, f"the endpoint ended with {end!r}, its caller got {outcome!r}")
    world.require(world.server.gone or not left, "the request was cancelled, but the client is there")
    world.require(world.hooks == ["endpoint"] * left, f"on_disconnect was called {len(world.hooks)} times")
    calm = plan.outside is None and not world.recancels and not any(name in world.steps for name in TIMEOUTS)
    told_twice = world.told_by_reading and isinstance(end, cancelled) and calm
    world.require(not told_twice, "the endpoint had read of the disconnect, and was cancelled on top")
    excused = plan.outside is not None or world.recancels or "'swallow'" in world.steps
    world.require(
        excused or not (world.child_was_cut and end == "result"),
        "the endpoint got past a task group whose children were cut as if they had ended well",
    )
    in_timeout = plan.outside is not None and plan.outside[0] != "cancel" and not world.recancels
    timed_out = isinstance(world.final, TimeoutError)
    world.require(timed_out or not (stopped and in_timeout), f"the timeout around it ended with {world.final!r}")
    world.require(nested or not world.cancelling, f"Task.cancelling() is off by {world.cancelling}")
    whole = b"".join(data for _, data in plan.chunks)
    complete = world.body == whole or not world.whole
    world.require(whole.startswith(world.body) and complete, f"the endpoint read {world.body!r} of {whole!r}")


async def judge_afterwards(world: World) -> None:
    """Note whether the disconnect is remembered, by this request and by what else is decorated."""
    if isinstance(world.outcome, ClientClosedRequest):
        with anyio.fail_after(1):
            remembered = await world.request.is_disconnected()
            world.require(remembered, "is_disconnected() is false after the leave")
            world.end = None
            with suppress(ClientClosedRequest):
                await cancel_on_disconnect(world.endpoint)(world.request)
            world.require(world.end is None, "an endpoint was started although the client is known to be gone")


def compare(world: World, plain: World) -> None:
    """Note how a run whose client stayed differs from the same one undecorated."""
    # Tasks that run in the same instant do so in no particular order; trio even shuffles them.
    events, plain_events = Counter(world.trace), Counter(plain.trace)
    world.require(
        events == plain_events, f"only decorated {events - plain_events}, only undecorated {plain_events - events}"
    )
    same_end = type(world.final) is type(plain.final)
    same_body = (world.body, world.whole) == (plain.body, plain.whole)
    world.require(
        same_end and same_body, f"it read {world.body!r} and ended with {world.final!r}, undecorated otherwise"
    )


async def run_trial(seed: int, unhandled: list[dict[str, Any]], *, native: bool) -> None:  # Any: asyncio's own type
    """Run one trial; `unhandled` is where the event loop collects what nobody has handled.

    Raises:
        BrokenPromise: If a promise was broken.
    """
    plan = Planner(seed, native=native).plan()
    tasks = living_tasks(native=native)
    with recorded() as records:
        world = await run_plan(plan, decorated=True)
    world.require(world.gathers or not world.left_behind, "a task was left behind")
    world.require(living_tasks(native=native) == tasks, "a task was left behind for good")
    if world.left_behind:  # gather's leftover may have gone on to call a decorated function
        world.faults[:] = [fault for fault in world.faults if fault != CUT]
    world.require(not world.server.receiving, "a receive() was left pending")
    least = isinstance(world.outcome, ClientClosedRequest)
    world.require(least <= records.number <= 1, f"{records.number} log records")
    world.require(not unhandled, f"the event loop reports {unhandled}")
    judge(world)
    await judge_afterwards(world)
    # A timeout of anyio's cancels at each turn of the loop, so with these inside it hangs on chance what comes out.
    chaos = plan.outside is not None and plan.outside[0] == "fail_after" and world.recancels
    if plan.leave is None and not chaos:
        compare(world, await run_plan(plan, decorated=False))
    if world.faults:
        raise BrokenPromise("\n".join([f"seed {seed}", *world.faults, repr(plan), *map(str, world.trace)]))


if __name__ == "__main__":
    main(run_trial)

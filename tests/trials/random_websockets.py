"""Random WebSockets against an oracle: reading, sending and ending, with clients that close or stay.

Run as many as you like with `python -m tests.trials.random_websockets --backend asyncio --trials 100000`.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
from anyio.lowlevel import checkpoint
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.types import Message, Scope
from starlette.websockets import WebSocket, WebSocketDisconnect

from cancelonleave import cancel_on_disconnect
from tests.shared.receiving import Receiving
from tests.shared.virtual_time import stall
from tests.trials.common import GRID, LATE, STARTED, BrokenPromise, compare, living_tasks, main, recorded, run_until

READS = ("receive", "read", "json", "iterate", "poll")
# What send() does after the disconnect: on uvicorn, on gunicorn, and on the other servers.
SENDING = ("RuntimeError", "OSError", "drop")
CODES = (1000, 1001, 1006, 4321)


@dataclass
class Plan:
    """One random WebSocket: what its client does, how its server passes that on, and what its endpoint does."""

    seed: int
    native: bool
    messages: list[tuple[int, str]]
    binary: list[bool]  # which of them are bytes
    close: int | None
    code: int
    once: bool  # the server reports the disconnect once, otherwise again with another code
    loses: bool  # receive() returns no coroutine, and loses a message that arrives just as it is cancelled
    checkpoints: bool
    sending: str
    before: int
    steps: list[tuple[str, int]]
    after_disconnect: int  # milliseconds that the endpoint goes on after it has read the disconnect
    cleanup: int
    closes: bool
    outside: int | None


def draw_plan(seed: int, *, native: bool) -> Plan:
    draw = random.Random(seed)
    times = sorted(draw.choices(GRID, k=draw.choice((0, 0, 1, 3, 8))))
    close = draw.choice((*GRID, 200, 300)) if draw.random() < 0.75 else None
    messages = [(time, str(number)) for number, time in enumerate(times) if close is None or time <= close]
    steps = ["sleep", "send", "shield", "helper", *READS] + ["stall"] * (close is not None)
    return Plan(
        seed=seed,
        native=native,
        messages=messages,
        binary=[draw.random() < 0.5 for _ in messages],
        close=close,
        code=draw.choice(CODES),
        once=draw.random() < 0.5,
        loses=draw.random() < 0.3,
        checkpoints=draw.random() < 0.5,
        sending=draw.choice(SENDING),
        before=draw.choice((0, 0, *GRID)),
        steps=[(draw.choice(steps), draw.choice(GRID)) for _ in range(draw.randint(0, 8))],
        after_disconnect=draw.choice((0, 0, 60, 2000)),
        cleanup=draw.choice((0, 1, 20, 60)),
        closes=draw.random() < 0.3,
        outside=draw.choice(GRID[1:]) if draw.random() < 0.15 else None,
    )


class World:
    """One run of a plan: its server, its endpoint, and its outcome."""

    def __init__(self, plan: Plan, *, decorated: bool) -> None:
        self.plan = plan
        self.decorated = decorated
        self.began = anyio.current_time()
        self.faults: list[str] = []
        self.queue: list[tuple[float, Message]] = [(0, {"type": "websocket.connect"})]
        for (time, text), binary in zip(plan.messages, plan.binary, strict=True):
            data = {"bytes": text.encode()} if binary else {"text": text}
            self.queue.append((time, {"type": "websocket.receive", **data}))
        if plan.close is not None:
            self.queue.append((plan.close, {"type": "websocket.disconnect", "code": plan.code, "reason": "enough"}))
        self.receiving = self.reported = self.closed = False
        self.own_close = anyio.Event()
        self.sent: list[Message] = []
        self.read: list[str] = []
        self.ends: list[str] = []
        self.codes: list[int] = []
        self.cleaned = False
        self.shielded_until = self.last_read = 0.0
        self.stalled = self.ended = 0.0
        self.hooks = self.records = 0
        self.cancelling = 0
        self.error: BaseException | None = None

    @property
    def now(self) -> float:
        return round((anyio.current_time() - self.began) * 1000, 3)

    @property
    def gone(self) -> bool:
        return self.plan.close is not None and self.plan.close <= self.now

    def require(self, fulfilled: bool, otherwise: str) -> None:
        self.faults += [f"at {self.now} ms: {otherwise}"] * (not fulfilled)

    async def sleep(self, time: float) -> None:
        if time:
            await anyio.sleep(time / 1000)
        else:
            await checkpoint()

    # The server.

    async def receive(self) -> Message:
        self.require(not self.receiving, "receive() was called by two at once")
        self.receiving = True
        taken: Message | None = None
        try:
            if self.plan.checkpoints:
                await checkpoint()
            while not self.queue or self.queue[0][0] > self.now:
                until = self.queue[0][0] if self.queue else math.inf
                with anyio.move_on_at(self.began + until / 1000):
                    await self.own_close.wait()
                if self.own_close.is_set():
                    self.queue = [(0, {"type": "websocket.disconnect", "code": 1000, "reason": ""})]
            taken = self.queue.pop(0)[1]
            if self.plan.loses and taken["type"] == "websocket.receive":
                await checkpoint()
        finally:
            self.receiving = False
        if taken["type"] == "websocket.disconnect":
            self.reported = True
            if not self.plan.once:
                self.queue = [(0, {"type": "websocket.disconnect", "code": 1005})]
        return taken

    async def send(self, message: Message) -> None:
        if self.reported and not self.closed and self.plan.sending == "RuntimeError":
            raise RuntimeError("Unexpected ASGI message")
        if self.plan.checkpoints:
            await checkpoint()
        if self.gone and not self.closed:
            if self.plan.sending != "drop":
                raise OSError("the client has disconnected")
            return
        self.sent.append(message)
        if message["type"] == "websocket.close":
            self.closed = True
            self.own_close.set()

    # The application.

    def hook(self, websocket: WebSocket) -> None:
        self.hooks += 1
        self.require(not self.ends or self.cleaned, "on_disconnect was called before the cleanup had ended")

    async def endpoint(self, websocket: WebSocket) -> None:
        try:
            await self.sleep(self.plan.before)
            await websocket.accept()
            for action, time in self.plan.steps:
                await self.step(websocket, action, time)
            if self.plan.closes:
                await websocket.close()
                await self.sleep(self.plan.cleanup)
        except WebSocketDisconnect as error:
            self.ends.append("notified")
            self.codes.append(error.code)
            await anyio.sleep(self.plan.after_disconnect / 1000)
            self.ends.append("worked on")
            raise
        except anyio.get_cancelled_exc_class():
            self.ends.append("cancelled")
            raise
        finally:
            if self.ends and self.plan.native:
                await anyio.sleep(self.plan.cleanup / 1000)
            self.cleaned = True

    async def step(self, websocket: WebSocket, action: str, time: int) -> None:
        match action:
            case "send":
                await websocket.send_text("text")
            case "stall":
                stall(time / 1000)
                self.stalled += time
            case "shield":
                self.shielded_until = self.now + time
                try:
                    with anyio.CancelScope(shield=True):
                        await self.sleep(time)
                finally:
                    self.require(self.now >= self.shielded_until, "a shield was cut short")
                await checkpoint()
            case "helper":
                await self.decorate(self.helper)(websocket, time)
            case "sleep":
                await self.sleep(time)
            case _:
                await self.reads(websocket, action, time)

    async def reads(self, websocket: WebSocket, action: str, time: int) -> None:
        """Read if another message is due; otherwise the endpoint would wait forever."""
        if len(self.read) >= len(self.plan.messages) and self.plan.close is None:
            return
        try:
            if action == "poll":
                with anyio.move_on_after(time / 1000):
                    self.read.append(await self.next_message(websocket, "receive"))
            else:
                self.read.append(await self.next_message(websocket, action))
        except WebSocketDisconnect:
            self.ends.append("read")
            raise
        finally:
            self.last_read = self.now

    async def next_message(self, websocket: WebSocket, form: str) -> str:
        """Read one message in one of the forms that Starlette has for its kind."""
        binary = self.plan.binary[len(self.read)] if len(self.read) < len(self.plan.binary) else False
        data: Any = None  # Any: of JSON
        match form:
            case "receive":
                message = await websocket.receive()
                websocket._raise_on_disconnect(message)
                data = message.get("bytes") or message["text"]
            case "json":
                data = await websocket.receive_json("binary" if binary else "text")
            case "read":
                data = await (websocket.receive_bytes() if binary else websocket.receive_text())
            case _:
                messages: Any = websocket.iter_bytes() if binary else websocket.iter_text()  # Any: it can be closed
                async with aclosing(messages):
                    data = await anext(messages, None)
                if data is None:  # they end at a disconnect
                    raise WebSocketDisconnect(self.plan.code)
        return data.decode() if isinstance(data, bytes) else str(data)

    async def helper(self, websocket: WebSocket, time: int) -> None:
        await self.sleep(time)

    def decorate(self, function: Any) -> Any:  # Any: of either signature
        return (
            cancel_on_disconnect(on_disconnect=self.hook if function == self.endpoint else None)(function)
            if (self.decorated)
            else function
        )

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[None]:
        try:
            yield
        except WebSocketDisconnect as error:
            self.codes.append(error.code)
            raise

    async def run(self) -> None:
        endpoint = self.decorate(self.endpoint)

        async def within(websocket: WebSocket) -> None:
            async with self.transaction():
                await endpoint(websocket)

        scope: Scope = {
            "type": "websocket",
            "path": "/",
            "headers": [],
            "query_string": b"",
            "asgi": {"version": "3.0"},
        }
        receive: Any = (lambda: Receiving(self.receive)) if self.plan.loses else self.receive  # Any: ASGI's own type
        try:
            await Starlette(routes=[WebSocketRoute("/", within)])(scope, receive, self.send)
        except Exception as error:
            self.error = error
        finally:
            self.ended = self.now
            task = asyncio.current_task() if self.plan.native else None
            self.cancelling = 0 if task is None else task.cancelling()
        if self.plan.outside is None:
            await anyio.sleep(0.005)  # in which nothing may cancel it


async def run_plan(plan: Plan, *, decorated: bool) -> World:
    world = World(plan, decorated=decorated)
    world.require(await run_until(world.run, plan.outside), "it hangs")
    return world


def judge(world: World) -> None:
    """Record what contradicts the promises."""
    plan, ends = world.plan, world.ends
    outside = plan.outside is not None and plan.outside <= world.ended
    texts = [text for _, text in plan.messages]
    world.require(world.read == texts[: len(world.read)], f"it read {world.read} of {texts}")
    if "read" in ends and not world.closed:
        world.require(world.read == texts, f"it read the disconnect after {world.read} of {texts}")
    world.require(ends.count("cancelled") + ends.count("notified") <= 1, f"it was notified more than once: {ends}")
    world.require(world.hooks <= world.records <= 1, f"{world.hooks} hooks, {world.records} records")
    world.require(world.gone or not world.hooks, "it was ended, but the client is there")
    world.require(world.error is None or outside, f"{world.error!r} left the application")
    if outside:
        return
    world.require(not world.cancelling, f"Task.cancelling() is off by {world.cancelling}")
    world.require(not ends or world.cleaned, "the cleanup was cut short")
    world.require("notified" not in ends or "worked on" in ends, "it read the disconnect and was cancelled too")
    world.require(bool(world.hooks) == bool(ends), f"{world.hooks} hooks after {ends}")
    if ends and not world.closed:
        # An endpoint that learns of the disconnect by a send() may do so before the server has reported the code.
        world.require(set(world.codes) <= {plan.code, 1006}, f"codes {world.codes}, not {plan.code}")
        world.require("cancelled" not in ends or plan.code in world.codes[-1:], f"codes {world.codes}, not {plan.code}")
    if plan.close is not None and "notified" not in ends and not world.closed:
        due = max(plan.close, STARTED, world.last_read + STARTED, world.shielded_until) + LATE + world.stalled
        due += plan.cleanup
        world.require(world.ended <= due, f"it should have ended by {due} ms")


async def run_trial(seed: int, unhandled: list[dict[str, Any]], *, native: bool) -> None:  # Any: asyncio's own type
    """Run one trial; `unhandled` is where the event loop collects unhandled errors.

    Raises:
        BrokenPromise: If a promise was broken.
    """
    plan = draw_plan(seed, native=native)
    tasks = living_tasks(native=native)
    with recorded() as records:
        world = await run_plan(plan, decorated=True)
        for _ in range(5):
            await anyio.sleep(0.1)
    world.records = records.number
    world.require(living_tasks(native=native) <= tasks, "a task was left behind")
    world.require(not world.receiving, "a receive() was left pending")
    world.require(not unhandled, f"the event loop reports {unhandled}")
    judge(world)
    # An undecorated endpoint that polls may lose messages, and doesn't find those that arrived while it didn't read.
    polls = any(action == "poll" for action, _ in plan.steps)
    if plan.close is None and plan.outside is None and not polls:
        compare(world, await run_plan(plan, decorated=False), ("sent", "ended", "read", "ends"))
    if world.faults:
        raise BrokenPromise("\n".join([f"seed {seed}", *world.faults, repr(plan), repr(vars(world))]))


if __name__ == "__main__":
    main(run_trial)

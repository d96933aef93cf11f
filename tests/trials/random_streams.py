"""Random streams against an oracle: bodies of responses and items of generators; their clients disconnect or stay.

Run as many as you like with `python -m tests.trials.random_streams --backend asyncio --trials 100000`.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import math
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import anyio
from anyio.lowlevel import checkpoint
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cancelonleave import cancel_on_disconnect
from tests.shared.asking import TRUSTS_SEND
from tests.trials.common import (
    CUT,
    GRID,
    LATE,
    STARTED,
    BrokenPromise,
    Server,
    Traffic,
    compare,
    living_tasks,
    main,
    recorded,
    run_until,
)

# Older Starlette also listens for generator endpoints, but the FastAPI of its time had none.
KINDS = ("response", "listening response", "generator")[: 3 if TRUSTS_SEND else 2]
SPEC_VERSIONS = (None, "2.1", "2.3", "2.4")
SENDING = ("drop", "raise", "block")


@dataclass
class Plan(Traffic):
    """One random stream: its traffic, what it waits for, and what is around it."""

    sending: str
    send_time: int
    kind: str
    delay: int
    pieces: list[tuple[str, int]]
    cleanup: int
    background: int
    middleware: list[str]
    outside: int | None

    @property
    def reads(self) -> bool:
        return any(name == "read" for name, _ in self.pieces)


def draw_plan(seed: int, *, native: bool) -> Plan:
    draw = random.Random(seed)
    kind = draw.choice(KINDS)
    body = [
        (float(time), draw.randbytes(draw.randint(1, 9))) for time in sorted(draw.choices(GRID, k=draw.randint(0, 4)))
    ]
    disconnect = draw.choice((*GRID, 200, 300)) if draw.random() < 0.75 else None
    waits = ["wait", "wait", "shield"] + ["read"] * bool(body) + ["swallow"] * native
    # Other tasks of the instant of a stall may run before or after it, so there is no stall if runs are compared.
    waits += ["stall"] * (disconnect is not None)
    spec_version = draw.choice(SPEC_VERSIONS)
    plan = Plan(
        seed=seed,
        native=native,
        chunks=body,
        final_is_empty=draw.random() < 0.5,
        disconnect=disconnect,
        once=draw.random() < 0.5,
        drops_body=draw.random() < 0.3,
        checkpoints=draw.random() < 0.5,
        spec_version=spec_version,
        lies=spec_version == "2.4" and draw.random() < 0.5,
        sending=draw.choice(SENDING),
        send_time=draw.choice((0, 0, 0, 1, 20, 60)),
        kind=kind,
        delay=draw.choice((0, 0, *GRID)),
        pieces=[(draw.choice(waits), draw.choice(GRID)) for _ in range(draw.randint(0, 6))],
        cleanup=draw.choice((0, 1, 20, 60)),
        background=draw.choice((0, 1, 60)),
        middleware=[draw.choice(("base", "base", "gzip")) for _ in range(draw.choice((0, 0, 1, 2, 3)))],
        outside=draw.choice(GRID[1:]) if draw.random() < 0.15 else None,
        loses=draw.random() < 0.5,
    )
    # The decorator can't guard a send() by the framework: that of a generator endpoint, or in BaseHTTPMiddleware.
    if kind == "generator" or "base" in plan.middleware:
        plan.sending = "drop"
    if kind == "generator" and not native:  # cancelled from outside, it would remain for the garbage collector
        plan.outside = None
    # GZipMiddleware loses the start when its first send() is cancelled by level, and BaseHTTPMiddleware then misses it.
    if "base" in plan.middleware and not (native and kind == "response"):
        plan.middleware = [name for name in plan.middleware if name == "base"]
    return plan


class StreamServer(Server[Plan]):
    """A server that also accepts the body of a response."""

    def __init__(self, plan: Plan, began: float) -> None:
        super().__init__(plan, began)
        self.sent: list[Message] = []
        self.completed = anyio.Event()

    @property
    def has_disconnected(self) -> bool:
        return self.plan.disconnect is not None and self.plan.disconnect <= self.now

    @property
    def complete(self) -> bool:
        return self.completed.is_set()

    @property
    def gone(self) -> bool:
        return super().gone or self.complete  # most servers report this when they have sent everything

    async def wait(self, until: float) -> None:
        with anyio.move_on_at(self.began + until / 1000):
            await self.completed.wait()

    async def send(self, message: Message) -> None:
        self.faults += [f"{message['type']} after the last body message"] * self.complete
        is_chunk = message["type"] == "http.response.body" and message.get("more_body", False)
        if self.has_disconnected or (is_chunk and await self._disconnects_during(self.plan.send_time)):
            if self.plan.sending == "raise":
                raise OSError("the client has disconnected")
            if self.plan.sending == "block" and is_chunk:  # it waits for a buffer that is never emptied
                await anyio.sleep_forever()
            return
        self.sent.append(message)
        if message["type"] == "http.response.body" and not is_chunk:
            self.completed.set()

    async def _disconnects_during(self, time: int) -> bool:
        """Wait until the client has received a chunk, or has disconnected instead."""
        until = self.now + time
        if self.plan.disconnect is not None:
            until = min(until, self.plan.disconnect)
        await anyio.sleep((until - self.now) / 1000)
        return self.has_disconnected


class ListeningResponse(Response):
    """Listens for the disconnect itself, as sse-starlette's response does."""

    def __init__(self, content: AsyncGenerator[bytes], background: BackgroundTask) -> None:
        super().__init__(background=background)
        del self.headers["content-length"]
        self.body_iterator = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as task_group:

            async def listen() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                task_group.cancel_scope.cancel()

            async def stream() -> None:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                async for chunk in self.body_iterator:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
                task_group.cancel_scope.cancel()

            task_group.start_soon(stream)
            task_group.start_soon(listen)
        assert self.background is not None
        await self.background()


class World:
    """One run of a plan, and its outcome."""

    def __init__(self, plan: Plan, *, decorated: bool) -> None:
        self.plan = plan
        self.decorated = decorated
        self.server = StreamServer(plan, anyio.current_time())
        self.faults = self.server.faults
        self.entered = self.returned = self.cleaned = False
        self.ends: list[str] = []  # how the generator was ended
        self.closed = self.ended = math.inf
        self.read = b""
        self.read_all = False
        self.shielded_until = 0.0
        self.hooks = self.records = 0
        self.background: list[str] = []
        self.error: BaseException | None = None

    @property
    def sent(self) -> list[Message]:
        return [without_time(message) for message in self.server.sent]

    def require(self, fulfilled: bool, otherwise: str) -> None:
        self.faults += [f"at {self.server.now} ms: {otherwise}"] * (not fulfilled)

    def hook(self, request: Request) -> None:
        self.hooks += 1
        ended = not self.entered or self.closed < math.inf or self.plan.outside is not None
        self.require(ended, "on_disconnect was called before the cleanup had ended")

    async def generator(self, request: Request) -> AsyncGenerator[bytes]:
        self.entered = True
        try:
            async with aclosing(request.stream()) as stream:
                for number, (action, time) in enumerate(self.plan.pieces):
                    await self.piece(action, time, stream)
                    yield b"%d" % number
        except (anyio.get_cancelled_exc_class(), ClientDisconnect, GeneratorExit) as error:
            self.ends.append(type(error).__name__)
            raise
        finally:
            try:
                await anyio.sleep(self.plan.cleanup / 1000)
                self.cleaned = True
            finally:
                self.closed = self.server.now

    async def piece(self, action: str, time: int, stream: AsyncGenerator[bytes]) -> None:
        match action:
            case "read" if not self.read_all:
                try:
                    self.read += await anext(stream)
                except StopAsyncIteration:
                    self.read_all = True
            case "stall":
                self.server.stall(time)
            case "swallow":
                try:
                    await anyio.sleep(time / 1000)
                except asyncio.CancelledError:
                    self.ends.append("swallowed")
            case "shield":
                self.shielded_until = self.server.now + time
                try:
                    with anyio.CancelScope(shield=True):
                        await anyio.sleep(time / 1000)
                finally:
                    self.require(self.server.now >= self.shielded_until, "a shield was cut short")
                await checkpoint()
            case _:
                await anyio.sleep(time / 1000)

    async def after(self) -> None:
        self.background.append("began")
        await anyio.sleep(self.plan.background / 1000)
        self.background.append("ended")

    def application(self) -> ASGIApp:
        endpoint = self.items_endpoint() if self.plan.kind == "generator" else self.decorate(self.endpoint)
        middleware = [
            Middleware(GZipMiddleware, minimum_size=0)
            if name == "gzip"
            else Middleware(BaseHTTPMiddleware, dispatch=pass_on)
            for name in self.plan.middleware
        ]
        return Starlette(
            routes=[Route("/", endpoint, methods=["POST"])],
            middleware=middleware,
            exception_handlers={HTTPException: answer},
        )

    def decorate(self, endpoint: Any) -> Any:  # Any: a function or a generator function
        return cancel_on_disconnect(on_disconnect=self.hook)(endpoint) if self.decorated else endpoint

    async def endpoint(self, request: Request) -> Response:
        await anyio.sleep(self.plan.delay / 1000)
        self.returned = True
        kind = StreamingResponse if self.plan.kind == "response" else ListeningResponse
        return kind(self.generator(request), background=BackgroundTask(self.after))

    def items_endpoint(self) -> Any:
        generator = self.decorate(self.generator)

        @functools.wraps(generator)  # so that FastAPI recognizes a generator
        async def endpoint(request: Request) -> Response:
            await anyio.sleep(self.plan.delay / 1000)
            self.returned = True
            return StreamingResponse(as_fastapi_does(generator(request)), background=BackgroundTask(self.after))

        return endpoint

    async def run(self) -> None:
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "headers": [(b"accept-encoding", b"gzip")],
            "query_string": b"",
            "asgi": self.plan.asgi,
        }
        try:
            await self.application()(scope, self.server.receive, self.server.send)
        except Exception as error:
            self.error = error
        finally:
            self.ended = self.server.now


def without_time(message: Message) -> Message:
    """Remove the time at which gzip compressed a body."""
    body = message.get("body", b"")
    return {**message, "body": body[:4] + body[8:]} if body.startswith(b"\x1f\x8b") else message


async def answer(request: Request, error: Exception) -> Response:
    """Answer without the thread that older Starlette uses, since threads don't have virtual time."""
    assert isinstance(error, HTTPException)
    return Response(status_code=error.status_code)


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


async def as_fastapi_does(items: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async for item in items:
        yield item
        await checkpoint()


async def run_plan(plan: Plan, *, decorated: bool) -> World:
    world = World(plan, decorated=decorated)
    world.require(await run_until(world.run, plan.outside), "it hangs")
    return world


def judge(world: World) -> None:
    """Record what contradicts the promises."""
    plan, ends, server = world.plan, world.ends, world.server
    disconnected = plan.disconnect is not None and plan.disconnect <= world.ended
    outside = plan.outside is not None and plan.outside <= world.ended
    answered = plan.sending == "raise" and not world.sent and isinstance(world.error, OSError)  # with a 499
    world.require(world.error is None or outside or answered, f"{world.error!r} left the application")
    if not (outside and plan.kind == "generator"):  # then FastAPI leaves it to the garbage collector
        world.require(not world.entered or world.closed <= world.ended, "the generator was not closed before the end")
    world.require(
        len(ends) - ends.count("swallowed") <= 1 >= ends.count("swallowed"),
        f"the generator was ended more than once: {ends}",
    )
    whole = b"".join(data for _, data in plan.chunks)
    world.require(whole.startswith(world.read), f"it read {world.read!r} of {whole!r}")
    world.require(disconnected or not world.read_all or world.read == whole, f"it read {world.read!r} of {whole!r}")
    world.require(world.hooks <= 1, f"on_disconnect was called {world.hooks} times")
    world.require(world.records == world.hooks, f"{world.records} log records")
    world.require(server.has_disconnected or not world.hooks, "the request was ended, but the client is there")
    world.require(not (server.complete and world.hooks), "the request was ended, but the response was complete")
    if outside:
        return
    world.require(not ends or not plan.native or world.cleaned, "the cleanup was cut short")
    world.require(disconnected or server.complete, "the response is not complete, but the client is there")
    if disconnected and not server.complete:
        began = STARTED + plan.delay
        due = max(plan.disconnect or 0, began, world.shielded_until) + LATE + plan.cleanup + plan.background
        due += server.stalled  # everything is late by at most the time in which the loop was blocked
        world.require(world.ended <= due, f"it should have ended by {due} ms")
        world.require(bool(world.hooks or (world.entered and not ends)), "on_disconnect was not called")
    # On trio such a response isn't guarded, so the error of a read may end it, as undecorated.
    may_fail = not plan.native and plan.kind == "listening response" and ends == ["ClientDisconnect"]
    expected = ["began", "ended"] if world.returned else []
    world.require(may_fail or world.background == expected, f"the background task: {world.background}")


async def run_trial(seed: int, unhandled: list[dict[str, Any]], *, native: bool) -> None:  # Any: asyncio's own type
    """Run one trial; `unhandled` is where the event loop collects unhandled errors.

    Raises:
        BrokenPromise: If a promise was broken.
    """
    plan = draw_plan(seed, native=native)
    tasks = living_tasks(native=native)
    with recorded() as records:
        world = await run_plan(plan, decorated=True)
        if plan.outside is not None:
            gc.collect(1)  # the young generation: interrupted generators of the framework
        for _ in range(5):
            await anyio.sleep(0.1)  # while they are closed
    world.records = records.number
    world.require(living_tasks(native=native) <= tasks, "a task was left behind")
    world.require(not world.server.receiving, "a receive() was left pending")
    world.require(not unhandled, f"the event loop reports {unhandled}")
    judge(world)
    steals = plan.reads and (plan.kind == "listening response" or plan.spec_version != "2.4" or not TRUSTS_SEND)
    if plan.disconnect is None and plan.outside is None and not steals:
        compare(world, await run_plan(plan, decorated=False), ("sent", "ended", "background", "read"))
    # On trio a wait can't outlive its call; and after a failed send(), receive() is called to check for a disconnect.
    if not native or plan.outside is not None or plan.sending == "raise":
        world.faults[:] = [fault for fault in world.faults if fault != CUT]
    if world.faults:
        raise BrokenPromise("\n".join([f"seed {seed}", *world.faults, repr(plan), repr(vars(world))]))


if __name__ == "__main__":
    main(run_trial)

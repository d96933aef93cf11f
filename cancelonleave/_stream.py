"""Passes on what a generator yields, until the client disconnects."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator
from enum import Enum
from inspect import GEN_SUSPENDED, getgeneratorstate
from typing import Any, Generic, TypeVar
from weakref import finalize

from anyio import CancelScope, Event, get_cancelled_exc_class
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from ._endpoint import OnDisconnect, guard, is_disconnect, log, run_hook
from ._watch import Call, Phase, Watch

T = TypeVar("T")
_END: Any = object()  # Any: in the place of an item


class Stream(Call):
    """What a request is answered with chunk by chunk; among the calls, it keeps the watch going between two chunks."""

    cancels_host = False
    is_cut = False  # by the disconnect

    def __init__(self, watch: Watch, request: Request) -> None:
        with guard(watch, request) as call:
            super().__init__(watch, request, call.host)
            watch.begin(self, watch.loop)
        self.hooks: list[OnDisconnect | None] = []

    def release_with(self, owner: object) -> None:
        """Have the watch end as well when what is sent is thrown away."""
        finalize(owner, self.watch.loop.call_from_anywhere, self.release).atexit = False

    def is_due(self) -> bool:
        return False

    def release(self) -> None:
        """Let the watch end, if no other call needs it."""
        if self in self.watch.calls:
            self.watch.end(self)

    @property
    def is_gone(self) -> bool:
        """Whether the client has disconnected before it had all."""
        return self.watch.phase is Phase.CAME

    async def cut(self) -> None:
        """Note that the disconnect has cut the stream: write the record and call the hooks, once."""
        self.is_cut = True
        log(self.watch, self.request.scope)
        while self.hooks:
            await run_hook(self.watch, self.request, self.hooks.pop(0))


class State(Enum):
    """What the source of some items does."""

    WAITS = "waits"  # it hasn't begun, or has yielded an item
    RUNS = "runs"
    CLOSES = "closes"
    ENDED = "ended"


class Items(Generic[T]):
    """Passes on what a source yields until the client disconnects, then closes it.

    Each item is awaited in the task that asks for it, as undecorated, under a guard of its own: the source may hold
    a timeout or a task group from one item to the next.
    """

    state = State.WAITS
    holds_scope = False  # the source has entered a cancel scope that it hasn't left

    def __init__(self, stream: Stream, source: AsyncIterator[T], *, in_thread: bool = False) -> None:
        self._stream = stream
        self._source = source
        self._in_thread = in_thread
        self._ended = Event()

    def __repr__(self) -> str:
        return f"<Items {self.state.value}>"

    def __aiter__(self) -> Items[T]:
        return self

    async def __anext__(self) -> T:
        if self._stream.is_gone or self.state is not State.WAITS:
            await self.aclose()
            raise StopAsyncIteration
        self.state = State.RUNS
        try:
            with guard(self._stream.watch, self._stream.request, in_thread=self._in_thread) as call:
                item = await anext(self._source)
                self.holds_scope = call.has_entered_scope()
        except BaseException as error:
            await self._end()
            if not await is_disconnect(error, self._stream.watch):
                raise
            await self._stream.cut()
            raise StopAsyncIteration from None
        self.state = State.WAITS
        return item

    async def aclose(self) -> None:
        """Close the source and see it end."""
        if self.state is State.CLOSES:  # in another task
            await self._ended.wait()
        elif self.state is State.WAITS:
            self.state = State.CLOSES
            await self._end()
            if self._stream.is_gone:
                await self._stream.cut()

    async def _end(self) -> None:
        try:
            await close(self._source)
        finally:
            self.state = State.ENDED
            self._ended.set()
            self._stream.watch.change()
            self._stream.release()


async def in_threads(generator: Generator[T]) -> AsyncGenerator[T]:
    """Yield what a sync generator yields in threads."""
    try:
        while (item := await run_in_threadpool(next, generator, _END)) is not _END:
            yield item
    finally:
        # It may have ended, or still run, if a server that shuts down has torn us from the thread.
        if getgeneratorstate(generator) == GEN_SUSPENDED:
            with CancelScope(shield=True):
                await run_in_threadpool(generator.close)


async def close(iterator: Any) -> None:  # Any: it need not be a generator
    """Close it, if it can be closed, and isn't just being closed."""
    # The garbage collector may have found a generator in one cycle with the one that closes it, and be faster.
    if not hasattr(iterator, "aclose") or getattr(iterator, "ag_running", False):
        return
    try:
        await iterator.aclose()
    except BaseExceptionGroup as group:
        # A task group of anyio's around a `yield` makes this of a GeneratorExit and of its children's cancellation.
        if group.split((GeneratorExit, get_cancelled_exc_class()))[1] is not None:
            raise

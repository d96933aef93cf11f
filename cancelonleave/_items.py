"""Passes on what an endpoint yields, or a response iterates over, until the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from inspect import GEN_SUSPENDED, getgeneratorstate
from typing import Any, TypeVar, cast

from anyio import CancelScope, current_time, get_cancelled_exc_class
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from ._cancellation import run
from ._dependencies import tell_dependencies
from ._patience import PATIENCE
from ._request import OnDisconnect, Watched, is_read, run_hook
from ._watch import asyncio_task

T = TypeVar("T")
_END: Any = object()  # Any: in the place of an item


class Stream:
    """What a request is answered with piece by piece."""

    cut = False  # since the client has left
    _pump: _Pump | None = None

    def __init__(self, watched: Watched, request: Request) -> None:
        self.watched = watched
        self.watch = watched.watch
        self.channel = watched.channel
        self.request = request
        self.hooks: list[OnDisconnect | None] = []
        tell_dependencies(request.scope, self.aclose, lambda: self.cut)

    async def items(self, source: AsyncIterator[T], *, level: bool = False) -> AsyncGenerator[T]:
        """Pass on what `source` yields until the client leaves, then close it; also if this is closed itself."""
        if not self.channel.invited:
            self.channel.invited = await is_read(self.request)
        if asyncio_task() is not None:
            self._pump = _Pump(self, source, level=level)
        items = self._pump or self._one_by_one(source, level=level)
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()
            self._pump = None  # they know each other

    async def _one_by_one(self, source: AsyncIterator[T], *, level: bool) -> AsyncGenerator[T]:
        """Do so on trio, where no task can outlive the call that starts it."""
        began = current_time()
        ended = False
        self.watch.is_held = True
        try:
            while not self.is_left:
                late = current_time() - began > PATIENCE
                yield await run(self.watch, _next(source), level=level, at_once=late)
        except StopAsyncIteration:
            ended = True
        except Exception as error:
            ended = not self.watched.is_end(error)
            if ended:
                raise
        finally:
            await close(source)
            if self.is_left and not ended:
                await self.end()

    @property
    def is_left(self) -> bool:
        """Whether the client has left before it had all."""
        return self.channel.left is not None and not self.watch.finished

    @property
    def rests(self) -> bool:
        """Whether nothing is being made, or will be."""
        return self._pump is None or self._pump.task is None or self._pump.task.done()

    async def aclose(self) -> None:
        """End what makes the items, and see it end."""
        if self._pump is not None:
            await self._pump.aclose()

    async def end(self) -> None:
        """Note and tell, once, that the stream was cut."""
        self.cut = True
        self.watched.log(self.request.scope)
        while self.hooks:
            await run_hook(self.hooks.pop(0), self.request)


class _Pump:
    """Makes the items in a task of its own, each when it is asked for.

    It is one task, under one guard, since a generator may hold a task group or a timeout from one item to the next.
    """

    task: asyncio.Task[None] | None = None
    _item: Any = None  # Any: whatever is passed on
    _closing = False

    def __init__(self, stream: Stream, source: AsyncIterator[Any], *, level: bool) -> None:  # Any: as above
        self._stream = stream
        self._source = source
        self._level = level
        self._cancel_scope = CancelScope()
        self._asked, self._ready = asyncio.Event(), asyncio.Event()

    def __aiter__(self) -> _Pump:
        return self

    async def __anext__(self) -> Any:  # Any: as above
        if self.task is None:
            self.task = asyncio.create_task(self._run(), name="cancelonleave: stream")
            self.task.add_done_callback(self._done)
        elif not self.task.done():
            self._ready.clear()
            self._asked.set()
        await self._ready.wait()
        if not self.task.done():
            return self._item
        self.task.result()
        raise StopAsyncIteration

    async def _run(self) -> None:
        try:
            with self._cancel_scope:
                await run(self._stream.watch, self._make(), level=self._level)
        except Exception as error:
            if not self._stream.watched.is_end(error):
                raise
            await self._stream.end()

    async def _make(self) -> None:
        try:
            self._go_on()
            async for item in self._source:
                self._item = item
                self._asked.clear()
                self._ready.set()
                await self._asked.wait()
                if self._closing:
                    self._stream.watch.tell()  # its end is under way: a leave must not cancel its cleanup
                    break
                self._go_on()
        finally:
            await close(self._source)

    def _go_on(self) -> None:
        """Stop if the client is known to have left: before this began, or a cancellation was caught, or is to come."""
        if self._stream.is_left:
            self._stream.watch.tell()
            raise ClientDisconnect

    def _done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # or asyncio complains that nobody has asked, if nobody does
        self._ready.set()
        self._stream.channel.change()

    async def aclose(self) -> None:
        if self.task is None or self.task.done():
            return
        if self._ready.is_set():  # it waits: its cleanup may await
            self._closing = True
            self._asked.set()
        else:
            self._cancel_scope.cancel()
        with CancelScope(shield=True):
            await asyncio.wait((self.task,))
        self.task.result()


def watch_items(
    items: Any, watched: Watched, request: Request, on_disconnect: OnDisconnect | None
) -> AsyncGenerator[Any]:  # Any: whatever the endpoint yields
    """Return the items of a generator endpoint until the client leaves."""
    # Starlette would listen beside us, take messages, and cancel by level: it leaves that to send() from ASGI 2.4 on.
    request.scope["asgi"] = {**request.scope.get("asgi", {}), "spec_version": "2.4"}
    stream = Stream(watched, request)
    stream.hooks.append(on_disconnect)
    if isinstance(items, Generator):
        generator = cast("Generator[Any]", items)  # isinstance() can't tell of what
        return stream.items(_in_threads(generator), level=True)
    return stream.items(items)


async def _in_threads(generator: Generator[T]) -> AsyncGenerator[T]:
    try:
        while (item := await run_in_threadpool(next, generator, _END)) is not _END:
            yield item
    finally:
        # It may have ended, or still run, if a server that shuts down has torn us from the thread.
        if getgeneratorstate(generator) == GEN_SUSPENDED:
            with CancelScope(shield=True):
                await run_in_threadpool(generator.close)


async def _next(iterator: AsyncIterator[T]) -> T:
    return await anext(iterator)  # within a coroutine, which may be closed before it has begun


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

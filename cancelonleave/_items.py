"""Passes on what an endpoint yields, or a response iterates over, until the client leaves."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator
from inspect import GEN_RUNNING, getgeneratorstate
from typing import Any, TypeVar, cast

from anyio import CancelScope, current_time
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from ._cancellation import run
from ._dependencies import tell_dependencies
from ._patience import PATIENCE
from ._request import OnDisconnect, Watched, is_read, run_hook

T = TypeVar("T")
_END: Any = object()  # Any: in the place of an item


class Stream:
    """What a request is answered with piece by piece."""

    pulling = False  # while the next item is being made, or the last one's maker cleans up
    cut = False  # since the client has left

    def __init__(self, watched: Watched, request: Request) -> None:
        self.watched = watched
        self.watch = watched.watch
        self.channel = watched.channel
        self.request = request
        self.hooks: list[OnDisconnect | None] = []
        tell_dependencies(request.scope, lambda: self.cut)

    async def items(self, source: AsyncIterator[T], *, level: bool = False) -> AsyncGenerator[T]:
        """Pass on what `source` yields until the client leaves, then close it; also if this is closed itself."""
        began = current_time()
        ended = False
        if not self.channel.invited:
            self.channel.invited = await is_read(self.request)
        try:
            async with self.watch.held():
                try:
                    while self.channel.left is None:
                        self.pulling = True
                        late = current_time() - began > PATIENCE
                        item = await run(self.watch, _next(source), level=level, at_once=late)
                        self._rest()
                        yield item
                finally:
                    self.pulling = True
                    # A response that listens itself may have begun to cancel by level in this very moment.
                    with CancelScope(shield=self.channel.left is not None):
                        await close(source)
        except StopAsyncIteration:
            ended = True
        except Exception as error:
            ended = not self.watched.is_end(error)
            if ended:
                raise
        finally:
            if self.channel.left is not None and not ended:
                self.cut = True
                await self.report()
            self._rest()

    def _rest(self) -> None:
        self.pulling = False
        if self.channel.left is not None:
            self.channel.change()

    async def report(self) -> None:
        """Tell of the leave, once."""
        self.watched.log(self.request.scope)
        while self.hooks:
            await run_hook(self.hooks.pop(0), self.request)


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
        # It still runs, if a server that shuts down has torn us from the thread.
        if getgeneratorstate(generator) != GEN_RUNNING:
            with CancelScope(shield=True):
                await run_in_threadpool(generator.close)


async def _next(iterator: AsyncIterator[T]) -> T:
    return await anext(iterator)  # within a coroutine, which may be closed before it has begun


async def close(iterator: Any) -> None:  # Any: it need not be a generator
    """Close it, if it can be closed, and isn't just being closed."""
    # The garbage collector may have found a generator in one cycle with the one that closes it, and be faster.
    if hasattr(iterator, "aclose") and not getattr(iterator, "ag_running", False):
        await iterator.aclose()

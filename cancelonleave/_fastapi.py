"""All that leans on FastAPI's internals."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import Any, cast
from weakref import ref

from starlette.exceptions import HTTPException
from starlette.requests import Request

from ._endpoint import OnDisconnect
from ._exceptions import ClientClosedRequest
from ._stream import Items, State, Stream, in_threads
from ._watch import Watch


def guard_items(
    source: Any, watch: Watch, request: Request, on_disconnect: OnDisconnect | None
) -> Items[Any]:  # Any: whatever the endpoint yields
    """Return what a generator endpoint yields until the client disconnects."""
    # Starlette would listen beside us, take messages, and cancel by level: it leaves that to send() from ASGI 2.4 on.
    request.scope["asgi"] = {**request.scope.get("asgi", {}), "spec_version": "2.4"}
    stream = GeneratorStream(watch, request)
    stream.hooks.append(on_disconnect)
    items: Items[Any]
    if isinstance(source, Generator):
        generator = cast("Generator[Any]", source)  # isinstance() can't tell of what
        items = Items(stream, in_threads(generator), in_thread=True)
    else:
        items = Items(stream, source)
    stream.items = ref(items)
    stream.release_with(items)
    tell_dependencies(stream, items)
    return items


class GeneratorStream(Stream):
    """What a generator endpoint yields, and FastAPI sends.

    That send() isn't guarded, and may never return on gunicorn with uvloop. The source is closed meanwhile, from
    another task, unless it holds a cancel scope, which only its own task may exit.
    """

    items: ref[Items[Any]]

    def is_due(self) -> bool:
        items = self.items()
        return items is not None and items.state is State.WAITS and not items.holds_scope

    def cancel(self) -> list[float]:
        items = cast("Items[Any]", self.items())  # it is there, or this would not be due
        self.watch.loop.start_task(items.aclose(), None)
        return super().cancel()


def tell_dependencies(stream: Stream, items: Items[Any] | None = None) -> None:
    """Have what FastAPI exits after the response see `ClientClosedRequest`, if the stream is cut.

    Raising it would not help: once the response has started, both frameworks turn it into a RuntimeError, which the
    server logs. The stack of these dependencies is FastAPI's own (from 0.118 on); without it, they see nothing of the
    cut.
    """
    stack: AsyncExitStack | None = stream.request.scope.get("fastapi_inner_astack")
    if stack is None:
        return
    dependencies = stack.pop_all()

    async def roll_back(
        kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if items is not None:
            await items.aclose()
        if error is not None or not stream.is_cut:
            return await dependencies.__aexit__(kind, error, traceback)
        with suppress(HTTPException):  # a dependency's answer to it, or itself, comes too late
            await dependencies.__aexit__(ClientClosedRequest, ClientClosedRequest(), None)
        return False

    stack.push_async_exit(roll_back)

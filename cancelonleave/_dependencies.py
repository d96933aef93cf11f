"""Has FastAPI's dependencies with `yield` see that the client left while the response was sent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from types import TracebackType

from starlette.exceptions import HTTPException
from starlette.types import Scope

from ._exceptions import ClientClosedRequest


def tell_dependencies(scope: Scope, close: Callable[[], Awaitable[None]], is_cut: Callable[[], bool]) -> None:
    """Have what FastAPI exits after the response see `ClientClosedRequest`, if `is_cut()` after `close()`.

    To raise it won't do: once the response has started, both frameworks turn it into a RuntimeError, which the server
    logs. The stack of these dependencies is FastAPI's own (from 0.118 on); without it, they see nothing of the leave.
    """
    stack: AsyncExitStack | None = scope.get("fastapi_inner_astack")
    if stack is None:
        return
    dependencies = stack.pop_all()

    async def leave(
        kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        await close()
        if error is not None or not is_cut():
            return await dependencies.__aexit__(kind, error, traceback)
        with suppress(HTTPException):  # a dependency's answer to it, or itself, comes too late
            await dependencies.__aexit__(ClientClosedRequest, ClientClosedRequest(), None)
        return False

    stack.push_async_exit(leave)

"""Guards one call: cancels it, and turns a disconnect into the exception, the record and the call of the hook."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from anyio import get_cancelled_exc_class
from anyio.lowlevel import checkpoint_if_cancelled
from starlette.requests import Request
from starlette.types import Scope
from starlette.websockets import WebSocket

from ._cancel import AsyncioCall, ThreadCall
from ._route import route_template
from ._watch import Connection, Fate, Phase, Watch

if TYPE_CHECKING:
    from ._trio import TrioCall

OnDisconnect = Callable[[Request], object] | Callable[[WebSocket], object]

logger = logging.getLogger("cancelonleave")


def guard(watch: Watch, request: Connection, *, in_thread: bool = False) -> AsyncioCall | TrioCall:
    """Return a context in which the current task is cancelled if the client disconnects: it raises the exception."""
    host = asyncio_task()
    if host is None:
        from ._trio import TrioCall  # here, for it need not be installed

        return TrioCall(watch, request)
    return ThreadCall(watch, request, host) if in_thread else AsyncioCall(watch, request, host)


def asyncio_task() -> asyncio.Task[Any] | None:  # Any: whatever it returns
    try:
        return asyncio.current_task()
    except RuntimeError:  # under trio; in its guest mode there is an asyncio loop, but it runs no task just now
        return None


def refuse_if_disconnected(watch: Watch) -> None:
    """Keep a call from being started whose client is known to have disconnected."""
    if watch.phase is Phase.CAME:
        watch.learn()  # a decorated caller in this task learns of it here
        raise watch.exception()


async def report(error: BaseException, watch: Watch, request: Connection, on_disconnect: OnDisconnect | None) -> None:
    """Write the record and call the hook, if what has ended a call is the disconnect; raise our exception for it."""
    if isinstance(error, get_cancelled_exc_class()):
        if any(call.fate is Fate.CANCELLED for call in watch.calls):  # the decorated endpoint that has called this one
            await run_hook(watch, request, on_disconnect)
    elif await is_disconnect(error, watch):
        log(watch, request.scope)
        await run_hook(watch, request, on_disconnect)
        ended = watch.exception()
        if not isinstance(error, type(ended)):
            raise ended from error


async def is_disconnect(error: BaseException, watch: Watch) -> bool:
    """Whether something has ended with `error` because the client disconnected."""
    if watch.phase is not Phase.CAME or not _is_only(watch.read_as, error):
        return False
    await checkpoint_if_cancelled()  # a cancellation from outside at the same time takes precedence
    return True


def _is_only(kind: type[Exception], error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):  # of a task group that was reading the body
        group = cast("BaseExceptionGroup[BaseException]", error)  # isinstance() can't tell what is in it
        return all(_is_only(kind, each) for each in group.exceptions)
    return isinstance(error, kind)


def log(watch: Watch, scope: Scope) -> None:
    """Write the one record of the disconnect."""
    if not watch.is_logged and logger.isEnabledFor(logging.INFO):  # to name the route is a walk through all routes
        watch.is_logged = True
        # It doesn't say that the client did it: a middleware that answers in the endpoint's place sends this, too.
        _write(logging.INFO, f"stopped after %(seconds).3f s on {scope['type']}.disconnect", _facts(watch, scope))


async def run_hook(watch: Watch, request: Connection, on_disconnect: OnDisconnect | None) -> None:
    """Call the hook, for which the scope says what the record does; log what it raises."""
    if on_disconnect is None:
        return
    host = asyncio_task()
    before = host.cancelling() if host else 0
    facts = request.scope["cancelonleave"] = _facts(watch, request.scope)
    try:
        if inspect.isawaitable(result := cast(Callable[[Connection], object], on_disconnect)(request)):
            await result
    except (Exception, asyncio.CancelledError) as error:
        if isinstance(error, asyncio.CancelledError) and host and host.cancelling() > before:
            raise  # it comes from outside, and not from a task that the hook has cancelled
        _write(logging.ERROR, "on_disconnect failed", facts, exc_info=True)


def _facts(watch: Watch, scope: Scope) -> dict[str, Any]:  # Any: whatever a middleware has made of them
    seconds = watch.loop.time() - watch.began
    return {"method": scope.get("method", scope["type"].upper()), "route": route_template(scope), "seconds": seconds}


def _write(level: int, text: str, facts: dict[str, Any], *, exc_info: bool = False) -> None:
    """Write a record; nothing that logging raises takes the place of the disconnect."""
    text = f"%(method)s %(route)s: {text}"
    with suppress(Exception):
        try:
            logger.log(level, text, facts, extra=facts, exc_info=exc_info)
        except KeyError:  # the application's record factory has attributes with these names
            logger.log(level, text, facts, exc_info=exc_info)

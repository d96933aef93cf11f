"""What the guards of one request share: its channel, the watch over it, and the record of its end."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, cast

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope

from ._channel import Channel, is_cancelled
from ._exceptions import ClientClosedRequest
from ._watch import Watch

OnDisconnect = Callable[[Request], object]

logger = logging.getLogger("cancelonleave")


class Watched:
    """A request's channel and the watch over it, in the place of its receive()."""

    __slots__ = ("__weakref__", "_began", "_logged", "channel", "watch")

    def __init__(self, receive: Receive, scope: Scope) -> None:
        self._began = time.perf_counter()
        self._logged = False
        self.channel = Channel(receive, scope)
        self.watch = Watch(self.channel, ClientClosedRequest, is_stream)

    async def __call__(self) -> Message:
        message = await self.channel.take(self.watch.start)
        if message is self.channel.left and not is_cancelled():  # read, not just asked for by is_disconnected()
            self.watch.tell()
        return message

    def is_end(self, error: Exception) -> bool:
        """Whether something has ended with `error` because the client left."""
        return self.channel.left is not None and _is_disconnect(error)

    def log(self, scope: Scope) -> None:
        """Write the one record of the leave."""
        if not self._logged:
            self._logged = True
            values = {**_names(scope), "seconds": time.perf_counter() - self._began}
            logger.info("%(method)s %(route)s: stopped after %(seconds).3f s, the client left", values, extra=values)


def is_stream(response: object) -> bool:
    """Whether it is a response whose body is still to be made."""
    return hasattr(response, "body_iterator")


def watch(request: Request) -> Watched:
    receive = request.receive
    if isinstance(receive, Watched):
        return receive
    watched = Watched(receive, request.scope)
    _replace_receive(request, watched)
    return watched


async def run_hook(on_disconnect: OnDisconnect | None, request: Request) -> None:
    if on_disconnect is None:
        return
    try:
        if inspect.isawaitable(result := on_disconnect(request)):
            await result
    except Exception:
        logger.exception("%(method)s %(route)s: on_disconnect failed", _names(request.scope))


def _names(scope: Scope) -> dict[str, Any]:  # Any: whatever a middleware has made of them
    # FastAPI and Starlette 1.x name the route; older Starlette, and a bare Route, only the endpoint.
    route = getattr(scope.get("route"), "path", getattr(scope.get("endpoint"), "__name__", None))
    return {"method": scope.get("method"), "route": route}


def _is_disconnect(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):  # of a task group that was reading the body
        group = cast("BaseExceptionGroup[BaseException]", error)  # isinstance() can't tell what is in it
        return all(_is_disconnect(each) for each in group.exceptions)
    return isinstance(error, ClientDisconnect)


async def is_read(request: Request) -> bool:
    """Whether the body was read already, as FastAPI does before it calls an endpoint that takes it."""

    async def unread() -> Message:
        raise EOFError

    receive = request.receive
    _replace_receive(request, unread)
    try:
        async with aclosing(request.stream()) as stream:
            await anext(stream)
    except (EOFError, RuntimeError) as error:
        return isinstance(error, RuntimeError)  # "Stream consumed", as after form()
    finally:
        _replace_receive(request, receive)
    return True


def _replace_receive(request: Request, receive: Receive) -> None:
    # The one private attribute of others that we need: the endpoint, and whoever reads this request after it, must get
    # what was read ahead. A new Request would lack the body, the form and the attributes that dependencies left here.
    request._receive = receive  # pyright: ignore[reportPrivateUsage]  # see above

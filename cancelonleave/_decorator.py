"""Turns an endpoint into one that ends when its client does; the only room that knows all others."""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar, cast, overload
from weakref import WeakSet

from anyio import get_cancelled_exc_class
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope

from ._cancellation import Watch
from ._channel import Channel, is_cancelled
from ._exceptions import ClientClosedRequest
from ._signature import request_parameter, takes_websocket

# Any: of whatever arguments and result, which the type variable carries over exactly.
EndpointT = TypeVar("EndpointT", bound=Callable[..., Awaitable[Any]])
OnDisconnect = Callable[[Request], object]

logger = logging.getLogger("cancelonleave")
_guarded: WeakSet[Callable[..., object]] = WeakSet()


@overload
def cancel_on_disconnect(endpoint: EndpointT, /) -> EndpointT: ...
@overload
def cancel_on_disconnect(*, on_disconnect: OnDisconnect | None = None) -> Callable[[EndpointT], EndpointT]: ...
def cancel_on_disconnect(
    endpoint: EndpointT | None = None, /, *, on_disconnect: OnDisconnect | None = None
) -> EndpointT | Callable[[EndpointT], EndpointT]:
    """Cancel an endpoint when its client leaves.

    Put it on async endpoints that are slow or expensive, below the route's own decorator; or on any async function
    that takes a `starlette.requests.Request`. Leave it off work that must finish although nobody waits for it, and off
    what runs after the response: servers tell of a disconnect after each one.

    When the client leaves, the endpoint gets one cancellation. Its `finally` and `except` blocks run to their end and
    may await; a section inside `anyio.CancelScope(shield=True)` is not cut, the cancellation waits for its end. (On
    trio cancellation is level-triggered, as always there.) Then `ClientClosedRequest` is raised in its place. An
    endpoint that has its result already, or that catches the cancellation and returns, is left to deliver it.

    Args:
        endpoint: The async function. One without a parameter for the Request gets a hidden one, which FastAPI fills.
            Called without any Request, as in a unit test, it just runs.
        on_disconnect: Called with the Request after the endpoint's cleanup, when the client's leaving has ended it.
            May be async. If it fails, that is logged and the request ends as it would have.

    Raises:
        TypeError: If it can't work: for a class, a generator, a sync function, or one that takes a WebSocket.
    """
    if endpoint is None:
        return functools.partial(_guard, on_disconnect=on_disconnect)
    return cast(EndpointT, _guard(endpoint, on_disconnect))  # it takes and returns what the endpoint does


def _guard(endpoint: Any, on_disconnect: OnDisconnect | None) -> Any:  # Any: the public function has the exact type
    if type(endpoint) in (staticmethod, classmethod):
        return type(endpoint)(_guard(endpoint.__func__, on_disconnect))
    if on_disconnect is None and inspect.isfunction(endpoint) and endpoint in _guarded:
        return endpoint
    _refuse_what_cannot_work(endpoint)
    parameter = request_parameter(endpoint)

    @functools.wraps(endpoint)
    async def guarded(*args: Any, **kwargs: Any) -> Any:  # Any: the endpoint's own
        request = parameter.take(args, kwargs)
        if request is None:
            return await endpoint(*args, **kwargs)
        watched = _watched(request)
        if not watched.channel.invited:
            watched.channel.invited = await _is_read(request)
        try:
            if watched.channel.left is not None:
                watched.watch.tell()  # a decorated caller learns of it here: it must not be cancelled on top
                raise ClientClosedRequest
            return await watched.watch.run(endpoint(*args, **kwargs))
        except BaseException as error:
            passes_on = isinstance(error, get_cancelled_exc_class())  # to the decorated endpoint that called this one
            is_leave = any(call.cancelled for call in watched.watch.calls) if passes_on else _is_disconnect(error)
            if not is_leave or watched.channel.left is None:
                raise
            if not passes_on:
                watched.log(request.scope)
            if on_disconnect is not None:
                await _run_hook(on_disconnect, request)
            if passes_on or isinstance(error, ClientClosedRequest):
                raise
            raise ClientClosedRequest from error

    guarded.__name__ = getattr(endpoint, "__name__", type(endpoint).__name__)  # as FastAPI calls it in OpenAPI
    guarded.__signature__ = parameter.signature  # type: ignore[attr-defined]  # known to inspect, not to typeshed
    _guarded.add(guarded)
    return guarded


def _refuse_what_cannot_work(endpoint: Any) -> None:  # Any: any mistake
    function = endpoint
    if isinstance(function, functools.partial):
        function = function.func
    call = function if inspect.isroutine(function) else type(function).__call__
    if inspect.isclass(function):
        fault = "a class, which has no one call to cancel. Decorate its async methods"
    elif inspect.isasyncgenfunction(call) or inspect.isgeneratorfunction(call):
        fault = "a generator. Return the result, or a response, from an async function"
    elif not inspect.iscoroutinefunction(call):
        fault = "not async, so nothing in it can be cancelled. Make it an `async def`"
    elif takes_websocket(endpoint):
        fault = "a WebSocket endpoint, which learns of a leave by itself: catch WebSocketDisconnect there"
    else:
        return
    raise TypeError(f"@cancel_on_disconnect can't guard {endpoint!r}: it is {fault}.")


async def _run_hook(on_disconnect: OnDisconnect, request: Request) -> None:
    try:
        if inspect.isawaitable(result := on_disconnect(request)):
            await result
    except Exception:
        logger.exception("on_disconnect %r failed", on_disconnect)


class _Watched:
    """A request's channel and the watch over it, in the place of the request's receive()."""

    _logged = False

    def __init__(self, receive: Receive, scope: Scope) -> None:
        self._began = time.perf_counter()
        self.channel = Channel(receive, scope)
        self.watch = Watch(self.channel.watch, self.channel.change, ClientClosedRequest)

    async def __call__(self) -> Message:
        message = await self.channel.take(self.watch.start)
        if message is self.channel.left and not is_cancelled():  # read, not just asked for by is_disconnected()
            self.watch.tell()
        return message

    def log(self, scope: Scope) -> None:
        if not self._logged:
            self._logged = True
            # FastAPI and Starlette 1.x name the route; older Starlette, and a bare Route, only the endpoint.
            route = getattr(scope.get("route"), "path", getattr(scope.get("endpoint"), "__name__", None))
            values = {"method": scope.get("method"), "route": route, "seconds": time.perf_counter() - self._began}
            logger.info("%(method)s %(route)s: stopped after %(seconds).3f s, the client left", values, extra=values)


def _is_disconnect(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):  # of a task group that was reading the body
        group = cast("BaseExceptionGroup[BaseException]", error)  # isinstance() can't tell what is in it
        return all(_is_disconnect(each) for each in group.exceptions)
    return isinstance(error, ClientDisconnect)


def _watched(request: Request) -> _Watched:
    receive = request.receive
    if isinstance(receive, _Watched):
        return receive
    watched = _Watched(receive, request.scope)
    _replace_receive(request, watched)
    return watched


async def _is_read(request: Request) -> bool:
    """Whether the body was read already, as FastAPI does before it calls an endpoint that takes it."""

    async def unread() -> Message:
        raise EOFError

    receive = _replace_receive(request, unread)
    try:
        async with aclosing(request.stream()) as stream:
            await anext(stream)
    except (EOFError, RuntimeError) as error:
        return isinstance(error, RuntimeError)  # "Stream consumed", as after form()
    finally:
        _replace_receive(request, receive)
    return True


def _replace_receive(request: Request, receive: Receive) -> Receive:
    # The one private attribute of others that we need: the endpoint, and whoever reads this request after it, must get
    # what was read ahead. A new Request would lack the body, the form and the attributes that dependencies left here.
    replaced, request._receive = request.receive, receive  # pyright: ignore[reportPrivateUsage]  # see above
    return replaced

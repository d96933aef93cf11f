"""Turns an endpoint into one that ends when its client does."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar, cast, overload
from weakref import WeakSet

from anyio import get_cancelled_exc_class
from starlette.concurrency import run_in_threadpool

from ._cancellation import run
from ._exceptions import ClientClosedRequest
from ._items import watch_items
from ._request import OnDisconnect, is_read, is_stream, run_hook, watch
from ._signature import RequestParameter, innermost, request_parameter, takes_websocket
from ._streaming import watch_response

# Any: of whatever arguments and result, which the type variable carries over exactly.
EndpointT = TypeVar("EndpointT", bound=Callable[..., Any])
_guarded: WeakSet[Callable[..., object]] = WeakSet()


@overload
def cancel_on_disconnect(endpoint: EndpointT, /) -> EndpointT: ...
@overload
def cancel_on_disconnect(*, on_disconnect: OnDisconnect | None = None) -> Callable[[EndpointT], EndpointT]: ...
def cancel_on_disconnect(
    endpoint: EndpointT | None = None, /, *, on_disconnect: OnDisconnect | None = None
) -> EndpointT | Callable[[EndpointT], EndpointT]:
    """Cancel an endpoint when its client leaves.

    Put it on endpoints that are slow or expensive, below the route's own decorator; or on any function that takes a
    `starlette.requests.Request`. Leave it off work that must finish although nobody waits for it, and off what runs
    after the response: servers tell of a disconnect after each one.

    When the client leaves, the endpoint gets one cancellation. Its `finally` and `except` blocks run to their end and
    may await; a section inside `anyio.CancelScope(shield=True)` is not cut, the cancellation waits for its end. (On
    trio cancellation is level-triggered, as always there.) Then `ClientClosedRequest` is raised in its place. An
    endpoint that has its result already, or that catches the cancellation and returns, is left to deliver it.

    What an endpoint streams, as a `StreamingResponse` or a generator endpoint of FastAPI's, ends as well, once its
    generator has cleaned up; then nothing is raised, but FastAPI's dependencies with `yield` see the exception. A sync
    endpoint runs in the framework's threads. `anyio.from_thread.check_cancelled()` raises in it once the client has
    left; if it never asks, it runs to its end, and its result is delivered.

    Args:
        endpoint: The function. One without a parameter for the Request gets a hidden one, which FastAPI fills. Called
            without any Request, as in a unit test, it just runs; a sync function must be awaited then.
        on_disconnect: Called with the Request after the endpoint's cleanup, when the client's leaving has ended it.
            May be async. If it fails, that is logged and the request ends as it would have.

    Raises:
        TypeError: If it can't work: for a class, or a function that takes a WebSocket; and when a generator is called
            that is not the endpoint of its route, as a dependency with `yield`.
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
    if _is(inspect.iscoroutinefunction, endpoint):
        guarded = _guard_function(endpoint, parameter, on_disconnect)
    elif _is(inspect.isasyncgenfunction, endpoint):
        guarded = _guard_generator(endpoint, parameter, on_disconnect)
    elif _is(inspect.isgeneratorfunction, endpoint):
        guarded = _guard_generator(endpoint, parameter, on_disconnect)
        guarded.__wrapped__ = _async_generator(guarded)  # for FastAPI, which would iterate in threads of its own
    else:
        guarded = _guard_function(endpoint, parameter, on_disconnect, in_thread=True)
    guarded.__name__ = getattr(endpoint, "__name__", type(endpoint).__name__)  # as FastAPI calls it in OpenAPI
    guarded.__signature__ = parameter.signature
    _guarded.add(guarded)
    return guarded


def _guard_function(
    endpoint: Any, parameter: RequestParameter, on_disconnect: OnDisconnect | None, *, in_thread: bool = False
) -> Any:  # Any: as above
    call = _in_thread(endpoint) if in_thread else endpoint

    @functools.wraps(endpoint)
    async def guarded(*args: Any, **kwargs: Any) -> Any:  # Any: the endpoint's own
        request = parameter.take(args, kwargs)
        if request is None:
            return await call(*args, **kwargs)
        watched = watch(request)
        if watched.watch.finished:  # it runs in the background of a stream that has been sent
            return await call(*args, **kwargs)
        if not watched.channel.invited:
            watched.channel.invited = await is_read(request)
        try:
            if watched.channel.left is not None:
                watched.watch.tell()  # a decorated caller learns of it here: it must not be cancelled on top
                raise ClientClosedRequest
            awaitable = call(*args, **kwargs)
            del args, kwargs  # or they would live as long as the endpoint: 0.1 KiB
            result = await run(watched.watch, awaitable, level=in_thread)
        except get_cancelled_exc_class():
            if any(call.cancelled for call in watched.watch.calls):  # the decorated endpoint that called this one
                await run_hook(on_disconnect, request)
            raise
        except Exception as error:
            if not watched.is_end(error):
                raise
            watched.log(request.scope)
            await run_hook(on_disconnect, request)
            if isinstance(error, ClientClosedRequest):
                raise
            raise ClientClosedRequest from error
        if is_stream(result):
            watch_response(result, watched, request, on_disconnect)
        return result

    return guarded


def _in_thread(endpoint: Any) -> Any:  # Any: as above
    async def call(*args: Any, **kwargs: Any) -> Any:  # Any: the endpoint's own
        result = await run_in_threadpool(endpoint, *args, **kwargs)
        return await result if inspect.isawaitable(result) else result  # as that of a lambda

    return call


def _guard_generator(endpoint: Any, parameter: RequestParameter, on_disconnect: OnDisconnect | None) -> Any:  # Any: so
    @functools.wraps(endpoint)
    def guarded(*args: Any, **kwargs: Any) -> Any:  # Any: the endpoint's own
        request = parameter.take(args, kwargs)
        items = endpoint(*args, **kwargs)
        if request is None:
            return items
        watched = watch(request)
        if is_stream(items):  # a function that wraps a generator, and makes a response of it
            watch_response(items, watched, request, on_disconnect)
            return items
        if innermost(request.scope.get("endpoint", guarded)) is not innermost(guarded):
            raise TypeError(
                f"@cancel_on_disconnect can't guard {_name(endpoint)}: it is a generator, but not its route's "
                "endpoint. Its last part may run when the response is complete. Decorate the endpoint."
            )
        return watch_items(items, watched, request, on_disconnect)

    return guarded


def _async_generator(guarded: Any) -> Any:  # Any: as above
    """Return what FastAPI takes for the innermost function of a sync generator, to see that its items are awaited."""

    @functools.wraps(guarded)
    async def generator() -> AsyncGenerator[None]:
        yield

    del generator.__wrapped__
    return generator


def _refuse_what_cannot_work(endpoint: Any) -> None:  # Any: any mistake
    if inspect.isclass(endpoint):
        fault = "a class, which has no one call to cancel. Decorate its methods"
    elif not callable(endpoint):
        fault = "not a function. Put the decorator right above a `def`; its option has a name, `on_disconnect=`"
    elif takes_websocket(endpoint):
        fault = "a WebSocket endpoint, which learns of a leave by itself: catch WebSocketDisconnect there"
    else:
        return
    raise TypeError(f"@cancel_on_disconnect can't guard {_name(endpoint)}: it is {fault}.")


def _name(endpoint: Any) -> str:  # Any: any mistake
    return f"{endpoint.__module__}.{endpoint.__qualname__}" if hasattr(endpoint, "__qualname__") else repr(endpoint)


def _is(kind: Callable[[object], bool], endpoint: Any) -> bool:  # Any: a function, partial, method or callable instance
    function = endpoint.func if isinstance(endpoint, functools.partial) else endpoint
    call = function if inspect.isroutine(function) else type(function).__call__
    return kind(call) or kind(inspect.unwrap(call))

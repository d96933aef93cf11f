"""Checks what it was put on, and wraps it so that calls with a request are guarded."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast, overload
from weakref import WeakKeyDictionary

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.types import Receive
from starlette.websockets import WebSocket

from ._endpoint import OnDisconnect, guard, refuse_if_disconnected, report
from ._fastapi import guard_items
from ._kind import async_generator_function, coroutine_function, in_place_of, innermost, is_kind
from ._response import guard_response, is_stream
from ._signature import RequestParameter, request_parameter, resolved_signature
from ._watch import Phase, Watch, watch_of
from ._websocket import watch_of_websocket

# Any: of whatever arguments and result, which the type variable carries over exactly.
EndpointT = TypeVar("EndpointT", bound=Callable[..., Any])
# With their hooks: FastAPI before 0.137 makes the routes of an included router twice, and a route class decorates both.
_guarded: WeakKeyDictionary[Callable[..., object], OnDisconnect | None] = WeakKeyDictionary()


@overload
def cancel_on_disconnect(endpoint: EndpointT, /, *, on_disconnect: OnDisconnect | None = None) -> EndpointT: ...
@overload
def cancel_on_disconnect(*, on_disconnect: OnDisconnect | None = None) -> Callable[[EndpointT], EndpointT]: ...
def cancel_on_disconnect(
    endpoint: EndpointT | None = None, /, *, on_disconnect: OnDisconnect | None = None
) -> EndpointT | Callable[[EndpointT], EndpointT]:
    """Cancel an endpoint when its client disconnects.

    Put it right below the route decorator, on endpoints that are slow or expensive, or on any function that takes a
    `starlette.requests.Request` or a `starlette.websockets.WebSocket`. Don't put it on work that must finish even
    if nobody waits for the result, or on background tasks: most servers report a disconnect after every response. Other
    decorators belong below it. A decorator above it sees the hidden Request (a cache would add it to its key, a tracer
    would export its headers), the exception (a retry would run the endpoint again), and a coroutine, even for a sync
    endpoint. (dishka's `@inject` and Pydantic's `validate_call` may stand above it.)

    When the client disconnects, the endpoint gets one cancellation where it awaits. Its `except` and `finally` blocks
    run to their end and may await. A section inside `anyio.CancelScope(shield=True)` is not interrupted: the
    cancellation is delivered when it ends. Then `ClientClosedRequest` is raised in the endpoint's place. An endpoint
    that has finished, or that catches the cancellation and returns, delivers its result. If it reads the body and gets
    `ClientDisconnect` there, it isn't cancelled as well; if it only calls `is_disconnected()`, it is.

    Streams: A `StreamingResponse`, or any response with a `body_iterator`, such as sse-starlette's
    `EventSourceResponse`, is guarded until its last chunk is handed to the server. When the client disconnects, a
    generator that waits stops at once, and one that produces stops at its next chunk. It is cancelled where it awaits,
    or closed where it yields, and its cleanup may await. Nothing is raised, since the response has started, but
    FastAPI's dependencies with `yield` that are still open see `ClientClosedRequest` and roll back (FastAPI 0.118 and
    newer). The response's background task runs, as Starlette runs it after any aborted stream. FastAPI's generator
    endpoints (0.134 and newer) work in the same way, but FastAPI itself calls `send()` for them: the decorator can't
    change whether that raises or blocks after a disconnect, and an `OSError` that such a generator raises becomes a
    `ClientDisconnect`. `FileResponse` and plain responses are left alone.

    Sync endpoints: They run in the framework's threads. A thread can't be cancelled, but it can ask:
    `anyio.from_thread.check_cancelled()` raises once the client has disconnected. A function that never asks runs to
    its end, and its result is delivered. A call that still waits for a free thread is dropped at once. A thread that an
    async endpoint starts with `run_in_threadpool()` or `anyio.to_thread.run_sync()` isn't told on asyncio: the endpoint
    is cancelled when the thread ends. With `asyncio.to_thread()` and `run_in_executor()` the endpoint ends at once, and
    its thread keeps running and using its resources.

    Child tasks: asyncio itself cancels the children of `gather()` and `TaskGroup`, and on Python 3.11 what `wait_for()`
    awaits, even inside their shields. A shield around the whole `gather()` holds. anyio's task groups keep cancelling
    their children, so shield cleanup there. If a child learns of the disconnect by reading the body, the tasks that
    wait for it have a second to end on their own before they are cancelled. A `TaskGroup` whose decorated helpers
    are stopped raises an `ExceptionGroup`, which is a 500 unless the endpoint is decorated too. Before Python 3.13, a
    `TaskGroup` whose child has failed leaves its task marked as cancelled (python/cpython#116720), so the rest of the
    endpoint isn't stopped.

    Middleware: A middleware that responds in the endpoint's place, such as a `BaseHTTPMiddleware` that sends 504 after
    a timeout, looks like a disconnect to the endpoint.

    Trio: Cancellation is level-triggered, as always on trio: shield cleanup that awaits. A generator endpoint stops at
    its next item and must not hold a task group open across a `yield`. Responses other than `StreamingResponse` end in
    their own way.

    WebSockets: A `WebSocketDisconnect` is raised, with the code and the reason of the client's close. Messages that
    nobody reads are kept in order, up to 64 KiB, where each counts as its size plus 256 bytes: about 250 short ones.
    Beyond that the endpoint must read, or send, to learn of the disconnect. Closing the WebSocket, or returning,
    isn't a disconnect.

    Args:
        endpoint: The function. If it has no parameter for the Request, it gets a hidden one, which FastAPI fills.
            Called without any Request, as in a unit test, it just runs; a sync function must be awaited then.
        on_disconnect: Called with the Request or WebSocket once the endpoint has cleaned up after a disconnect. It
            finds the `method`, `route` and `seconds` of the log record in `request.scope["cancelonleave"]`, and may be
            async. If it fails, that is logged, and the request ends as it would have.

    Raises:
        TypeError: If the decorator can't work on this object: a class, an ASGI application, a router, an HTTP
            middleware; or if `on_disconnect` can't be called with one argument. Also raised when a generator is
            called that isn't its route's endpoint, such as a dependency with `yield`.
    """
    if on_disconnect is not None:
        _refuse_hook_that_cannot_be_called(on_disconnect)
    if endpoint is None:
        return functools.partial(_guard, on_disconnect=on_disconnect)
    return cast(EndpointT, _guard(endpoint, on_disconnect))  # it takes and returns what the endpoint does


def _guard(endpoint: Any, on_disconnect: OnDisconnect | None) -> Any:  # Any: the public function has the exact type
    if type(endpoint) in (staticmethod, classmethod):
        return type(endpoint)(_guard(endpoint.__func__, on_disconnect))
    if inspect.isfunction(endpoint) and endpoint in _guarded and on_disconnect in (None, _guarded[endpoint]):
        return endpoint
    _refuse_what_cannot_work(endpoint)
    parameter = request_parameter(endpoint)
    if is_kind(inspect.iscoroutinefunction, endpoint):
        guarded = _guard_function(endpoint, parameter, on_disconnect)
    elif is_kind(inspect.isasyncgenfunction, endpoint):
        guarded = _guard_generator(endpoint, parameter, on_disconnect)
    elif is_kind(inspect.isgeneratorfunction, endpoint):
        guarded = _guard_generator(endpoint, parameter, on_disconnect)
        guarded.__wrapped__ = in_place_of(endpoint, async_generator_function)
    else:
        guarded = _guard_function(endpoint, parameter, on_disconnect, in_thread=True)
        guarded.__wrapped__ = in_place_of(endpoint, coroutine_function)
    guarded.__name__ = getattr(endpoint, "__name__", type(endpoint).__name__)  # as FastAPI calls it in OpenAPI
    guarded.__signature__ = signature = parameter.signature
    annotations = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    annotations["return"] = signature.return_annotation
    guarded.__annotations__ = {name: each for name, each in annotations.items() if each is not signature.empty}
    _guarded[guarded] = on_disconnect
    return guarded


def _guard_function(
    endpoint: Any, parameter: RequestParameter, on_disconnect: OnDisconnect | None, *, in_thread: bool = False
) -> Any:
    call: Any = _in_thread(endpoint) if in_thread else endpoint  # Any: the endpoint's type

    @functools.wraps(endpoint)
    async def guarded(*args: Any, **kwargs: Any) -> Any:  # Any: the endpoint's own
        request = parameter.take(args, kwargs)
        # A phase CLOSED: it runs in the background of a stream that has been sent.
        if request is None or (watch := _watch_of(request)).phase is Phase.CLOSED:
            result = await call(*args, **kwargs)
        else:
            try:
                with guard(watch, request, in_thread=in_thread):
                    refuse_if_disconnected(watch)
                    awaitable = call(*args, **kwargs)
                    del args, kwargs  # or they would live as long as the endpoint: 0.1 KiB
                    result = await awaitable
                    guard_response(result, watch, request, on_disconnect)
            except BaseException as error:
                await report(error, watch, request, on_disconnect)
                raise
        if in_thread and inspect.isawaitable(result):  # of a lambda or a wrapper; the thread's scope must not cancel it
            result = await _await_guarded(request, result, on_disconnect)
        return result

    return guarded


def _in_thread(endpoint: Any) -> Any:
    async def call(*args: Any, **kwargs: Any) -> Any:
        # In a list: a wrapper of an async endpoint returns a coroutine, which trio refuses from a thread.
        return (await run_in_threadpool(lambda: [endpoint(*args, **kwargs)]))[0]

    return call


def _watch_of(request: Request | WebSocket) -> Watch:
    return watch_of(request) if isinstance(request, Request) else watch_of_websocket(request)


async def _await_guarded(
    request: Request | WebSocket | None, awaitable: Awaitable[object], on_disconnect: OnDisconnect | None
) -> object:
    try:
        return await _guard(_wait_for, on_disconnect)(request, awaitable)
    finally:
        if inspect.iscoroutine(awaitable):
            awaitable.close()  # it was not started if the client disconnected before, and Python would warn of that


async def _wait_for(request: Request | WebSocket | None, awaitable: Awaitable[object]) -> object:
    return await awaitable


def _guard_generator(endpoint: Any, parameter: RequestParameter, on_disconnect: OnDisconnect | None) -> Any:  # Any: so
    @functools.wraps(endpoint)
    def guarded(*args: Any, **kwargs: Any) -> Any:  # Any: the endpoint's own
        request = parameter.take(args, kwargs)
        items = endpoint(*args, **kwargs)
        if request is None:
            return items
        if isinstance(request, Request):
            if is_stream(items):  # a function that wraps a generator, and makes a response of it
                guard_response(items, watch_of(request), request, on_disconnect)
                return items
            if innermost(request.scope.get("endpoint", guarded)) is innermost(guarded):
                return guard_items(items, watch_of(request), request, on_disconnect)
        raise TypeError(
            f"@cancel_on_disconnect can't guard {_name(endpoint)}: it is a generator, but not its route's "
            "endpoint. What follows its `yield` may run after the response. Decorate the endpoint."
        )

    return guarded


def _refuse_what_cannot_work(endpoint: Any) -> None:  # Any: any mistake
    if fault := _fault_of(endpoint):
        raise TypeError(f"@cancel_on_disconnect can't guard {_name(endpoint)}: it is {fault}.")


def _fault_of(endpoint: Any) -> str | None:
    from starlette.middleware.base import RequestResponseEndpoint  # here, so that to import us loads nothing else

    if inspect.isclass(endpoint):
        return "a class, which has no single call to cancel. Decorate its methods"
    if not callable(endpoint):
        return "not a function. Put the decorator right below the route decorator; pass a hook as `on_disconnect=`"
    parameters = resolved_signature(endpoint).parameters.values()
    names, annotations = [p.name for p in parameters], [p.annotation for p in parameters]
    if names[-3:] == ["scope", "receive", "send"] or Receive in annotations:
        return "an ASGI application, which gets no Request. Decorate the endpoints in it"
    if "call_next" in names or RequestResponseEndpoint in annotations:
        return "an HTTP middleware: cancelling it would cut the endpoint's cleanup short. Decorate the endpoint"
    return None


def _refuse_hook_that_cannot_be_called(on_disconnect: Any) -> None:
    try:
        resolved_signature(on_disconnect).bind(None)
    except ValueError:  # written in C, and doesn't say what it takes
        pass
    except TypeError as error:
        raise TypeError(
            f"@cancel_on_disconnect can't call on_disconnect={_name(on_disconnect)}: {error}. "
            "Give it a function that takes the Request (or WebSocket) as its only argument."
        ) from None


def _name(endpoint: Any) -> str:
    return f"{endpoint.__module__}.{endpoint.__qualname__}" if hasattr(endpoint, "__qualname__") else repr(endpoint)

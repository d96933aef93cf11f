"""The compared implementations: no guard, ours, and other published ways to stop an endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from importlib import import_module
from typing import Any, NamedTuple

import anyio
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from cancelonleave import cancel_on_disconnect

# Any: nothing is sent into an endpoint, nor yielded; what it takes beside the request and returns is its framework's.
Endpoint = Callable[..., Coroutine[Any, Any, Any]]

BARE, OURS, ARTICLE, FASTAPI_DISCONNECT = "undecorated", "cancelonleave", "article", "fastapi-disconnect"
MIDDLEWARE = "fastapi-disconnect (middleware)"
FRAMEWORKS = ["Starlette", "FastAPI"]


class Guard(NamedTuple):
    """What an implementation puts around each endpoint, and around the whole application."""

    decorate: Callable[[Endpoint], Endpoint] = lambda endpoint: endpoint
    wrap: Callable[[ASGIApp], ASGIApp] = lambda app: app


# Each is as short as possible, so that none is slower here than necessary.


def article(endpoint: Endpoint) -> Endpoint:
    """Run endpoint and watcher in a task group, the pattern of "Understanding client disconnection in FastAPI"."""

    @wraps(endpoint)
    async def guarded(request: Request, **others: Any) -> Any:  # Any: the endpoint's own
        response: Any = Response(status_code=499)

        async def respond() -> None:
            nonlocal response
            response = await endpoint(request, **others)

        async with anyio.create_task_group() as task_group:

            async def wrap(call: Callable[[], Coroutine[Any, Any, None]]) -> None:  # Any: as for an endpoint
                await call()
                task_group.cancel_scope.cancel()

            task_group.start_soon(wrap, lambda: disconnected(request))
            await wrap(respond)
        return response

    return guarded


def handler_task(endpoint: Endpoint) -> Endpoint:
    """Run endpoint and watcher in tasks, and cancel the one that ends last, as vLLM's `with_cancellation` does."""

    @wraps(endpoint)
    async def guarded(request: Request, **others: Any) -> Any:  # Any: the endpoint's own
        task = asyncio.create_task(endpoint(request, **others))
        watcher = asyncio.create_task(disconnected(request))
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        watcher.cancel()
        if task.done():
            return task.result()
        task.cancel()
        return None

    return guarded


def polling(endpoint: Endpoint) -> Endpoint:
    """Run the endpoint in a task, and ask every 10 ms whether the client has disconnected."""

    @wraps(endpoint)
    async def guarded(request: Request, **others: Any) -> Any:  # Any: the endpoint's own
        task = asyncio.create_task(endpoint(request, **others))
        while not (await asyncio.wait((task,), timeout=0.01))[0]:
            if await request.is_disconnected():
                task.cancel()
                await asyncio.wait((task,))
                raise HTTPException(499)  # the published ones raise too
        return task.result()

    return guarded


def aiofence() -> Guard:
    """Run the whole endpoint in a fence, which aiofence's middleware opens; the application handles its end."""
    get_current_fencing = import_module("aiofence").get_current_fencing
    middleware = import_module("aiofence.contrib.starlette").DisconnectMiddleware

    def decorate(endpoint: Endpoint) -> Endpoint:
        @wraps(endpoint)
        async def guarded(request: Request, **others: Any) -> Any:  # Any: the endpoint's own
            with get_current_fencing().move_on_cancel():
                return await endpoint(request, **others)
            return Response(status_code=499)

        return guarded

    return Guard(decorate, middleware)


def implementations() -> dict[str, Guard]:
    """Return the installed implementations, by their names in the tables."""
    guards = {
        BARE: Guard(),
        OURS: Guard(cancel_on_disconnect),
        ARTICLE: Guard(article),
        "handler task": Guard(handler_task),
        "polling": Guard(polling),
    }
    try:
        # Imported by name, so that type checkers don't need them where they can't be installed.
        peer = import_module("fastapi_disconnect")
        guards[FASTAPI_DISCONNECT] = Guard(peer.cancel_on_disconnect)
        guards[MIDDLEWARE] = Guard(wrap=peer.CancelOnDisconnectMiddleware)
        guards["aiofence"] = aiofence()
    except ImportError:
        print("Without fastapi-disconnect and aiofence, which are not installed. (They need Python 3.12 or newer.)")
    return guards


async def disconnected(request: Request) -> None:
    """Return when the client has disconnected; everything else that arrives is lost."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def application(framework: str, guard: Guard, endpoints: dict[str, Endpoint]) -> ASGIApp:
    """Return an application with these endpoints, each under its path, guarded."""
    guarded = {path: guard.decorate(endpoint) for path, endpoint in endpoints.items()}
    if framework == "Starlette":
        return guard.wrap(Starlette(routes=[Route(path, endpoint) for path, endpoint in guarded.items()]))
    app = FastAPI()
    for path, endpoint in guarded.items():
        app.get(path, response_model=None)(endpoint)
    return guard.wrap(app)

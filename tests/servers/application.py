"""An application for real servers: decorated endpoints of all kinds, in both frameworks, bare and under middleware."""

from __future__ import annotations

import gc
import hashlib
import logging
import random
import sys
from collections import Counter
from collections.abc import Callable

import anyio
from fastapi import FastAPI, Request
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from cancelonleave import cancel_on_disconnect
from cancelonleave._watch import Call, Watch
from tests.servers import application_streams as streams
from tests.servers.application_notes import events, note, noted, on_disconnect

logger = logging.getLogger("cancelonleave")
logger.setLevel(logging.INFO)
# Otherwise daphne would log it again:
logger.propagate = False
logger.addHandler(logging.StreamHandler(sys.stdout))


async def wait(request: Request) -> None:
    async with noted(request):
        note(request, "begun")
        await anyio.sleep(60)


async def read(request: Request) -> None:
    """Read the body, then wait."""
    async with noted(request):
        note(request, "reading")
        note(request, f"read {len(await request.body())} bytes")
        await anyio.sleep(60)


async def take(request: Request, item: dict[str, str]) -> None:
    """Have FastAPI read the body, then wait."""
    async with noted(request):
        note(request, f"took {len(item)} items")
        await anyio.sleep(60)


async def digest(request: Request) -> Response:
    """Read the body with short timeouts: give up, call is_disconnected(), and read on, again and again."""
    whole = hashlib.sha256()
    more = True
    while more:
        with anyio.move_on_after(random.uniform(0, 0.005)):
            message = await request.receive()
            whole.update(message["body"])
            more = message.get("more_body", False)
        await request.is_disconnected()
    return PlainTextResponse(whole.hexdigest())


async def refuse(request: Request) -> Response:
    """Refuse a body after a moment, without reading it."""
    await anyio.sleep(0.06)
    return Response(status_code=413)


async def answer(request: Request) -> Response:
    """Call is_disconnected(), which must not lose a chunk of the body, read the body, and answer after a time."""
    async with noted(request):
        note(request, "begun")
        await request.is_disconnected()
        size = len(await request.body())
        await anyio.sleep(float(request.query_params.get("after", 0)))
    note(request, "answer")
    return PlainTextResponse(f"{size} bytes")


async def work_on(request: Request) -> Response:
    """Answer, and work in the background until after the moment at which the watch would begin."""
    return PlainTextResponse("answer", background=BackgroundTask(streams.after, request))


ENDPOINTS: dict[str, Callable[[Request], object]] = {
    "/wait": wait,
    "/read": read,
    "/digest": digest,
    "/refuse": refuse,
    "/answer": answer,
    "/work-on": work_on,
    "/idle": streams.idle,
    "/busy": streams.busy,
    "/listening": streams.listening,
    "/whole": streams.whole,
    "/echo": streams.echo,
    "/hashed": streams.hashed,
    "/sync": streams.sync,
    "/loop": streams.loop,
}
guard = cancel_on_disconnect(on_disconnect=on_disconnect)
OURS = (Watch, Call)  # each request has one of each
METHODS = ["GET", "POST"]


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


def in_fastapi(middleware: list[Middleware]) -> FastAPI:
    app = FastAPI(middleware=middleware)
    for path, endpoint in ENDPOINTS.items():
        app.add_api_route(path, guard(endpoint), methods=METHODS, response_model=None)
    app.add_api_route("/take", guard(take), methods=["POST"], response_model=None)
    return app


def in_starlette(middleware: list[Middleware]) -> Starlette:
    routes = [Route(path, guard(endpoint), methods=METHODS) for path, endpoint in ENDPOINTS.items()]
    return Starlette(routes=routes, middleware=middleware)


async def ready(request: Request) -> Response:
    return PlainTextResponse("ready")


async def show(request: Request) -> Response:
    """Return the events of all requests whose keys have this prefix."""
    begin = request.path_params["begin"]
    seen = dict(events)  # threads add to it meanwhile
    return JSONResponse({key.removeprefix(begin): seen[key] for key in seen if key.startswith(begin)})


async def census(request: Request) -> Response:
    """Count the objects that belong to requests, including this one, and the tasks that were started for them."""
    gc.collect()
    things: list[object] = gc.get_objects()
    kinds = Counter(type(thing) for thing in things)
    counted = {kind.__name__: kinds[kind] for kind in kinds if issubclass(kind, (Request, *OURS))}
    names = Counter(str(task.name) for task in anyio.get_running_tasks())
    tasks = {name: names[name] for name in names if name.startswith(("cancelonleave", "starlette", "sse_starlette"))}
    return JSONResponse({**counted, **tasks})


TWO = [Middleware(BaseHTTPMiddleware, dispatch=pass_on)] * 2
app = Starlette(
    routes=[
        Route("/", ready),
        Route("/events/{begin}", show),
        Route("/census", census),
        Mount("/fastapi", in_fastapi([])),
        Mount("/fastapi-under-two", in_fastapi(TWO)),
        Mount("/starlette", in_starlette([])),
        Mount("/starlette-under-two", in_starlette(TWO)),
    ]
)

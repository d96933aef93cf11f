"""An application for real servers: streams of every kind, and what became of them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator

import anyio
import anyio.from_thread
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from sse_starlette.sse import EventSourceResponse
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse, Response

from cancelonleave import cancel_on_disconnect

app = FastAPI()
events: dict[str, list[str]] = {}


def note(request: Request, event: str) -> None:
    events.setdefault(request.query_params["key"], []).append(event)


@app.get("/events")
async def show(key: str) -> list[str]:
    return events.get(key, [])


def on_disconnect(request: Request) -> None:
    note(request, "on_disconnect")


async def pieces(request: Request, pause: float) -> AsyncGenerator[str]:
    try:
        while True:
            yield "piece " * 1000
            await anyio.sleep(pause)
    except BaseException as error:
        note(request, type(error).__name__)
        raise
    finally:
        await anyio.sleep(0.01)
        note(request, "clean")


async def after(request: Request) -> None:
    await anyio.sleep(0.05)
    note(request, "background")


@app.get("/idle")
@cancel_on_disconnect(on_disconnect=on_disconnect)
async def idle(request: Request) -> Response:
    return StreamingResponse(pieces(request, 60), background=BackgroundTask(after, request))


@app.get("/busy")
@cancel_on_disconnect(on_disconnect=on_disconnect)
async def busy(request: Request) -> Response:
    return StreamingResponse(pieces(request, 0), background=BackgroundTask(after, request))


@app.get("/listening")
@cancel_on_disconnect(on_disconnect=on_disconnect)
async def listening(request: Request) -> Response:
    return EventSourceResponse(pieces(request, 60), background=BackgroundTask(after, request))


@app.get("/loop")
@cancel_on_disconnect(on_disconnect=on_disconnect)
def loop(request: Request) -> str:
    try:
        note(request, "begun")
        while True:
            anyio.from_thread.check_cancelled()
            time.sleep(0.005)
    except BaseException as error:
        note(request, type(error).__name__)
        raise
    finally:
        note(request, "clean")


@app.get("/whole")
@cancel_on_disconnect(on_disconnect=on_disconnect)
async def whole(request: Request) -> Response:
    async def numbers() -> AsyncIterator[str]:
        for number in range(5):
            yield str(number)
            await anyio.sleep(0.02)

    return StreamingResponse(numbers(), background=BackgroundTask(after, request))


@app.post("/echo")
@cancel_on_disconnect
async def echo(request: Request) -> Response:
    await anyio.sleep(0.06)
    return StreamingResponse(request.stream())


@app.post("/digest")
@cancel_on_disconnect
async def digest(request: Request) -> Response:
    async def hashed() -> AsyncIterator[str]:
        yield "sha256 "
        whole = hashlib.sha256()
        async for piece in request.stream():
            whole.update(piece)
        yield whole.hexdigest()

    return StreamingResponse(hashed())


@app.get("/sync")
@cancel_on_disconnect(on_disconnect=on_disconnect)
async def sync(request: Request) -> Response:
    def lines() -> Generator[str]:
        try:
            yield "line"
            while True:
                anyio.from_thread.check_cancelled()
                time.sleep(0.005)
        finally:
            note(request, "clean")

    return StreamingResponse(lines())


@app.get("/")
async def ready() -> Response:
    return PlainTextResponse("ready")

"""An application for real servers: decorated WebSocket endpoints, in both frameworks."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
from anyio.lowlevel import checkpoint
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from cancelonleave import cancel_on_disconnect
from tests.servers import application
from tests.servers.application_notes import events, on_trio

Endpoint = Callable[[WebSocket], Awaitable[None]]


def note(websocket: WebSocket, event: str) -> None:
    events[websocket.query_params["key"]].append(event)


@asynccontextmanager
async def noted(websocket: WebSocket) -> AsyncGenerator[None]:
    """Record how work ends early, and that its cleanup can await."""
    try:
        yield
    except BaseException as error:
        note_end(websocket, error)
        with anyio.CancelScope(shield=on_trio()):
            await anyio.sleep(0.01)
        note(websocket, "clean")
        raise


def note_end(websocket: WebSocket, error: BaseException) -> None:
    """Record the name of the exception; ours by the class that handlers catch, since send() can raise either kind."""
    name = "WebSocketDisconnect" if isinstance(error, WebSocketDisconnect) else "Cancelled"
    note(websocket, name)


async def wait(websocket: WebSocket) -> None:
    await websocket.accept()
    async with noted(websocket):
        note(websocket, "begun")
        await anyio.sleep(60)


async def before(websocket: WebSocket) -> None:
    """Wait before accepting."""
    async with noted(websocket):
        note(websocket, "begun")
        await anyio.sleep(60)


async def send(websocket: WebSocket) -> None:
    """Send now and then; at the time of a send, the client may have disconnected."""
    await websocket.accept()
    async with noted(websocket):
        note(websocket, "begun")
        while True:
            await websocket.send_text("price")
            await anyio.sleep(random.uniform(0, 0.01))


async def flood(websocket: WebSocket) -> None:
    """Send more than the client reads."""
    await websocket.accept()
    async with noted(websocket):
        note(websocket, "begun")
        while True:
            await websocket.send_bytes(bytes(100_000))
            await checkpoint()  # without it, uvicorn's and asyncio's send() would never end on a lost connection


async def read(websocket: WebSocket) -> None:
    """Read, and don't catch the disconnect."""
    await websocket.accept()
    async with noted(websocket):
        note(websocket, "begun")
        while True:
            await websocket.receive_text()


async def digest(websocket: WebSocket) -> None:
    """Read in all ways, with pauses and with short timeouts, and answer with what was read."""
    await websocket.accept()
    whole = hashlib.sha256()
    number = 0
    while True:
        message = None
        with anyio.move_on_after(random.choice([0, 0.0001, 0.001, 1])):
            message = await websocket.receive()
        if message is not None:
            data = message.get("bytes") or (message.get("text") or "end").encode()
            if data == b"end" or message["type"] == "websocket.disconnect":
                break
            whole.update(data)
            number += 1
        if random.random() < 0.001:
            await anyio.sleep(0.06)  # long enough to read ahead
    await websocket.send_text(f"{number} {whole.hexdigest()}")
    await anyio.sleep(60)


async def close(websocket: WebSocket) -> None:
    """Close the WebSocket, and work on."""
    await websocket.accept()
    await anyio.sleep(0.06)  # long enough to read ahead, which on granian would prevent the close
    await websocket.close(4000, "own")
    await anyio.sleep(0.2)
    note(websocket, "finished")


ENDPOINTS: dict[str, Endpoint] = {
    f"/{endpoint.__name__}": endpoint for endpoint in (wait, before, send, flood, read, digest, close)
}


def on_disconnect(websocket: WebSocket) -> None:
    note(websocket, "on_disconnect")


guard = cancel_on_disconnect(on_disconnect=on_disconnect)


async def transaction(websocket: WebSocket) -> AsyncGenerator[None]:
    try:
        yield
    except WebSocketDisconnect as error:
        note(websocket, f"rolled back: {error.code} {error.reason}".rstrip())
        raise


def in_fastapi() -> FastAPI:
    app = FastAPI(dependencies=[Depends(transaction)])
    for path, endpoint in ENDPOINTS.items():
        app.add_api_websocket_route(path, guard(endpoint))
    app.add_api_websocket_route("/undecorated", read)
    return app


def in_starlette() -> Starlette:
    return Starlette(routes=[WebSocketRoute(path, guard(endpoint)) for path, endpoint in ENDPOINTS.items()])


app = Starlette(
    routes=[
        Route("/", application.ready),
        Route("/events/{begin}", application.show),
        Route("/census", application.census),
        Mount("/fastapi", in_fastapi()),
        Mount("/starlette", in_starlette()),
    ]
)

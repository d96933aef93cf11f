"""An application whose client disconnects once during each kind of work; it can also be run as a program."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import anyio
import anyio.from_thread
from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from starlette.requests import Request

from cancelonleave import ClientClosedRequest, cancel_on_disconnect
from cancelonleave.testing import Client

app = FastAPI()
events: list[str] = []
begun: list[anyio.Event] = []  # of the current request: its client disconnects when it is set
EXPECTED = {
    "/stays": [200, "committed"],
    "/cleanup": [499, "cleaned up", "on_disconnect", "rolled back"],
    "/children": [499, "cleaned up", "cleaned up"],
    "/shield": [499, "whole"],
    "/thread": [499, "disconnected"],
    "/stream": [200, "cleaned up", "on_disconnect"],
}


@asynccontextmanager
async def cleanup() -> AsyncGenerator[None]:
    try:
        yield
    finally:
        await anyio.sleep(0.01)
        events.append("cleaned up")


async def rest() -> None:
    begun[-1].set()
    await anyio.sleep(60)


async def transaction() -> AsyncIterator[None]:
    try:
        yield
        events.append("committed")
    except ClientClosedRequest:
        events.append("rolled back")
        raise


def on_disconnect(request: Request) -> None:
    events.append("on_disconnect")


Transaction = Annotated[None, Depends(transaction)]


@app.get("/stays")
@cancel_on_disconnect
async def stays(opened: Transaction) -> None:
    await anyio.sleep(0.06)


@app.get("/cleanup")
@cancel_on_disconnect(on_disconnect=on_disconnect)
async def cleans_up(opened: Transaction) -> None:
    async with cleanup():
        await rest()


async def child() -> None:
    async with cleanup():
        await rest()


@app.get("/children")
@cancel_on_disconnect
async def children() -> None:
    # Without this it wouldn't wait for the second child if that child's sleep ends a moment later.
    await asyncio.gather(child(), child(), return_exceptions=True)


@app.get("/shield")
@cancel_on_disconnect
async def shield() -> None:
    begun[-1].set()
    with anyio.CancelScope(shield=True):
        await anyio.sleep(0.1)
        events.append("whole")
    await anyio.sleep(60)


@app.get("/thread")
@cancel_on_disconnect
def thread() -> None:
    anyio.from_thread.run_sync(begun[-1].set)
    try:
        while True:
            anyio.from_thread.check_cancelled()
            anyio.from_thread.run(anyio.sleep, 0.01)
    finally:
        events.append("disconnected")


@app.get("/stream")
@cancel_on_disconnect(on_disconnect=on_disconnect)
async def stream() -> StreamingResponse:
    async def chunks() -> AsyncIterator[str]:
        async with cleanup():
            yield "piece"
            await rest()

    return StreamingResponse(chunks())


async def disconnect_all() -> dict[str, list[object]]:
    """Return the status of each request, and what happened to it."""
    results: dict[str, list[object]] = {}
    for path in EXPECTED:
        events.clear()
        begun.append(anyio.Event())
        exchange = await Client(app).get(path, leave_when=begun[-1])
        results[path] = [exchange.status, *events]
    return results


if __name__ == "__main__":
    print(asyncio.run(disconnect_all()))

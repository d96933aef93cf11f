"""One service of a chain: it requests the work from the next service, or does the work if it is the last."""

from __future__ import annotations

import os
from asyncio import Barrier, gather
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
from fastapi import FastAPI, Request
from httpx2 import AsyncClient, Limits

from cancelonleave import cancel_on_disconnect

POOL_SIZE = 10

# Not httpx 0.28, nor httpx2 2.0: cancelling a request that queues for a place in their pool may lose one for good.
next_service = os.environ.get("NEXT", "")
client = AsyncClient(base_url=next_service, limits=Limits(max_connections=POOL_SIZE), timeout=60, trust_env=False)
all_here = Barrier(POOL_SIZE)
working: set[Request] = set()


@asynccontextmanager
async def close_pool(_: FastAPI) -> AsyncGenerator[None]:
    async with client:
        yield


app = FastAPI(lifespan=close_pool)


async def ask_next(path: str) -> None:
    (await client.get(path)).raise_for_status()


@app.get("/")
async def show() -> int:
    """Return how many requests are in progress."""
    return len(working)


@app.get("/work")
@cancel_on_disconnect
async def work(request: Request) -> None:
    working.add(request)
    try:
        await (ask_next("/work") if next_service else anyio.sleep_forever())
    finally:
        working.remove(request)


@app.get("/pass")
@cancel_on_disconnect
async def pass_on() -> None:
    if next_service:
        await ask_next("/pass")


@app.get("/settle")
async def settle() -> None:
    """Return when every earlier request is watched, which is 25 to 50 ms after its start on this event loop."""
    await anyio.sleep(0.06)


@app.get("/meet")
async def meet() -> None:
    """Return when as many requests as a pool has connections have arrived."""
    await all_here.wait()


@app.get("/use_all")
async def use_all() -> None:
    await gather(*(ask_next("/meet") for _ in range(POOL_SIZE)))

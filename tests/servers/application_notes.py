"""Records what happens to each request to the live application, by the key that its client gave it."""

from __future__ import annotations

from asyncio import CancelledError
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
from starlette.requests import Request

events: defaultdict[str, list[str]] = defaultdict(list)


def note(request: Request, event: str) -> None:
    events[request.query_params["key"]].append(event)


def note_end(request: Request, error: BaseException) -> None:
    """Record the name of the exception; that of a cancellation is the same on asyncio and on trio."""
    note(request, type(error).__name__.replace("CancelledError", "Cancelled"))


def on_disconnect(request: Request) -> None:
    note(request, "on_disconnect")


async def clean_up(request: Request) -> None:
    with anyio.CancelScope(shield=on_trio()):  # on trio, cleanup can await only in a shield
        await anyio.sleep(0.01)
    note(request, "clean")


@asynccontextmanager
async def noted(request: Request) -> AsyncGenerator[None]:
    """Record how work ends early, and that its cleanup can await."""
    try:
        yield
    except BaseException as error:
        note_end(request, error)
        await clean_up(request)
        raise


def on_trio() -> bool:
    return anyio.get_cancelled_exc_class() is not CancelledError

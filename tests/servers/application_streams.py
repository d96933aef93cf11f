"""Endpoints of the live application that stream, or work in a thread."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator

import anyio
from anyio.from_thread import check_cancelled
from fastapi import Request
from fastapi.responses import StreamingResponse
from sse_starlette.sse import EventSourceResponse
from starlette.background import BackgroundTask
from starlette.responses import Response

from tests.servers.application_notes import clean_up, note, note_end


async def chunks(request: Request, pause: float) -> AsyncGenerator[str]:
    try:
        while True:
            yield "piece " * 1000
            await anyio.sleep(pause)
    except BaseException as error:
        note_end(request, error)
        raise
    finally:
        await clean_up(request)


async def after(request: Request) -> None:
    await anyio.sleep(0.06)
    note(request, "background")


async def idle(request: Request) -> Response:
    return StreamingResponse(chunks(request, 60), background=BackgroundTask(after, request))


async def busy(request: Request) -> Response:
    return StreamingResponse(chunks(request, 0), background=BackgroundTask(after, request))


async def listening(request: Request) -> Response:
    return EventSourceResponse(chunks(request, 60), background=BackgroundTask(after, request))


async def whole(request: Request) -> Response:
    async def numbers() -> AsyncIterator[str]:
        for number in range(5):
            yield str(number)
            await anyio.sleep(0.02)

    return StreamingResponse(numbers(), background=BackgroundTask(after, request))


async def echo(request: Request) -> Response:
    await anyio.sleep(0.06)
    return StreamingResponse(request.stream())


async def hashed(request: Request) -> Response:
    async def words() -> AsyncIterator[str]:
        yield "sha256 "
        whole = hashlib.sha256()
        async for chunk in request.stream():
            whole.update(chunk)
        yield whole.hexdigest()

    return StreamingResponse(words())


async def sync(request: Request) -> Response:
    def lines() -> Generator[str]:
        try:
            yield "line"
            while True:
                check_cancelled()
                time.sleep(0.005)
        finally:
            note(request, "clean")

    return StreamingResponse(lines())


def loop(request: Request) -> Response:
    note(request, "begun")
    try:
        while True:
            check_cancelled()
            time.sleep(0.005)
    except BaseException as error:
        note_end(request, error)
        raise

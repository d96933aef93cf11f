"""What type checkers see of decorated functions; nothing here ever runs."""

# mypy: disable-error-code=empty-body
# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import assert_type

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from cancelonleave import ClientClosedRequest, cancel_on_disconnect

app = FastAPI()


@cancel_on_disconnect
async def bare(request: Request, year: int, *, q: str = "") -> Response: ...


@cancel_on_disconnect()
async def called(year: int) -> str: ...


def count(request: Request) -> None: ...


async def count_async(request: Request) -> int: ...


@cancel_on_disconnect(on_disconnect=count)
async def hooked(year: int) -> str: ...


@cancel_on_disconnect(on_disconnect=count_async)
async def hooked_async(year: int) -> str: ...


@cancel_on_disconnect
def sync(year: int) -> str: ...


@cancel_on_disconnect
async def generator(year: int) -> AsyncIterator[int]:
    yield year


@cancel_on_disconnect
def sync_generator(year: int) -> Iterator[int]:
    yield year


@app.get("/stream")
@cancel_on_disconnect
async def stream() -> StreamingResponse: ...


@app.websocket("/prices")
@cancel_on_disconnect
async def prices(websocket: WebSocket, market: str = "all") -> None: ...


def count_websocket(websocket: WebSocket) -> None: ...


@cancel_on_disconnect(on_disconnect=count_websocket)
async def helper(websocket: WebSocket) -> int: ...


class Methods:
    @cancel_on_disconnect
    async def get(self, request: Request) -> Response: ...

    @staticmethod
    @cancel_on_disconnect
    async def static(request: Request) -> Response: ...

    @classmethod
    @cancel_on_disconnect
    async def of_class(cls, request: Request) -> Response: ...

    @cancel_on_disconnect
    @staticmethod
    async def decorated_static(request: Request) -> Response: ...

    async def __call__(self, request: Request) -> Response: ...


# Each keeps its type, including parameter names and defaults.
async def use(request: Request, websocket: WebSocket) -> None:
    assert_type(await bare(request, 2026), Response)
    assert_type(await bare(request, year=2026, q="all"), Response)
    assert_type(await called(2026), str)
    assert_type(await hooked(2026), str)
    assert_type(await hooked_async(year=2026), str)
    assert_type(generator(2026), AsyncIterator[int])
    assert_type(sync_generator(2026), Iterator[int])
    assert_type(sync(2026), str)  # code that calls it directly must await it nevertheless
    assert_type(await stream(), StreamingResponse)
    assert_type(await prices(websocket, market="tea"), None)
    assert_type(await helper(websocket), int)
    assert_type(await Methods().get(request), Response)
    assert_type(await Methods.static(request), Response)
    assert_type(await Methods.of_class(request), Response)
    assert_type(await Methods.decorated_static(request), Response)
    assert_type(cancel_on_disconnect(Methods()), Methods)
    assert_type(await cancel_on_disconnect(functools.partial(called, 2026))(), str)
    assert_type(await cancel_on_disconnect(Methods().get)(request), Response)
    assert_type(await cancel_on_disconnect(called, on_disconnect=count)(year=2026), str)


routes = Starlette(
    routes=[Route("/", bare), Route("/method", Methods().get), WebSocketRoute("/prices", prices)],
)
plain: Callable[[int], Awaitable[str]] = called


async def wrong(request: Request) -> None:
    await bare(request)  # type: ignore[call-arg]
    await bare(request, "2026")  # type: ignore[arg-type]
    await bare(request, 2026, p="")  # type: ignore[call-arg]
    await Methods().get()  # type: ignore[call-arg]
    await prices(request)  # type: ignore[arg-type]
    length: int = await called(2026)  # type: ignore[assignment]
    print(length)


def needs_more(request: Request, reason: str) -> None: ...
def takes_scope(scope: dict[str, object]) -> None: ...


cancel_on_disconnect(on_disconnect=needs_more)  # type: ignore[arg-type]
cancel_on_disconnect(on_disconnect=takes_scope)  # type: ignore[arg-type]
cancel_on_disconnect(on_leave=count)  # type: ignore[call-overload]
cancel_on_disconnect("report")  # type: ignore[call-overload]
cancel_on_disconnect(bare, count)  # type: ignore[call-overload]
# Refused at run time, but a class is a callable to type checkers.
assert_type(cancel_on_disconnect(Methods), type[Methods])

error: ClientDisconnect = ClientClosedRequest()
as_http: HTTPException = ClientClosedRequest()
assert_type(ClientClosedRequest().status_code, int)
ClientClosedRequest(499)  # type: ignore[call-arg]

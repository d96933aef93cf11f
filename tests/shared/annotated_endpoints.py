"""Endpoints whose annotations are strings; some names in them are known only to type checkers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends, Header, HTTPException
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import PlainTextResponse

if TYPE_CHECKING:
    from decimal import Decimal

    from starlette.requests import Request as HiddenRequest

Endpoint = Callable[..., Awaitable[object]]
Guard = Callable[[Endpoint], Endpoint]
Work = Callable[[], Awaitable[None]]


class Order(BaseModel):
    item: str
    count: int = 1


async def price() -> AsyncIterator[float]:
    yield 2.5


PRICE = Depends(price)


def fastapi_router(guard: Guard, work: Work) -> APIRouter:
    router = APIRouter(prefix="/future")

    @router.post("/model")
    @guard
    async def model(request: Order, x_token: Annotated[str, Header()] = "none") -> Order:
        await work()
        return Order(item=request.item + x_token, count=request.count)

    @router.get("/own/{item_id}")
    @guard
    async def own(item_id: int, http: Annotated[Request, "the request"]) -> str:
        await work()
        return f"{http.method} {item_id}"

    @router.get("/hidden")
    @guard
    async def hidden(price: Decimal = PRICE) -> float:
        await work()
        return float(price)

    @router.get("/result", response_model=None)
    @guard
    async def result(count: int = 1) -> Decimal:
        await work()
        raise HTTPException(404, f"{count} not found")

    return router


def starlette_endpoints(guard: Guard, work: Work) -> dict[str, Endpoint]:
    @guard
    async def known(request: Request) -> PlainTextResponse:
        await work()
        return PlainTextResponse(request.method)

    @guard
    async def hidden(request: HiddenRequest) -> PlainTextResponse:
        await work()
        return PlainTextResponse(request.method)

    @guard
    async def hidden_renamed(http: HiddenRequest) -> PlainTextResponse:
        await work()
        return PlainTextResponse(http.method)

    return {"/future/known": known, "/future/hidden": hidden, "/future/hidden-renamed": hidden_renamed}

"""States are words: the repr of a request, its calls and its response names their state."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from cancelonleave import ClientClosedRequest, cancel_on_disconnect
from cancelonleave._endpoint import guard
from cancelonleave._stream import Items, Stream
from cancelonleave._watch import watch_of
from tests.shared.asking import on_trio
from tests.shared.virtual_time import anyio_backend as anyio_backend

pytestmark = pytest.mark.anyio

DISCONNECT = 0.1  # seconds: when the client disconnects
LONG = 0.2  # seconds: more than that
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio", "uvloop"], indirect=True)


class Exchange:
    """A request whose client disconnects, and its repr at several moments."""

    def __init__(self, *, stays: bool = False) -> None:
        self.seconds = 60 if stays else DISCONNECT
        self.body: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]
        self.request = Request({"type": "http", "method": "GET", "path": "/", "headers": []}, self.receive)
        self.seen: list[str] = []

    async def receive(self) -> Message:
        if self.body:
            return self.body.pop()
        await anyio.sleep(self.seconds)
        return {"type": "http.disconnect"}

    def look(self) -> None:
        self.seen.append(repr(watch_of(self.request)))

    def with_call_as(self, kind: str) -> list[str]:
        """Return the reprs, with the same name for a call on both backends."""
        return [line.replace(kind, "Call") for line in self.seen]


def call_name() -> str:
    return "TrioCall" if on_trio() else "AsyncioCall"


async def test_a_request_whose_client_stays_is_open_and_its_call_runs() -> None:
    exchange = Exchange(stays=True)

    @cancel_on_disconnect
    async def endpoint(request: Request) -> None:
        await anyio.sleep(LONG)
        exchange.look()

    exchange.look()
    await endpoint(exchange.request)
    exchange.look()
    assert exchange.with_call_as(call_name()) == [
        "<Watch open, calls: ()>",
        "<Watch open, calls: (<Call runs>,)>",
        "<Watch open, calls: ()>",
    ]


async def test_a_request_whose_client_has_disconnected_is_disconnected_and_its_call_cancelled() -> None:
    exchange = Exchange()

    @cancel_on_disconnect
    async def within(request: Request) -> None:
        try:
            await anyio.sleep(LONG)
        finally:
            exchange.look()

    @cancel_on_disconnect
    async def endpoint(request: Request) -> None:
        await within(request)

    with pytest.raises(ClientClosedRequest):
        await endpoint(exchange.request)
    exchange.look()
    assert exchange.with_call_as(call_name()) == [
        "<Watch disconnected, calls: (<Call cancelled>, <Call runs>)>",
        "<Watch disconnected, calls: ()>",
    ]


async def test_a_call_whose_task_has_read_the_disconnect_knows_of_it() -> None:
    exchange = Exchange()

    @cancel_on_disconnect
    async def endpoint(request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            exchange.look()
        exchange.look()

    await endpoint(exchange.request)
    assert exchange.with_call_as(call_name()) == [
        "<Watch open, calls: (<Call runs>,)>",
        "<Watch disconnected, calls: (<Call knows>,)>",
    ]


@on_asyncio
async def test_a_call_that_waits_for_a_thread_is_named_after_it() -> None:
    exchange = Exchange()

    async def wait() -> None:
        exchange.look()
        try:
            await anyio.sleep(LONG)
        finally:
            exchange.look()

    with pytest.raises(ClientClosedRequest), guard(watch_of(exchange.request), exchange.request, in_thread=True):
        await wait()
    assert exchange.with_call_as("ThreadCall") == [
        "<Watch open, calls: (<Call runs>,)>",
        "<Watch disconnected, calls: (<Call cancelled>,)>",
    ]


async def numbers() -> AsyncIterator[bytes]:
    for number in range(2):
        yield str(number).encode()


async def test_items_are_waiting_then_running_then_ended() -> None:
    exchange = Exchange(stays=True)

    async def source() -> AsyncIterator[int]:
        exchange.seen.append(repr(items))
        yield 1
        exchange.seen.append(repr(items))

    items = Items(Stream(watch_of(exchange.request), exchange.request), source())
    exchange.seen.append(repr(items))
    async for _ in items:
        exchange.seen.append(repr(items))
    exchange.seen.append(repr(items))
    assert exchange.seen == ["<Items waits>", "<Items runs>", "<Items waits>", "<Items runs>", "<Items ended>"]


async def test_items_that_are_closed_are_closing_then_ended() -> None:
    exchange = Exchange(stays=True)

    async def source() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            exchange.seen.append(repr(items))

    items = Items(Stream(watch_of(exchange.request), exchange.request), source())
    assert await anext(items) == 1
    await items.aclose()
    exchange.seen.append(repr(items))
    assert exchange.seen == ["<Items closes>", "<Items ended>"]


async def send_all(exchange: Exchange, response: Response) -> None:
    """Send a response, and record the repr of its body before each message and at the end."""

    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        return response

    async def send(message: Message) -> None:
        exchange.seen.append(f"{message['type']}: {body!r}")

    assert await endpoint(exchange.request) is response
    (body,) = watch_of(exchange.request).calls
    exchange.seen.append(repr(body))
    await response(exchange.request.scope, exchange.request.receive, send)
    exchange.seen.append(repr(body))


async def test_the_body_of_a_response_says_how_much_of_it_has_been_sent() -> None:
    exchange = Exchange(stays=True)
    await send_all(exchange, StreamingResponse(numbers()))
    exchange.look()
    assert exchange.seen == [
        "<Body nothing>",
        "http.response.start: <Body started>",
        "http.response.body: <Body started>",
        "http.response.body: <Body some of its body sent>",
        "http.response.body: <Body complete>",
        "<Body complete>",
        "<Watch closed, calls: ()>",
    ]


async def test_the_body_of_an_aborted_response_is_incomplete_and_its_request_is_disconnected() -> None:
    exchange = Exchange()

    async def endless() -> AsyncIterator[bytes]:
        yield b"a"
        await anyio.sleep(LONG)

    await send_all(exchange, StreamingResponse(endless()))
    assert exchange.seen == [
        "<Body nothing>",
        "http.response.start: <Body started>",
        "http.response.body: <Body started>",
        "<Body some of its body sent>",
    ]

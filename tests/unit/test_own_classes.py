"""Request and response classes of the application: they work as they do undecorated."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive

from cancelonleave import cancel_on_disconnect
from cancelonleave.testing import Client
from tests.shared.virtual_time import anyio_backend as anyio_backend

pytestmark = pytest.mark.anyio

Endpoint = Callable[[Request], Awaitable[Response]]


def application(endpoint: Endpoint) -> Starlette:
    return Starlette(routes=[Route("/", endpoint, methods=["GET", "POST"])])


class Export(StreamingResponse):
    """Registers its subclasses, each of which must declare its kind."""

    kinds: dict[str, type] = {}  # noqa: RUF012  # as in applications

    def __init_subclass__(cls, *, kind: str) -> None:
        cls.kinds[kind] = cls


class CsvExport(Export, kind="csv"): ...


class Registry(type):
    """Registers every class that it creates."""

    made: list[str] = []  # noqa: RUF012  # as above

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:  # Any: as in type()
        super().__init__(name, bases, namespace)
        cls.made.append(name)


class RegisteredExport(StreamingResponse, metaclass=Registry): ...


async def rows() -> AsyncGenerator[str]:
    yield "1,2\n"
    await anyio.sleep(0.1)
    yield "3,4\n"


@pytest.mark.parametrize("kind", [CsvExport, RegisteredExport])
async def test_a_response_class_that_registers_its_subclasses_sees_no_new_one(
    kind: Callable[[AsyncIterator[str]], Response],
) -> None:
    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        return kind(rows())

    exchange = await Client(application(endpoint)).get("/")
    assert exchange.text == "1,2\n3,4\n"
    assert Export.kinds == {"csv": CsvExport}
    assert Registry.made == ["RegisteredExport"]
    exchange = await Client(application(endpoint)).get("/", leave_after=0.05)
    assert exchange.text == "1,2\n"


class Rows:
    """A body that can be sent repeatedly."""

    async def __aiter__(self) -> AsyncGenerator[str]:
        async for row in rows():
            yield row


async def test_one_response_can_be_sent_to_two_clients_at_once() -> None:
    shared = StreamingResponse(Rows())
    texts: list[str] = []

    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        return shared

    async def get(after: float, **options: Any) -> None:  # Any: the client's
        await anyio.sleep(after)
        texts.append((await Client(application(endpoint)).get("/", **options)).text)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(get, 0)
            tasks.start_soon(get, 0.05)
            tasks.start_soon(lambda: get(0.06, leave_after=0.01))
    assert sorted(texts) == ["1,2\n", "1,2\n3,4\n", "1,2\n3,4\n"]


async def test_a_response_that_was_guarded_for_another_request_is_sent_unchanged() -> None:
    kept: list[Response] = []

    @cancel_on_disconnect
    async def make(request: Request) -> Response:
        return StreamingResponse(Rows())

    async def endpoint(request: Request) -> Response:
        if not kept:
            kept.append(await make(request))
        return kept[0]

    app = application(endpoint)
    assert [(await Client(app).get("/")).text for _ in range(2)] == ["1,2\n3,4\n"] * 2


class Counting(Request):
    """Counts the received messages, whichever way they are received."""

    count = 0

    @property
    def receive(self) -> Receive:
        async def counted() -> Message:
            message = await self._receive()
            self.count += len(message.get("body", b""))
            return message

        return counted


async def test_a_request_class_can_wrap_its_receive() -> None:
    counts: list[int] = []

    @cancel_on_disconnect
    async def decorated(request: Request) -> Response:
        body = bytearray()
        more = True
        while more:
            message = await request.receive()
            body += message["body"]
            more = message.get("more_body", False)
        await anyio.sleep(0.1)
        return PlainTextResponse(bytes(body))

    async def endpoint(request: Request) -> Response:
        counting = Counting(request.scope, request.receive)
        try:
            return await decorated(counting)
        finally:
            counts.append(counting.count)

    app = application(endpoint)
    exchange = await Client(app).post("/", content=[b"ab", b"c"])
    assert exchange.text == "abc"
    exchange = await Client(app).post("/", content=[b"ab", b"c"], leave_after=0.05)
    assert exchange.status == 499
    assert counts == [3, 3]

"""An application whose endpoints make the calls that another request asks for, and return their outcomes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable

import anyio
from anyio.lowlevel import checkpoint
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cancelonleave import cancel_on_disconnect

# Seconds, in the server's own process. A server that reports a disconnect does so within milliseconds;
# gunicorn also cancels the application after 3 seconds, which must not be confused with its report.
WINDOW = 1.0


class Outcome:
    """The outcome of one call."""

    def __init__(self) -> None:
        self.known = anyio.Event()
        self.text = ""

    def set(self, text: str) -> None:
        self.text = text
        self.known.set()


class RemoteEndpoint:
    """An endpoint that serves one request, and makes the calls that other requests ask for."""

    def __init__(self) -> None:
        self.outcomes = {"begun": Outcome(), "ended": Outcome()}
        self._give, self._orders = anyio.create_memory_object_stream[str](100)

    async def ask(self, call: str) -> str:
        """Make a call, or go on waiting for an earlier one that hasn't ended."""
        if call not in self.outcomes:
            self.outcomes[call] = Outcome()
            self._give.send_nowait(call)
        outcome = self.outcomes[call]
        with anyio.move_on_after(WINDOW):
            await outcome.known.wait()
            if call not in ("begun", "ended"):
                del self.outcomes[call]
            return outcome.text
        return "nothing"

    async def obey(self, request: Request, send: Send) -> None:
        self.outcomes["begun"].set("begun")
        try:
            async with anyio.create_task_group() as calls:
                async for order in self._orders:
                    calls.start_soon(self._make, order, request, send)
                calls.cancel_scope.cancel()
        except BaseException as error:
            self.outcomes["ended"].set(type(error).__name__)
            raise

    def drop(self) -> None:
        self._give.close()

    async def _make(self, call: str, request: Request, send: Send) -> None:
        try:
            text = await CALLS[call](request, send)
        except Exception as error:
            text = type(error).__name__
        self.outcomes[call].set(text)


remote_endpoints: defaultdict[str, RemoteEndpoint] = defaultdict(RemoteEndpoint)


async def ask(request: Request) -> Response:
    return PlainTextResponse(await remote_endpoints[request.query_params["key"]].ask(request.query_params["call"]))


async def drop(request: Request) -> Response:
    for remote_endpoint in remote_endpoints.values():
        remote_endpoint.drop()
    return PlainTextResponse("dropped")


async def spec_version(request: Request, send: Send) -> str:
    return str(request.scope["asgi"].get("spec_version", "none"))


async def receive(request: Request, send: Send) -> str:
    message = await request.receive()
    return "disconnect" if message["type"] == "http.disconnect" else f"{len(message['body'])} bytes"


async def receive_thrice(request: Request, send: Send) -> str:
    """Receive without a pause: the decorator cancels an endpoint a second after its child read the disconnect."""
    return " ".join([await receive(request, send) for _ in range(3)])


async def wait_and_give_up(request: Request, send: Send) -> str:
    with anyio.move_on_after(0.05):
        return await receive(request, send)
    return "given up"


async def read_and_give_up(request: Request, send: Send) -> str:
    """Give each receive() only some turns of the event loop, until the body has ended or no more of it arrives."""
    messages: list[Message] = []

    async def take() -> None:
        messages.append(await request.receive())
        quiet.deadline = anyio.current_time() + 2 * WINDOW

    with anyio.move_on_after(2 * WINDOW) as quiet:
        while not messages or messages[-1].get("more_body"):
            for turns in range(6):
                async with anyio.create_task_group() as call:
                    call.start_soon(take)
                    for _ in range(turns):
                        await checkpoint()
                    call.cancel_scope.cancel()
            await anyio.sleep(0.001)
    return f"{sum(len(message.get('body', b'')) for message in messages)} bytes"


async def is_disconnected(request: Request, send: Send) -> str:
    return str(await request.is_disconnected())


async def body(request: Request, send: Send) -> str:
    return f"{len(await request.body())} bytes"


async def answer(request: Request, send: Send) -> str:
    await PlainTextResponse("answer")(request.scope, request.receive, send)
    return "sent"


async def begin_answer(request: Request, send: Send) -> str:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    return "sent"


async def send_chunk(request: Request, send: Send) -> str:
    await send({"type": "http.response.body", "body": b"piece" * 10_000, "more_body": True})
    return "sent"


Call = Callable[[Request, Send], Awaitable[str]]
CALLS: dict[str, Call] = {
    call.__name__: call
    for call in (
        spec_version,
        receive,
        receive_thrice,
        wait_and_give_up,
        read_and_give_up,
        is_disconnected,
        body,
        answer,
        begin_answer,
        send_chunk,
    )
}


async def obey(request: Request, send: Send) -> None:
    await remote_endpoints[request.query_params["key"]].obey(request, send)


async def stream(request: Request, send: Send) -> Response:
    remote_endpoint = remote_endpoints[request.query_params["key"]]

    async def chunks() -> AsyncGenerator[str]:
        try:
            yield "piece"
            remote_endpoint.outcomes["begun"].set("begun")
            await anyio.sleep(60)
        finally:
            remote_endpoint.outcomes["ended"].set("stopped")

    return StreamingResponse(chunks())


def endpoint(function: Callable[[Request, Send], Awaitable[Response | None]]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = await function(Request(scope, receive), send)
        if response is not None:
            await response(scope, receive, send)

    return app


async def ready(request: Request) -> Response:
    return PlainTextResponse("ready")


app = Starlette(
    routes=[
        Route("/", ready),
        Route("/ask", ask),
        Route("/drop", drop),
        Mount("/plain", endpoint(obey)),
        Mount("/decorated", endpoint(cancel_on_disconnect(obey))),
        Mount("/plain-stream", endpoint(stream)),
        Mount("/decorated-stream", endpoint(cancel_on_disconnect(stream))),
    ]
)

"""What authors of tests rely on, on asyncio, uvloop and trio, in virtual time."""

import asyncio
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import AsyncExitStack, aclosing, nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from anyio.lowlevel import checkpoint
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cancelonleave import cancel_on_disconnect
from cancelonleave.testing import SERVERS, Client, Exchange, Options, Sent
from cancelonleave.testing._request import Body
from tests.shared.asking import on_trio
from tests.shared.virtual_time import anyio_backend as anyio_backend
from tests.shared.virtual_time import stall

pytestmark = pytest.mark.anyio

ALL_SERVERS = ("strict", "gunicorn-uvloop", *SERVERS)
START: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": []}  # Any: ASGI's own type
CHUNK: Message = {"type": "http.response.body", "body": b"chunk", "more_body": True}
END: Message = {"type": "http.response.body", "body": b"end"}
GOT, GONE, WAITS = "http.request", "http.disconnect", "waits"


on_asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio", "uvloop"], indirect=True)


def app_of(respond: Callable[[Request], Awaitable[ASGIApp]]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = await respond(Request(scope, receive))
        await response(scope, receive, send)

    return app


async def ask(app: ASGIApp, method: str = "GET", path: str = "/", **options: Any) -> Exchange:  # Any: see Client
    """Send a request with a client; the options also contain the client's own arguments."""
    own = {name: options.pop(name) for name in ("server", "timeout", "unchecked") if name in options}
    with anyio.fail_after(1000):
        return await Client(app, **own).request(method, path, **options)


async def endless(scope: Scope, receive: Receive, send: Send) -> None:
    await anyio.sleep_forever()


async def obedient(scope: Scope, receive: Receive, send: Send) -> None:
    """Ends when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


def sends(*messages: Message) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    return app


async def echo(request: Request) -> ASGIApp:
    return JSONResponse(
        {
            "method": request.method,
            "path": [request.scope["path"], request.scope["raw_path"].decode()],
            "query": request.query_params.multi_items(),
            "type": request.headers.get("content-type"),
            "body": (await request.body()).decode(),
        }
    )


# The request


@pytest.mark.parametrize("server", ALL_SERVERS)
@pytest.mark.parametrize(
    ("options", "content_type", "body"),
    [
        ({"json": {"a": [1]}}, "application/json", '{"a": [1]}'),
        ({"json": None}, "application/json", "null"),
        ({"data": {"a": "b c", "d": ["1", "2"]}}, "application/x-www-form-urlencoded", "a=b+c&d=1&d=2"),
        ({"content": b"bytes"}, None, "bytes"),
        ({"content": [b"by", b"", b"tes"]}, None, "bytes"),
        ({"content": []}, None, ""),
        ({"content": b"<a/>", "headers": {"Content-Type": "text/xml"}}, "text/xml", "<a/>"),
        ({}, None, ""),
    ],
)
async def test_body_arrives_as_it_is_given(
    options: dict[str, Any], content_type: str | None, body: str, server: str
) -> None:
    exchange = await ask(app_of(echo), "post", server=server, **options)
    assert (exchange.json()["type"], exchange.json()["body"]) == (content_type, body)
    assert exchange.json()["method"] == "POST"
    assert exchange.body_consumed


async def test_path_query_and_headers_reach_the_application() -> None:
    exchange = await ask(app_of(echo), path="/a b/%C3%BC?x=1&y=%26", params={"z": [2, 3]})
    assert exchange.json()["path"] == ["/a b/ü", "/a%20b/%C3%BC"]
    assert exchange.json()["query"] == [["x", "1"], ["y", "&"], ["z", "2"], ["z", "3"]]
    assert exchange.request == "GET /a b/%C3%BC?x=1&y=%26"


async def test_values_of_a_query_and_of_a_form_are_written_as_in_httpx() -> None:
    values = {"a": True, "b": None, "c": [False, 1]}
    query = await ask(app_of(echo), params=values)
    assert query.json()["query"] == [["a", "true"], ["b", ""], ["c", "false"], ["c", "1"]]
    assert (await ask(app_of(echo), "post", data=values)).json()["body"] == "a=true&b=&c=false&c=1"


async def test_options_that_are_none_count_as_left_out() -> None:
    options: dict[str, Any] = dict.fromkeys(Options.__annotations__.keys() - {"json"})  # Any: see Client
    exchange = await ask(app_of(echo), **options)
    assert exchange.json() == (await ask(app_of(echo))).json()


async def test_headers_can_be_repeated() -> None:
    async def respond(request: Request) -> ASGIApp:
        return JSONResponse([request.headers.getlist("x-tag"), request.headers["host"]])

    exchange = await ask(app_of(respond), headers=[("X-Tag", "a"), ("X-Tag", "b"), ("Host", "own")])
    assert exchange.json() == [["a", "b"], "own"]


async def test_length_of_the_body_is_announced_unless_it_comes_in_chunks() -> None:
    async def respond(request: Request) -> ASGIApp:
        return JSONResponse([request.headers.get("content-length"), request.headers.get("transfer-encoding")])

    assert (await ask(app_of(respond), content=b"abc")).json() == ["3", None]
    for chunks in ([b"abc"], []):
        assert (await ask(app_of(respond), content=chunks)).json() == [None, "chunked"]
    assert (await ask(app_of(respond))).json() == [None, None]


async def test_two_bodies_are_refused() -> None:
    with pytest.raises(TypeError, match=r"has one body, but content and json were given. Choose one."):
        await ask(endless, json=1, content=b"")


@pytest.mark.parametrize("url", ["/a?b=c", "a?b=c", "http://testserver/a?b=c", "http://testserver:80/a?b=c"])
async def test_path_can_be_given_as_to_other_clients(url: str) -> None:
    exchange = await ask(app_of(echo), path=url)
    assert (exchange.json()["path"], exchange.json()["query"]) == (["/a", "/a"], [["b", "c"]])


@pytest.mark.parametrize("url", ["http://example.org/a", "https://testserver/a", "//testserver/a"])
async def test_url_of_another_host_is_refused(url: str) -> None:
    with pytest.raises(TypeError, match=rf"only requests http://testserver\. Pass a path instead of '{url}'"):
        await ask(endless, path=url)


async def test_unknown_options_are_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(TypeError) as failure:
        await ask(endless, leave_after_recieved=3, parms={"a": "b"})
    assert str(failure.value) == (
        "A request has no option 'leave_after_recieved' or 'parms'. Choose from params, headers, cookies, json, data, "
        "content, leave_after, leave_when, leave_after_received, leave_after_sent."
    )


async def test_cookies_are_sent_with_their_request_only() -> None:
    async def respond(request: Request) -> ASGIApp:
        response = JSONResponse(request.cookies)
        response.set_cookie("set", "by the application")
        return response

    client = Client(app_of(respond))
    assert (await client.get("/", cookies={"a": "b", "c": "d"})).json() == {"a": "b", "c": "d"}
    assert (await client.get("/")).json() == {}


@pytest.mark.parametrize("method", ["get", "post", "put", "patch", "delete", "head", "options"])
async def test_each_common_method_has_a_function(method: str) -> None:
    exchange = await getattr(Client(app_of(echo)), method)("/", params={"a": "b"})
    assert exchange.json()["method"] == method.upper()
    assert exchange.json()["query"] == [["a", "b"]]


# When the client disconnects


async def test_client_that_stays_gets_the_whole_response() -> None:
    async def respond(request: Request) -> ASGIApp:
        await anyio.sleep(2)
        return PlainTextResponse("done", 201, {"X-Own": "ü"})

    exchange = await ask(app_of(respond))
    assert (exchange.status, exchange.body, exchange.text, exchange.complete) == (201, b"done", "done", True)
    assert exchange.status_code == 201
    assert exchange.headers["x-own"] == "ü"
    assert (exchange.left_after, exchange.seconds_after_leave, exchange.error) == (None, None, None)
    assert exchange.ended_after == pytest.approx(2)


async def test_client_disconnects_after_a_time() -> None:
    exchange = await ask(obedient, leave_after=1.5)
    assert exchange.left_after == pytest.approx(1.5)
    assert exchange.seconds_after_leave == pytest.approx(0)
    assert (exchange.status, exchange.body, exchange.complete, dict(exchange.headers)) == (None, b"", False, {})


@pytest.mark.parametrize("server", ["strict", "uvicorn"])
@pytest.mark.parametrize("when", ["0 s", "an event that is set", "no chunk sent"])
async def test_client_has_disconnected_before_the_application_starts(when: str, server: str) -> None:
    event = anyio.Event()
    event.set()
    options: dict[str, dict[str, Any]] = {  # Any: see Client
        "0 s": {"leave_after": 0},
        "an event that is set": {"leave_when": event},
        "no chunk sent": {"leave_after_sent": 0},
    }
    got: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        got.append((await receive())["type"])

    for _ in range(10):  # trio starts tasks in any order
        exchange = await ask(app, content=b"body", server=server, **options[when])
        assert exchange.left_after == 0
    # A body sent in one message has arrived, and uvicorn drops it.
    assert set(got) == {GOT if server == "strict" and when != "no chunk sent" else GONE}


async def test_client_disconnects_when_the_application_sets_an_event() -> None:
    event = anyio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep(3)
        event.set()
        await obedient(scope, receive, send)

    exchange = await ask(app, leave_when=event)
    assert exchange.left_after == pytest.approx(3)


async def test_first_of_several_conditions_counts() -> None:
    event = anyio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep(2)
        event.set()
        await anyio.sleep(1)

    exchange = await ask(app, leave_when=event, leave_after=1, leave_after_received=1)
    assert exchange.left_after == pytest.approx(1)
    assert exchange.seconds_after_leave == pytest.approx(2)


async def ticks(scope: Scope, receive: Receive, send: Send) -> None:
    """Sends a chunk each second until the client has disconnected."""

    async def tick() -> None:
        await send(START)
        while True:
            await send(CHUNK)
            await anyio.sleep(1)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        await obedient(scope, receive, send)
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("chunks", [0, 1, 3])
async def test_client_disconnects_after_chunks_of_the_response(chunks: int) -> None:
    exchange = await ask(ticks, server="uvicorn", leave_after_received=chunks)
    assert exchange.left_after == pytest.approx(max(0, chunks - 1))
    assert exchange.status == 200
    assert exchange.text.count("chunk") in (chunks, chunks + 1)
    assert not exchange.complete
    assert exchange.seconds_after_leave == pytest.approx(0)


async def test_client_with_a_complete_response_no_longer_disconnects() -> None:
    event = anyio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await sends(START, END)(scope, receive, send)
        event.set()
        await anyio.sleep(2)

    exchange = await ask(app, leave_after=1, leave_when=event, leave_after_received=1)
    assert exchange.left_after is None
    assert exchange.complete


async def one_by_one(chunks: Iterator[bytes], closed: list[str]) -> AsyncIterator[bytes]:
    try:
        while True:
            yield next(chunks)
    finally:
        closed.append("generator")


class OneByOne:
    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.chunks = chunks

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        return next(self.chunks)


@pytest.mark.parametrize("kind", ["iterator", "generator", "async iterator"])
async def test_client_disconnects_during_an_upload(kind: str) -> None:
    chunks = iter([b"a", b"b", b"c", b"d"])
    closed: list[str] = []
    contents = {"iterator": chunks, "generator": one_by_one(chunks, closed), "async iterator": OneByOne(chunks)}
    read: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(Request(scope, receive).stream()) as stream:
            async for chunk in stream:
                read.append(chunk)

    exchange = await ask(app, "POST", content=contents[kind], leave_after_sent=2)
    assert read == [b"a", b"b"]
    assert list(chunks) == [b"c", b"d"]
    assert closed == (["generator"] if kind == "generator" else [])
    assert isinstance(exchange.error, ClientDisconnect)
    assert not exchange.body_consumed


async def test_body_is_sent_no_faster_than_it_is_read() -> None:
    unsent = [b"a", b"b", b"c"]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep(1)
        assert unsent == [b"b", b"c"]
        await receive()
        await anyio.sleep(1)
        assert unsent == [b"c"]

    exchange = await ask(app, content=iter(lambda: unsent.pop(0), None))
    assert exchange.error is None
    assert not exchange.body_consumed


async def test_body_that_fails_fails_the_test() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"a"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await ask(obedient, content=chunks())


# The servers


async def seen_by(server: str, *, disconnects: bool) -> list[str]:
    """Disconnect while a body is unread, or get the response; return what the next four receive() calls return."""
    seen: list[str] = []
    event = anyio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if disconnects:
            event.set()
            await anyio.sleep(1)
        else:
            await receive()
            await sends(START, END)(scope, receive, send)
        for _ in range(4):
            with anyio.move_on_after(0.1) as limit:
                seen.append((await receive())["type"])
            if limit.cancelled_caught:
                seen.append("waits")

    await ask(app, "POST", server=server, content=b"body", leave_when=event)
    return seen


def without_false_disconnect(seen: list[str]) -> list[str]:
    """Return what gunicorn would report on trio; on asyncio it reports a disconnect after a cancelled wait."""
    return [*seen[: seen.index(WAITS)], *[WAITS] * 4][:4] if WAITS in seen else seen


@pytest.mark.parametrize(
    ("server", "after_disconnect", "after_response"),
    [
        ("strict", [GOT, GONE, WAITS, GONE], [GONE, WAITS, GONE, GONE]),
        ("uvicorn", [GONE, GONE, GONE, GONE], [GONE, GONE, GONE, GONE]),
        ("hypercorn", [GOT, GONE, WAITS, WAITS], [GONE, WAITS, WAITS, WAITS]),
        ("granian", [GOT, GONE, GONE, GONE], [GONE, GONE, GONE, GONE]),
        ("gunicorn", [GONE, GONE, GONE, GONE], [WAITS, GONE, GONE, GONE]),
        ("gunicorn-uvloop", [GONE, GONE, GONE, GONE], [WAITS, GONE, GONE, GONE]),
        ("gunicorn-h2", [GONE, GONE, GONE, GONE], [GONE, GONE, GONE, GONE]),
        ("daphne", [GOT, GONE, WAITS, WAITS], [GONE, WAITS, WAITS, WAITS]),
    ],
)
async def test_server_reports_the_disconnect_and_the_end_of_the_response_in_its_own_way(
    server: str, after_disconnect: list[str], after_response: list[str]
) -> None:
    if on_trio():
        after_disconnect, after_response = map(without_false_disconnect, (after_disconnect, after_response))
    assert await seen_by(server, disconnects=True) == after_disconnect
    assert await seen_by(server, disconnects=False) == after_response


@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_waiting_call_of_receive_learns_of_the_end_of_the_response(server: str) -> None:
    learned: list[str] = []

    async def listen(receive: Receive) -> None:
        await receive()
        learned.append((await receive())["type"])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen, receive)
            await anyio.sleep(1)
            await sends(START, END)(scope, receive, send)
            await anyio.sleep(1)
            tasks.cancel_scope.cancel()
        assert learned == ([] if server in ("gunicorn", "gunicorn-uvloop") else [GONE])

    assert (await ask(app, server=server)).error is None


@pytest.mark.parametrize(
    ("server", "version", "extensions"),
    [
        ("strict", "2.4", {}),
        ("uvicorn", "2.3", None),
        ("hypercorn", "2.1", {}),
        ("granian", "2.3", {"http.response.pathsend": {}, "websocket.http.response": {}}),
        ("gunicorn", "2.4", {}),
        ("gunicorn-uvloop", "2.4", {}),
        ("gunicorn-h2", "2.4", {"http.response.priority": {}, "http.response.trailers": {}}),
        ("daphne", None, None),
    ],
)
async def test_server_announces_its_version_of_asgi_and_its_extensions(
    server: str, version: str | None, extensions: object
) -> None:
    async def respond(request: Request) -> ASGIApp:
        return JSONResponse([request.scope["asgi"].get("spec_version"), request.scope.get("extensions")])

    assert (await ask(app_of(respond), server=server)).json() == [version, extensions]


@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_send_after_the_disconnect(server: str) -> None:
    exchange = await ask(sends(START, END), server=server, leave_after=0)
    assert isinstance(exchange.error, OSError) == (server == "gunicorn-h2")
    assert exchange.status == 200
    assert exchange.complete == (server != "gunicorn-h2")


@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_send_during_the_disconnect(server: str) -> None:
    blocked: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        with anyio.move_on_after(1) as limit:
            await send(CHUNK)
        blocked.append(limit.cancelled_caught)

    exchange = await ask(app, server=server, leave_after_received=1)
    assert blocked == [server == "gunicorn-uvloop"]
    assert exchange.left_after == 0


async def test_start_of_a_response_never_blocks() -> None:
    exchange = await ask(sends(START, END), server="gunicorn-uvloop", leave_after_received=0)
    assert (exchange.left_after, exchange.complete) == (0, True)


@pytest.mark.parametrize("server", [server for server in ALL_SERVERS if server != "daphne"])
async def test_cancelled_wait_for_a_chunk_of_the_body_does_no_harm(server: str) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        await anyio.sleep(2)
        yield b"body"

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with anyio.move_on_after(1):
            await receive()
        assert (await receive())["body"] == b"body"

    exchange = await ask(app, server=server, content=chunks())
    assert exchange.error is None


@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_cancelled_receive_loses_or_keeps_the_body_as_the_server_does(server: str) -> None:
    read: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with anyio.CancelScope() as cancelled:
            cancelled.cancel()
            read.append(await receive())
        if not read:
            read.append(await receive())

    await ask(app, server=server, content=b"body")
    body = b"" if server in ("strict", "granian") and not on_trio() else b"body"
    assert read == [{"type": "http.request", "body": body, "more_body": False}]


@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_client_that_waits_for_100_continue_sends_no_body_before(server: str) -> None:
    chunks = [b"body"]
    at_once = server in ("hypercorn", "daphne")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep(1)
        assert chunks == ([] if at_once else [b"body"])
        await receive()
        assert chunks == []

    options: dict[str, Any] = {"headers": {"Expect": "100-continue"}, "server": server}  # Any: see Client
    exchange = await ask(app, "POST", content=(chunks.pop() for _ in range(1)), **options)
    assert exchange.error is None
    assert exchange.asked_for_body
    exchange = await ask(app_of(echo), "POST", content=b"body", **options)
    assert exchange.json()["body"] == "body"
    untouched = iter([b"body"])
    exchange = await ask(sends(START, END), "POST", content=untouched, leave_after=1, **options)
    assert list(untouched) == ([] if at_once else [b"body"])
    assert not exchange.asked_for_body
    assert not exchange.body_consumed


@pytest.mark.parametrize("content", [b"body", [b"body"]])
async def test_body_that_was_not_asked_for_is_not_sent_after_the_disconnect(content: Body) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep(2)
        assert (await receive())["type"] == "http.disconnect"

    exchange = await ask(app, "POST", content=content, headers={"Expect": "100-continue"}, leave_after=1)
    assert exchange.error is None


@pytest.mark.parametrize("when", [{"leave_after_sent": 2}, {"leave_after": 1}])
async def test_daphne_starts_the_application_when_the_body_is_there(when: dict[str, Any]) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"a"
        yield b"b"
        await anyio.sleep(2)

    exchange = await ask(sends(START, END), "POST", server="daphne", content=chunks())
    assert exchange.messages[0].seconds == pytest.approx(2)
    exchange = await ask(sends(START, END), "POST", server="daphne", content=chunks(), **when)
    assert exchange.messages == ()
    assert exchange.left_after == pytest.approx(when.get("leave_after", 0))
    assert exchange.seconds_after_leave == 0


async def test_message_blames_the_chosen_server_if_send_does_not_return() -> None:
    client = Client(sends(START, CHUNK, END), server="gunicorn-uvloop")
    with anyio.fail_after(100), pytest.raises(AssertionError) as failure:
        await client.get("/", leave_after_received=1)
    first, *_, last = str(failure.value).splitlines()
    assert first == "The application was still running 5 s after the client disconnected. Its tasks wait here:"
    assert last.startswith("It waits in send(), which never returns on this server, chosen by name,")
    assert last.endswith("Choose another server for them.")


async def test_message_does_not_blame_a_send_that_was_cancelled() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        with anyio.move_on_after(1):
            await send(CHUNK)
        await anyio.sleep_forever()

    with failing("raise the limit: Client"):
        await ask(app, server="gunicorn-uvloop", leave_after_received=1)


def test_servers_lists_every_real_server_but_gunicorn_on_uvloop() -> None:
    assert SERVERS == ("uvicorn", "hypercorn", "granian", "gunicorn", "gunicorn-h2", "daphne")


def test_unknown_server_is_refused() -> None:
    with pytest.raises(ValueError, match=r"There is no server 'apache'. Choose one of strict, uvicorn, "):
        Client(endless, server="apache")


# What is reported


async def test_every_message_is_reported_unchanged_with_its_time() -> None:
    message = dict(START)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(message)
        message["status"] = 500  # too late
        await anyio.sleep(1)
        await send(END)

    first, last = (await ask(app)).messages
    assert (first, last.message) == (Sent(0, START), END)
    assert last.seconds == pytest.approx(1)


async def test_what_the_application_raised_is_reported() -> None:
    error = ValueError("own")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep(1)
        raise error

    assert (await ask(app)).error is error


@on_asyncio_only
async def test_cancellation_that_the_application_raised_by_itself_is_reported() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise asyncio.CancelledError

    assert isinstance((await ask(app)).error, asyncio.CancelledError)


@on_asyncio_only
async def test_exception_does_not_keep_a_task_alive_that_ends_with_the_request() -> None:
    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        async def body() -> AsyncIterator[str]:
            yield "chunk"
            await anyio.sleep(1)
            try:
                raise ZeroDivisionError
            except ZeroDivisionError as error:
                raise ExceptionGroup("several", [error]) from None

        return StreamingResponse(body())

    for server in ALL_SERVERS:
        exchange = await ask(Starlette(routes=[Route("/", endpoint)]), server=server)
        assert isinstance(exchange.error, ExceptionGroup)


async def test_outcome_that_the_test_framework_raises_in_the_application_is_raised() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        pytest.fail("here")

    with pytest.raises(pytest.fail.Exception, match="here"):
        await ask(app)


async def test_cancellation_of_the_test_is_passed_on() -> None:
    ended: list[float] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(anyio.current_time())

    began = anyio.current_time()
    with anyio.move_on_after(1) as limit:
        await ask(app)
    assert limit.cancelled_caught
    assert ended == [pytest.approx(began + 1)]


async def test_exchange_is_readable_and_does_not_change() -> None:
    exchange = await ask(obedient, leave_after=0.5)
    assert (
        repr(exchange)
        == "<Exchange GET / on strict: no response, 0 bytes, disconnected at 0.500 s, ended 0.000 s later>"
    )
    with pytest.raises(AttributeError):
        exchange.error = None  # type: ignore[misc]  # this is what the test is about
    exchange = await ask(sends(START), path="/a?b=c", server="uvicorn")
    assert repr(exchange) == "<Exchange GET /a?b=c on uvicorn: 200 incomplete, 0 bytes, stayed, ended after 0.000 s>"
    exchange = await ask(sends(START, END))
    assert repr(exchange) == "<Exchange GET / on strict: 200, 3 bytes, stayed, ended after 0.000 s>"
    exchange = await ask(sends(START, {"type": "http.response.pathsend", "path": "/a"}), server="granian")
    assert repr(exchange) == "<Exchange GET / on granian: 200, 0 bytes, stayed, ended after 0.000 s>"

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("missing")

    assert "RAISED KeyError('missing')" in repr(await ask(fail))


# What is checked


LEFT = "The application ended, but left a task behind:"
INTENDED = "If this is intended, leave the check out:"


def failing(text: str) -> Any:  # Any: pytest's own type is not public
    return pytest.raises(AssertionError, match=text)


async def waits_here(receive: Receive) -> None:
    await anyio.sleep_forever()


async def waits_in_receive(receive: Receive) -> None:
    await receive()
    await receive()


async def waits_in_a_child(receive: Receive) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(waits_here, receive)


async def waits_behind_a_shield(receive: Receive) -> None:
    with anyio.CancelScope(shield=True):
        await anyio.sleep_forever()


async def waits_in_a_generator(receive: Receive) -> None:
    async def generator() -> AsyncIterator[Message]:
        yield await receive()

    await receive()
    assert [each async for each in generator()] == []


class Waiting:
    def __init__(self, receive: Receive) -> None:
        self.receive = receive

    def __await__(self) -> Generator[Any, None, None]:  # Any: as in asyncio
        return waits_here(self.receive).__await__()


async def waits_in_an_awaitable(receive: Receive) -> None:
    await Waiting(receive)


@pytest.mark.parametrize("timeout", [5, 0.5])
async def test_application_that_goes_on_after_the_disconnect_fails_the_test(timeout: float) -> None:
    with pytest.raises(AssertionError) as failure:
        await ask(endless, leave_after=10, timeout=timeout)
    lines = str(failure.value).splitlines()
    since = f"{timeout:g} s after the client disconnected"
    assert lines[0] == f"The application was still running {since}. Its tasks wait here:"
    assert lines[1].startswith(f"- application, which runs endless(), defined at {__file__}:")
    assert lines[-1] == "If it is meant to take longer, raise the limit: Client(app, timeout=...)"
    assert lines[-2].endswith(f"disconnected at 10.000 s, ended {timeout:.3f} s later>")


async def test_application_that_never_ends_fails_the_test_of_a_client_that_stays() -> None:
    with failing("The application was still running after 5 s, and the client had not disconnected"):
        await ask(endless)
    with failing("The application was still running after 2 s, and the client had not disconnected"):
        await ask(endless, leave_when=anyio.Event(), timeout=2)

    async def goes_on_after_its_response(scope: Scope, receive: Receive, send: Send) -> None:
        await sends(START, END)(scope, receive, send)
        await anyio.sleep_forever()

    with failing("The application was still running after 6 s, and the client had not disconnected"):
        await ask(goes_on_after_its_response, leave_after=1)


async def test_time_in_which_the_machine_stops_everything_is_not_counted() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(3):
            stall(60)
            await anyio.sleep(1)

    exchange = await ask(app)
    assert exchange.ended_after > 180


async def test_body_that_never_ends_fails_the_test() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"a"
        await anyio.sleep_forever()

    for server in ("strict", "daphne"):
        with failing("The application was still running after 5 s, and the client had not disconnected"):
            await ask(app_of(echo), "POST", content=chunks(), server=server)


@on_asyncio_only  # trio's virtual time stands still while anything runs
async def test_application_that_only_sends_fails_the_test() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        while True:
            await send(CHUNK)

    with anyio.fail_after(100), failing("The application was still running 5 s after the client disconnected"):
        await ask(app, leave_after_received=3, server="uvicorn")


@on_asyncio_only
@pytest.mark.parametrize(
    ("wait", "innermost"),
    [
        (waits_here, "waits_here"),
        (waits_in_receive, "receive"),
        (waits_in_a_child, "waits_here"),
        (waits_behind_a_shield, "waits_behind_a_shield"),
        (waits_in_a_generator, "receive"),
        (waits_in_an_awaitable, "waits_here"),
    ],
)
async def test_message_says_where_the_application_waits(
    wait: Callable[[Receive], Awaitable[None]], innermost: str
) -> None:
    ended: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await wait(receive)
        finally:
            ended.append(True)

    with pytest.raises(AssertionError) as failure:
        await ask(app)
    text = str(failure.value)
    assert "\n- application, which runs test_message_says_where_the_application_waits.<locals>.app(), " in text
    assert f'{__file__}", line ' in text
    assert f"in {wait.__name__}\n" in text
    assert f"in {innermost}\n    await " in text
    assert ended == [True]


@on_asyncio_only
async def test_task_left_behind_fails_the_test() -> None:
    async with AsyncExitStack() as stack:

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            task = asyncio.create_task(waits_here(receive), name="heartbeat")
            stack.callback(task.cancel)

        with pytest.raises(AssertionError) as failure:
            await ask(app)
        lines = str(failure.value).splitlines()
        line = waits_here.__code__.co_firstlineno
        assert lines[0] == f"{LEFT} heartbeat, which runs waits_here(), defined at {__file__}:{line}"
        assert lines[1].endswith("in waits_here")
        assert lines[-1] == f'{INTENDED} Client(app, unchecked={{"tasks left behind": "the reason"}})'
        await ask(app, unchecked={"tasks left behind": "it has a heartbeat"})


async def chain(depth: int, cleanup: float, closed: list[int]) -> AsyncIterator[None]:
    """Nest generators as httpx's responses do; aclosing() closes only the outermost."""
    try:
        if depth:
            inner = chain(depth - 1, cleanup, closed)
            await anext(inner)
        yield
    finally:
        await anyio.sleep(cleanup)
        closed.append(depth)


@on_asyncio_only
@pytest.mark.parametrize("cleanup", [0, 0.5])
async def test_generators_that_the_event_loop_closes_are_waited_for(cleanup: float) -> None:
    closed: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anext(chain(7, cleanup, closed))

    exchange = await ask(app)
    assert sorted(closed) == list(range(8))
    assert exchange.ended_after == 0


@on_asyncio_only
async def test_generator_that_is_still_being_closed_after_the_timeout_is_no_task_left_behind() -> None:
    closed: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anext(chain(0, 60, closed))

    began = anyio.current_time()
    await ask(app)
    assert anyio.current_time() - began == pytest.approx(5)
    with failing(r"- Task-\d+, which runs chain\(\), defined at "):
        await ask(both(app, endless))
    await anyio.sleep(60)
    assert closed == [0]  # the second one was cancelled with its application


def both(first: ASGIApp, second: ASGIApp) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await first(scope, receive, send)
        await second(scope, receive, send)

    return app


def installed(signature: str) -> Callable[..., Awaitable[None]]:
    """Return a coroutine function that seems to be defined in an installed library."""
    source = f"import anyio\nasync def {signature}:\n    await anyio.sleep_forever()"
    names: dict[str, Any] = {}  # Any: values of any type
    exec(compile(source, f"{sysconfig.get_path('purelib')}/library.py", "exec"), names)
    return cast("Callable[..., Awaitable[None]]", names["watch"])


@on_asyncio_only
@pytest.mark.parametrize(
    ("signature", "requests", "is_left_behind"),
    [("watch()", 1, False), ("watch()", 2, True), ("watch(request)", 1, True), ("watch(*, request)", 1, True)],
)
async def test_task_that_a_library_starts_once_for_the_process_is_not_the_requests(
    signature: str, requests: int, is_left_behind: bool
) -> None:
    watch = installed(signature)
    async with AsyncExitStack() as stack:

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            arguments = {"request": scope} if "request" in signature else {}
            task = asyncio.ensure_future(watch(**arguments))
            stack.callback(task.cancel)

        for _ in range(requests - 1):
            await ask(app)
        with failing(r"which runs watch\(\), defined at .*library.py:2") if is_left_behind else nullcontext():
            await ask(app)


class Foreign(Coroutine[Any, Any, None]):  # Any: as in asyncio
    """A coroutine without frames, as a compiled one may be."""

    def send(self, value: object) -> None: ...

    def throw(self, *error: Any) -> None:  # Any: see the class
        raise StopIteration

    def close(self) -> None: ...

    def __await__(self) -> Generator[Any, None, None]:  # type: ignore[empty-body]  # nobody awaits it
        ...


@on_asyncio_only
async def test_task_left_behind_without_frames_is_named_by_its_coroutine() -> None:
    async with AsyncExitStack() as stack:

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            stack.callback(asyncio.create_task(Foreign(), name="foreign").cancel)

        with failing(f"{LEFT} foreign, which runs <.*Foreign object at "):
            await ask(app)


async def test_task_left_behind_in_an_outer_task_group_fails_the_test() -> None:
    async with anyio.create_task_group() as tasks:

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            tasks.start_soon(waits_here, receive, name="heartbeat")

        with failing(f"{LEFT} heartbeat, which runs waits_here"):
            await ask(app)
        tasks.cancel_scope.cancel()


@on_asyncio_only
async def test_task_that_was_cancelled_can_end_a_little_later() -> None:
    async def wait(depth: int) -> None:
        await (asyncio.create_task(wait(depth - 1)) if depth else anyio.sleep_forever())

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.create_task(wait(3))
        await anyio.sleep(1)
        task.cancel()

    await ask(app)


async def test_tasks_of_another_request_are_not_taken_for_the_applications() -> None:
    async def ask_later() -> None:
        await anyio.sleep(1)
        await ask(obedient, leave_after=3)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask_later)
        await ask(obedient, leave_after=2)
        assert any(task.name == "application" for task in anyio.get_running_tasks())


async def swallow_cancellation() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    with suppress(asyncio.CancelledError):
        await checkpoint()


UNBALANCED = r"caught 1 cancellation\(s\) of its task without calling task.uncancel\(\), during a request for "


@on_asyncio_only
async def test_unbalanced_cancelling_fails_the_test() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await swallow_cancellation()

    with failing(rf"{UNBALANCED}.*<locals>\.app\(\), defined at {__file__}:\d+\."):
        await ask(app)
    await ask(app, unchecked={"unbalanced cancelling": "it is what the test is about"})


@on_asyncio_only
async def test_the_fault_of_unbalanced_cancelling_names_the_endpoint_or_the_application() -> None:
    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        await swallow_cancellation()
        return Response()

    class App:
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await swallow_cancellation()

    with failing(rf"{UNBALANCED}.*<locals>\.endpoint\(\), defined at {__file__}:\d+\."):
        await ask(Starlette(routes=[Route("/", endpoint)]))
    with failing(rf"{UNBALANCED}<.*App object at .*>\."):
        await ask(App())


async def test_concurrent_calls_of_receive_fail_the_test() -> None:
    seen: list[str] = []

    async def listen(receive: Receive) -> None:
        seen.append((await receive())["type"])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen, receive)
            tasks.start_soon(listen, receive)

    with failing(rf"another call was waiting\. The second .* by .*<locals>\.listen\(\), defined at {__file__}:\d+\."):
        await ask(app, leave_after=1, server="uvicorn")
    seen.clear()
    await ask(app, leave_after=1, server="uvicorn", unchecked={"concurrent receive": "uvicorn only"})
    assert seen == [GONE, GONE]


@on_asyncio_only
async def test_concurrent_call_by_a_task_of_its_own_fails_the_test() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await asyncio.gather(receive(), receive())

    with failing(r"while another call was waiting\. The second call was by a task that runs receive\(\) itself\."):
        await ask(app, leave_after=1, server="uvicorn")


WRONG: dict[str, list[Message]] = {
    "http.response.body came before http.response.start": [END],
    "http.response.start came twice": [START, START],
    "http.response.start came after the response was complete": [START, END, START],
    "http.response.body came after the response was complete": [START, END, END],
    "http.response.start has no status that is an int": [{"type": "http.response.start"}],
    "http.response.start has headers that are not pairs of bytes": [START | {"headers": [("a", "b")]}],
    "http.response.body has a body that is not bytes": [START, {"type": "http.response.body", "body": "text"}],
    "http.response.pathsend is not a message that this server takes": [{"type": "http.response.pathsend"}],
    "None is not a message that this server takes": [{}],
}


@pytest.mark.parametrize(("fault", "messages"), WRONG.items(), ids=range(len(WRONG)))
async def test_messages_out_of_order_fail_the_test(messages: list[Message], fault: str) -> None:
    with failing(rf"way that ASGI forbids, by sends.<locals>.app\(\), defined at {__file__}:\d+: {fault}\."):
        await ask(sends(*messages))
    exchange = await ask(sends(*messages), unchecked={"message order": "it is what the test is about"})
    assert [sent.message for sent in exchange.messages] == messages


async def test_failed_check_names_what_the_application_raised_as_its_cause() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(END)
        raise ZeroDivisionError

    with failing("RAISED ZeroDivisionError()") as failure:
        await ask(app)
    assert isinstance(failure.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("unchecked", "fault"),
    [
        (
            {"tasks": "they are many"},
            r"There is no check 'tasks'. Choose from tasks left behind, unbalanced ",
        ),
        ({"message order": " "}, r"The check 'message order' is left out without a reason. Say why: "),
    ],
)
def test_check_is_skipped_only_by_name_and_with_a_reason(unchecked: Any, fault: str) -> None:  # Any: any mistake
    with pytest.raises(ValueError, match=fault):
        Client(endless, unchecked=unchecked)


# Where it runs

OF_A_USER = """
import {imports}
from cancelonleave.testing import Client

async def app(scope, receive, send):
    while (await receive())["type"] != "http.disconnect":
        pass

{mark}
async def test_disconnect({arguments}):
    exchange = await Client(app).get("/", leave_after={seconds})
    assert exchange.left_after >= {seconds}
"""


@pytest.mark.parametrize(
    "values",
    [
        {"imports": "pytest", "mark": "@pytest.mark.anyio", "arguments": "anyio_backend", "seconds": 0.05},
        {"imports": "pytest", "mark": "@pytest.mark.asyncio", "arguments": "", "seconds": 0.05},
        {"imports": "pytest", "mark": "@pytest.mark.trio", "arguments": "", "seconds": 0.05},
        {"imports": "pytest", "mark": "@pytest.mark.trio", "arguments": "autojump_clock", "seconds": 3600},
    ],
    ids=["anyio", "pytest-asyncio", "pytest-trio", "pytest-trio with MockClock"],
)
def test_works_under_each_plugin(values: dict[str, object], tmp_path: Path, pytestconfig: pytest.Config) -> None:
    tmp_path.joinpath("test_user.py").write_text(OF_A_USER.format(**values), encoding="utf-8")
    settings = ["[pytest]", "asyncio_default_fixture_loop_scope = function", "filterwarnings ="]
    settings += [f"  {line}" for line in pytestconfig.getini("filterwarnings")]
    tmp_path.joinpath("pytest.ini").write_text("\n".join(settings), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "pytest"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_trio_is_not_imported_on_asyncio() -> None:
    program = """
        import sys, asyncio
        from cancelonleave.testing import Client

        async def app(scope, receive, send):
            await asyncio.sleep(0)

        asyncio.run(Client(app).get("/"))
        assert "trio" not in sys.modules
        assert "fastapi" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120)

"""What a test author relies on, on asyncio, uvloop and trio, in virtual time."""

import asyncio
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cancelonleave.testing import SERVERS, Client, Exchange, Sent
from cancelonleave.testing._request import Body
from virtual import anyio_backend as anyio_backend
from work import on_trio

pytestmark = pytest.mark.anyio

ALL_SERVERS = ("strict", *SERVERS)
START: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": []}  # Any: ASGI's own type
PIECE: Message = {"type": "http.response.body", "body": b"piece", "more_body": True}
END: Message = {"type": "http.response.body", "body": b"end"}
GOT, GONE, WAITS = "http.request", "http.disconnect", "waits"


on_asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio", "uvloop"], indirect=True)


def app_of(respond: Callable[[Request], Awaitable[ASGIApp]]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = await respond(Request(scope, receive))
        await response(scope, receive, send)

    return app


async def ask(app: ASGIApp, method: str = "GET", path: str = "/", **options: Any) -> Exchange:  # Any: see Client
    """Ask with a client whose own arguments are taken from the options."""
    own = {name: options.pop(name) for name in ("server", "timeout", "unchecked") if name in options}
    with anyio.fail_after(1000):
        return await Client(app, **own).request(method, path, **options)


async def endless(scope: Scope, receive: Receive, send: Send) -> None:
    await anyio.sleep_forever()


async def obedient(scope: Scope, receive: Receive, send: Send) -> None:
    """Ends when the client has left."""
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


async def test_headers_may_come_several_times() -> None:
    async def respond(request: Request) -> ASGIApp:
        return JSONResponse([request.headers.getlist("x-tag"), request.headers["host"]])

    exchange = await ask(app_of(respond), headers=[("X-Tag", "a"), ("X-Tag", "b"), ("Host", "own")])
    assert exchange.json() == [["a", "b"], "own"]


async def test_length_of_the_body_is_announced_unless_it_comes_in_pieces() -> None:
    async def respond(request: Request) -> ASGIApp:
        return JSONResponse([request.headers.get("content-length"), request.headers.get("transfer-encoding")])

    assert (await ask(app_of(respond), content=b"abc")).json() == ["3", None]
    assert (await ask(app_of(respond), content=[b"abc"])).json() == [None, "chunked"]
    assert (await ask(app_of(respond))).json() == [None, None]


async def test_two_bodies_are_refused() -> None:
    with pytest.raises(TypeError, match=r"has one body, but content and json are given. Choose one."):
        await ask(endless, json=1, content=b"")


@pytest.mark.parametrize("method", ["get", "post", "put", "patch", "delete"])
async def test_each_common_method_has_a_function(method: str) -> None:
    exchange = await getattr(Client(app_of(echo)), method)("/", params={"a": "b"})
    assert exchange.json()["method"] == method.upper()
    assert exchange.json()["query"] == [["a", "b"]]


# When the client leaves


async def test_client_that_stays_gets_the_whole_response() -> None:
    async def respond(request: Request) -> ASGIApp:
        await anyio.sleep(2)
        return PlainTextResponse("done", 201, {"X-Own": "ü"})

    exchange = await ask(app_of(respond))
    assert (exchange.status, exchange.body, exchange.text, exchange.complete) == (201, b"done", "done", True)
    assert exchange.headers["x-own"] == "ü"
    assert (exchange.left_after, exchange.seconds_after_leave, exchange.error) == (None, None, None)
    assert exchange.ended_after == pytest.approx(2)


async def test_client_leaves_after_a_time() -> None:
    exchange = await ask(obedient, leave_after=1.5)
    assert exchange.left_after == pytest.approx(1.5)
    assert exchange.seconds_after_leave == pytest.approx(0)
    assert (exchange.status, exchange.body, exchange.complete, dict(exchange.headers)) == (None, b"", False, {})


@pytest.mark.parametrize("server", ["strict", "uvicorn"])
@pytest.mark.parametrize("when", ["0 s", "an event that is set", "no piece sent"])
async def test_client_has_left_before_the_application_starts(when: str, server: str) -> None:
    event = anyio.Event()
    event.set()
    options: dict[str, dict[str, Any]] = {  # Any: see Client
        "0 s": {"leave_after": 0},
        "an event that is set": {"leave_when": event},
        "no piece sent": {"leave_after_sent": 0},
    }
    got: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        got.append((await receive())["type"])

    for _ in range(10):  # trio starts tasks in any order
        exchange = await ask(app, content=b"body", server=server, **options[when])
        assert exchange.left_after == 0
    # What is sent in one go has arrived, and uvicorn drops it.
    assert set(got) == {GOT if server == "strict" and when != "no piece sent" else GONE}


async def test_client_leaves_when_the_application_sets_an_event() -> None:
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
    """Sends a piece each second until the client has left."""

    async def tick() -> None:
        await send(START)
        while True:
            await send(PIECE)
            await anyio.sleep(1)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        await obedient(scope, receive, send)
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("pieces", [0, 1, 3])
async def test_client_leaves_after_pieces_of_the_response(pieces: int) -> None:
    exchange = await ask(ticks, server="uvicorn", leave_after_received=pieces)
    assert exchange.left_after == pytest.approx(max(0, pieces - 1))
    assert exchange.status == 200
    assert exchange.text.count("piece") in (pieces, pieces + 1)
    assert not exchange.complete
    assert exchange.seconds_after_leave == pytest.approx(0)


async def test_client_with_a_complete_response_does_not_leave() -> None:
    event = anyio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await sends(START, END)(scope, receive, send)
        event.set()
        await anyio.sleep(2)

    exchange = await ask(app, leave_after=1, leave_when=event, leave_after_received=1)
    assert exchange.left_after is None
    assert exchange.complete


async def one_by_one(pieces: Iterator[bytes], closed: list[str]) -> AsyncIterator[bytes]:
    try:
        while True:
            yield next(pieces)
    finally:
        closed.append("generator")


class OneByOne:
    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces = pieces

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        return next(self.pieces)


@pytest.mark.parametrize("kind", ["iterator", "generator", "async iterator"])
async def test_client_leaves_in_mid_upload(kind: str) -> None:
    pieces = iter([b"a", b"b", b"c", b"d"])
    closed: list[str] = []
    contents = {"iterator": pieces, "generator": one_by_one(pieces, closed), "async iterator": OneByOne(pieces)}
    read: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(Request(scope, receive).stream()) as stream:
            async for piece in stream:
                read.append(piece)

    exchange = await ask(app, "POST", content=contents[kind], leave_after_sent=2)
    assert read == [b"a", b"b"]
    assert list(pieces) == [b"c", b"d"]
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
    async def pieces() -> AsyncIterator[bytes]:
        yield b"a"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await ask(obedient, content=pieces())


# The servers


async def seen_by(server: str, *, leaves: bool) -> list[str]:
    """Leave while a body waits to be read, or get the response; return what four calls of receive() say then."""
    seen: list[str] = []
    event = anyio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if leaves:
            event.set()
            await anyio.sleep(1)
        else:
            await receive()
            await sends(START, END)(scope, receive, send)
        for _ in range(4):
            with anyio.move_on_after(0.1) as patience:
                seen.append((await receive())["type"])
            if patience.cancelled_caught:
                seen.append("waits")

    await ask(app, "POST", server=server, content=b"body", leave_when=event)
    return seen


def without_lies(seen: list[str]) -> list[str]:
    """What gunicorn would say, which says that the client has left after a wait was cancelled, if it had trio."""
    return [*seen[: seen.index(WAITS)], *[WAITS] * 4][:4] if WAITS in seen else seen


@pytest.mark.parametrize(
    ("server", "after_leave", "after_response"),
    [
        ("strict", [GOT, GONE, WAITS, GONE], [GONE, WAITS, GONE, GONE]),
        ("uvicorn", [GONE, GONE, GONE, GONE], [GONE, GONE, GONE, GONE]),
        ("hypercorn", [GOT, GONE, WAITS, WAITS], [GONE, WAITS, WAITS, WAITS]),
        ("granian", [GOT, GONE, GONE, GONE], [GONE, GONE, GONE, GONE]),
        ("gunicorn", [GONE, GONE, GONE, GONE], [WAITS, GONE, GONE, GONE]),
        ("gunicorn-h2", [GONE, GONE, GONE, GONE], [GONE, GONE, GONE, GONE]),
        ("daphne", [GOT, GONE, WAITS, WAITS], [GONE, WAITS, WAITS, WAITS]),
    ],
)
async def test_server_tells_of_the_leave_and_of_the_end_as_it_does(
    server: str, after_leave: list[str], after_response: list[str]
) -> None:
    if on_trio():
        after_leave, after_response = map(without_lies, (after_leave, after_response))
    assert await seen_by(server, leaves=True) == after_leave
    assert await seen_by(server, leaves=False) == after_response


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
        assert learned == ([] if server == "gunicorn" else [GONE])

    assert (await ask(app, server=server)).error is None


@pytest.mark.parametrize(
    ("server", "version", "extensions"),
    [
        ("strict", "2.4", {}),
        ("uvicorn", "2.3", None),
        ("hypercorn", "2.1", {}),
        ("granian", "2.3", {"http.response.pathsend": {}, "websocket.http.response": {}}),
        ("gunicorn", "2.4", {}),
        ("gunicorn-h2", "2.4", {"http.response.priority": {}, "http.response.trailers": {}}),
        ("daphne", None, None),
    ],
)
async def test_server_announces_what_it_does(server: str, version: str | None, extensions: object) -> None:
    async def respond(request: Request) -> ASGIApp:
        return JSONResponse([request.scope["asgi"].get("spec_version"), request.scope.get("extensions")])

    assert (await ask(app_of(respond), server=server)).json() == [version, extensions]


@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_send_after_the_leave(server: str) -> None:
    exchange = await ask(sends(START, END), server=server, leave_after=0)
    assert isinstance(exchange.error, OSError) == (server == "gunicorn-h2")
    assert exchange.status == 200
    assert exchange.complete == (server != "gunicorn-h2")


@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_send_under_way_during_the_leave(server: str) -> None:
    blocked: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        with anyio.move_on_after(1) as patience:
            await send(PIECE)
        blocked.append(patience.cancelled_caught)

    exchange = await ask(app, server=server, leave_after_received=1)
    assert blocked == [server in ("strict", "gunicorn")]
    assert exchange.left_after == 0


async def test_start_of_a_response_never_waits() -> None:
    exchange = await ask(sends(START, END), leave_after_received=0)
    assert (exchange.left_after, exchange.complete) == (0, True)


@pytest.mark.parametrize("server", [server for server in ALL_SERVERS if server != "daphne"])
async def test_cancelled_wait_for_a_piece_of_the_body_does_no_harm(server: str) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        await anyio.sleep(2)
        yield b"body"

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with anyio.move_on_after(1):
            await receive()
        assert (await receive())["body"] == b"body"

    exchange = await ask(app, server=server, content=pieces())
    assert exchange.error is None


@pytest.mark.parametrize("server", ALL_SERVERS)
async def test_body_that_a_cancelled_call_of_receive_was_to_bring(server: str) -> None:
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
async def test_who_waits_for_100_continue_sends_no_body_before(server: str) -> None:
    pieces = [b"body"]
    at_once = server in ("hypercorn", "daphne")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep(1)
        assert pieces == ([] if at_once else [b"body"])
        await receive()
        assert pieces == []

    options: dict[str, Any] = {"headers": {"Expect": "100-continue"}, "server": server}  # Any: see Client
    exchange = await ask(app, "POST", content=(pieces.pop() for _ in range(1)), **options)
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
async def test_body_that_nobody_asks_for_is_not_sent_after_the_leave_either(content: Body) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep(2)
        assert (await receive())["type"] == "http.disconnect"

    exchange = await ask(app, "POST", content=content, headers={"Expect": "100-continue"}, leave_after=1)
    assert exchange.error is None


@pytest.mark.parametrize("leave", [{"leave_after_sent": 2}, {"leave_after": 1}])
async def test_daphne_starts_the_application_when_the_body_is_there(leave: dict[str, Any]) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"a"
        yield b"b"
        await anyio.sleep(2)

    exchange = await ask(sends(START, END), "POST", server="daphne", content=pieces())
    assert exchange.messages[0].seconds == pytest.approx(2)
    exchange = await ask(sends(START, END), "POST", server="daphne", content=pieces(), **leave)
    assert exchange.messages == ()
    assert exchange.left_after == pytest.approx(leave.get("leave_after", 0))
    assert exchange.seconds_after_leave == 0


def test_unknown_server_is_refused() -> None:
    with pytest.raises(ValueError, match=r"There is no server 'apache'. Choose one of strict, uvicorn, "):
        Client(endless, server="apache")


# What is reported


async def test_every_message_is_reported_as_it_was_with_its_time() -> None:
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
    with anyio.move_on_after(1) as patience:
        await ask(app)
    assert patience.cancelled_caught
    assert ended == [pytest.approx(began + 1)]


async def test_exchange_is_readable_and_does_not_change() -> None:
    exchange = await ask(obedient, leave_after=0.5)
    assert repr(exchange) == "<Exchange GET / on strict: no response, 0 bytes, left at 0.500 s, ended 0.000 s later>"
    with pytest.raises(AttributeError):
        exchange.error = None  # type: ignore[misc]  # that is what is tested
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


def failing(text: str) -> Any:  # Any: of pytest's own type, which is not public
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

    def __await__(self) -> Generator[Any, None, None]:  # Any: as asyncio has it
        return waits_here(self.receive).__await__()


async def waits_in_an_awaitable(receive: Receive) -> None:
    await Waiting(receive)


@pytest.mark.parametrize("timeout", [5, 0.5])
async def test_application_that_goes_on_after_the_leave_fails_the_test(timeout: float) -> None:
    with pytest.raises(AssertionError) as failure:
        await ask(endless, leave_after=10, timeout=timeout)
    lines = str(failure.value).splitlines()
    assert lines[0] == f"The application still ran {timeout:g} s after the client left, waiting"
    assert lines[-1].endswith(f"left at 10.000 s, ended {timeout:.3f} s later>")


async def test_application_that_never_ends_fails_the_test_of_a_client_that_stays() -> None:
    with failing("The application still ran 5 s though the client stayed, waiting"):
        await ask(endless)
    with failing("The application still ran 2 s though the client stayed, waiting"):
        await ask(endless, leave_when=anyio.Event(), timeout=2)

    async def goes_on_after_its_response(scope: Scope, receive: Receive, send: Send) -> None:
        await sends(START, END)(scope, receive, send)
        await anyio.sleep_forever()

    with failing("The application still ran 6 s though the client stayed, waiting"):
        await ask(goes_on_after_its_response, leave_after=1)


async def test_body_that_never_ends_fails_the_test_too() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"a"
        await anyio.sleep_forever()

    for server in ("strict", "daphne"):
        with failing("The application still ran 5 s though the client stayed, waiting"):
            await ask(app_of(echo), "POST", content=pieces(), server=server)


@on_asyncio_only  # trio's virtual time stands still while anything runs
async def test_application_that_only_sends_fails_the_test_too() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        while True:
            await send(PIECE)

    with anyio.fail_after(100), failing("The application still ran 5 s after the client left"):
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
    assert "in task application\n" in text
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
        assert str(failure.value).startswith("The application ended without its task heartbeat\n  File ")
        assert "in waits_here\n" in str(failure.value)
        await ask(app, unchecked={"tasks left behind": "it has a heartbeat"})


async def test_task_left_behind_in_an_outer_task_group_fails_the_test() -> None:
    async with anyio.create_task_group() as tasks:

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            tasks.start_soon(waits_here, receive, name="heartbeat")

        with failing("The application ended without its task heartbeat"):
            await ask(app)
        tasks.cancel_scope.cancel()


@on_asyncio_only
async def test_task_that_was_cancelled_may_end_a_little_later() -> None:
    async def wait(depth: int) -> None:
        await (asyncio.create_task(wait(depth - 1)) if depth else anyio.sleep_forever())

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.create_task(wait(3))
        await anyio.sleep(1)
        task.cancel()

    await ask(app)


async def test_tasks_of_others_are_not_taken_for_the_applications() -> None:
    async def ask_later() -> None:
        await anyio.sleep(1)
        await ask(obedient, leave_after=3)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask_later)
        await ask(obedient, leave_after=2)
        assert any(task.name == "application" for task in anyio.get_running_tasks())


@on_asyncio_only
async def test_unbalanced_cancelling_fails_the_test() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        try:
            await checkpoint()
        except asyncio.CancelledError:
            return

    with failing(r"The application caught 1 cancellation\(s\) of its task without calling task.uncancel\(\)."):
        await ask(app)
    await ask(app, unchecked={"unbalanced cancelling": "that is what it is about"})


async def test_concurrent_calls_of_receive_fail_the_test() -> None:
    seen: list[str] = []

    async def listen(receive: Receive) -> None:
        seen.append((await receive())["type"])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen, receive)
            tasks.start_soon(listen, receive)

    with failing(r"receive\(\) was called while another call of it was waiting."):
        await ask(app, leave_after=1, server="uvicorn")
    seen.clear()
    await ask(app, leave_after=1, server="uvicorn", unchecked={"concurrent receive": "uvicorn only"})
    assert seen == [GONE, GONE]


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
    with failing(f"ASGI forbids: {fault}."):
        await ask(sends(*messages))
    exchange = await ask(sends(*messages), unchecked={"message order": "that is what it is about"})
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
def test_check_is_left_out_only_by_name_and_for_a_reason(unchecked: Any, fault: str) -> None:  # Any: any mistake
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
async def test_leave({arguments}):
    exchange = await Client(app).get("/", leave_after={seconds})
    assert exchange.left_after >= {seconds}
    assert exchange.seconds_after_leave < 1
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
    done = subprocess.run([sys.executable, "-m", "pytest"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
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
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60)

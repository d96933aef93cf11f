"""WebSocket endpoints on real servers, with a real client that closes, is killed, or stays."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
import time
from collections.abc import Generator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.servers.client import TIMEOUT, Live, disconnect, groups
from tests.servers.start import WEBSOCKET

APPS = ["fastapi", "starlette"]
MESSAGES = 10_000
CLIENTS = 200
# How each server reports a close with code 4001 and reason "enough", and a lost connection.
CODES = {"uvicorn": "4001 enough", "hypercorn": "1006", "granian": "4001", "gunicorn": "4001", "daphne": "4001"}
LOST = {"uvicorn-websockets": "1006", "uvicorn": "1005", "granian": "1005"}
PINGS = {
    "uvicorn-websockets-sansio": ["--ws-ping-interval", "1", "--ws-ping-timeout", "1"],
    "daphne": ["--ping-interval", "1", "--ping-timeout", "1"],
}
# daphne buffers everything, so an endpoint that floods it never waits; until all of it is sent, or lost, its
# send() raises an exception of its own. The oldest uvicorn logs an AssertionError if a client closes during a send().
NOT_FLOODED = ("daphne", "uvicorn-websockets")
UNREAD = b"\x81\x86\0\0\0\0unread"  # a text message as in RFC 6455, section 5.2, under a mask of zeros
NOISE = ("UvicornDeprecationWarning", "warnings.warn(")


@pytest.fixture(scope="module", params=WEBSOCKET)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[Live]:
    live = Live(request.param, tmp_path_factory.mktemp("live") / "log", "tests.servers.application_websockets:app")
    yield live
    unexpected = [line for line in live.unexpected() if not any(noise in line for noise in NOISE)]
    live.stop()
    assert unexpected == []


def of(server: Live, table: dict[str, str], otherwise: str) -> str:
    return table.get(server.name, table.get(server.name.split("-")[0], otherwise))


class Clients:
    """For each application, a client of the endpoint that will close, and two that will be killed."""

    def __init__(self, server: Live, path: str, *, closing: bool = True) -> None:
        self.server = server
        self.group = str(next(groups))
        self.closing: dict[str, ClientConnection] = {}
        self.dying: dict[str, socket.socket] = {}
        self._stack = ExitStack()
        for app in APPS:
            key = f"{app} close"
            url = f"ws://{server.address[0]}:{server.address[1]}/{app}{path}?key={self.group}.{key.replace(' ', '+')}"
            if closing and path != "/before":
                self.closing[key] = self._stack.enter_context(
                    connect(url, proxy=None, compression=None, close_timeout=1)
                )
            for way in ("FIN", "RST"):
                self.dying[f"{app} {way}"] = self._connect(f"/{app}{path}?key={self.group}.{app}+{way}")

    def _connect(self, target: str) -> socket.socket:
        headers = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"]
        connection = self.server.ask(target, *headers, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
        if "/before" not in target:
            assert connection.recv(12, socket.MSG_WAITALL) == b"HTTP/1.1 101"
        return connection

    def have_seen(self, *expected: str) -> None:
        wanted = {key: list(expected) for key in (*self.closing, *self.dying)}
        events = self.server.wait_for(
            self.group, lambda events: {key: self._without_code(seen) for key, seen in events.items()} == wanted
        )
        assert {key: self._without_code(seen) for key, seen in events.items()} == wanted

    @staticmethod
    def _without_code(events: list[str]) -> list[str]:
        return [event for event in events if not event.startswith("rolled back")]

    def disconnect(self) -> None:
        for websocket in self.closing.values():
            websocket.close(4001, "enough")
        for key, connection in self.dying.items():
            disconnect(connection, key.split()[-1])
        self._stack.close()

    def have_rolled_back(self) -> None:
        """Wait until code and reason have arrived in FastAPI's dependencies."""
        lost = of(self.server, LOST, "1006")
        codes = {"close": of(self.server, CODES, ""), "FIN": lost, "RST": lost}
        wanted = {f"fastapi {way}": f"rolled back: {code}" for way, code in codes.items()}
        events = self.server.wait_for(
            self.group, lambda events: all(text in events.get(key, []) for key, text in wanted.items())
        )
        assert {key: events[key][-1] for key in wanted} == wanted


STOPPED = ["Cancelled", "clean", "on_disconnect"]
NOTIFIED = ["WebSocketDisconnect", "clean", "on_disconnect"]


def test_an_endpoint_that_waits_stops_when_its_client_disconnects(server: Live) -> None:
    clients = Clients(server, "/wait")
    clients.have_seen("begun")
    clients.disconnect()
    clients.have_seen("begun", *STOPPED)
    clients.have_rolled_back()


def test_an_endpoint_that_does_not_read_its_messages_stops_when_its_client_disconnects(server: Live) -> None:
    clients = Clients(server, "/wait")
    clients.have_seen("begun")
    for websocket in clients.closing.values():
        for _ in range(100):
            websocket.send("unread")
    for connection in clients.dying.values():
        connection.sendall(UNREAD * 100)
    clients.disconnect()
    clients.have_seen("begun", *STOPPED)


@pytest.mark.parametrize("path", ["/send", "/flood"])
def test_an_endpoint_that_sends_stops_when_its_client_disconnects(server: Live, path: str) -> None:
    clients = Clients(server, "/send" if server.name in NOT_FLOODED else path)
    clients.have_seen("begun")
    time.sleep(0.1)
    clients.disconnect()
    events = server.wait_for(
        clients.group, lambda events: sum("on_disconnect" in seen for seen in events.values()) == 6
    )
    # send() may have reported it before the watch could.
    ends = [seen[1:4] for seen in events.values()]
    assert [end for end in ends if end not in (STOPPED, NOTIFIED)] == []


def test_an_endpoint_that_reads_gets_the_disconnect_once_and_ends_quietly(server: Live) -> None:
    clients = Clients(server, "/read")
    clients.have_seen("begun")
    clients.disconnect()
    clients.have_seen("begun", *NOTIFIED)
    clients.have_rolled_back()


def test_an_endpoint_that_has_not_accepted_stops_when_its_client_disconnects(server: Live) -> None:
    clients = Clients(server, "/before")
    clients.have_seen("begun")
    clients.disconnect()
    if server.name.startswith("granian"):  # granian reports it only when it is to send the response
        clients.have_seen("begun")
    else:
        clients.have_seen("begun", *STOPPED)


@pytest.mark.parametrize("app", APPS)
def test_no_message_is_lost(server: Live, app: str) -> None:
    url = f"ws://{server.address[0]}:{server.address[1]}/{app}/digest?key=digest"
    whole = hashlib.sha256()
    with connect(url, proxy=None, compression=None, close_timeout=1) as websocket:
        for number in range(MESSAGES):
            data = random.randbytes(random.randint(1, 20)).hex()
            whole.update(data.encode())
            websocket.send(data if number % 3 else data.encode())
            if number % 50 == 0:
                time.sleep(random.uniform(0, 0.002))
        websocket.send("end")
        assert websocket.recv(TIMEOUT) == f"{MESSAGES} {whole.hexdigest()}"


def test_closing_the_websocket_is_not_a_disconnect(server: Live) -> None:
    group = str(next(groups))
    for app in APPS:
        url = f"ws://{server.address[0]}:{server.address[1]}/{app}/close?key={group}.{app}"
        with (
            connect(url, proxy=None, compression=None, close_timeout=1) as websocket,
            pytest.raises(ConnectionClosed) as raised,
        ):
            websocket.recv(TIMEOUT)
        assert raised.value.rcvd is not None
        assert raised.value.rcvd.code == 4000
    expected = {app: ["finished"] for app in APPS}
    assert server.wait_for(group, expected.__eq__) == expected


async def visit(server: Live, key: str) -> None:
    """Exchange some messages, and disconnect in a random way."""
    path = random.choice(["/wait", "/send", "/read", "/digest"] + ["/flood"] * (server.name not in NOT_FLOODED))
    url = f"ws://{server.address[0]}:{server.address[1]}/{random.choice(APPS)}{path}?key={key}"
    async with connect_async(url, proxy=None, compression=None, close_timeout=1) as websocket:
        for _ in range(random.choice([0, 3])):
            await websocket.send("text")
        await asyncio.sleep(random.choice([0, random.uniform(0, 0.1)]))
        if random.random() < 0.5:
            websocket.transport.abort()


async def visits(server: Live, group: str) -> None:
    numbers = iter(range(CLIENTS))

    async def visit_again() -> None:
        for number in numbers:
            with suppress(ConnectionClosed):
                await visit(server, f"{group}.{number}")

    async with asyncio.TaskGroup() as tasks:
        for _ in range(10):
            tasks.create_task(visit_again())


def test_finished_websockets_leave_nothing_behind(server: Live) -> None:
    group = str(next(groups))
    before = server.census()
    asyncio.run(visits(server, group))
    assert server.left_behind(before) == {}
    events = server.events(group)
    assert [seen for seen in events.values() if seen.count("on_disconnect") > 1] == []


@pytest.mark.parametrize("name", ["uvicorn-websockets-sansio", "daphne"])
def test_an_endpoint_stops_when_its_client_no_longer_answers_pings(name: str, tmp_path: Path) -> None:
    live = Live(name, tmp_path / "log", "tests.servers.application_websockets:app", *PINGS[name])
    clients = Clients(live, "/wait", closing=False)
    clients.have_seen("begun", *STOPPED)  # although nobody has closed a connection
    clients.disconnect()
    assert live.unexpected() == []
    live.stop()


@pytest.mark.parametrize("name", WEBSOCKET)
def test_the_disconnect_of_an_undecorated_endpoint_is_logged_with_a_traceback(name: str, tmp_path: Path) -> None:
    """A decorated endpoint adds nothing to the log except our record (see the fixture)."""
    live = Live(name, tmp_path / "log", "tests.servers.application_websockets:app")
    url = f"ws://{live.address[0]}:{live.address[1]}/fastapi/undecorated?key=key"
    with connect(url, proxy=None, compression=None, close_timeout=1):
        pass
    live.wait_for_log("WebSocketDisconnect")
    log = live.stop()
    assert "Traceback" in log
    assert "WebSocketDisconnect" in log

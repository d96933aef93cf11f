"""Streams on a real server, with a real client that leaves by FIN or by RST."""

from __future__ import annotations

import hashlib
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Generator
from itertools import count
from pathlib import Path

import httpx
import pytest

SERVERS = {"h11 on asyncio": ("h11", "asyncio"), "httptools on uvloop": ("httptools", "uvloop")}
TIMEOUT = 10  # seconds
START_TIMEOUT = 60  # seconds; of a new environment every module is compiled first
keys = count()


class Server:
    """uvicorn in a process of its own, and what it writes to its log."""

    def __init__(self, http: str, loop: str, log: Path) -> None:
        self._log = log
        self._listener = socket.create_server(("127.0.0.1", 0))  # connections wait in it until the server is up
        self.address: tuple[str, int] = self._listener.getsockname()
        options = ["--http", http, "--loop", loop, "--log-level", "warning", "--timeout-graceful-shutdown", "2"]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", "streams:app", "--fd", str(self._listener.fileno()), *options],
                cwd=Path(__file__).parent,
                pass_fds=[self._listener.fileno()],
                stdout=output,
                stderr=output,
            )
        host, port = self.address
        self.client = httpx.Client(base_url=f"http://{host}:{port}", timeout=TIMEOUT)
        assert self.client.get("/", timeout=START_TIMEOUT).text == "ready"

    def open(self, path: str) -> tuple[socket.socket, str]:
        """Send a request by hand, and return when its answer has begun, or its endpoint."""
        key = str(next(keys))
        connection = socket.create_connection(self.address, timeout=TIMEOUT)
        connection.sendall(f"GET {path}?key={key} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        if path == "/loop":
            self.wait_for(key, "begun")
        else:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        return connection, key

    def wait_for(self, key: str, event: str) -> list[str]:
        """Return all events once there is this one."""
        until = time.monotonic() + TIMEOUT
        while True:
            events: list[str] = self.client.get("/events", params={"key": key}).json()
            if event in events:
                return events
            assert time.monotonic() < until, events
            time.sleep(0.01)

    def stop(self) -> str:
        """Return what it has written to its log."""
        self.client.close()
        self._process.terminate()
        self._process.wait(TIMEOUT)
        self._listener.close()
        return self._log.read_text()


@pytest.fixture(scope="module", params=list(SERVERS.values()), ids=list(SERVERS))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    http, loop = request.param
    server = Server(http, loop, tmp_path_factory.mktemp("uvicorn") / "log")
    yield server
    assert server.stop() == ""


def leave(connection: socket.socket, how: str) -> None:
    if how == "RST":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


ENDS = {
    "/idle": (["CancelledError", "clean", "on_disconnect", "background"], "background"),
    "/listening": (["CancelledError", "clean", "on_disconnect", "background"], "background"),
    "/sync": (["clean", "on_disconnect"], "on_disconnect"),
    "/loop": (["begun", "CancelledError", "clean", "on_disconnect"], "on_disconnect"),
}


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("path", ENDS)
def test_what_waits_stops_when_its_client_leaves(server: Server, path: str, how: str) -> None:
    connection, key = server.open(path)
    leave(connection, how)
    expected, last = ENDS[path]
    events = server.wait_for(key, last)
    if path == "/listening":
        events = server.wait_for(key, "on_disconnect")
        events.sort(key=expected.index)  # it runs its background task by itself
    assert events == expected


@pytest.mark.parametrize("how", ["FIN", "RST"])
def test_what_is_just_sending_stops_when_its_client_leaves(server: Server, how: str) -> None:
    connection, key = server.open("/busy")
    leave(connection, how)
    end, *rest = server.wait_for(key, "background")
    assert end in {"CancelledError", "GeneratorExit"}
    assert rest == ["clean", "on_disconnect", "background"]


@pytest.mark.parametrize("how", ["FIN", "RST"])
def test_what_is_sending_to_a_client_that_does_not_read_stops_when_it_leaves(server: Server, how: str) -> None:
    connection, key = server.open("/busy")
    time.sleep(0.1)  # until the buffers are full, and send() waits
    leave(connection, how)
    end, *rest = server.wait_for(key, "background")
    assert end in {"CancelledError", "GeneratorExit"}
    assert rest == ["clean", "on_disconnect", "background"]


def test_the_background_of_a_whole_stream_is_not_cancelled(server: Server) -> None:
    key = str(next(keys))
    assert server.client.get("/whole", params={"key": key}).text == "01234"
    assert server.wait_for(key, "background") == ["background"]


@pytest.mark.parametrize("size", [0, 1, 100_000, 3_000_000])
def test_what_is_read_while_it_is_sent_is_whole(server: Server, size: int) -> None:
    body = bytes(number % 251 for number in range(size))

    def slowly() -> Generator[bytes]:
        for start in range(0, size, 32_768):
            yield body[start : start + 32_768]
            time.sleep(0.001)

    assert server.client.post("/digest", content=slowly()).text == "sha256 " + hashlib.sha256(body).hexdigest()
    if size < 1_000_000:  # httpx sends all before it reads
        assert server.client.post("/echo", content=slowly()).content == body

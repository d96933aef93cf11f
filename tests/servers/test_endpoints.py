"""Endpoints on real servers, whose clients disconnect or stay."""

from __future__ import annotations

import hashlib
import random
import signal
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

import anyio
import anyio.to_thread
import httpx
import pytest

from tests.servers.client import APPS, TIMEOUT, Live, Visits, groups, response_on
from tests.servers.start import Server

STOPPED = ["Cancelled", "clean", "on_disconnect"]
CONTINUE_AT_ONCE = ("hypercorn", "daphne")  # these send "100 Continue" before the application reads


def test_an_endpoint_that_waits_stops_when_its_client_disconnects(live: Live) -> None:
    visits = Visits(live, "/wait")
    visits.have_seen("begun")
    visits.disconnect()
    visits.have_seen("begun", *STOPPED)


def test_an_endpoint_whose_body_fastapi_has_read_stops_when_its_client_disconnects(live: Live) -> None:
    headers = ["Content-Type: application/json", "Content-Length: 14"]
    visits = Visits(live, "/take", *headers, method="POST", body=b'{"name":"tea"}', apps=APPS[:2])
    visits.have_seen("took 1 items")
    visits.disconnect()
    visits.have_seen("took 1 items", *STOPPED)


def test_an_endpoint_that_has_read_its_body_stops_when_its_client_disconnects(live: Live) -> None:
    visits = Visits(live, "/read", "Content-Length: 5", method="POST", body=b"12345")
    visits.have_seen("reading", "read 5 bytes")
    visits.disconnect()
    visits.have_seen("reading", "read 5 bytes", *STOPPED)


def test_an_endpoint_that_does_not_read_its_body_stops_when_its_client_disconnects(live: Live) -> None:
    visits = Visits(live, "/wait", "Content-Length: 5", method="POST", body=b"12345")
    visits.have_seen("begun")
    visits.disconnect()
    visits.have_seen("begun", *STOPPED)


@pytest.mark.parametrize(
    ("path", "begin", "end"), [("/wait", "begun", "Cancelled"), ("/read", "reading", "ClientDisconnect")]
)
def test_an_endpoint_stops_when_its_client_disconnects_during_an_upload(
    live: Live, path: str, begin: str, end: str
) -> None:
    visits = Visits(live, path, "Content-Length: 100000", method="POST", body=bytes(5000))
    starts = live.name != "daphne"  # daphne starts the endpoint once the whole body has arrived
    visits.have_seen(*[begin] * starts)
    visits.disconnect()
    visits.have_seen(*[begin, end, "clean", "on_disconnect"] * starts)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_no_byte_of_a_slow_upload_is_lost(live: Live, is_chunked: bool) -> None:
    chunks = [random.randbytes(random.randint(1, 3000)) for _ in range(100)]
    body = b"".join(chunks)
    header = "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {len(body)}"
    visits = Visits(live, "/digest", header, method="POST")
    for chunk in chunks:
        visits.send(b"%x\r\n%b\r\n" % (len(chunk), chunk) if is_chunked else chunk)
        time.sleep(random.uniform(0, 0.001))
    visits.send(b"0\r\n\r\n" * is_chunked)
    digests = {case: response_on(connection) for case, connection in visits.connections.items()}
    assert digests == dict.fromkeys(visits.connections, (200, hashlib.sha256(body).hexdigest().encode()))
    visits.disconnect()


def test_an_upload_is_refused_without_asking_for_it(live: Live) -> None:
    visits = Visits(live, "/refuse", "Expect: 100-continue", "Content-Length: 5", method="POST")
    continues = live.name.startswith(CONTINUE_AT_ONCE)
    for connection in visits.connections.values():
        first = connection.recv(12, socket.MSG_PEEK | socket.MSG_WAITALL)
        assert first == (b"HTTP/1.1 100" if continues else b"HTTP/1.1 413")
        connection.sendall(b"12345" * continues)
        assert response_on(connection)[0] == 413
    visits.disconnect()


def test_an_upload_is_asked_for_when_the_endpoint_reads(live: Live) -> None:
    visits = Visits(live, "/answer", "Expect: 100-continue", "Content-Length: 5", method="POST")
    for connection in visits.connections.values():
        assert connection.recv(12, socket.MSG_PEEK | socket.MSG_WAITALL) == b"HTTP/1.1 100"
        connection.sendall(b"12345")
        assert response_on(connection) == (200, b"5 bytes")
    visits.disconnect()


def test_a_connection_serves_a_thousand_requests(live: Live) -> None:
    group = str(next(groups))
    connection = HTTPConnection(*live.address, timeout=TIMEOUT)
    connection.connect()
    first = connection.sock
    for number in range(1000):
        after = 0.06 if number % 100 == 0 else 0  # either long enough for the watch to begin, or not
        app = "fastapi-under-two" if number % 10 == 0 else "starlette"
        target = f"/{app}/answer?key={group}.&after={after}"
        body = b"12345" * (number % 3)
        connection.request("POST" if body else "GET", target, body or None)
        assert connection.sock is first
        assert connection.getresponse().read() == b"%d bytes" % len(body)
    connection.close()
    assert live.events(group) == {"": ["begun", "answer"] * 1000}


def test_a_background_task_is_not_cancelled(live: Live) -> None:
    visits = Visits(live, "/work-on")
    for connection in visits.connections.values():
        assert response_on(connection) == (200, b"answer")
    visits.disconnect()
    visits.have_seen("background")


async def ask_with_a_short_timeout(live: Live, group: str) -> None:
    async def lose_it(scope: anyio.CancelScope) -> None:
        await anyio.to_thread.run_sync(live.wait_for, group, bool)
        scope.deadline = anyio.current_time()

    async with httpx.AsyncClient(base_url=live.url, trust_env=False) as client, anyio.create_task_group() as tasks:
        with anyio.fail_after(TIMEOUT) as scope:
            tasks.start_soon(lose_it, scope)
            await client.get("/fastapi/wait", params={"key": f"{group}.httpx"})


def test_an_http_client_that_gives_up_has_disconnected(live: Live) -> None:
    group = str(next(groups))
    with pytest.RaisesGroup(TimeoutError):
        anyio.run(ask_with_a_short_timeout, live, group)
    expected = {"httpx": ["begun", *STOPPED]}
    assert live.wait_for(group, expected.__eq__) == expected


CURL = """
import pycurl, signal, sys
for number in (signal.SIGINT, signal.SIGTERM):  # let them end the process, as they end curl's own
    signal.signal(number, signal.SIG_DFL)
curl = pycurl.Curl()
curl.setopt(curl.URL, sys.argv[1])
curl.perform()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_curl_has_disconnected_when_it_is_killed(live: Live, number: signal.Signals) -> None:
    group = str(next(groups))
    curl = subprocess.Popen([sys.executable, "-c", CURL, f"{live.url}/fastapi/wait?key={group}.curl"])
    try:
        assert live.wait_for(group, bool) == {"curl": ["begun"]}
        curl.send_signal(number)
        assert curl.wait(TIMEOUT) == -number
    finally:
        curl.kill()
        curl.wait(TIMEOUT)
    expected = {"curl": ["begun", *STOPPED]}
    assert live.wait_for(group, expected.__eq__) == expected


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r'has not started:\n.*Attribute "nothing" not found'):
        Server("uvicorn-h11", "tests.servers.start:nothing", tmp_path / "log")

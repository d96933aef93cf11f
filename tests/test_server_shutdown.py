"""A server that is told to end while a request is in flight: no client has left."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from servers import HTTP1, Server

TIMEOUT = 30  # seconds, on a machine with much else to do
GRACE = {
    "uvicorn": ["--timeout-graceful-shutdown", "1"],
    "hypercorn": ["--graceful-timeout", "1"],
    "granian": ["--workers-kill-timeout", "1"],
    "gunicorn": ["--graceful-timeout", "1"],
    "daphne": [],
}
# The others wait for the request for ever, or are killed with it; with newer asyncio, hypercorn does so, too.
CANCEL = ["uvicorn-h11", "uvicorn-httptools", "hypercorn-uvloop", "hypercorn-trio", "daphne"]
CANCEL_HERE = [*CANCEL, "hypercorn-asyncio"] if sys.version_info < (3, 12) else CANCEL
LET_CLEAN_UP = ["hypercorn-uvloop", "hypercorn-trio", "daphne"]


@pytest.mark.parametrize("name", HTTP1)
def test_the_end_of_the_server_is_not_taken_for_a_leave(name: str, tmp_path: Path) -> None:
    server = Server(name, "going_down:app", tmp_path / "log", *GRACE[name.split("-")[0]])
    with socket.create_connection(server.address, timeout=TIMEOUT) as connection:
        connection.sendall(b"GET /wait HTTP/1.1\r\nHost: test\r\n\r\n")
        server.wait_for_log("begun")
        log = server.stop(within=TIMEOUT if name in CANCEL_HERE else 2).splitlines()
    assert "begun" in log
    assert ("cancelled" in log) == (name in CANCEL_HERE)
    assert "clean" in log or name not in LET_CLEAN_UP
    assert "on_disconnect" not in log
    assert not any("the client left" in line for line in log)

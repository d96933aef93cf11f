"""A server that is shut down while a request is in flight: no client has disconnected."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from tests.servers.start import HTTP1, Server

TIMEOUT = 30  # seconds, on a busy machine
GRACE = {
    "uvicorn": ["--timeout-graceful-shutdown", "1"],
    "hypercorn": ["--graceful-timeout", "1"],
    "granian": ["--workers-kill-timeout", "1"],
    "gunicorn": ["--graceful-timeout", "1"],
    "daphne": [],
}
# The other servers wait for the request forever, or are killed with it, as hypercorn is with newer asyncio.
CANCEL = ["uvicorn-h11", "uvicorn-httptools", "hypercorn-uvloop", "hypercorn-trio", "daphne"]
CANCEL_HERE = [*CANCEL, "hypercorn-asyncio"] if sys.version_info < (3, 12) else CANCEL
LET_CLEAN_UP = ["hypercorn-uvloop", "hypercorn-trio", "daphne"]


@pytest.mark.parametrize("name", HTTP1)
def test_the_shutdown_of_the_server_is_not_taken_for_a_disconnect(name: str, tmp_path: Path) -> None:
    server = Server(name, "tests.servers.shutdown_application:app", tmp_path / "log", *GRACE[name.split("-")[0]])
    with socket.create_connection(server.address, timeout=TIMEOUT) as connection:
        connection.sendall(b"GET /wait HTTP/1.1\r\nHost: test\r\n\r\n")
        server.wait_for_log("begun")
        log = server.stop(within=TIMEOUT if name in CANCEL_HERE else 2).splitlines()
    assert "begun" in log
    assert ("cancelled" in log) == (name in CANCEL_HERE)
    assert "clean" in log or name not in LET_CLEAN_UP
    assert "on_disconnect" not in log
    assert not any("http.disconnect" in line for line in log)

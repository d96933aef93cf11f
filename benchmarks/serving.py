"""Starts servers on loopback, each in a process of its own, and holds connections to them."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

HERE = Path(__file__).parent
TIMEOUT = 60  # seconds, for whatever should happen at once

# Modules for Python to run, with their arguments.
SERVERS = {
    "uvicorn": "uvicorn served:app --host 127.0.0.1 --port {port} --log-level critical --http httptools --loop uvloop",
    "uvicorn h11": "uvicorn served:app --host 127.0.0.1 --port {port} --log-level critical --http h11 --loop asyncio",
    "hypercorn": "hypercorn served:app --bind 127.0.0.1:{port} --log-level critical --worker-class uvloop",
    "granian": "granian served:app --host 127.0.0.1 --port {port} --log-level critical --interface asgi --loop uvloop",
    "gunicorn": "gunicorn served:app --bind 127.0.0.1:{port} --log-level critical --worker-class asgi --keep-alive 60",
    "daphne": "daphne served:app --bind 127.0.0.1 --port {port} --verbosity 0",
}


class Server(NamedTuple):
    """A server that has started."""

    pid: int
    port: int

    async def open(self, path: str) -> socket.socket:
        """Send a request, and don't wait for the answer."""
        connection = socket.socket()
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, ("127.0.0.1", self.port))
        await loop.sock_sendall(connection, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        return connection

    async def get(self, path: str) -> Any:  # Any: what the JSON of the answer says
        """Ask, with a client that stays, and take the answer apart."""
        async with httpx.AsyncClient(timeout=TIMEOUT, trust_env=False) as client:
            response = await client.get(f"http://127.0.0.1:{self.port}{path}")
        return response.raise_for_status().json()


@asynccontextmanager
async def serve(server: str, benchmark: str, contestant: str, framework: str = "Starlette") -> AsyncGenerator[Server]:
    """Serve what the module `benchmark` makes of a contestant, in its function `app()`."""
    allow_connections()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    environment = {"BENCHMARK": benchmark, "CONTESTANT": contestant, "FRAMEWORK": framework}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *SERVERS[server].format(port=port).split(),
        cwd=HERE,
        env={**os.environ, **environment},
        start_new_session=True,  # so that its workers can be ended with it
        stderr=subprocess.DEVNULL,  # daphne: a KeyError for each client that leaves
    )
    try:
        await _ready(process, port)
        yield Server(process.pid, port)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # some would wait for the requests in flight for ever
        await process.wait()


async def _ready(process: asyncio.subprocess.Process, port: int) -> None:
    async with asyncio.timeout(TIMEOUT):
        while True:
            if process.returncode is not None:
                raise RuntimeError(f"The server ended with {process.returncode}.")
            try:
                socket.create_connection(("127.0.0.1", port)).close()
            except ConnectionRefusedError:
                await asyncio.sleep(0.05)
            else:
                return


def allow_connections() -> None:
    """Raise the limit of open files as far as it goes; servers started from now on inherit it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

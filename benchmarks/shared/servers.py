"""Starts servers on loopback, each in a process of its own, and holds connections to them."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx

ROOT = Path(__file__).parent.parent.parent
APP = "benchmarks.shared.server_application:app"
TIMEOUT = 60  # seconds, for anything that should happen immediately

# Modules for Python to run, with their arguments.
SERVERS = {
    "uvicorn": "uvicorn {app} --host 127.0.0.1 --port {port} --log-level critical --http httptools --loop uvloop",
    "uvicorn h11": "uvicorn {app} --host 127.0.0.1 --port {port} --log-level critical --http h11 --loop asyncio",
    "hypercorn": "hypercorn {app} --bind 127.0.0.1:{port} --log-level critical --worker-class uvloop",
    "granian": "granian {app} --host 127.0.0.1 --port {port} --log-level critical --interface asgi --loop uvloop",
    "gunicorn": "gunicorn {app} --bind 127.0.0.1:{port} --log-level critical --worker-class asgi --keep-alive 60",
    "daphne": "daphne {app} --bind 127.0.0.1 --port {port} --verbosity 0",
}


class Server(NamedTuple):
    """A server that has started."""

    pid: int
    port: int

    def processor_time(self) -> float:
        """Return the seconds of processor time that its processes have used."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # a process that has ended
                fields = path.read_text().rpartition(")")[2].split()  # see proc_pid_stat(5); these begin with the third
                ticks += (int(fields[11]) + int(fields[12])) * (int(fields[3]) == self.pid)
        return ticks / os.sysconf("SC_CLK_TCK")

    async def open(self, path: str) -> socket.socket:
        """Send a request without waiting for the response."""
        connection = socket.socket()
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, ("127.0.0.1", self.port))
        await loop.sock_sendall(connection, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        return connection

    async def get(self, path: str) -> Any:  # Any: what the JSON of the response contains
        """Send a request, wait for the response, and parse it."""
        async with httpx.AsyncClient(timeout=TIMEOUT, trust_env=False) as client:
            response = await client.get(f"http://127.0.0.1:{self.port}{path}")
        return response.raise_for_status().json()


@asynccontextmanager
async def serve(
    server: str, benchmark: str, implementation: str, framework: str = "Starlette"
) -> AsyncGenerator[Server]:
    """Serve the application that the function `app()` of the module `benchmark` returns for an implementation."""
    allow_connections()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    environment = {"BENCHMARK": f"benchmarks.{benchmark}", "IMPLEMENTATION": implementation, "FRAMEWORK": framework}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *SERVERS[server].format(app=APP, port=port).split(),
        cwd=ROOT,
        env={**os.environ, **environment},
        start_new_session=True,  # so that its workers can be killed with it
        stderr=subprocess.DEVNULL,  # daphne writes a KeyError for each client that disconnects
    )
    try:
        await _ready(process, port)
        yield Server(process.pid, port)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # some servers would wait forever for the requests in flight
        await process.wait()


@asynccontextmanager
async def serve_each(
    server: str, benchmark: str, names: Iterable[str], framework: str = "Starlette"
) -> AsyncGenerator[dict[str, Server]]:
    """Serve the application of each implementation, all at the same time."""
    async with AsyncExitStack() as stack:
        yield {name: await stack.enter_async_context(serve(server, benchmark, name, framework)) for name in names}


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
    """Raise the limit of open files as far as possible; servers that start afterwards inherit it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

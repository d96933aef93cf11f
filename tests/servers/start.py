"""Starts the servers that people run, each in a process of its own, on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

# Modules that Python runs, with their arguments. A server that accepts a listening socket gets one, so that
# no port is guessed, and connections wait in it until the server has started.
COMMANDS = {
    "uvicorn-h11": "uvicorn {app} --fd {fd} --http h11 --loop asyncio --log-level warning",
    "uvicorn-httptools": "uvicorn {app} --fd {fd} --http httptools --loop uvloop --log-level warning",
    "hypercorn-asyncio": "hypercorn {app} --bind fd://{fd} --worker-class asyncio --log-level warning",
    "hypercorn-uvloop": "hypercorn {app} --bind fd://{fd} --worker-class uvloop --log-level warning",
    "hypercorn-trio": "hypercorn {app} --bind fd://{fd} --worker-class trio --log-level warning",
    "granian-asyncio": "granian {app} --port {port} --interface asgi --loop asyncio --log-level warning",
    "granian-uvloop": "granian {app} --port {port} --interface asgi --loop uvloop --log-level warning",
    "gunicorn": "gunicorn {app} --bind fd://{fd} --worker-class asgi --log-level warning --no-control-socket",
    "daphne": "daphne {app} --fd {fd} --verbosity 0",
}
# The other servers speak HTTP/2 without options, if the client begins with it.
COMMANDS["gunicorn-http2"] = COMMANDS["gunicorn"] + " --http-protocols h1,h2 --http2-cleartext both"
HTTP1 = [name for name in COMMANDS if name != "gunicorn-http2"]
HTTP2 = [name for name in COMMANDS if name.startswith(("hypercorn", "granian", "gunicorn-http2"))]
UVICORN_WS = {
    f"uvicorn-{ws}": f"uvicorn {{app}} --fd {{fd}} --ws {ws} --loop {loop} --log-level warning"
    for ws, loop in (("websockets", "asyncio"), ("websockets-sansio", "uvloop"), ("wsproto", "asyncio"))
}
COMMANDS.update(UVICORN_WS)
WEBSOCKET = [*UVICORN_WS, *(name for name in HTTP1 if not name.startswith("uvicorn"))]

ROOT = Path(__file__).parent.parent.parent
STARTS_WITHIN = 60  # seconds, on a busy machine
SAYS_WITHIN = 30
STOPS_WITHIN = 5  # seconds; some servers would wait forever for a request in flight


class Server:
    """A server that has started, with an application that answers `GET /`.

    Args:
        name: The name of the server, one of `COMMANDS`.
        app: The application, as "module:attribute"; modules are looked for in the root of the repository.
        log: The file for everything that the server and the application write.
        options: Additional arguments for the server.

    Raises:
        RuntimeError: If the server does not start; the message contains its log.
    """

    def __init__(self, name: str, app: str, log: Path, *options: str) -> None:
        self.name = name
        self._log = log
        command = COMMANDS[name]
        self._socket = socket.socket()
        # Granian accepts only a port number, and shares the port. No other process gets it while this socket is bound.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._socket.bind(("127.0.0.1", 0))
        # Connections inherit this option. uvicorn treats a given socket as a Unix one, so asyncio doesn't set it,
        # and each response would wait 40 ms for the client's ACK.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if "{fd}" in command:
            self._socket.listen(1024)
        self.address: tuple[str, int] = self._socket.getsockname()
        self.url = "http://{}:{}".format(*self.address)
        words = command.format(app=app, fd=self._socket.fileno(), port=self.address[1]).split()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", *words, *options],
                cwd=ROOT,
                pass_fds=[self._socket.fileno()],
                start_new_session=True,  # so that its workers can be killed with it
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop(within=0)
            raise

    def stop(self, within: float = STOPS_WITHIN) -> str:
        """Ask the server to stop, kill it after `within` seconds, and return its log."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(within)
        with suppress(ProcessLookupError):  # the server and its workers have already ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._socket.close()
        return self.log

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def wait_for_log(self, text: str) -> None:
        """Return once the log contains the text, or after a timeout."""
        until = time.monotonic() + SAYS_WITHIN
        while text not in self.log and time.monotonic() < until:
            time.sleep(0.01)

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + STARTS_WITHIN
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{self.name} has not started:\n{self.log}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(self.address, timeout=1) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
            return connection.recv(1) == b"H"
        return False

"""Sends requests to the live application, disconnects, and checks what happened to the requests."""

from __future__ import annotations

import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable
from http.client import HTTPResponse
from itertools import count
from pathlib import Path

import httpx

from tests.servers.start import STOPS_WITHIN, Server

APPS = ["fastapi", "fastapi-under-two", "starlette", "starlette-under-two"]
# Older Starlette names the endpoint instead of the route.
RECORD = re.compile(r"(GET|POST|WEBSOCKET) \S+: stopped after \d+\.\d{3} s on (http|websocket)\.disconnect")
# These two cancel applications some seconds after the disconnect; on a busy machine that could be before we do.
OPTIONS = {
    "daphne": ["--application-close-timeout", "60"],
    "gunicorn": ["--asgi-disconnect-grace-period", "60"],
    "gunicorn-http2": ["--asgi-disconnect-grace-period", "60"],
}
# asyncio logs this at the fifth write on a lost connection; hypercorn writes until it has notified the application.
NOISE = {"hypercorn-asyncio": "socket.send() raised exception."}
TIMEOUT = 30  # seconds, on a busy machine
groups = count()

Events = dict[str, list[str]]


class Live(Server):
    """A server with the live application."""

    def __init__(self, name: str, log: Path, app: str = "tests.servers.application:app", *options: str) -> None:
        super().__init__(name, app, log, *OPTIONS.get(name, []), *options)
        # The server may close a kept-alive connection (gunicorn after 2 s) just as it is used again.
        limits = httpx.Limits(max_keepalive_connections=0)
        self.client = httpx.Client(base_url=self.url, timeout=TIMEOUT, limits=limits, trust_env=False)

    def stop(self, within: float = STOPS_WITHIN) -> str:
        self.client.close()
        return super().stop(within)

    def unexpected(self) -> list[str]:
        """Return the lines of the log that are neither our records nor written by the server anyway."""
        return [line for line in self.log.splitlines() if not RECORD.fullmatch(line) and NOISE.get(self.name) != line]

    def records(self) -> int:
        """Return how many of our records are in the log."""
        return sum(RECORD.fullmatch(line) is not None for line in self.log.splitlines())

    def census(self) -> Counter[str]:
        """Return how many objects and tasks of requests exist, by name."""
        return Counter(self.client.get("/census").raise_for_status().json())

    def left_behind(self, before: Counter[str]) -> Counter[str]:
        """Return which objects and tasks are there beyond those before, once there are none, or after a timeout."""
        until = time.monotonic() + TIMEOUT
        remaining = Counter(["not known yet"])
        while remaining and time.monotonic() < until:
            time.sleep(0.01)
            remaining = self.census() - before
        return remaining

    def ask(self, target: str, *headers: str, method: str = "GET") -> socket.socket:
        """Send the head of a request on a new connection."""
        connection = socket.create_connection(self.address, timeout=TIMEOUT)
        head = [f"{method} {target} HTTP/1.1", "Host: test", *headers, "", ""]
        connection.sendall("\r\n".join(head).encode())
        return connection

    def events(self, group: str) -> Events:
        """Return the events of the requests whose keys begin with `group`, by the rest of the key."""
        events: Events = self.client.get(f"/events/{group}.").raise_for_status().json()
        return events

    def wait_for(self, group: str, is_so: Callable[[Events], bool]) -> Events:
        """Return the events of a group once the condition is true, or after a timeout."""
        until = time.monotonic() + TIMEOUT
        while not is_so(events := self.events(group)) and time.monotonic() < until:
            time.sleep(0.01)
        return events


class Visits:
    """The same request to each application, from a client that will send FIN and from one that will send RST.

    Args:
        live: The server.
        path: The path of the endpoint in each application.
        headers: Header lines.
        method: The method of the requests.
        body: The part of the body that is sent.
        apps: The names of the applications.
    """

    def __init__(
        self,
        live: Live,
        path: str,
        *headers: str,
        method: str = "GET",
        body: bytes = b"",
        apps: Iterable[str] = APPS,
    ) -> None:
        self._live = live
        self._group = str(next(groups))
        self.connections = {
            f"{app} {way}": live.ask(f"/{app}{path}?key={self._group}.{app}+{way}", *headers, method=method)
            for app in apps
            for way in ("FIN", "RST")
        }
        self.send(body)

    def send(self, body: bytes) -> None:
        for connection in self.connections.values():
            connection.sendall(body)

    def disconnect(self) -> None:
        for case, connection in self.connections.items():
            disconnect(connection, case.split()[-1])

    def have_seen(self, *expected: str) -> None:
        """Wait until each request has exactly these events."""
        wanted = {case: list(expected) for case in self.connections if expected}
        events = self._live.wait_for(self._group, wanted.__eq__)
        assert events == wanted

    def have_ended_with(self, last: str) -> list[list[str]]:
        """Return the events of the requests once each of them has this last event."""
        events = self._live.wait_for(self._group, lambda events: self._all_have(last, events))
        assert self._all_have(last, events), events
        return list(events.values())

    def _all_have(self, event: str, events: Events) -> bool:
        return all(event in events.get(case, []) for case in self.connections)


def disconnect(connection: socket.socket, way: str) -> None:
    if way == "RST":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def response_on(connection: socket.socket) -> tuple[int, bytes]:
    """Return the status and the body of the next response."""
    with HTTPResponse(connection) as response:
        response.begin()
        return response.status, response.read()

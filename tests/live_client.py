"""Asks the live application by hand, leaves, and sees what became of the requests."""

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

from servers import STOPS_WITHIN, Server

APPS = ["fastapi", "fastapi-under-two", "starlette", "starlette-under-two"]
# Older Starlette names the endpoint instead of the route.
RECORD = re.compile(r"(GET|POST) \S+: stopped after \d+\.\d{3} s, the client left")
# These two cancel applications some seconds after the leave, which on a busy machine could come before we do.
OPTIONS = {
    "daphne": ["--application-close-timeout", "60"],
    "gunicorn": ["--asgi-disconnect-grace-period", "60"],
    "gunicorn-http2": ["--asgi-disconnect-grace-period", "60"],
}
# asyncio writes this at the fifth write on a lost connection, and hypercorn writes until it has told the application.
NOISE = {"hypercorn-asyncio": "socket.send() raised exception."}
TIMEOUT = 30  # seconds, on a machine with much else to do
groups = count()

Events = dict[str, list[str]]


class Live(Server):
    """A server with the live application."""

    def __init__(self, name: str, log: Path) -> None:
        super().__init__(name, "live:app", log, *OPTIONS.get(name, []))
        # A connection kept alive might be closed by the server, gunicorn's after 2 s, just as it is used again.
        limits = httpx.Limits(max_keepalive_connections=0)
        self.client = httpx.Client(base_url=self.url, timeout=TIMEOUT, limits=limits, trust_env=False)

    def stop(self, within: float = STOPS_WITHIN) -> str:
        self.client.close()
        return super().stop(within)

    def unexpected(self) -> list[str]:
        """Return what is in the log beside the package's records and what the server writes without us, too."""
        return [line for line in self.log.splitlines() if not RECORD.fullmatch(line) and NOISE.get(self.name) != line]

    def records(self) -> int:
        """Return how many of the package's there are."""
        return sum(RECORD.fullmatch(line) is not None for line in self.log.splitlines())

    def census(self) -> Counter[str]:
        """Return how much there is of requests, and how many tasks for them, by name."""
        return Counter(self.client.get("/census").raise_for_status().json())

    def ask(self, target: str, *headers: str, method: str = "GET") -> socket.socket:
        """Send the head of a request on a connection of its own."""
        connection = socket.create_connection(self.address, timeout=TIMEOUT)
        head = [f"{method} {target} HTTP/1.1", "Host: test", *headers, "", ""]
        connection.sendall("\r\n".join(head).encode())
        return connection

    def events(self, group: str) -> Events:
        """Return what was noted of the requests whose keys begin with that word, by the rest of the key."""
        events: Events = self.client.get(f"/events/{group}.").raise_for_status().json()
        return events

    def wait_for(self, group: str, is_so: Callable[[Events], bool]) -> Events:
        """Return the events of a group once something is so, or when it seems that it won't be."""
        until = time.monotonic() + TIMEOUT
        while not is_so(events := self.events(group)) and time.monotonic() < until:
            time.sleep(0.01)
        return events


class Visits:
    """The same request to each application, from a client that will leave by FIN and from one that will by RST.

    Args:
        live: The server.
        path: The endpoint's in each application.
        headers: Lines.
        method: The requests'.
        body: What is sent of the body.
        apps: Which applications.
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

    def leave(self) -> None:
        for case, connection in self.connections.items():
            leave(connection, case.split()[-1])

    def have_seen(self, *expected: str) -> None:
        """Wait until these are the events of each request."""
        wanted = {case: list(expected) for case in self.connections if expected}
        events = self._live.wait_for(self._group, wanted.__eq__)
        assert events == wanted

    def have_ended_with(self, last: str) -> list[list[str]]:
        """Return the events of the requests once there is this one in each."""
        events = self._live.wait_for(self._group, lambda events: self._all_have(last, events))
        assert self._all_have(last, events), events
        return list(events.values())

    def _all_have(self, event: str, events: Events) -> bool:
        return all(event in events.get(case, []) for case in self.connections)


def leave(connection: socket.socket, way: str) -> None:
    if way == "RST":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def response_on(connection: socket.socket) -> tuple[int, bytes]:
    """Return status and body of the response that is due."""
    with HTTPResponse(connection) as response:
        response.begin()
        return response.status, response.read()

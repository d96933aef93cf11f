"""Three services, each waiting for the next over HTTP: what goes on in them when the client of the first leaves."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Generator

import httpx
import pytest

from live_client import leave
from servers import Server

SERVERS = ["hypercorn-asyncio", "granian-asyncio", "uvicorn-httptools"]
AT_ONCE = 10  # as many as there are connections in each pool
TIMEOUT = 60  # seconds, on a machine with much else to do


class Chain:
    """The services, from the first to the last."""

    def __init__(self, services: list[Server], client: httpx.Client) -> None:
        self._services = services
        self._client = client

    def ask(self) -> list[socket.socket]:
        """Ask the first service for as much work as the chain can do at once."""
        connections = [socket.create_connection(self._services[0].address, timeout=TIMEOUT) for _ in range(AT_ONCE)]
        for connection in connections:
            connection.sendall(b"GET /work HTTP/1.1\r\nHost: test\r\n\r\n")
        return connections

    def working(self, service: int) -> int:
        """Return how many requests a service works on."""
        return int(self._get(service, "/"))

    def wait_until_working(self, service: int, requests: int) -> None:
        until = time.monotonic() + TIMEOUT
        while (working := self.working(service)) != requests:
            assert time.monotonic() < until, working
            time.sleep(0.005)

    def pass_through(self) -> None:
        """Have a request go through all services."""
        self._get(0, "/pass")

    def use_all(self, service: int) -> None:
        """Have a service use as many connections to the next one at the same time as its pool is to have."""
        self._get(service, "/use_all")

    def _get(self, service: int, path: str) -> str:
        return self._client.get(self._services[service].url + path).raise_for_status().text


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Generator[Chain]:
    services: list[Server] = []
    try:
        for name in reversed(SERVERS):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("NEXT", services[0].url if services else "")
                services.insert(0, Server(name, "chain:app", tmp_path_factory.mktemp("chain") / "log"))
        with httpx.Client(timeout=TIMEOUT, trust_env=False) as client:
            yield Chain(services, client)
    finally:
        logs = [service.stop() for service in services]
    assert logs == [""] * len(SERVERS)


def leave_all(connections: list[socket.socket]) -> None:
    for connection in connections:
        leave(connection, random.choice(["FIN", "RST"]))


def test_the_last_service_has_stopped_before_ten_more_requests_have_gone_the_same_way(chain: Chain) -> None:
    for _ in range(10):
        connections = chain.ask()
        chain.wait_until_working(2, AT_ONCE)
        leave_all(connections)
        for _ in range(10):  # measured: one is enough nearly always
            chain.pass_through()
        assert [chain.working(service) for service in range(3)] == [0, 0, 0]


def test_every_pool_is_whole_after_leaves_at_random_times(chain: Chain) -> None:
    for _ in range(20):
        connections = chain.ask()
        time.sleep(random.uniform(0, 0.1))
        leave_all(connections)
    for service in range(3):
        chain.wait_until_working(service, 0)
    for service in range(2):
        chain.use_all(service)

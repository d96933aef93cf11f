"""Three services, each waiting for the next over HTTP: what happens when the client of the first disconnects."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Generator

import httpx
import pytest

from tests.servers.client import disconnect
from tests.servers.start import Server

SERVERS = ["hypercorn-asyncio", "granian-asyncio", "uvicorn-httptools"]
AT_ONCE = 10  # as many as there are connections in each pool
TIMEOUT = 60  # seconds, on a busy machine


class Chain:
    """The services, from the first to the last."""

    def __init__(self, services: list[Server], client: httpx.Client) -> None:
        self._services = services
        self._client = client

    def ask(self) -> list[socket.socket]:
        """Request as much work from the first service as the chain can do at the same time."""
        connections = [socket.create_connection(self._services[0].address, timeout=TIMEOUT) for _ in range(AT_ONCE)]
        for connection in connections:
            connection.sendall(b"GET /work HTTP/1.1\r\nHost: test\r\n\r\n")
        return connections

    def working(self, service: int) -> int:
        """Return how many requests are in progress in a service."""
        return int(self._get(service, "/"))

    def wait_until_working(self, service: int, requests: int) -> None:
        until = time.monotonic() + TIMEOUT
        while (working := self.working(service)) != requests:
            assert time.monotonic() < until, working
            time.sleep(0.005)

    def wait_until_watched(self) -> None:
        """Wait until every service watches for a disconnect of its clients."""
        for service in range(len(self._services)):
            self._get(service, "/settle")

    def pass_through(self) -> None:
        """Send a request that passes through all services."""
        self._get(0, "/pass")

    def use_all(self, service: int) -> None:
        """Have a service use all connections of its pool at the same time."""
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
                log = tmp_path_factory.mktemp("chain") / "log"
                services.insert(0, Server(name, "tests.servers.chain_service:app", log))
        with httpx.Client(timeout=TIMEOUT, trust_env=False) as client:
            yield Chain(services, client)
    finally:
        logs = [service.stop() for service in services]
    assert logs == [""] * len(SERVERS)


def disconnect_all(connections: list[socket.socket]) -> None:
    for connection in connections:
        disconnect(connection, random.choice(["FIN", "RST"]))


def test_the_last_service_stops_before_ten_more_requests_have_passed_through_the_chain(chain: Chain) -> None:
    for _ in range(10):
        connections = chain.ask()
        chain.wait_until_working(2, AT_ONCE)
        chain.wait_until_watched()
        disconnect_all(connections)
        for _ in range(10):  # in measurements, one was nearly always enough
            chain.pass_through()
        assert [chain.working(service) for service in range(3)] == [0, 0, 0]


def test_every_pool_is_complete_after_disconnects_at_random_times(chain: Chain) -> None:
    for _ in range(20):
        connections = chain.ask()
        time.sleep(random.uniform(0, 0.1))
        disconnect_all(connections)
    for service in range(3):
        chain.wait_until_working(service, 0)
    for service in range(2):
        chain.use_all(service)

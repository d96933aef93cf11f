"""Requests work in PostgreSQL, disconnects at one of its steps, and asks PostgreSQL what happened."""

from __future__ import annotations

import random
import socket
import time
from collections import Counter
from pathlib import Path

import httpx
import psycopg
import pytest
from anyio import CapacityLimiter, create_task_group, create_udp_socket, fail_after, run, sleep
from anyio.abc import SocketAttribute

from tests.database.application import SCHEMA
from tests.servers.client import disconnect
from tests.servers.start import STOPS_WITHIN, Server

AT_ONCE = 20  # twice as many as there are connections in a pool
TIMEOUT = 60  # seconds, on a busy machine
# The steps at which clients disconnect; -1 is before the first. Only an order ends by itself, at its 19th step.
STEPS = {
    "transfers": range(-1, 12),
    "order": range(-1, 18),
    "lock": range(-1, 10),
    "job": [-1, 0, 1, 2, 3, 3, 3, 3],  # the last step is PostgreSQL's half a minute
}


class Database(Server):
    """The application on a real server, and the database in which only this one works.

    Args:
        app: The name of one of the module's applications.
        postgres: The directory of PostgreSQL's socket.
        log: The file for the server's log.
    """

    def __init__(self, app: str, postgres: Path, log: Path) -> None:
        self._app = app
        self._postgres_log = postgres / "log"
        with psycopg.connect(dbname="postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {app}".encode())
        self._connection = psycopg.connect(dbname=app, autocommit=True)
        self._connection.execute(SCHEMA)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PGDATABASE", app)
            super().__init__("uvicorn-httptools", f"tests.database.application:{app}", log)
        self._client = httpx.Client(base_url=self.url, timeout=TIMEOUT, trust_env=False)

    def stop(self, within: float = STOPS_WITHIN) -> str:
        self._client.close()
        self._connection.close()
        return super().stop(within)

    def count(self, query: str) -> int:
        """Return how many rows a query returns."""
        return self._connection.execute(query.encode()).rowcount

    def stay(self, driver: str, work: str) -> None:
        """Request work, and wait for its end."""
        self._client.post(f"/{driver}/{work}?port=1&disconnect_at=-1").raise_for_status()
        self._wait()  # FastAPI sends the response before the dependencies commit

    def disconnect(self, driver: str, work: str, times: int) -> Counter[str]:
        """Have many clients request work and disconnect at random steps; return what happened to their requests.

        The result counts requests that were cancelled ("499"), ended with another status, or held a lock ("holders"),
        and connections that the driver "opened" to replace others.
        """
        self._connection.execute("TRUNCATE entries, locks, jobs")
        self.stay(driver, "use_all")  # SQLAlchemy opens connections only when it needs them
        before, opened = self._counts(), self._opened(driver)
        run(self._disconnect, driver, work, times)
        counts = self._wait()
        counts.subtract(before)
        self.stay(driver, "use_all")
        counts["opened"] = self._opened(driver) - opened
        return counts

    def _wait(self) -> Counter[str]:
        """Wait until no request is in progress, and return the counts."""
        until = time.monotonic() + TIMEOUT
        while (counts := self._counts())["under way"]:
            assert time.monotonic() < until, counts
            time.sleep(0.01)
        return counts

    def _counts(self) -> Counter[str]:
        return Counter(self._client.get("/").json())

    def _opened(self, driver: str) -> int:
        lines = self._postgres_log.read_text(encoding="utf-8").splitlines()
        return sum(f"database={self._app} application_name={driver}" in line for line in lines)

    async def _disconnect(self, driver: str, work: str, times: int) -> None:
        limiter = CapacityLimiter(AT_ONCE)
        async with create_task_group() as task_group:
            for _ in range(times):
                task_group.start_soon(
                    self._ask_and_disconnect, f"/{driver}/{work}", random.choice(STEPS[work]), limiter
                )

    async def _ask_and_disconnect(self, path: str, step: int, limiter: CapacityLimiter) -> None:
        async with limiter, await create_udp_socket(local_host="127.0.0.1") as notified:
            connection = socket.create_connection(self.address, timeout=TIMEOUT)
            target = f"{path}?port={notified.extra(SocketAttribute.local_port)}&disconnect_at={step}"
            connection.sendall(f"POST {target} HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n".encode())
            if step >= 0:
                with fail_after(TIMEOUT):
                    await notified.receive()
            await sleep(random.uniform(0, 0.02))
            disconnect(connection, random.choice(["FIN", "RST"]))

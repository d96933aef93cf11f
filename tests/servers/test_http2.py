"""HTTP/2 on real servers: a client can reset one of many requests on a connection."""

from __future__ import annotations

import socket
from collections.abc import Generator

import h2.config
import h2.connection
import h2.errors
import h2.events
import pytest

from tests.servers.client import APPS, TIMEOUT, Live, groups
from tests.servers.start import HTTP2

STOPPED = ["Cancelled", "clean", "on_disconnect"]
on_each_server = pytest.mark.parametrize("live", HTTP2, indirect=True, scope="session")


class Connection:
    """The client's side of a connection."""

    def __init__(self, live: Live) -> None:
        self._socket = socket.create_connection(live.address, timeout=TIMEOUT)
        self._state = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self._state.initiate_connection()
        self._flush()

    def ask(self, target: str, *, method: str = "GET") -> int:
        """Send a request, and return the number of its stream, which a POST keeps open for its body."""
        stream = self._state.get_next_available_stream_id()
        headers = [(":method", method), (":scheme", "http"), (":authority", "test"), (":path", target)]
        self._state.send_headers(stream, headers, end_stream=method == "GET")
        self._flush()
        return stream

    def end(self, stream: int, body: bytes) -> None:
        self._state.send_data(stream, body, end_stream=True)
        self._flush()

    def reset(self, stream: int) -> None:
        self._state.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
        self._flush()

    def receive(self, stream: int) -> Generator[bytes]:
        """Yield the chunks of a response's body."""
        while True:
            data = self._socket.recv(65536)
            assert data != b""
            for event in self._state.receive_data(data):
                if isinstance(event, h2.events.DataReceived) and event.stream_id == stream:
                    yield event.data
                if isinstance(event, h2.events.StreamEnded) and event.stream_id == stream:
                    return
            self._flush()

    def close(self) -> None:
        self._socket.close()

    def _flush(self) -> None:
        self._socket.sendall(self._state.data_to_send())


@on_each_server
@pytest.mark.parametrize("app", APPS)
def test_only_the_stream_that_its_client_resets_is_stopped(live: Live, app: str) -> None:
    group = str(next(groups))
    connection = Connection(live)
    one, _ = (connection.ask(f"/{app}/wait?key={group}.{name}") for name in ("one", "other"))
    upload = connection.ask(f"/{app}/answer?key={group}.upload", method="POST")
    begun = {"one": ["begun"], "other": ["begun"], "upload": ["begun"]}
    assert live.wait_for(group, begun.__eq__) == begun
    connection.reset(one)
    one_stopped = {**begun, "one": ["begun", *STOPPED]}
    assert live.wait_for(group, one_stopped.__eq__) == one_stopped
    connection.end(upload, b"12345")
    assert b"".join(connection.receive(upload)) == b"5 bytes"
    connection.close()
    all_stopped = {**one_stopped, "other": ["begun", *STOPPED], "upload": ["begun", "answer"]}
    assert live.wait_for(group, all_stopped.__eq__) == all_stopped


@on_each_server
@pytest.mark.parametrize("app", APPS)
def test_a_stream_that_waits_stops_when_its_client_resets_it(live: Live, app: str) -> None:
    group = str(next(groups))
    connection = Connection(live)
    stream = connection.ask(f"/{app}/idle?key={group}.it")
    assert next(connection.receive(stream)).startswith(b"piece")
    connection.reset(stream)
    expected = {"it": [*STOPPED, "background"]}
    assert live.wait_for(group, expected.__eq__) == expected
    connection.close()

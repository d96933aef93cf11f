"""Streams and threads on real servers, whose clients disconnect or stay."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Generator

import pytest

from tests.servers.client import Live, Visits, groups

ENDS = {
    "/idle": ["Cancelled", "clean", "on_disconnect", "background"],
    "/sync": ["clean", "on_disconnect"],
}


def begin(visits: Visits) -> None:
    for connection in visits.connections.values():
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("path", ENDS)
def test_a_stream_that_waits_stops_when_its_client_disconnects(live: Live, path: str) -> None:
    visits = Visits(live, path)
    begin(visits)
    visits.disconnect()
    visits.have_seen(*ENDS[path])


def test_a_stream_that_listens_for_the_disconnect_itself_stops(live: Live) -> None:
    visits = Visits(live, "/listening")
    begin(visits)
    visits.disconnect()
    visits.have_ended_with("on_disconnect")
    for events in visits.have_ended_with("background"):  # the response runs it itself, before or after the rest
        assert [event for event in events if event != "background"] == ["Cancelled", "clean", "on_disconnect"]


def test_a_thread_that_checks_for_cancellation_stops_when_its_client_disconnects(live: Live) -> None:
    visits = Visits(live, "/loop")
    visits.have_seen("begun")
    visits.disconnect()
    visits.have_seen("begun", "Cancelled", "on_disconnect")


@pytest.mark.parametrize("is_stuck", [False, True])
def test_a_stream_that_is_sending_stops_when_its_client_disconnects(live: Live, is_stuck: bool) -> None:
    visits = Visits(live, "/busy")
    begin(visits)
    if is_stuck:
        time.sleep(0.1)  # until the buffers are full and send() waits
    visits.disconnect()
    for end, *rest in visits.have_ended_with("background"):
        assert end in {"Cancelled", "GeneratorExit"}
        assert rest == ["clean", "on_disconnect", "background"]


def test_the_background_task_of_a_complete_stream_is_not_cancelled(live: Live) -> None:
    group = str(next(groups))
    assert live.client.get("/fastapi/whole", params={"key": f"{group}.it"}).text == "01234"
    expected = {"it": ["background"]}
    assert live.wait_for(group, expected.__eq__) == expected


@pytest.mark.parametrize("size", [0, 1, 100_000, 3_000_000])
def test_a_body_that_is_read_while_it_arrives_is_complete(live: Live, size: int) -> None:
    body = random.randbytes(size)

    def slowly() -> Generator[bytes]:
        for start in range(0, size, 32_768):
            yield body[start : start + 32_768]
            time.sleep(0.001)

    digest = "sha256 " + hashlib.sha256(body).hexdigest()
    assert live.client.post("/starlette/hashed", content=slowly()).text == digest
    if size < 1_000_000:  # httpx sends the whole body before it reads
        assert live.client.post("/starlette/echo", content=slowly()).content == body

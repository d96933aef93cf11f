"""The backends on which every behaviour is tested, and the servers."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

import fastapi
import pytest
import uvloop

from tests.servers.client import Live
from tests.servers.start import HTTP1

BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {  # Any: anyio's own type for backend options
    "asyncio": ("asyncio", {"loop_factory": asyncio.new_event_loop}),
    "uvloop": ("asyncio", {"loop_factory": uvloop.new_event_loop}),
    "trio": ("trio", {}),
}


# FastAPI in the oldest supported versions doesn't accept generator functions as endpoints.
collect_ignore = [] if hasattr(fastapi, "sse") else ["frameworks/test_fastapi_generators.py"]


@pytest.fixture(params=list(BACKENDS.values()), ids=list(BACKENDS))
def anyio_backend(request: pytest.FixtureRequest) -> object:
    return request.param


@pytest.fixture(scope="session", params=HTTP1)
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[Live]:
    """Start each server once, and run all tests that use it one after another."""
    live = Live(request.param, tmp_path_factory.mktemp("live") / "log")
    yield live
    unexpected = live.unexpected()  # before stop(): on Python 3.11, cancelled asyncio streams write tracebacks
    live.stop()
    assert unexpected == []

"""The backends that every behaviour is tested on, and the servers."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

import fastapi
import pytest
import uvloop

from live_client import Live
from servers import HTTP1

BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {  # Any: anyio's own type for backend options
    "asyncio": ("asyncio", {"loop_factory": asyncio.new_event_loop}),
    "uvloop": ("asyncio", {"loop_factory": uvloop.new_event_loop}),
    "trio": ("trio", {}),
}


# Older FastAPI, which the lowest versions allowed include, takes no generator functions for endpoints.
collect_ignore = [] if hasattr(fastapi, "sse") else ["test_fastapi_generators.py"]


@pytest.fixture(params=list(BACKENDS.values()), ids=list(BACKENDS))
def anyio_backend(request: pytest.FixtureRequest) -> object:
    return request.param


@pytest.fixture(scope="session", params=HTTP1)
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[Live]:
    """Have each server run once, and all tests that want it one after the other."""
    live = Live(request.param, tmp_path_factory.mktemp("live") / "log")
    yield live
    unexpected = live.unexpected()  # now: on Python 3.11, asyncio's streams write tracebacks when they are cancelled
    live.stop()
    assert unexpected == []

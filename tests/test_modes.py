"""The same leaves in every mode that people run Python and asyncio in."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

import pytest
from blockbuster import blockbuster_ctx

import leaves


def eager_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory", None))  # from 3.12 on
    return loop


LOOPS: dict[str, dict[str, Any]] = {  # Any: anyio's own type for backend options
    "debug": {"loop_factory": asyncio.new_event_loop, "debug": True},
    "eager tasks": {"loop_factory": eager_loop},
    "eager tasks, debug": {"loop_factory": eager_loop, "debug": True},
}


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", [("asyncio", options) for options in LOOPS.values()], ids=LOOPS)
async def test_leaves_are_the_same_in_the_modes_of_asyncio() -> None:
    assert await leaves.leave_all() == leaves.EXPECTED


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_nothing_blocks_the_event_loop() -> None:
    with blockbuster_ctx():
        assert await leaves.leave_all() == leaves.EXPECTED


@pytest.mark.parametrize("variable", ["PYTHONOPTIMIZE", "PYTHONASYNCIODEBUG"])
def test_leaves_are_the_same_in_the_modes_of_python(variable: str) -> None:
    command = [sys.executable, leaves.__file__]
    env = {**os.environ, variable: "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == (f"{leaves.EXPECTED}\n", 0), done.stderr

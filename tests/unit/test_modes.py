"""Disconnects have the same effect in every mode in which people run Python and asyncio."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

import pytest
from blockbuster import blockbuster_ctx

from tests.unit import every_kind_of_disconnect


def eager_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory", None))  # since Python 3.12
    return loop


def loop_with_a_plain_factory() -> asyncio.AbstractEventLoop:
    """Return a loop whose task factory uses no context, like those written before Python 3.11."""

    # Any: tasks with any result, and options: before Python 3.14 a factory that accepts none gets none.
    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(coroutine, loop=loop)

    loop = asyncio.new_event_loop()
    loop.set_task_factory(factory)
    return loop


LOOPS: dict[str, dict[str, Any]] = {  # Any: anyio's own type for backend options
    "debug": {"loop_factory": asyncio.new_event_loop, "debug": True},
    "eager tasks": {"loop_factory": eager_loop},
    "a plain task factory": {"loop_factory": loop_with_a_plain_factory},
    "eager tasks, debug": {"loop_factory": eager_loop, "debug": True},
}


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", [("asyncio", options) for options in LOOPS.values()], ids=LOOPS)
async def test_disconnects_have_the_same_effect_in_every_mode_of_asyncio() -> None:
    assert await every_kind_of_disconnect.disconnect_all() == every_kind_of_disconnect.EXPECTED


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_nothing_blocks_the_event_loop() -> None:
    with blockbuster_ctx():
        assert await every_kind_of_disconnect.disconnect_all() == every_kind_of_disconnect.EXPECTED


@pytest.mark.parametrize("variable", ["PYTHONOPTIMIZE", "PYTHONASYNCIODEBUG"])
def test_disconnects_have_the_same_effect_in_every_mode_of_python(variable: str) -> None:
    command = [sys.executable, every_kind_of_disconnect.__file__]
    env = {**os.environ, variable: "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == (f"{every_kind_of_disconnect.EXPECTED}\n", 0), done.stderr

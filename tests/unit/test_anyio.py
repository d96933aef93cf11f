"""The internals of other libraries that we use: they are where we look for them, and what happens without them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import warnings
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from starlette.requests import Request
from starlette.types import Message

from cancelonleave import ClientClosedRequest, _anyio, cancel_on_disconnect
from cancelonleave._anyio import cancel_scopes, is_cancelled
from cancelonleave._watch import Watch, watch_of
from tests.shared.virtual_time import anyio_backend as anyio_backend

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio", "uvloop"], indirect=True)

DISCONNECT = 0.1  # seconds: when the client disconnects
LONG = 0.3  # seconds: more than that
Function = Callable[[], Coroutine[Any, Any, None]]  # Any: coroutines' own types for what tasks ignore


class Server:
    """Reports a disconnect some seconds after receive() was called."""

    def __init__(self, after: float = DISCONNECT) -> None:
        self.after = after
        self.asked = 0
        self.request = Request({"type": "http", "method": "GET", "path": "/", "headers": []}, self.receive)

    async def receive(self) -> Message:
        self.asked += 1
        await asyncio.sleep(self.after)
        return {"type": "http.disconnect"}


async def call(server: Server, function: Function) -> None:
    """Call a function as a decorated endpoint does."""

    @cancel_on_disconnect
    async def endpoint(request: Request) -> None:
        await function()

    with pytest.raises(ClientClosedRequest):
        await endpoint(server.request)


# anyio's records of cancel scopes.


def current_scopes() -> list[anyio.CancelScope]:
    task = asyncio.current_task()
    assert task is not None
    return cancel_scopes(task)


@on_asyncio
async def test_an_asyncio_task_is_in_no_cancel_scope() -> None:
    async def function() -> list[anyio.CancelScope]:
        await asyncio.sleep(0)
        return current_scopes()

    with anyio.CancelScope(shield=True):
        assert await asyncio.create_task(function()) == []


@on_asyncio
async def test_the_scopes_and_shields_of_a_task_are_those_it_has_entered_innermost_first() -> None:
    async def function() -> None:
        with anyio.CancelScope() as outer:
            assert current_scopes() == [outer]
            with anyio.CancelScope(shield=True) as shield, anyio.fail_after(5) as timeout:
                await checkpoint()
                assert current_scopes() == [timeout, shield, outer]
                assert [scope.shield for scope in current_scopes()] == [False, True, False]
            assert current_scopes() == [outer]
        assert current_scopes() == []

    await asyncio.create_task(function())


@on_asyncio
async def test_the_scopes_of_a_child_include_those_around_its_task_group() -> None:
    seen: list[anyio.CancelScope] = []

    async def child() -> None:
        with anyio.CancelScope() as own:
            seen.append(own)
            await checkpoint()
            seen.extend(current_scopes())

    async def function() -> None:
        with anyio.CancelScope(shield=True) as shield:
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(child)
                await checkpoint()
                assert current_scopes() == [task_group.cancel_scope, shield]
            own, innermost, *between = seen  # between: newer versions of anyio give each child a scope
            assert innermost is own
            assert between[-2:] == [task_group.cancel_scope, shield]
            assert not any(scope.shield for scope in between[:-1])

    await asyncio.create_task(function())


@on_asyncio
async def test_the_scopes_of_another_task_can_be_read() -> None:
    entered = asyncio.Event()
    scopes: list[anyio.CancelScope] = []

    async def function() -> None:
        with anyio.CancelScope(shield=True) as shield:
            scopes.append(shield)
            entered.set()
            await asyncio.sleep(LONG)

    task = asyncio.create_task(function())
    with anyio.fail_after(5):
        await entered.wait()
        assert cancel_scopes(task) == scopes
        await task
    assert cancel_scopes(task) == []


async def test_a_cancelled_scope_around_the_running_code_is_detected() -> None:
    assert not is_cancelled()
    with anyio.CancelScope() as scope:
        assert not is_cancelled()
        scope.cancel()
        assert is_cancelled()
        with anyio.CancelScope(shield=True):
            await checkpoint()
            assert not is_cancelled()
        assert is_cancelled()
    assert not is_cancelled()


# Without these records.


@pytest.fixture
def without_records(monkeypatch: pytest.MonkeyPatch) -> Generator[list[warnings.WarningMessage]]:
    """Remove anyio's records of cancel scopes, and collect the warnings."""
    monkeypatch.setattr(_anyio, "records", None)
    _anyio._warn.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
    _anyio._warn.cache_clear()


@on_asyncio
async def test_without_anyios_records_there_is_exactly_one_warning(
    without_records: list[warnings.WarningMessage],
) -> None:
    for _ in range(3):
        await call(Server(), lambda: anyio.sleep(LONG))
    assert [warning.category for warning in without_records] == [RuntimeWarning]
    assert "so a disconnect interrupts them" in str(without_records[0].message)


@on_asyncio
async def test_without_anyios_records_a_disconnect_interrupts_shielded_sections_once(
    without_records: list[warnings.WarningMessage],
) -> None:
    seen: list[str] = []

    async def function() -> None:
        try:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(LONG)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        finally:
            await asyncio.sleep(LONG)
            seen.append("clean")

    await call(Server(), function)
    assert seen == ["cancelled", "clean"]
    assert len(without_records) == 1


@on_asyncio
async def test_with_anyios_records_a_disconnect_does_not_interrupt_shielded_sections() -> None:
    seen: list[str] = []

    async def function() -> None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(LONG)
            seen.append("whole")
        await anyio.sleep(LONG)

    await call(Server(), function)
    assert seen == ["whole"]


async def test_without_anyios_records_a_cancelled_scope_around_the_running_code_is_detected(
    without_records: list[warnings.WarningMessage],
) -> None:
    await test_a_cancelled_scope_around_the_running_code_is_detected()
    assert without_records == []


WAYS_TO_BE_MISSING = {
    "the name": "import anyio._backends._asyncio as backend; del backend._task_states",
    "the module": "import sys; sys.modules['anyio._backends._asyncio'] = None",
}
SCRIPT = """
import asyncio, warnings
{gone}
import cancelonleave
from cancelonleave._anyio import cancel_scopes

async def main():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return [cancel_scopes(asyncio.current_task()) for _ in range(3)], [each.category for each in caught]

print(asyncio.run(main()))
"""


@pytest.mark.parametrize("gone", WAYS_TO_BE_MISSING)
def test_the_package_can_be_imported_with_an_anyio_that_lacks_its_records(gone: str) -> None:
    command = [sys.executable, "-c", SCRIPT.format(gone=WAYS_TO_BE_MISSING[gone])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("([[], [], []], [<class 'RuntimeWarning'>])\n", 0), done.stderr


# What an asyncio task awaits.


@on_asyncio
async def test_asyncio_keeps_what_a_task_awaits_where_we_look_for_it() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def function() -> None:
        await future

    task = asyncio.create_task(function())
    await asyncio.sleep(0)
    awaited = getattr(task, "_fut_waiter")  # noqa: B009  # the type checkers don't know this name
    assert awaited is future
    future.set_result(None)
    await task


class TaskThatHidesWhatItAwaits(asyncio.Task[None]):
    """A task of an asyncio version that keeps what it awaits somewhere else."""

    @property
    def _fut_waiter(self) -> object:
        raise AttributeError


@on_asyncio
@pytest.mark.parametrize("kind", [asyncio.Task[None], TaskThatHidesWhatItAwaits], ids=["with it", "without"])
async def test_a_call_is_cancelled_if_its_task_hides_what_it_awaits(kind: type[asyncio.Task[None]]) -> None:
    seen: list[str] = []

    async def function() -> None:
        try:
            await asyncio.sleep(LONG)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        finally:
            await asyncio.sleep(LONG)
            seen.append("clean")

    task = kind(call(Server(), function))
    with anyio.fail_after(5):
        await asyncio.wait([task])
    assert task.exception() is None
    assert task.cancelling() == 0
    assert seen == ["cancelled", "clean"]


@on_asyncio
@pytest.mark.parametrize(
    ("kind", "expected"),
    [(asyncio.Task[None], ["result"]), (TaskThatHidesWhatItAwaits, [])],
    ids=["with it", "without"],
)
async def test_a_task_that_hides_what_it_awaits_loses_the_result_it_is_about_to_get(
    kind: type[asyncio.Task[None]], expected: list[str]
) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[str] = loop.create_future()
    seen: list[str] = []

    class Together(Server):
        async def receive(self) -> Message:
            disconnect = await super().receive()
            loop.call_later(0, future.set_result, "result")  # in the turn in which the call is cancelled
            return disconnect

    async def function() -> None:
        seen.append(await future)
        await asyncio.sleep(LONG)

    task = kind(call(Together(), function))
    with anyio.fail_after(5):
        await asyncio.wait([task])
    assert task.exception() is None
    assert seen == expected


# What a Request stores.


async def test_starlette_keeps_receive_where_we_put_it() -> None:
    server = Server()
    assert server.request._receive == server.receive
    watch = watch_of(server.request)
    assert isinstance(watch, Watch)
    assert server.request.receive is watch
    assert watch_of(server.request) is watch


async def test_starlette_keeps_the_result_of_is_disconnected_where_we_look_for_it() -> None:
    messages: list[Message] = [{"type": "http.request"}, {"type": "http.disconnect"}]

    async def receive() -> Message:
        return messages.pop(0)

    request = Request({"type": "http"}, receive)
    for expected in (False, True):
        assert await request.is_disconnected() == expected
        assert request._is_disconnected == expected


@on_asyncio
@pytest.mark.parametrize("is_kept", [True, False], ids=["with it", "without"])
async def test_without_the_result_of_is_disconnected_the_server_is_asked_again_and_the_call_cancelled(
    is_kept: bool,
) -> None:
    server = Server(after=0)
    server.request._is_disconnected = True
    if not is_kept:
        del server.request._is_disconnected
    seen: list[str] = []

    async def function() -> None:
        seen.append("started")
        await anyio.sleep(LONG)

    with anyio.fail_after(5):
        await call(server, function)
    assert seen == ([] if is_kept else ["started"])
    assert server.asked == (0 if is_kept else 1)

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
import trio
from anyio.lowlevel import checkpoint
from starlette.requests import Request
from starlette.types import Message

from cancelonleave import ClientClosedRequest, cancel_on_disconnect
from cancelonleave._endpoint import guard
from cancelonleave._loop import GRACE
from cancelonleave._watch import LEARN, RETRY, Fate, watch_of
from tests.shared.virtual_time import AsyncioLoop, UvloopLoop
from tests.shared.virtual_time import anyio_backend as anyio_backend

pytestmark = pytest.mark.anyio

DISCONNECT = 0.1  # seconds: when the client disconnects in most tests
LONG = 0.2  # seconds: more than that
TASK = "cancelonleave: receive"


def eager_loop() -> asyncio.AbstractEventLoop:
    loop = AsyncioLoop()
    loop.set_task_factory(EAGER_TASKS)
    return loop


EAGER_TASKS = getattr(asyncio, "eager_task_factory", None)  # since Python 3.12
factories = {"asyncio": AsyncioLoop, "uvloop": UvloopLoop} | ({"eager tasks": eager_loop} if EAGER_TASKS else {})
on_asyncio = pytest.mark.parametrize(
    "anyio_backend", [("asyncio", {"loop_factory": factory}) for factory in factories.values()], ids=factories
)
on_trio = pytest.mark.parametrize("anyio_backend", ["trio"], indirect=True)
on_a_real_clock = pytest.mark.parametrize("anyio_backend", ["asyncio"])


class Server:
    """Returns the body, waits until the client disconnects, and counts the calls of receive()."""

    def __init__(self, *body: Message) -> None:
        self.body = list(body or [{"type": "http.request", "body": b"", "more_body": False}])
        self.gone = anyio.Event()
        self.asked = 0  # how often receive() was called
        self.pending = 0  # calls of receive() that have not returned
        self.most_pending = 0

    async def receive(self) -> Message:
        self.asked += 1
        self.pending += 1
        self.most_pending = max(self.most_pending, self.pending)
        try:
            if self.body:
                return self.body.pop(0)
            return await self.wait()
        finally:
            self.pending -= 1

    async def wait(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    def request(self, spec_version: str = "2.3") -> Request:
        asgi = {"version": "3.0", "spec_version": spec_version}
        return Request({"type": "http", "method": "GET", "path": "/", "headers": [], "asgi": asgi}, self.receive)


async def call(request: Request, function: Callable[[], Awaitable[Any]]) -> Any:  # Any: whatever the function returns
    """Call `function` as a decorated endpoint does."""

    @cancel_on_disconnect
    async def endpoint(request: Request) -> Any:
        return await function()

    return await endpoint(request)


class Bench:
    """A request, its server, and what happened to a call for it."""

    def __init__(self, server: Server | None = None, spec_version: str = "2.3") -> None:
        self.server = server or Server()
        self.request = self.server.request(spec_version)
        self.seen: list[str] = []
        self.began = anyio.current_time()

    @property
    def seconds(self) -> float:
        return anyio.current_time() - self.began

    async def call(self, function: Callable[[], Awaitable[Any]]) -> Any:
        return await call(self.request, function)

    async def disconnect(self) -> None:
        await anyio.sleep(DISCONNECT)
        self.server.gone.set()

    async def run(self, function: Callable[[], Awaitable[Any]]) -> Any:
        """Call `function`, and disconnect the client once the watch has certainly begun."""
        with anyio.fail_after(60):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(self.disconnect)
                try:
                    return await self.call(function)
                except BaseException as error:
                    self.error = error
                finally:
                    task_group.cancel_scope.cancel()
        if isinstance(self.error, ClientClosedRequest):
            self.seen.append("closed")
            return None
        raise self.error

    async def sleep(self) -> None:
        try:
            await anyio.sleep(30)
        except anyio.get_cancelled_exc_class():
            self.seen.append("cancelled")
            raise

    async def read(self) -> None:
        """Read until the disconnect."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass


def cancelling() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


# When the watch waits for the disconnect.


async def test_a_call_that_ends_soon_never_starts_the_wait() -> None:
    bench = Bench()

    async def function() -> str:
        await anyio.sleep(GRACE / 2)
        return "result"

    assert await bench.call(function) == "result"
    await anyio.sleep(GRACE * 4)
    assert bench.server.asked == 0


async def test_a_long_call_is_watched_and_the_wait_ends_with_it() -> None:
    bench = Bench()

    async def function() -> str:
        await anyio.sleep(LONG)
        assert (bench.server.asked, bench.server.pending) == (2, 1)
        return "result"

    assert await bench.call(function) == "result"
    await anyio.sleep(GRACE)
    assert (bench.server.asked, bench.server.pending) == (2, 0)


async def test_the_wait_begins_25_to_50_ms_after_the_call() -> None:
    began: list[float] = []

    async def watched(after: float) -> None:
        bench = Bench()

        async def function() -> None:
            while not bench.server.asked:
                await anyio.sleep(0.001)
            began.append(bench.seconds)

        await anyio.sleep(after)
        bench.began = anyio.current_time()
        await bench.call(function)

    with anyio.fail_after(10):
        async with anyio.create_task_group() as task_group:
            for milliseconds in range(0, 60, 6):
                task_group.start_soon(watched, milliseconds / 1000)
    assert len(began) == 10
    assert all(GRACE - 0.002 < seconds < 2 * GRACE + 0.002 for seconds in began), began


@on_a_real_clock
async def test_on_an_event_loop_that_lags_the_wait_begins_at_once() -> None:
    first, second = Bench(), Bench()

    async def function() -> None:
        for _ in range(3):
            await checkpoint()
        assert second.server.asked == 2

    with anyio.fail_after(10):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(first.call, first.sleep)
            await checkpoint()
            time.sleep(GRACE * 3)  # noqa: ASYNC251  # the event loop lags here
            await second.call(function)
            task_group.cancel_scope.cancel()


async def test_a_receive_that_ends_slowly_delays_only_the_next_reader() -> None:
    class Slow(Server):
        async def wait(self) -> Message:
            try:
                return await super().wait()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(1)

    bench = Bench(Slow())
    with anyio.fail_after(30):
        await bench.call(lambda: anyio.sleep(LONG))
        assert bench.seconds == pytest.approx(LONG)
        assert bench.server.pending == 1
        bench.server.gone.set()
        await bench.read()
    assert bench.seconds == pytest.approx(LONG + 2, abs=0.01)
    assert bench.server.most_pending == 1


async def test_the_wait_runs_in_the_context_of_its_call_and_keeps_no_other_context_alive() -> None:
    name: ContextVar[str] = ContextVar("name")
    seen: list[str] = []

    class Curious(Server):
        async def wait(self) -> Message:
            seen.append(name.get())
            return await super().wait()

    async def function(own: str, duration: float) -> None:
        name.set(own)
        await Bench(Curious()).call(lambda: anyio.sleep(duration))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(function, "first", GRACE / 5)
            await anyio.sleep(GRACE / 10)
            task_group.start_soon(function, "second", GRACE * 3)
    assert seen == ["second"]


# How the call ends.


async def test_the_disconnect_cancels_the_call() -> None:
    bench = Bench()
    await bench.run(bench.sleep)
    assert bench.seen == ["cancelled", "closed"]
    assert bench.seconds == pytest.approx(DISCONNECT)


async def test_an_await_inside_a_guard_is_cancelled() -> None:
    bench = Bench()
    with anyio.fail_after(10):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(bench.disconnect)
            with pytest.raises(ClientClosedRequest), guard(watch_of(bench.request), bench.request):
                await bench.sleep()
    assert bench.seen == ["cancelled"]


@on_asyncio
async def test_cleanup_can_await_and_is_not_cancelled_again() -> None:
    bench = Bench()

    async def child() -> None:
        try:
            await bench.sleep()
        finally:
            await asyncio.sleep(LONG)
            bench.seen.append("child clean")

    async def function() -> None:
        try:
            await asyncio.gather(child(), child())
        finally:
            await asyncio.sleep(LONG)
            bench.seen.append("clean")

    await bench.run(function)
    assert bench.seen == ["cancelled", "cancelled", "child clean", "child clean", "clean", "closed"]
    assert TASK not in [task.get_name() for task in asyncio.all_tasks()]


async def test_a_shielded_section_is_not_interrupted_and_the_cancellation_comes_after_it() -> None:
    bench = Bench()

    async def function() -> None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(LONG)
            bench.seen.append("whole")
        await bench.sleep()

    await bench.run(function)
    assert bench.seen == ["whole", "cancelled", "closed"]
    assert bench.seconds < LONG + 2 * RETRY


async def test_a_call_inside_an_outer_shield_is_cancelled() -> None:
    bench = Bench()

    async def function() -> None:
        with anyio.CancelScope(shield=True):
            await bench.run(bench.sleep)

    await function()
    assert bench.seen == ["cancelled", "closed"]
    assert bench.seconds == pytest.approx(DISCONNECT)


async def test_a_task_group_of_anyio_is_cancelled_with_its_children() -> None:
    bench = Bench()

    async def function() -> None:
        try:
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(bench.sleep)
                task_group.start_soon(bench.sleep)
        except anyio.get_cancelled_exc_class():
            bench.seen.append("passed on")
            raise

    await bench.run(function)
    assert bench.seen == ["cancelled", "cancelled", "passed on", "closed"]


@on_asyncio
async def test_a_task_group_of_asyncio_is_cancelled_with_its_children() -> None:
    bench = Bench()

    async def function() -> None:
        async with asyncio.TaskGroup() as task_group:
            task_group.create_task(bench.sleep())
            task_group.create_task(bench.sleep())

    await bench.run(function)
    assert bench.seen == ["cancelled", "cancelled", "closed"]


async def test_a_result_wins_over_the_disconnect() -> None:
    bench = Bench()

    async def function() -> str:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(LONG)
        return "result"

    assert await bench.run(function) == "result"


async def test_an_exception_of_the_call_wins_over_the_disconnect() -> None:
    bench = Bench()

    async def function() -> None:
        try:
            await bench.sleep()
        finally:
            raise ValueError("clean-up failed")

    with pytest.raises(ValueError, match="clean-up failed"):
        await bench.run(function)


@on_asyncio
async def test_a_call_that_swallows_the_cancellation_counts_as_finished() -> None:
    bench = Bench()

    async def function() -> str:
        with suppress(asyncio.CancelledError):
            await bench.sleep()
        await asyncio.sleep(LONG)
        return "partial"

    assert await bench.run(function) == "partial"


async def test_an_exception_group_is_not_changed() -> None:
    group = BaseExceptionGroup("of the call", [ValueError(), KeyboardInterrupt()])

    async def function() -> None:
        raise group

    with pytest.raises(BaseExceptionGroup) as raised:
        await Bench().call(function)
    assert raised.value is group


@on_asyncio
async def test_a_task_whose_future_is_just_done_gets_its_result_and_is_cancelled_afterwards() -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[str] = loop.create_future()

    class Together(Server):
        async def wait(self) -> Message:
            disconnect = await super().wait()
            loop.call_later(0, future.set_result, "result")  # in the turn in which the call is cancelled
            return disconnect

    bench = Bench(Together())

    async def function() -> None:
        bench.seen.append(await future)
        await bench.sleep()

    await bench.run(function)
    assert bench.seen == ["result", "cancelled", "closed"]
    assert bench.seconds == pytest.approx(DISCONNECT)


@on_asyncio
@pytest.mark.parametrize("end", ["cancelled", "result", "error", "group"])
async def test_a_task_is_no_longer_being_cancelled_after_its_cancelled_call_has_ended(end: str) -> None:
    bench = Bench()
    ends = {"cancelled": asyncio.CancelledError(), "error": ValueError(), "group": ExceptionGroup("", [ValueError()])}

    async def function() -> None:
        with suppress(asyncio.CancelledError):
            await bench.sleep()
        assert cancelling() == 1
        if end in ends:
            raise ends[end]

    with anyio.fail_after(10):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(bench.disconnect)
            with suppress(ClientClosedRequest, ValueError, ExceptionGroup):
                await bench.call(function)
            assert cancelling() == 0
            await asyncio.sleep(LONG)
    assert bench.seen == ["cancelled"]


# Calls that have learned of the disconnect.


async def test_a_call_that_has_read_the_disconnect_is_not_cancelled_as_well() -> None:
    bench = Bench()

    async def function() -> str:
        await bench.call(bench.read)  # the inner call has read the disconnect, and so has the outer one
        await anyio.sleep(LONG)
        return "result"

    assert await bench.run(function) == "result"


@on_asyncio
async def test_a_call_that_has_read_the_disconnect_in_a_shield_is_not_cancelled_as_well() -> None:
    bench = Bench()

    async def function() -> str:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(LONG)
            await bench.read()
        await anyio.sleep(LONG)
        return "result"

    assert await bench.run(function) == "result"


async def test_a_call_that_is_reading_gets_the_disconnect_and_is_not_cancelled() -> None:
    bench = Bench()

    async def function() -> str:
        await bench.read()
        return "result"

    assert await bench.run(function) == "result"
    assert bench.seconds == pytest.approx(DISCONNECT)


async def test_a_call_that_waits_for_a_task_that_has_read_the_disconnect_is_cancelled_a_second_later() -> None:
    bench = Bench()

    async def function() -> None:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(bench.read)
            await bench.sleep()

    await bench.run(function)
    assert bench.seen == ["cancelled", "closed"]
    assert bench.seconds == pytest.approx(DISCONNECT + LEARN)


async def test_a_call_that_learns_of_the_disconnect_from_another_task_is_not_cancelled() -> None:
    bench = Bench()

    async def function() -> str:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(bench.read)
        await anyio.sleep(LEARN / 2)
        return "result"

    assert await bench.run(function) == "result"
    assert bench.seconds == pytest.approx(DISCONNECT + LEARN / 2)


# Several calls of one request.


async def test_inner_calls_are_cancelled_through_the_outer_call() -> None:
    bench = Bench()

    async def inner() -> None:
        try:
            await bench.sleep()
        finally:
            assert [each.fate for each in watch_of(bench.request).calls] == [Fate.CANCELLED, Fate.RUNS]

    async def function() -> None:
        try:
            await bench.call(inner)
        except anyio.get_cancelled_exc_class():
            bench.seen.append("passed on")
            raise

    await bench.run(function)
    assert bench.seen == ["cancelled", "passed on", "closed"]


async def test_the_first_of_several_calls_is_cancelled_at_once_and_those_in_other_tasks_25_ms_later() -> None:
    bench = Bench()
    cancelled: list[float] = []

    async def function() -> None:
        try:
            await anyio.sleep(30)
        finally:
            cancelled.append(bench.seconds)

    async def task() -> None:
        with pytest.raises(ClientClosedRequest):
            await bench.call(function)

    with anyio.fail_after(10):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(bench.disconnect)
            for _ in range(3):
                task_group.start_soon(task)
    assert cancelled == pytest.approx([DISCONNECT, DISCONNECT + RETRY, DISCONNECT + RETRY])


async def test_a_call_in_a_child_that_was_cancelled_through_its_parent_is_not_cancelled_again() -> None:
    bench = Bench()

    async def inner() -> None:
        try:
            await bench.sleep()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(LONG)
            bench.seen.append("clean")

    async def function() -> None:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(bench.call, inner)

    await bench.run(function)
    assert bench.seen == ["cancelled", "clean", "closed"]


async def test_a_call_that_outlives_the_outer_call_is_cancelled_directly() -> None:
    bench = Bench()

    async def inner() -> None:
        with pytest.raises(ClientClosedRequest):
            await bench.call(bench.sleep)

    with anyio.fail_after(10):
        async with anyio.create_task_group() as task_group:

            async def function() -> None:
                task_group.start_soon(inner)
                await anyio.sleep(DISCONNECT / 2)

            task_group.start_soon(bench.disconnect)
            await bench.call(function)
    assert bench.seen == ["cancelled"]
    assert bench.seconds == pytest.approx(DISCONNECT)


async def test_a_call_in_a_child_of_a_task_that_has_read_the_disconnect_is_cancelled_a_second_later() -> None:
    bench = Bench()

    async def inner() -> None:
        with pytest.raises(ClientClosedRequest):
            await bench.call(bench.sleep)

    async def function() -> str:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(inner)
            await bench.read()
        return "result"

    assert await bench.run(function) == "result"
    assert bench.seen == ["cancelled"]
    assert bench.seconds == pytest.approx(DISCONNECT + LEARN)


async def test_a_call_that_begins_after_the_disconnect_is_not_started() -> None:
    bench = Bench()
    await bench.run(bench.sleep)
    with pytest.raises(ClientClosedRequest):
        await bench.call(bench.sleep)
    assert bench.seen == ["cancelled", "closed"]


# Cancellation from outside.


async def test_an_outer_scope_keeps_its_cancellation() -> None:
    bench = Bench()
    with anyio.fail_after(10):
        with anyio.move_on_after(DISCONNECT) as scope:
            await bench.call(bench.sleep)
        assert scope.cancelled_caught
    assert bench.seen == ["cancelled"]


async def test_an_outer_scope_keeps_its_cancellation_if_the_client_disconnects_at_the_same_time() -> None:
    bench = Bench()
    scope = anyio.CancelScope(deadline=anyio.current_time() + DISCONNECT)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(bench.disconnect)
            with scope:
                await bench.call(bench.sleep)
    assert scope.cancelled_caught
    assert bench.seen == ["cancelled"]


async def test_an_inner_timeout_stays_a_timeout() -> None:
    bench = Bench()

    async def function() -> None:
        with anyio.fail_after(DISCONNECT / 2):
            await bench.sleep()

    with pytest.raises(TimeoutError):
        await bench.run(function)


@on_asyncio
async def test_an_outer_asyncio_timeout_keeps_its_cancellation() -> None:
    bench = Bench()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(DISCONNECT / 2):
            await bench.call(bench.sleep)
    assert cancelling() == 0


@on_asyncio
async def test_an_inner_asyncio_timeout_stays_a_timeout_if_the_client_disconnects_at_the_same_time() -> None:
    bench = Bench()

    async def function() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(DISCONNECT):
                await bench.sleep()
        assert cancelling() == 0
        bench.seen.append("timeout")
        await bench.sleep()

    await bench.run(function)
    assert bench.seen == ["cancelled", "timeout", "cancelled", "closed"]


MOMENTS = ["before the disconnect", "together with it", "as its cancellation arrives", "during the cleanup"]


@on_asyncio
@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_cancellation_from_outside_is_passed_on(moment: str) -> None:
    loop = asyncio.get_running_loop()
    cleanups: list[str] = []

    class Racing(Server):
        async def wait(self) -> Message:
            disconnect = await super().wait()
            if moment == "as its cancellation arrives":
                loop.call_later(0, lambda: loop.call_soon(task.cancel))  # before the call's task has run
            return disconnect

    bench = Bench(Racing())

    async def function() -> None:
        try:
            await bench.sleep()
        finally:
            if moment == "during the cleanup":
                loop.call_later(LONG / 2, task.cancel)
            else:
                loop.call_later(LONG / 2, cleanups.append, "not cut")
            await asyncio.sleep(LONG)
            cleanups.append("clean")

    task = asyncio.create_task(bench.run(function))
    if moment == "before the disconnect":
        loop.call_later(DISCONNECT / 2, task.cancel)
    elif moment == "together with it":
        loop.call_later(DISCONNECT / 2, bench.server.gone.set)
        loop.call_later(DISCONNECT / 2, task.cancel)
    await asyncio.wait([task], timeout=10)
    assert task.cancelled()
    assert task.cancelling() == 1
    assert bench.seen == ["cancelled"]
    assert cleanups == ([] if moment == "during the cleanup" else ["not cut", "clean"])


@on_asyncio
async def test_the_cleanup_after_a_cancellation_from_outside_is_not_cancelled_again() -> None:
    bench = Bench()

    async def function() -> None:
        try:
            await bench.sleep()
        finally:
            await asyncio.sleep(LONG)
            bench.seen.append("clean")

    task = asyncio.create_task(bench.run(function))
    asyncio.get_running_loop().call_later(DISCONNECT / 2, task.cancel)
    await asyncio.wait([task], timeout=10)
    assert task.cancelled()
    assert bench.seen == ["cancelled", "clean"]


# What happens to the task that reads.


@on_asyncio
async def test_cancelling_all_tasks_is_not_taken_for_a_disconnect() -> None:
    bench = Bench()

    async def function() -> str:
        await asyncio.sleep(DISCONNECT)
        for task in asyncio.all_tasks():
            if task.get_name() == TASK:
                task.cancel()
        await asyncio.sleep(DISCONNECT)
        assert bench.server.pending == 0
        return "result"

    assert await bench.call(function) == "result"
    assert watch_of(bench.request).disconnect is None


@on_asyncio
async def test_reading_goes_on_after_all_tasks_were_cancelled() -> None:
    bench = Bench()

    async def sweep() -> None:
        await asyncio.sleep(DISCONNECT / 2)
        for task in asyncio.all_tasks():
            if task.get_name() == TASK:
                task.cancel()

    async def function() -> str:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(sweep)
            await bench.read()
        return "result"

    assert await bench.run(function) == "result"
    assert bench.server.asked == 3
    assert bench.server.most_pending == 1


async def test_a_receive_that_fails_does_not_end_the_call() -> None:
    class Failing(Server):
        async def wait(self) -> Message:
            raise RuntimeError("too large")

    bench = Bench(Failing())

    async def function() -> str:
        await anyio.sleep(LONG)
        return "result"

    assert await bench.run(function) == "result"


async def test_the_wait_goes_on_after_the_error_was_read() -> None:
    class FailsOnce(Server):
        async def wait(self) -> Message:
            if self.asked == 2:
                raise RuntimeError("too large")
            return await super().wait()

    bench = Bench(FailsOnce())

    async def function() -> None:
        with pytest.raises(RuntimeError, match="too large"):
            await bench.read()
        await bench.sleep()

    await bench.run(function)
    assert bench.seen == ["cancelled", "closed"]


UNREAD = {"type": "http.request", "body": b"a", "more_body": True}
PAUSE_BETWEEN_CALLS = 10  # seconds

lasting_receives = pytest.mark.parametrize(
    ("version", "body"), [("2.4", []), ("2.3", [UNREAD])], ids=["ASGI 2.4", "body may come"]
)


@lasting_receives
async def test_a_receive_that_must_not_be_cancelled_goes_on_from_call_to_call(
    version: str, body: list[Message]
) -> None:
    bench = Bench(Server(*body), version)
    for _ in range(3):
        await bench.call(lambda: anyio.sleep(LONG))
        assert (bench.server.asked, bench.server.pending) == (2, 1)
    await bench.run(bench.sleep)
    assert bench.seen == ["cancelled", "closed"]
    assert (bench.server.asked, bench.server.pending) == (2, 0)


@lasting_receives
async def test_a_receive_that_must_not_be_cancelled_ends_when_the_request_is_released(
    version: str, body: list[Message]
) -> None:
    server = Server(*body)
    request = server.request(version)
    await call(request, lambda: anyio.sleep(LONG))
    assert server.pending == 1
    del request
    await anyio.sleep(0.001)
    assert server.pending == 0


@on_asyncio
async def test_a_receive_that_must_not_be_cancelled_goes_on_if_another_task_has_begun_a_call() -> None:
    bench = Bench(spec_version="2.4")
    for _ in range(2):
        async with asyncio.TaskGroup() as task_group:
            task_group.create_task(bench.call(lambda: asyncio.sleep(PAUSE_BETWEEN_CALLS)))
    assert (bench.server.asked, bench.server.pending) == (2, 1)
    async with asyncio.TaskGroup() as task_group:
        task_group.create_task(bench.run(bench.sleep))
    assert bench.seen == ["cancelled", "closed"]
    assert (bench.server.asked, bench.server.pending) == (2, 0)


async def test_a_receive_that_must_not_be_cancelled_goes_on_while_the_request_is_held() -> None:
    bench = Bench(spec_version="2.4")
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(bench.call, lambda: anyio.sleep(LONG))
    await anyio.sleep(PAUSE_BETWEEN_CALLS)
    assert bench.server.pending == 1


@pytest.mark.parametrize("version", ["2.3", "2.4"])
async def test_nothing_is_left_to_the_garbage_collector(version: str) -> None:
    gc.collect()
    gc.disable()
    try:
        server = Server()
        request = server.request(version)
        await call(request, lambda: anyio.sleep(LONG))
        gone = [weakref.ref(each) for each in (server, request, watch_of(request))]
        del server, request
        await anyio.sleep(GRACE * 4)  # until the timer that all calls share has ticked
        assert [each() for each in gone] == [None, None, None]
    finally:
        gc.enable()


# Event loops.


def test_every_loop_has_its_own_clock() -> None:
    def run() -> None:
        for _ in range(2):
            with asyncio.Runner(loop_factory=AsyncioLoop) as runner:
                benches.append(runner.run(main()))

    async def main() -> Bench:
        bench = Bench()
        await bench.run(bench.sleep)
        return bench

    benches: list[Bench] = []
    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert [bench.seen for bench in benches] == [["cancelled", "closed"]] * 6


def test_trio_as_a_guest_of_asyncio_counts_as_trio() -> None:
    async def host() -> list[str]:
        done: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        benches: list[Bench] = []

        async def guest() -> None:
            benches.append(Bench())
            await benches[0].run(benches[0].sleep)

        trio.lowlevel.start_guest_run(
            guest,
            run_sync_soon_threadsafe=asyncio.get_running_loop().call_soon_threadsafe,
            done_callback=lambda outcome: done.set_result(outcome.unwrap()),
        )
        await asyncio.wait_for(done, 10)
        return benches[0].seen

    assert asyncio.run(host()) == ["cancelled", "closed"]

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

import anyio
import pytest
import trio
from anyio.lowlevel import checkpoint

from cancelonleave import _tasks
from cancelonleave._cancellation import run
from cancelonleave._patience import PATIENCE
from cancelonleave._watch import Watch
from conftest import BACKENDS

pytestmark = pytest.mark.anyio


def eager_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_task_factory(EAGER_TASKS)
    return loop


EAGER_TASKS = getattr(asyncio, "eager_task_factory", None)  # since Python 3.12
loops = [pytest.param(BACKENDS[name], id=name) for name in ("asyncio", "uvloop")]
loops += [pytest.param(("asyncio", {"loop_factory": eager_loop}), id="eager tasks")] if EAGER_TASKS else []
on_asyncio = pytest.mark.parametrize("anyio_backend", loops)


class Rang(Exception):
    pass


class Alarm:
    """An event to watch."""

    def __init__(self) -> None:
        self.rung = anyio.Event()
        self.watched = self.changed = 0

    async def watch(self) -> None:
        self.watched += 1
        await self.rung.wait()

    def change(self) -> None:
        self.changed += 1


def watch_for(alarm: Alarm) -> Watch:
    return Watch(alarm, Rang, goes_on_after=lambda result: False)


class Bench:
    """An alarm, the watch for it, and what a call under it went through."""

    def __init__(self) -> None:
        self.alarm = Alarm()
        self.watch = watch_for(self.alarm)
        self.seen: list[str] = []

    async def ring(self) -> None:
        await anyio.sleep(PATIENCE * 3)
        self.alarm.rung.set()

    async def run(self, function: Callable[[], Awaitable[Any]]) -> Any:  # Any: whatever the function returns
        """Call `function` under the watch, and ring the alarm when the watch is surely on."""
        with anyio.fail_after(5):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(self.ring)
                try:
                    return await run(self.watch, function())
                except BaseException as error:
                    self.error = error
                finally:
                    task_group.cancel_scope.cancel()
        if isinstance(self.error, Rang):
            self.seen.append("rang")
            return None
        raise self.error

    async def sleep(self) -> None:
        try:
            await anyio.sleep(60)
        except anyio.get_cancelled_exc_class():
            self.seen.append("cancelled")
            raise


async def test_a_call_that_ends_soon_never_starts_the_wait() -> None:
    alarm = Alarm()

    async def call() -> str:
        await checkpoint()
        return "result"

    assert await run(watch_for(alarm), call()) == "result"
    assert alarm.watched == 0


async def test_a_call_that_lasts_is_watched_and_the_wait_ends_with_it() -> None:
    alarm = Alarm()

    async def call() -> str:
        while not alarm.watched:
            await anyio.sleep(0.001)
        return "result"

    with anyio.fail_after(10):
        assert await run(watch_for(alarm), call()) == "result"
    assert (alarm.watched, alarm.changed) == (1, 1)


async def test_the_wait_starts_at_once_for_a_call_that_asks() -> None:
    bench = Bench()

    async def call() -> str:
        assert bench.watch.start()
        await checkpoint()
        await checkpoint()
        return f"{bench.alarm.watched} watched"

    assert await run(bench.watch, call()) in ("0 watched", "1 watched")
    assert not bench.watch.start()


async def test_the_event_cancels_the_call() -> None:
    bench = Bench()
    await bench.run(bench.sleep)
    assert bench.seen == ["cancelled", "rang"]


@on_asyncio
async def test_cleanup_may_await_and_is_not_cancelled_again() -> None:
    bench = Bench()

    async def child() -> None:
        try:
            await bench.sleep()
        finally:
            await asyncio.sleep(PATIENCE * 3)
            bench.seen.append("child clean")

    async def call() -> None:
        try:
            await asyncio.gather(child(), child())
        finally:
            await asyncio.sleep(PATIENCE * 3)
            bench.seen.append("clean")

    await bench.run(call)
    assert bench.seen == ["cancelled", "cancelled", "child clean", "child clean", "clean", "rang"]
    assert not any(task.get_name().startswith("cancelonleave") for task in asyncio.all_tasks())


async def test_a_shield_is_not_cut_and_the_cancellation_comes_after_it() -> None:
    bench = Bench()

    async def call() -> None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(PATIENCE * 6)
            bench.seen.append("whole")
        await bench.sleep()

    await bench.run(call)
    assert bench.seen == ["whole", "cancelled", "rang"]


async def test_a_task_group_of_anyio_is_cancelled_with_its_children() -> None:
    bench = Bench()

    async def call() -> None:
        try:
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(bench.sleep)
                task_group.start_soon(bench.sleep)
        except anyio.get_cancelled_exc_class():
            bench.seen.append("passed on")  # swallowed by anyio before 4.16
            raise

    await bench.run(call)
    assert bench.seen == ["cancelled", "cancelled", "passed on", "rang"]


@on_asyncio
async def test_those_cancelled_at_once_do_not_each_look_at_all_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def look() -> list[anyio.TaskInfo]:
        looks.append(len(seen))
        return anyio.get_running_tasks()

    monkeypatch.setattr(_tasks, "get_running_tasks", look)
    alarm = Alarm()
    seen: list[str] = []

    async def child() -> None:
        try:
            await anyio.sleep(60)
        finally:
            seen.append("child")

    async def shielded() -> None:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(child)
            with anyio.CancelScope(shield=True):
                await anyio.sleep(PATIENCE * 8)
            seen.append("whole")
        await anyio.sleep(60)

    async def call(function: Callable[[], Awaitable[None]]) -> None:
        with pytest.raises(Rang):
            await run(watch_for(alarm), function())

    for function in (partial(anyio.sleep, 60), shielded):
        alarm.rung = anyio.Event()
        with anyio.fail_after(10):
            async with anyio.create_task_group() as task_group:
                for _ in range(50):
                    task_group.start_soon(call, function)
                await anyio.sleep(PATIENCE * 3)
                alarm.rung.set()
        assert len(looks) <= (5 if seen else 0)
    assert sorted(seen) == ["child"] * 50 + ["whole"] * 50


async def test_a_result_wins_over_the_event() -> None:
    bench = Bench()

    async def call() -> str:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(PATIENCE * 6)
        return "result"

    assert await bench.run(call) == "result"


async def test_an_exception_of_the_call_wins_over_the_event() -> None:
    bench = Bench()

    async def call() -> None:
        try:
            await bench.sleep()
        finally:
            raise ValueError("clean-up failed")

    with pytest.raises(ValueError, match="clean-up failed"):
        await bench.run(call)


@on_asyncio
async def test_swallowing_the_cancellation_is_finishing() -> None:
    bench = Bench()

    async def call() -> str:
        try:
            await bench.sleep()
        except asyncio.CancelledError:
            await asyncio.sleep(PATIENCE * 3)
        return "partial"

    assert await bench.run(call) == "partial"


async def test_an_exception_group_stays_as_it_is() -> None:
    group = BaseExceptionGroup("of the call", [ValueError(), KeyboardInterrupt()])

    async def call() -> None:
        raise group

    with pytest.raises(BaseExceptionGroup) as raised:
        await run(watch_for(Alarm()), call())
    assert raised.value is group


async def test_one_who_was_told_is_not_cancelled_on_top() -> None:
    bench = Bench()
    other = watch_for(Alarm())

    async def call() -> str:
        async def within() -> None:
            bench.watch.tell()

        await run(other, within())
        await anyio.sleep(PATIENCE * 6)
        return "result"

    assert await bench.run(call) == "result"


@on_asyncio
async def test_nor_is_one_who_was_told_in_a_shield_after_children_were_cancelled() -> None:
    bench = Bench()

    async def call() -> str:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(bench.sleep)
            with anyio.CancelScope(shield=True):
                while not bench.seen:
                    await checkpoint()
                bench.watch.tell()
            await anyio.sleep(PATIENCE * 3)
        return "result"

    assert await bench.run(call) == "result"
    assert bench.seen == ["cancelled"]


async def test_calls_within_a_call_are_cancelled_by_way_of_it() -> None:
    bench = Bench()

    async def inner() -> None:
        try:
            await bench.sleep()
        finally:
            assert any(call.cancelled for call in bench.watch.calls)

    async def call() -> None:
        try:
            await run(bench.watch, inner())
        except anyio.get_cancelled_exc_class():
            bench.seen.append("passed on")
            raise

    await bench.run(call)
    assert bench.seen == ["cancelled", "passed on", "rang"]


async def test_a_call_that_outlives_the_one_around_it_is_cancelled_by_itself() -> None:
    bench = Bench()

    async def inner() -> None:
        with pytest.raises(Rang):
            await run(bench.watch, bench.sleep())

    with anyio.fail_after(5):
        async with anyio.create_task_group() as task_group:

            async def call() -> None:
                task_group.start_soon(inner)
                await anyio.sleep(PATIENCE * 2)

            task_group.start_soon(bench.ring)
            await run(bench.watch, call())
    assert bench.seen == ["cancelled"]


async def test_a_call_within_one_who_was_told_is_cancelled_by_itself() -> None:
    bench = Bench()

    async def inner() -> None:
        with pytest.raises(Rang):
            await run(bench.watch, bench.sleep())

    async def call() -> str:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(inner)
            await checkpoint()
            bench.watch.tell()
        return "result"

    assert await bench.run(call) == "result"
    assert bench.seen == ["cancelled"]


async def test_a_scope_around_keeps_its_cancellation() -> None:
    bench = Bench()
    with anyio.fail_after(5):
        with anyio.move_on_after(PATIENCE * 3) as scope:
            await run(bench.watch, bench.sleep())
        assert scope.cancelled_caught
    assert bench.seen == ["cancelled"]


async def test_a_timeout_within_stays_a_timeout() -> None:
    bench = Bench()

    async def call() -> None:
        with anyio.fail_after(PATIENCE):
            await bench.sleep()

    with pytest.raises(TimeoutError):
        await bench.run(call)


@on_asyncio
async def test_a_timeout_of_asyncio_around_keeps_its_cancellation() -> None:
    bench = Bench()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(PATIENCE * 2):
            await run(bench.watch, bench.sleep())
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@on_asyncio
@pytest.mark.parametrize("moment", ["before the event", "together with it", "during the cleanup"])
async def test_a_cancellation_from_outside_is_passed_on(moment: str) -> None:
    bench = Bench()

    async def call() -> None:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        if moment == "before the event":
            loop.call_later(PATIENCE * 2, task.cancel)
        elif moment == "together with it":
            loop.call_later(PATIENCE * 2, bench.alarm.rung.set)
            loop.call_later(PATIENCE * 2, task.cancel)
        try:
            await bench.sleep()
        finally:
            if moment == "during the cleanup":
                loop.call_later(PATIENCE, task.cancel)
            await asyncio.sleep(PATIENCE * 2)

    task = asyncio.create_task(bench.run(call))
    await asyncio.wait([task], timeout=5)
    assert task.cancelled()
    assert task.cancelling() == 1
    assert "rang" not in bench.seen


@on_asyncio
async def test_a_cancellation_from_outside_while_the_wait_is_being_joined_is_passed_on() -> None:
    class Slow(Alarm):
        async def watch(self) -> None:
            try:
                await super().watch()
            finally:
                task.cancel()
                await asyncio.sleep(PATIENCE)

    async def call() -> None:
        await asyncio.sleep(PATIENCE * 3)

    task = asyncio.create_task(run(watch_for(Slow()), call()))
    await asyncio.wait([task], timeout=5)
    assert task.cancelled()
    await asyncio.sleep(PATIENCE * 2)


@on_asyncio
async def test_the_cleanup_after_a_cancellation_from_outside_is_not_cancelled_again() -> None:
    bench = Bench()

    async def call() -> None:
        try:
            await bench.sleep()
        finally:
            await asyncio.sleep(PATIENCE * 6)
            bench.seen.append("clean")

    task = asyncio.create_task(bench.run(call))
    asyncio.get_running_loop().call_later(PATIENCE, task.cancel)
    await asyncio.wait([task], timeout=5)
    assert task.cancelled()
    assert bench.seen == ["cancelled", "clean"]


@on_asyncio
async def test_a_sweep_over_all_tasks_is_not_the_event() -> None:
    bench = Bench()

    async def call() -> str:
        await asyncio.sleep(PATIENCE * 3)
        for task in asyncio.all_tasks():
            if task.get_name().startswith("cancelonleave"):
                task.cancel()
        await asyncio.sleep(PATIENCE * 3)
        return "result"

    assert await run(bench.watch, call()) == "result"
    assert not bench.watch.over


@on_asyncio
async def test_a_wait_that_swallows_a_cancellation_is_cancelled_again() -> None:
    class Deaf(Alarm):
        async def watch(self) -> None:
            with suppress(asyncio.CancelledError):
                await super().watch()
            await super().watch()

    async def call() -> None:
        await asyncio.sleep(PATIENCE * 3)

    alarm = Deaf()
    with anyio.fail_after(5):
        await run(watch_for(alarm), call())
    assert (alarm.watched, alarm.changed) == (2, 1)


@on_asyncio
async def test_the_wait_runs_in_the_context_of_the_call_and_holds_no_other() -> None:
    name: ContextVar[str] = ContextVar("name")
    seen: list[str] = []

    class Curious(Alarm):
        async def watch(self) -> None:
            seen.append(name.get())
            await super().watch()

    async def call(own: str, duration: float) -> None:
        name.set(own)
        await run(watch_for(Curious()), asyncio.sleep(duration))

    async with asyncio.TaskGroup() as task_group:
        task_group.create_task(call("first", PATIENCE / 5))
        await asyncio.sleep(PATIENCE / 10)
        task_group.create_task(call("second", PATIENCE * 3))
    assert seen == ["second"]


def test_every_loop_has_its_own_clock() -> None:
    def run() -> None:
        for _ in range(2):
            bench = asyncio.run(main())
            benches.append(bench)

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
    assert [bench.seen for bench in benches] == [["cancelled", "rang"]] * 6


def test_trio_as_a_guest_of_asyncio_is_trio() -> None:
    async def host() -> list[str]:
        done: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        bench: list[Bench] = []

        async def guest() -> None:
            bench.append(Bench())
            await bench[0].run(bench[0].sleep)

        trio.lowlevel.start_guest_run(
            guest,
            run_sync_soon_threadsafe=asyncio.get_running_loop().call_soon_threadsafe,
            done_callback=lambda outcome: done.set_result(outcome.unwrap()),
        )
        await asyncio.wait_for(done, 5)
        return bench[0].seen

    assert asyncio.run(host()) == ["cancelled", "rang"]


@on_asyncio
async def test_nothing_is_left_to_the_garbage_collector() -> None:
    async def call() -> None:
        await asyncio.sleep(PATIENCE * 3)

    gc.collect()
    gc.disable()
    try:
        alarm = Alarm()
        watch = watch_for(alarm)
        await run(watch, call())
        gone = weakref.ref(alarm)  # the watch has it
        del watch, alarm
        await asyncio.sleep(PATIENCE * 3)
        assert gone() is None
    finally:
        gc.enable()

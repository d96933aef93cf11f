"""Random requests, and the proof that they find out when a promise is broken."""

from __future__ import annotations

import asyncio
import runpy
import sys
from collections.abc import Callable

import pytest
from starlette.types import Message

import stream_trials
import trials
from cancelonleave import _cancellation, _channel, _items, _request, _streaming, _watch
from trial import BrokenPromise, run_trials
from trials import run_trial
from virtual import BACKENDS
from work import ignore_middleware_garbage

pytestmark = ignore_middleware_garbage

TRIALS = 3000
STREAM_TRIALS = 2000


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_random_request_breaks_a_promise(backend: str) -> None:
    run_trials(run_trial, backend, range(TRIALS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_random_stream_breaks_a_promise(backend: str) -> None:
    run_trials(stream_trials.run_trial, backend, range(STREAM_TRIALS))


def test_as_many_as_you_like_can_be_run_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (trials.__file__, stream_trials.__file__):
        monkeypatch.setattr(sys, "argv", [path, "--backend", "trio", "--trials", "5", "--seed", "7"])
        runpy.run_path(path, run_name="__main__")
        assert capsys.readouterr().out == "5 trials on trio: no fault\n"


def eats_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = _channel.Channel._keep

    def keep_what_is_waited_for(self: _channel.Channel, message: Message) -> None:
        if self._takers or not message.get("body"):
            keep(self, message)

    monkeypatch.setattr(_channel.Channel, "_keep", keep_what_is_waited_for)


def cancels_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    create = _cancellation._AsyncioCall.__init__

    class Unshielded:
        shield = False

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    def without_shield(call: _cancellation._AsyncioCall, watch: _watch.Watch, host: asyncio.Task[object]) -> None:
        create(call, watch, host)
        monkeypatch.setattr(call, "_shield", Unshielded())

    monkeypatch.setattr(_cancellation._AsyncioCall, "__init__", without_shield)


def takes_a_cancellation_from_outside_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    create = _cancellation._AsyncioCall.__init__

    def count_from_100(call: _cancellation._AsyncioCall, watch: _watch.Watch, host: asyncio.Task[object]) -> None:
        create(call, watch, host)
        call._base = 100

    monkeypatch.setattr(_cancellation._AsyncioCall, "__init__", count_from_100)


def leaves_its_task_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stop(self: _watch.Watch, task: asyncio.Task[None]) -> None:
        pass

    monkeypatch.setattr(_watch.Watch, "_stop_task", stop)


def tells_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(self: _watch.Watch) -> None:
        pass

    monkeypatch.setattr(_watch.Watch, "tell", tell)


def cancels_inside_shields(monkeypatch: pytest.MonkeyPatch) -> None:
    def cancel(call: _cancellation._AsyncioCall) -> None:
        call.cancelled = call._host.cancel()

    monkeypatch.setattr(_cancellation._AsyncioCall, "cancel", cancel)


@pytest.mark.parametrize(
    "breaks",
    [
        eats_a_chunk,
        cancels_again_and_again,
        takes_a_cancellation_from_outside_for_its_own,
        leaves_its_task_behind,
        tells_twice,
        cancels_inside_shields,
    ],
)
def test_the_trials_find_a_variant_that(
    breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    with pytest.raises(BrokenPromise, match="seed"):
        run_trials(run_trial, "asyncio", range(TRIALS))


@pytest.mark.parametrize("breaks", [eats_a_chunk, tells_twice])
def test_the_trials_on_trio_find_a_variant_that(
    breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    with pytest.raises(BrokenPromise, match="seed"):
        run_trials(run_trial, "trio", range(TRIALS))


def does_not_close_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    async def close(iterator: object) -> None:
        pass

    monkeypatch.setattr(_streaming, "close", close)


def takes_the_end_of_a_response_for_a_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(self: _watch.Watch) -> None:
        pass

    monkeypatch.setattr(_watch.Watch, "finish", finish)


def lets_a_response_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    async def listen(self: _streaming._Body) -> Message:
        return await self.request.receive()

    monkeypatch.setattr(_streaming._Body, "_listen", listen)


def interrupts_receive_before_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_stream(response: object) -> bool:
        return False

    monkeypatch.setattr(_request, "is_stream", is_stream)


def reports_each_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    async def end(self: _items.Stream) -> None:
        self.watched._logged = False
        await original(self)
        self.hooks.append(None)

    original = _items.Stream.end
    monkeypatch.setattr(_items.Stream, "end", end)


def runs_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    async def make(self: _items._Pump) -> None:
        self._asked.clear = lambda: None  # type: ignore[method-assign]  # so that it always seems to be asked
        await original(self)

    original = _items._Pump._make
    monkeypatch.setattr(_items._Pump, "_make", make)


@pytest.mark.parametrize(
    "breaks",
    [
        does_not_close_generators,
        takes_the_end_of_a_response_for_a_leave,
        lets_a_response_listen,
        interrupts_receive_before_the_body,
        runs_ahead,
        reports_each_piece,
        cancels_again_and_again,
        cancels_inside_shields,
        eats_a_chunk,
    ],
)
def test_the_trials_of_streams_find_a_variant_that(
    breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    with pytest.raises(BrokenPromise, match="seed"):
        run_trials(stream_trials.run_trial, "asyncio", range(STREAM_TRIALS))

"""Random requests, and the proof that they find out when a promise is broken."""

from __future__ import annotations

import asyncio
import runpy
import sys
from collections.abc import Callable

import pytest
from starlette.types import Message

import trials
from cancelonleave import _cancellation, _channel
from trials import BACKENDS, BrokenPromise, run_trials

TRIALS = 3000


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_random_request_breaks_a_promise(backend: str) -> None:
    run_trials(backend, range(TRIALS))


def test_as_many_as_you_like_can_be_run_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trials.py", "--backend", "trio", "--trials", "5", "--seed", "7"])
    runpy.run_path(trials.__file__, run_name="__main__")
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

    def without_shield(
        call: _cancellation._AsyncioCall, watch: _cancellation.Watch, host: asyncio.Task[object]
    ) -> None:
        create(call, watch, host)
        monkeypatch.setattr(call, "_shield", Unshielded())

    monkeypatch.setattr(_cancellation._AsyncioCall, "__init__", without_shield)


def takes_a_cancellation_from_outside_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    create = _cancellation._AsyncioCall.__init__

    def count_from_100(
        call: _cancellation._AsyncioCall, watch: _cancellation.Watch, host: asyncio.Task[object]
    ) -> None:
        create(call, watch, host)
        call._base = 100

    monkeypatch.setattr(_cancellation._AsyncioCall, "__init__", count_from_100)


def leaves_its_task_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stop(self: _cancellation.Watch, task: asyncio.Task[None]) -> None:
        pass

    monkeypatch.setattr(_cancellation.Watch, "stop_task", stop)


def tells_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(self: _cancellation.Watch) -> None:
        pass

    monkeypatch.setattr(_cancellation.Watch, "tell", tell)


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
        run_trials("asyncio", range(TRIALS))


@pytest.mark.parametrize("breaks", [eats_a_chunk, tells_twice])
def test_the_trials_on_trio_find_a_variant_that(
    breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    with pytest.raises(BrokenPromise, match="seed"):
        run_trials("trio", range(TRIALS))

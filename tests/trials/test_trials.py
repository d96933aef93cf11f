"""Random trials, and the proof that they detect a broken promise."""

from __future__ import annotations

import asyncio
import runpy
import sys
from collections.abc import Callable
from contextvars import Context
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message
from starlette.websockets import WebSocketDisconnect

from cancelonleave import ClientClosedRequest, _cancel, _receive, _response, _stream
from cancelonleave._cancel import AsyncioCall
from cancelonleave._loop import Loop
from cancelonleave._receive import Reader
from cancelonleave._watch import Fate, Watch
from cancelonleave._websocket import WebSocketWatch
from tests.shared.asking import ignore_middleware_garbage
from tests.shared.virtual_time import BACKENDS
from tests.trials import random_requests, random_streams, random_websockets
from tests.trials.common import BrokenPromise, run_trials
from tests.trials.random_requests import run_trial

pytestmark = ignore_middleware_garbage

TRIALS = 3000
STREAM_TRIALS = 2000
BLOCK = 500  # so many of the slowest run in one test, so that several processes share them


@pytest.mark.parametrize("first", range(0, TRIALS, BLOCK))
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_random_request_breaks_a_promise(backend: str, first: int) -> None:
    run_trials(run_trial, backend, range(first, first + BLOCK))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_random_stream_breaks_a_promise(backend: str) -> None:
    run_trials(random_streams.run_trial, backend, range(STREAM_TRIALS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_random_websocket_breaks_a_promise(backend: str) -> None:
    run_trials(random_websockets.run_trial, backend, range(TRIALS))


def test_any_number_of_trials_can_be_run_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (random_requests.__file__, random_streams.__file__, random_websockets.__file__):
        monkeypatch.setattr(sys, "argv", [path, "--backend", "trio", "--trials", "5", "--seed", "7"])
        runpy.run_path(path, run_name="__main__")
        assert capsys.readouterr().out == "5 trials on trio: no fault\n"


def test_a_cancellation_that_reaches_the_trial_itself_breaks_a_promise() -> None:
    async def cancelled(seed: int, unhandled: list[dict[str, Any]], *, native: bool) -> None:  # Any: asyncio's own type
        raise asyncio.CancelledError

    with pytest.raises(BrokenPromise, match="seed 7"):
        run_trials(cancelled, "asyncio", [7])


def eats_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = Reader.keep

    def keep_what_is_waited_for(self: Reader, outcome: Message | BaseException) -> float | None:
        if not self._waiting and not isinstance(outcome, BaseException) and outcome.get("body"):
            return 0.0
        return keep(self, outcome)

    monkeypatch.setattr(Reader, "keep", keep_what_is_waited_for)


def cancels_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    cancel = AsyncioCall.cancel

    def cancel_twice(self: AsyncioCall) -> list[float]:
        delays = cancel(self)
        if self.fate is Fate.CANCELLED:
            self.watch.loop.call_later(0.001, self.host.cancel)
        return delays

    monkeypatch.setattr(AsyncioCall, "cancel", cancel_twice)


def takes_a_cancellation_from_outside_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def count_from_100(self: AsyncioCall, watch: Watch, request: Request, host: asyncio.Task[object]) -> None:
        create(self, watch, request, host)
        self._base = 100

    create = AsyncioCall.__init__
    monkeypatch.setattr(AsyncioCall, "__init__", count_from_100)


def forgets_to_uncancel(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(self: AsyncioCall, kind: object, error: object, traceback: object) -> None:
        self.watch.end(self)
        if self.fate is Fate.CANCELLED and isinstance(error, asyncio.CancelledError):
            raise ClientClosedRequest

    monkeypatch.setattr(AsyncioCall, "__exit__", end)


def leaves_its_task_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def cancel(self: Reader) -> None:
        pass

    def call_from_anywhere(self: Loop, callback: object) -> None:
        pass

    monkeypatch.setattr(Reader, "cancel", cancel)
    monkeypatch.setattr(Loop, "call_from_anywhere", call_from_anywhere)


def treats_no_call_as_notified(monkeypatch: pytest.MonkeyPatch) -> None:
    def learn(self: Watch) -> None:
        pass

    monkeypatch.setattr(Watch, "learn", learn)


def treats_every_call_as_notified(monkeypatch: pytest.MonkeyPatch) -> None:
    def learn(self: Watch) -> None:
        for call in self.calls:
            call.fate = Fate.KNOWS

    monkeypatch.setattr(Watch, "learn", learn)


def cancels_inside_shields(monkeypatch: pytest.MonkeyPatch) -> None:
    def cancel_scopes(task: asyncio.Task[object]) -> list[object]:
        return []

    monkeypatch.setattr(_cancel, "cancel_scopes", cancel_scopes)


def reads_twice_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_ahead(self: Reader, context: Context | None = None) -> None:
        self._reads_ahead = True
        self._start_reading(context=context)

    monkeypatch.setattr(Reader, "read_ahead", read_ahead)


def reads_in_the_task_that_asks_on_all_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_receive, "CoroutineType", object)


@pytest.mark.parametrize(
    "breaks",
    [
        eats_a_chunk,
        cancels_twice,
        takes_a_cancellation_from_outside_for_its_own,
        forgets_to_uncancel,
        leaves_its_task_behind,
        treats_no_call_as_notified,
        treats_every_call_as_notified,
        cancels_inside_shields,
        reads_twice_at_a_time,
        reads_in_the_task_that_asks_on_all_servers,
    ],
)
def test_the_trials_find_a_variant_that(
    breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    with pytest.raises(BrokenPromise, match="seed"):
        run_trials(run_trial, "asyncio", range(TRIALS))


@pytest.mark.parametrize("breaks", [eats_a_chunk, treats_no_call_as_notified])
def test_the_trials_on_trio_find_a_variant_that(
    breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    with pytest.raises(BrokenPromise, match="seed"):
        run_trials(run_trial, "trio", range(TRIALS))


def does_not_close_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    async def close(iterator: object) -> None:
        pass

    monkeypatch.setattr(_response, "close", close)
    monkeypatch.setattr(_stream, "close", close)


def takes_the_end_of_a_response_for_a_disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    def close(self: Watch) -> None:
        pass

    monkeypatch.setattr(Watch, "close", close)


def lets_a_response_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    async def listen(self: _response.Body) -> Message:
        return await self.request.receive()

    monkeypatch.setattr(_response.Body, "_listen", listen)


def interrupts_receive_before_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "stop", Reader.cancel)


def reports_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    async def cut(self: _stream.Stream) -> None:
        self.watch.is_logged = False
        await original(self)
        self.hooks.append(None)

    original = _stream.Stream.cut
    monkeypatch.setattr(_stream.Stream, "cut", cut)


def guards_no_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_response.Body, "_send_guarded", _response.Body._send)


@pytest.mark.parametrize(
    "breaks",
    [
        does_not_close_generators,
        takes_the_end_of_a_response_for_a_disconnect,
        lets_a_response_listen,
        interrupts_receive_before_the_body,
        reports_each_chunk,
        guards_no_send,
        cancels_twice,
        cancels_inside_shields,
        eats_a_chunk,
    ],
)
def test_the_trials_of_streams_find_a_variant_that(
    breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    with pytest.raises(BrokenPromise, match="seed"):
        run_trials(random_streams.run_trial, "asyncio", range(STREAM_TRIALS))


def drops_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = WebSocketWatch.keep

    def keep_what_is_waited_for(self: WebSocketWatch, outcome: Message | BaseException) -> float | None:
        if not self._waiting and not isinstance(outcome, BaseException) and outcome["type"] == "websocket.receive":
            return 0.0
        return keep(self, outcome)

    monkeypatch.setattr(WebSocketWatch, "keep", keep_what_is_waited_for)


def reports_the_disconnect_before_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    next_message = WebSocketWatch.next_message

    async def disconnect_first(self: WebSocketWatch) -> Message:
        return self.disconnect or await next_message(self)

    monkeypatch.setattr(WebSocketWatch, "next_message", disconnect_first)


def takes_its_own_close_for_a_disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    def ignore(self: WebSocketWatch) -> None:
        pass

    monkeypatch.setattr(WebSocketWatch, "close", ignore)
    monkeypatch.setattr(WebSocketWatch, "_read_no_more", ignore)


def lets_send_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def send(self: WebSocketWatch, message: Message) -> None:
        await self._send(message)

    monkeypatch.setattr(WebSocketWatch, "send", send)


def knows_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def exception(self: WebSocketWatch) -> WebSocketDisconnect:
        return WebSocketDisconnect()

    monkeypatch.setattr(WebSocketWatch, "exception", exception)


def reads_ahead_no_more_once_the_endpoint_has_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_on(self: WebSocketWatch) -> None:
        self._reads_ahead = False

    monkeypatch.setattr(WebSocketWatch, "read_on", read_on)


@pytest.mark.parametrize(
    "breaks",
    [
        drops_messages,
        reads_in_the_task_that_asks_on_all_servers,
        reports_the_disconnect_before_messages,
        takes_its_own_close_for_a_disconnect,
        lets_send_alone,
        knows_no_code,
        reads_ahead_no_more_once_the_endpoint_has_read,
        forgets_to_uncancel,
        leaves_its_task_behind,
        treats_no_call_as_notified,
        cancels_inside_shields,
        reads_twice_at_a_time,
    ],
)
def test_the_trials_of_websockets_find_a_variant_that(
    breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    with pytest.raises(BrokenPromise, match="seed"):
        run_trials(random_websockets.run_trial, "asyncio", range(TRIALS))

"""The demo: its chart, its exit status, and how it ends when it fails or is interrupted."""

from __future__ import annotations

import asyncio
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cancelonleave import __main__ as demo

MODULE = ["-u", "-m", "cancelonleave"]
WITHOUT_UVICORN = """
import runpy, sys
sys.modules["uvicorn"] = None
runpy.run_module("cancelonleave", run_name="__main__")
"""
MISSING = 'The demo needs uvicorn: pip install "cancelonleave[demo]"\n'
CHART = """\
            0 s                 1 s                 2 s                 3 s
plain       ██████████▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒
decorated   ██████████
                      ^ the client disconnected at 0.500 s

            stopped at   after disconnect    cleanup     transaction
plain          3.010 s             2.510 s   ran         15 rows committed
decorated      0.503 s             0.003 s   ran         3 rows rolled back"""
SLOW_CHART = """\
            0 s         1 s         2 s         3 s         4 s         5 s
plain       ######------------------------------------------------------
decorated   ######------
                  ^ the client disconnected at 0.500 s

            stopped at   after disconnect    cleanup     transaction
plain          5.000 s             4.500 s   ran         15 rows committed
decorated      1.000 s             0.500 s   cut short   5 rows committed"""


def start(*arguments: str, encoding: str = "utf-8") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding=encoding,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    with process:
        try:
            output, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    return process.returncode, output, errors


def test_the_chart() -> None:
    plain = demo.Run("plain", "", written=15, stopped=103.01, cleaned=True, kept=15)
    decorated = demo.Run("decorated", "", written=3, stopped=100.503, cleaned=True)
    assert demo.draw([plain, decorated], 100, 100.5, "utf-8") == CHART


def test_the_chart_of_a_slow_machine_in_ascii() -> None:
    plain = demo.Run("plain", "", written=15, stopped=5, cleaned=True, kept=15)
    decorated = demo.Run("decorated", "", written=5, stopped=1, kept=5)
    assert demo.draw([plain, decorated], 0, 0.5, "ascii") == SLOW_CHART


def test_a_terminal_gets_blocks_or_else_ascii() -> None:
    for process, worked, wasted in [(start(*MODULE), "█", "▒"), (start(*MODULE, encoding="ascii"), "#", "-")]:
        status, output, errors = end(process)
        assert (status, errors) == (0, "")
        assert max(len(line) for line in output.splitlines()) <= 80
        plain = re.search(rf"^plain +{worked}+{wasted}+$", output, re.MULTILINE)
        decorated = re.search(rf"^decorated +{worked}+{wasted}*$", output, re.MULTILINE)
        assert plain
        assert decorated
        assert len(decorated[0]) < len(plain[0])


def test_it_says_what_each_endpoint_did_and_what_to_do_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main([]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    disconnected = re.search(r"the client disconnected at (\d+\.\d+) s$", output, re.MULTILINE)
    plain = re.search(r"^plain +(\d+\.\d+) s +(\d+\.\d+) s +ran +15 rows committed$", output, re.MULTILINE)
    decorated = re.search(r"^decorated +(\d+\.\d+) s +(\d+\.\d+) s +ran +\d+ rows rolled back$", output, re.MULTILINE)
    assert disconnected
    assert plain
    assert decorated
    assert float(disconnected[1]) >= 0.5
    assert float(plain[2]) == pytest.approx(float(plain[1]) - float(disconnected[1]), abs=0.0021)
    assert float(decorated[2]) < float(plain[2])
    assert output.endswith(f"\n\nThe decorated endpoint stopped and rolled back.\n\n{demo.NEXT}\n")


def test_it_fails_if_the_decorated_endpoint_does_not_stop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "STEPS", 5)
    assert demo.main([], lambda endpoint: endpoint) == 1
    output = capsys.readouterr().out
    assert len(re.findall(" ran +5 rows committed", output)) == 2
    assert output.endswith("\n\nThe decorated endpoint did not stop and roll back.\n")


def test_it_gives_up_on_an_endpoint_that_never_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stuck(endpoint: demo.Endpoint) -> demo.Endpoint:
        async def sleeping() -> None:
            await asyncio.sleep(60)

        return sleeping

    monkeypatch.setattr(demo, "LIMIT", 0.5)
    assert demo.main([], stuck) == 1
    assert capsys.readouterr().err == "The endpoints did not start and end within 0.5 s.\n"


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["cancelonleave", "--help"])
    monkeypatch.delitem(sys.modules, "cancelonleave.__main__")
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("cancelonleave", run_name="__main__")
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python -m cancelonleave [-h]\n")


def test_help_without_the_extra() -> None:
    status, output, errors = end(start("-c", WITHOUT_UVICORN, "--help"))
    assert (status, errors) == (0, "")
    assert "usage: python -m cancelonleave" in output


def test_without_the_extra_it_says_what_to_install() -> None:
    assert end(start("-c", WITHOUT_UVICORN)) == (2, "", MISSING)


def test_without_the_extra_in_this_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert demo.main([]) == 2
    assert capsys.readouterr().err == MISSING


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let programs started here receive SIGINT, which shells have background processes ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_stops_the_server(times: int) -> None:
    process = start(*MODULE)
    assert process.stdout
    address = re.search(r"127\.0\.0\.1:(\d+)", process.stdout.readline())
    for _ in range(times):
        process.send_signal(signal.SIGINT)
    status, output, errors = end(process)
    assert (status, output.strip(), errors) == (130, "", "")
    assert address
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(address[1])))


def test_ctrl_c_in_this_process() -> None:
    def interrupted(endpoint: demo.Endpoint) -> demo.Endpoint:
        raise KeyboardInterrupt

    assert demo.main([], interrupted) == 130

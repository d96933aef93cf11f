from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cancelonleave.testing import Client
from servers import Server
from work import TRUSTS_SEND

README = Path(__file__).parent.parent.joinpath("README.md").read_text(encoding="utf-8")


def block(begin: str) -> str:
    """Return the first block of code whose language, and whatever more is given of it, is this."""
    found = re.search(rf"^```(?={begin}\n)\w+\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_example_prints_what_the_readme_says(tmp_path: Path) -> None:
    tmp_path.joinpath("report.py").write_text(block("python"), encoding="utf-8")
    server = Server("uvicorn-h11", "report:app", tmp_path / "log", "--app-dir", str(tmp_path))
    with socket.create_connection(server.address, timeout=30) as client:
        client.sendall(b"GET /report HTTP/1.1\r\nHost: test\r\n\r\n")
        server.wait_for_log("working")
    server.wait_for_log("stopped")
    log = server.stop()
    assert log == block("text")


@pytest.mark.parametrize("name", ["test_orders.py", "test_events.py"])
def test_the_examples_of_tests_pass(name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    tmp_path.joinpath(name).write_text(block(f"python\n# {name}"), encoding="utf-8")
    warnings = "\n  ".join(["filterwarnings =", *pytestconfig.getini("filterwarnings")])  # -W takes no patterns
    tmp_path.joinpath("pytest.ini").write_text(f"[pytest]\n{warnings}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:asyncio", "-p", "no:trio"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_said_of_the_stream_behind_gunicorn_is_true(tmp_path: Path) -> None:
    example = block("python\n# test_events.py").replace('["uvicorn", ', '["gunicorn", "strict", "uvicorn", ')
    tmp_path.joinpath("test_events.py").write_text(example, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:asyncio", "-p", "no:trio"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ("2 failed, 4 passed" if TRUSTS_SEND else "6 passed") in done.stdout
    assert ("still ran 1 s after the client left" in done.stdout) == TRUSTS_SEND


def test_there_are_two_commands_that_set_everything_up() -> None:
    commands = re.findall(r"^    (python3 -m venv .*)$", README, re.MULTILINE)
    assert [command.split(" -m ")[-1] for command in commands] == ["cancelonleave", "pytest -n 4"]


def example(name: str) -> Any:  # Any: an ASGI application
    """Run a file of the README's and return its application."""
    names: dict[str, Any] = {}  # Any: whatever is in it
    exec(compile(block(f"python\n# {name}"), name, "exec"), names)
    return names["app"]


@pytest.mark.anyio
async def test_the_sync_example_stops_when_its_client_leaves() -> None:
    exchange = await Client(example("primes.py")).get("/primes?below=10000000", leave_after=0.1)
    assert exchange.status == 499


@pytest.mark.anyio
async def test_the_sync_example_finds_primes() -> None:
    exchange = await Client(example("primes.py")).get("/primes?below=12")
    assert exchange.json() == [2, 3, 5, 7, 11]

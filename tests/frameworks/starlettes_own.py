"""Runs Starlette's own tests, from its sdist, with every endpoint undecorated, then decorated; prints the difference.

    .venv/bin/python -m tests.frameworks.starlettes_own

It needs pip and, besides the extra `test`, what Starlette's tests need (jinja2). This file is also the pytest plugin
that decorates the endpoints.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import starlette.endpoints
import starlette.routing

from cancelonleave import _loop, cancel_on_disconnect

DOWNLOAD = ["-m", "pip", "download", "-q", "--no-deps", "--no-binary", "starlette", "--no-build-isolation"]
PYTEST = [
    "-m",
    "pytest",
    "-q",
    "-rfE",
    "--no-header",
    "--tb=no",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:asyncio",
    "-p",
    "no:trio",
]
METHODS = {"get", "head", "post", "put", "patch", "delete", "options", "on_connect", "on_receive"}
TIMEOUT = 900  # seconds
decorated: list[object] = []


def decorate(endpoint: Callable[..., Any]) -> Any:  # Any: an endpoint takes and returns anything
    decorated.append(endpoint)
    return cancel_on_disconnect(endpoint)


def pytest_configure(config: pytest.Config) -> None:
    for name in ("request_response", "websocket_session"):
        setattr(starlette.routing, name, partial(decorate_function, getattr(starlette.routing, name)))
    for kind in (starlette.endpoints.HTTPEndpoint, starlette.endpoints.WebSocketEndpoint):
        setattr(kind, "__init_subclass__", classmethod(decorate_methods))  # noqa: B010 - it is typed more narrowly
    _loop.GRACE = 0  # seconds: watch at once


def decorate_function(into_application: Callable[..., Any], endpoint: Callable[..., Any]) -> Any:
    return into_application(decorate(endpoint))


def decorate_methods(kind: type) -> None:
    """Decorate the methods of a class that are endpoints; `on_disconnect()` is called after the disconnect."""
    for name in METHODS & vars(kind).keys():
        setattr(kind, name, decorate(vars(kind)[name]))


def pytest_report_collectionfinish() -> str:
    return f"{len(decorated)} endpoints decorated so far"


def failures(suite: Path, *arguments: str) -> set[str]:
    """Run the suite, and return the lines of pytest's summary for the tests that failed."""
    command = [sys.executable, *PYTEST, *arguments, "tests"]
    done = subprocess.run(command, cwd=suite, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    print(*(line for line in done.stdout.splitlines() if "endpoints decorated" in line))
    print(" ".join(arguments) or "undecorated", done.stdout.splitlines()[-1], sep=": ")
    return {line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))}


def main() -> None:
    version = metadata.version("starlette")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        subprocess.run([sys.executable, *DOWNLOAD, "-d", name, f"starlette=={version}"], check=True, timeout=TIMEOUT)
        with tarfile.open(next(directory.glob("*.tar.gz"))) as archive:
            archive.extractall(directory, filter="data")
        suite = directory / f"starlette-{version}"
        directory.joinpath("decorate.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
        plain = failures(suite)
        guarded = failures(suite, "-p", "decorate", "--override-ini", f"pythonpath={directory}")
    for line in sorted(guarded - plain):
        print("only decorated:", line)
    for line in sorted(plain - guarded):
        print("only undecorated:", line)


if __name__ == "__main__":
    main()

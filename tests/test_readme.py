"""The README: Sybil runs the code of each section, as somebody who reads it would."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from importlib import metadata
from pathlib import Path

import httpx
import pytest
from sybil import Example
from sybil.document import Document
from sybil.parsers.markdown import CodeBlockParser

from readme import README, TEXT, module
from work import TRUSTS_SEND

HEADINGS = ["# cancelonleave", *re.findall(r"^## .+$", TEXT, re.MULTILINE)]
TIMEOUT = 120  # seconds


# Of what Starlette 0.40, the oldest allowed, imports.
FILTER = "error\n  ignore:Please use .import python_multipart. instead:PendingDeprecationWarning"


class Reader:
    """Somebody who does with the code of a section what the README tells them to do."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "log"
        self.stack = ExitStack()
        self.url = ""

    def python(self, example: Example) -> None:
        name = example.parsed.split(maxsplit=2)[1]
        self.directory.joinpath(name).write_text(example.parsed, encoding="utf-8")
        if not name.startswith("test_"):
            module(name)

    def run_tests(self) -> None:
        if not list(self.directory.glob("test_*")):
            return
        self.directory.joinpath("pytest.ini").write_text(f"[pytest]\nfilterwarnings = {FILTER}\n")
        done = subprocess.run(
            [sys.executable, "-m", "pytest"],
            cwd=self.directory,
            env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def sh(self, example: Example) -> None:
        command, *arguments = shlex.split(example.parsed)
        if command == "uvicorn":
            self.uvicorn(*arguments)
        else:
            assert command == "curl"
            self.curl(*arguments)

    def uvicorn(self, *arguments: str) -> None:
        listener = self.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        log = self.stack.enter_context(self.log.open("wb"))
        command = [sys.executable, "-m", "uvicorn", *arguments, "--fd", str(listener.fileno())]
        server = subprocess.Popen(
            command, cwd=self.directory, pass_fds=[listener.fileno()], stdout=log, stderr=subprocess.STDOUT
        )
        self.stack.callback(server.wait)
        self.stack.callback(server.kill)
        self.url = "http://{}:{}".format(*listener.getsockname())
        assert httpx.get(f"{self.url}/openapi.json", timeout=TIMEOUT).is_success  # it has started

    def curl(self, option: str, seconds: str, url: str) -> None:
        assert option == "--max-time"
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(url.replace("http://127.0.0.1:8000", self.url), timeout=float(seconds))

    def text(self, example: Example) -> None:
        until = time.monotonic() + 30  # without the decorator it takes 60
        printed = False
        while not printed and time.monotonic() < until:
            time.sleep(0.01)
            printed = self.log.read_text() == example.parsed
        assert printed, self.log.read_text()


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    with reader.stack:
        yield reader


def parse(
    python: Callable[[Example], None], sh: Callable[[Example], None], text: Callable[[Example], None]
) -> Document:
    parsers = [CodeBlockParser("python", python), CodeBlockParser("sh", sh), CodeBlockParser("text", text)]
    return Document.parse(str(README), *parsers)


@pytest.mark.parametrize("heading", HEADINGS)
def test_the_code_of_a_section_does_what_it_says(heading: str, reader: Reader) -> None:
    begin = TEXT.index(f"{heading}\n")
    end = TEXT.find("\n## ", begin) % len(TEXT)
    for example in parse(python=reader.python, sh=reader.sh, text=reader.text).examples():
        if begin < example.start < end:
            example.evaluate()
    reader.run_tests()


@pytest.mark.parametrize("server", ["gunicorn", "strict"])
def test_what_is_said_of_the_stream_behind_gunicorn_is_true(server: str) -> None:
    test = module("test_events.py")["test_events_end_when_the_client_leaves"]
    with pytest.raises(AssertionError, match="still ran 1 s after") if TRUSTS_SEND else nullcontext():
        test(server)


def test_no_code_is_left_out() -> None:
    """But for two commands, which `.ci/run` runs, and the diagram."""
    fenced = re.compile(r"^```(.*)\n(?:.*\n)*?```$", re.MULTILINE)
    languages = fenced.findall(TEXT)
    assert set(languages) == {"python", "sh", "text", ""}
    assert languages.count("") == 1
    commands = re.findall(
        r"^ {4}(\S.*)$", re.sub(r"^```.*\n(?:.*\n)*?```$", "", TEXT, flags=re.MULTILINE), re.MULTILINE
    )
    assert [command.split(" -m ")[-1] for command in commands] == ["cancelonleave", "pytest -n 4"]


def test_what_it_links_to_is_there() -> None:
    links = re.findall(r"\]\((?!https://)([^)]+)\)", TEXT)
    assert links
    assert [link for link in links if not README.parent.joinpath(link).is_file()] == []


def test_the_changelog_begins_with_this_version() -> None:
    assert f"## Changelog\n\n### {metadata.version('cancelonleave')}\n" in TEXT

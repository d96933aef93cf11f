"""The README and the documents it links to: Sybil runs the code of each section, as a reader would."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement
from sybil import Example
from sybil.document import Document
from sybil.parsers.markdown import CodeBlockParser

from tests.shared.readme_code import README, TEXT, files, module

ROOT = README.parent
HEADINGS = ["# cancelonleave", *re.findall(r"^## .+$", TEXT, re.MULTILINE)]
TIMEOUT = 120  # seconds
PROJECT = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCUMENTS = [
    README,
    *ROOT.glob("tests/*.md"),
    ROOT.joinpath("benchmarks", "README.md"),
    *ROOT.glob("cancelonleave/**/*.md"),
]
BADGES = {
    "python": f"Python {PROJECT['requires-python'].removeprefix('>=')} or newer",
    "licence": f"Licence: {PROJECT['license']}",
    "typed": "Typed",
}

# Starlette 0.40, the oldest supported version, imports a module that warns.
FILTER = "error\n  ignore:Please use .import python_multipart. instead:PendingDeprecationWarning"


class Reader:
    """A reader who follows the instructions of a section."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "log"
        self.stack = ExitStack()
        self.url = ""
        for name, code in files().items():
            directory.joinpath(name).write_text(code, encoding="utf-8")

    def python(self, example: Example) -> None:
        name = example.parsed.split(maxsplit=2)[1]
        if name.startswith("test_"):
            self.pytest(name)
        else:
            module(name)

    def pytest(self, name: str) -> None:
        self.directory.joinpath("pytest.ini").write_text(f"[pytest]\nfilterwarnings = {FILTER}\n")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", name],
            cwd=self.directory,
            env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def sh(self, example: Example) -> None:
        commands: dict[str, Callable[..., None]] = {
            "curl": self.curl,
            "git": self.git,
            "pip": self.pip,
            "uvicorn": self.uvicorn,
        }
        for line in example.parsed.splitlines():
            command, *arguments = shlex.split(line)
            commands[command](*arguments)

    def git(self, command: str, url: str) -> None:
        assert command == "clone"
        assert url == PROJECT["urls"]["Source"]

    def pip(self, command: str, *packages: str) -> None:
        """Check that the packages are installed; `.ci/run` installs this project into clean environments."""
        assert command == "install"
        for package in packages:
            assert metadata.version(package.removeprefix("./"))

    def requirement(self, example: Example) -> None:
        requirement = Requirement(example.parsed.strip())
        assert requirement.name == PROJECT["name"]
        assert requirement.url == f"git+{PROJECT['urls']['Source']}"

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
            httpx.get(
                url.replace("http://127.0.0.1:8000", self.url), timeout=httpx.Timeout(TIMEOUT, read=float(seconds))
            )

    def text(self, example: Example) -> None:
        until = time.monotonic() + 30  # without the decorator it would take 60 seconds
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


def parse(reader: Reader) -> Document:
    evaluators = {
        "python": reader.python,
        "sh": reader.sh,
        "text": reader.text,
        "pip-requirements": reader.requirement,
    }
    return Document.parse(str(README), *[CodeBlockParser(*each) for each in evaluators.items()])


@pytest.mark.parametrize("heading", HEADINGS)
def test_the_code_of_a_section_does_what_the_section_says(heading: str, reader: Reader) -> None:
    begin = TEXT.index(f"{heading}\n")
    end = TEXT.find("\n## ", begin) % len(TEXT)
    for example in parse(reader).examples():
        if begin < example.start < end:
            example.evaluate()


def test_every_code_block_is_tested() -> None:
    """`.ci/run` runs the two commands that aren't tested here."""
    fenced = re.compile(r"^```(.*)\n(?:.*\n)*?```$", re.MULTILINE)
    assert set(fenced.findall(TEXT)) == {"python", "sh", "text", "pip-requirements"}
    commands = re.findall(r"^ {4}(\S.*)$", fenced.sub("", TEXT), re.MULTILINE)
    assert [command.split(" -m ")[-1] for command in commands] == ["cancelonleave", "pytest -n 4"]


def test_the_page_takes_five_minutes_to_read() -> None:
    page, _, _ = TEXT.partition("\n## Development\n")
    assert len(page.split()) <= 1500


def anchors(document: Path) -> set[str]:
    """Return what a link to a heading of the document ends with, by GitHub's rules."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_every_link_in_a_document_has_a_target(document: Path) -> None:
    links = re.findall(r"\]\((?!https://)([^)]*)\)", document.read_text(encoding="utf-8"))
    for link in links:
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", BADGES)
def test_a_badge_is_shown_and_true(name: str) -> None:
    assert f"[![{BADGES[name]}](benchmarks/badges/{name}.svg)]" in TEXT
    badge = ROOT.joinpath("benchmarks", "badges", f"{name}.svg").read_text(encoding="utf-8")
    assert f"<title>{BADGES[name]}</title>" in badge
    assert "Typing :: Typed" in PROJECT["classifiers"]


def test_the_changelog_begins_with_this_version() -> None:
    assert f"## Changelog\n\n### {metadata.version('cancelonleave')}\n" in TEXT

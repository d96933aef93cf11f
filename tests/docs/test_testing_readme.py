"""The README of the test client: its code passes, its tables are complete, and its links have targets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
from sybil import Example
from sybil.document import Document
from sybil.parsers.markdown import CodeBlockParser

import cancelonleave.testing
from cancelonleave.testing import Client, Exchange, Options
from cancelonleave.testing._faults import Check
from cancelonleave.testing._servers import TABLE
from tests.shared.asking import TRUSTS_SEND

README = Path(cancelonleave.testing.__file__).with_name("README.md")
TEXT = README.read_text(encoding="utf-8")


def blocks() -> dict[str, str]:
    """Return the files in the README by name."""
    found: dict[str, str] = {}

    def add(example: Example) -> None:
        found[example.parsed.split(maxsplit=2)[1]] = example.parsed

    for example in Document.parse(str(README), CodeBlockParser("python", add)).examples():
        example.evaluate()
    return found


def first_column(heading: str) -> list[str]:
    """Return the code in the first column of the table below a heading."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*) \|$", section, re.MULTILINE)
    return [code for row in rows for code in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


@pytest.mark.parametrize("name", blocks())
def test_the_code_passes_as_it_stands(name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    tmp_path.joinpath(name).write_text(blocks()[name], encoding="utf-8")
    settings = ["[pytest]", "filterwarnings =", *(f"  {line}" for line in pytestconfig.getini("filterwarnings"))]
    tmp_path.joinpath("pytest.ini").write_text("\n".join(settings), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "anyio.pytest_plugin"],
        cwd=tmp_path,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_code_block_is_python_and_is_run() -> None:
    languages = re.findall(r"^```(.*)\n(?:.*\n)*?```$", TEXT, re.MULTILINE)
    assert languages == ["python"] * len(blocks())


@pytest.mark.parametrize("server", ["gunicorn", "strict"])
def test_the_stream_that_is_not_decorated_runs_on_where_the_text_says_so(server: str) -> None:
    names: dict[str, Any] = {"__name__": "test_events"}  # Any: values of any type
    exec(compile(blocks()["test_events.py"], "test_events.py", "exec"), names)
    names["Client"] = partial(Client, timeout=0.5)
    with pytest.raises(AssertionError, match="still running") if TRUSTS_SEND else nullcontext():
        names["test_events_end_on_a_disconnect"](server)


def test_the_tables_are_complete() -> None:
    assert first_column("The request") == list(Options.__annotations__)
    assert [name.strip('"') for name in first_column("The checks")] == list(get_args(Check))
    assert sorted(name.strip('"') for name in first_column("Servers")) == sorted({*TABLE} - {"strict"})
    attributes = {name.removesuffix("()") for name in first_column("What you get back")}
    public = {name for name in (*Exchange.__annotations__, *dir(Exchange)) if not name.startswith("_")}
    assert attributes == public - {"request", "server"}  # which the test itself has chosen


def test_every_link_has_a_target() -> None:
    links = re.findall(r"\]\((?!https://)([^)]+)\)", TEXT)
    assert links
    assert [link for link in links if not README.parent.joinpath(link).is_file()] == []

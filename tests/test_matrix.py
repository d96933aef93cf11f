"""What the README's tables say of each server, measured on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import matrix
from cancelonleave.testing._servers import TABLE
from servers import HTTP1
from work import TRUSTS_SEND

README = Path(__file__).parent.parent.joinpath("README.md").read_text(encoding="utf-8")
# The one word that depends on the version of Starlette: it listened behind gunicorn, too.
EXPECTED = README if TRUSTS_SEND else README.replace("stops | runs on | stops |", "stops | stops | stops |")


@pytest.mark.parametrize("name", HTTP1)
def test_the_tables_say_what_the_server_does(name: str, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(EXPECTED, encoding="utf-8")
    matrix.update(readme, [name])
    lines = readme.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line not in EXPECTED.splitlines()] == []


def test_the_command_puts_what_it_measures_into_the_readme(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README.replace("| OSError |", "| never tried |"), encoding="utf-8")
    command = [sys.executable, str(Path(matrix.__file__)), str(readme), "gunicorn-http2"]
    subprocess.run(command, check=True, timeout=120)
    assert readme.read_text(encoding="utf-8") == README


@pytest.mark.parametrize("name", ["uvicorn", "hypercorn", "granian", "gunicorn", "daphne"])
def test_the_testing_client_has_servers_that_do_the_same(name: str) -> None:
    server = TABLE[name]
    cancelled = "false alarm" if server.disconnects_after_cancel else "right"
    words = {
        "`spec_version` of ASGI": server.spec_version or "none",
        "`receive()` after a complete response": "told" if server.disconnects_after_response else "waits",
        "body not yet read when the client leaves": "dropped" if server.drops_body else "kept",
        "`send()` when the client has left": "OSError" if server.raises_in_send else "silent",
        "`100 Continue`": "at once" if server.invites_body else "when read",
        "16 MiB that nobody reads": "all" if server.takes_body_first else "in part",
        "`receive()` again, after the disconnect | plain": "told again" if server.repeats_disconnect else "waits",
        "`receive()` cancelled, and called again | plain": "body lost" if server.loses_body_by_cancel else cancelled,
    }
    said = matrix.said(README)
    assert words == {question: said[question][name] for question in words}

"""The tables of tests/servers.md, measured again on each server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cancelonleave.testing._servers import TABLE
from tests.servers import measure_tables
from tests.servers.start import HTTP1
from tests.shared.asking import TRUSTS_SEND

DOCUMENT = Path(__file__).parent.parent.joinpath("servers.md").read_text(encoding="utf-8")
# One word depends on the version of Starlette: before 0.42 a StreamingResponse also listens on gunicorn.
EXPECTED = DOCUMENT if TRUSTS_SEND else DOCUMENT.replace("stops | runs on | stops |", "stops | stops | stops |")


@pytest.mark.parametrize("name", HTTP1)
def test_the_tables_say_what_the_server_does(name: str, tmp_path: Path) -> None:
    document = tmp_path / "servers.md"
    document.write_text(EXPECTED, encoding="utf-8")
    measure_tables.update(document, [name])
    lines = document.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line not in EXPECTED.splitlines()] == []


def test_the_command_puts_what_it_measures_into_the_document(tmp_path: Path) -> None:
    document = tmp_path / "servers.md"
    tables, rest = DOCUMENT.split("## WebSockets")  # its table was measured by hand
    document.write_text(tables.replace("| OSError |", "| never tried |") + "## WebSockets" + rest, encoding="utf-8")
    command = [sys.executable, "-m", measure_tables.__name__, str(document), "gunicorn-http2"]
    subprocess.run(command, check=True, timeout=120)
    assert document.read_text(encoding="utf-8") == DOCUMENT


@pytest.mark.parametrize("name", ["uvicorn", "hypercorn", "granian", "gunicorn", "daphne"])
def test_the_servers_of_the_test_client_behave_the_same(name: str) -> None:
    server = TABLE[name]
    cancelled = "false alarm" if server.disconnects_after_cancel else "right"
    words = {
        "`spec_version` of ASGI": server.spec_version or "none",
        "`receive()` after a complete response": "reported" if server.disconnects_after_response else "waits",
        "body not yet read when the client disconnects": "dropped" if server.drops_body else "kept",
        "`send()` after the disconnect": "OSError" if server.raises_in_send else "silent",
        "`100 Continue`": "at once" if server.continues_at_once else "when read",
        "16 MiB that the endpoint doesn't read": "all" if server.takes_body_first else "in part",
        "`receive()` again, after the disconnect | plain": "reported again" if server.repeats_disconnect else "waits",
        "`receive()` cancelled, and called again | plain": "body lost" if server.loses_body_by_cancel else cancelled,
    }
    said = measure_tables.said(DOCUMENT)
    assert words == {question: said[question][name] for question in words}

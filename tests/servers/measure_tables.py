"""Measures how servers report a disconnect, and what an endpoint then does, for the tables of tests/servers.md.

Run it as `python -m tests.servers.measure_tables tests/servers.md [SERVER...]`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path

import anyio

from tests.servers import questions
from tests.servers.remote_calls_client import Client
from tests.servers.start import COMMANDS, HTTP1, HTTP2, Server

BEGIN = "<!-- measured by: python -m tests.servers.measure_tables tests/servers.md -->\n\n"
END = "\n<!-- end of what is measured -->\n"

# All servers of a column behave the same.
COLUMNS = {
    "uvicorn": ["uvicorn-h11", "uvicorn-httptools"],
    "hypercorn": ["hypercorn-asyncio", "hypercorn-uvloop"],
    "hypercorn on trio": ["hypercorn-trio"],
    "granian": ["granian-asyncio", "granian-uvloop"],
    "gunicorn": ["gunicorn", "gunicorn-http2"],
    "daphne": ["daphne"],
}

# By default these two cancel the application 3 and 10 seconds after the disconnect.
OPTIONS = {"gunicorn": ["--asgi-disconnect-grace-period", "60"], "daphne": ["--application-close-timeout", "60"]}

TIMEOUT = 120  # seconds for all questions to one server, on a busy machine
Probe = Callable[[Client], Awaitable[str]]
Words = dict[str, dict[str, str]]  # by row, by column

REPORTS: dict[str, Probe] = {
    "`spec_version` of ASGI": questions.spec_version,
    "client disconnects": questions.disconnect,
    "client closes its sending side only": questions.half_close,
    "`receive()` after a complete response": questions.receive_after_response,
    "body not yet read when the client disconnects": questions.unread_body,
    "`send()` after the disconnect": questions.send_after_disconnect,
    "`100 Continue`": questions.expect_continue,
    "16 MiB that the endpoint doesn't read": questions.big_upload,
    "TCP keep-alive": questions.keep_alive,
}
REPORTS_ON_HTTP2: dict[str, Probe] = {
    "HTTP/2: client resets one of two streams": questions.reset_stream,
    "HTTP/2: `send()` to that stream": questions.send_after_reset,
}
PLAIN_OR_DECORATED = {
    "client disconnects": questions.waiting,
    "client disconnects during a `StreamingResponse`": questions.streaming,
    "`receive()` again, after the disconnect": questions.receiving_again,
    "`receive()` cancelled, and called again": questions.giving_up,
    "`is_disconnected()` called several times": questions.polling,
    "`body()` after `is_disconnected()`": questions.reading_after_polling,
}
DECORATED = {
    "client disconnects, 32 KiB are unread": questions.small_upload,
    "client disconnects, 256 KiB are unread": questions.large_upload,
    "client disconnects, still waiting for `100 Continue`": questions.upload_awaiting_continue,
    "client closes its sending side only": questions.half_closing,
    "client pipelines a request, then disconnects": questions.pipelining,
}
ENDPOINTS: dict[str, Probe] = {
    **{
        f"{title} | {kind}": partial(probe, kind=kind)
        for title, probe in PLAIN_OR_DECORATED.items()
        for kind in ("plain", "decorated")
    },
    **{f"{title} | decorated": partial(probe, kind="decorated") for title, probe in DECORATED.items()},
}


def update(document: Path, names: Iterable[str]) -> None:
    """Measure what the tables say about these servers, and update the tables."""
    text = document.read_text(encoding="utf-8")
    words = said(text)
    for name in names:
        (column,) = [column for column in COLUMNS if name in COLUMNS[column]]
        for question, word in measure(name).items():
            words.setdefault(question, {})[column] = word
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    tables = (
        table("what a server reports", REPORTS | REPORTS_ON_HTTP2, words)
        + "\n"
        + table("what an endpoint does | ", ENDPOINTS, words)
    )
    document.write_text(before + BEGIN + tables + END + after, encoding="utf-8")


def said(text: str) -> Words:
    """Return the contents of the tables, by question and server."""
    lines = text.split(BEGIN)[1].split(END)[0].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line]
    return {" | ".join(row[: -len(COLUMNS)]): dict(zip(COLUMNS, row[-len(COLUMNS) :], strict=True)) for row in rows}


def table(corner: str, rows: Iterable[str], words: Words) -> str:
    lines = [[row, *(words.get(row, {}).get(column, "-") for column in COLUMNS)] for row in rows]
    head = [[corner, *COLUMNS], ["---"] * (corner.count("|") + 1 + len(COLUMNS))]
    return "".join(f"| {' | '.join(line)} |\n" for line in head + lines)


def measure(name: str) -> dict[str, str]:
    """Return a server's answers to the questions that apply to it."""
    questions = (REPORTS | ENDPOINTS if name in HTTP1 else {}) | (REPORTS_ON_HTTP2 if name in HTTP2 else {})
    with tempfile.TemporaryDirectory() as directory:
        server = Server(name, "tests.servers.remote_calls:app", Path(directory, "log"), *OPTIONS.get(name, []))
        try:
            return anyio.run(_ask_all, server, questions)
        finally:
            server.stop(within=2)


async def _ask_all(server: Server, questions: dict[str, Probe]) -> dict[str, str]:
    words: dict[str, str] = {}

    async def ask(question: str) -> None:
        words[question] = await questions[question](client)

    with anyio.fail_after(TIMEOUT):
        async with Client(server) as client, anyio.create_task_group() as tasks:
            for question in questions:
                tasks.start_soon(ask, question)
    return words


if __name__ == "__main__":
    update(Path(sys.argv[1]), sys.argv[2:] or COMMANDS)

"""Measures how servers tell of a client that leaves, and what becomes of an endpoint then, for the README's tables.

Run as `python tests/matrix.py README.md [SERVER...]`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path

import anyio

import probes
from puppeteer import Client
from servers import COMMANDS, HTTP1, HTTP2, Server

BEGIN = "<!-- measured by: python tests/matrix.py README.md -->\n\n"
END = "\n<!-- end of what is measured -->\n"

# Each column is what all its servers do.
COLUMNS = {
    "uvicorn": ["uvicorn-h11", "uvicorn-httptools"],
    "hypercorn": ["hypercorn-asyncio", "hypercorn-uvloop"],
    "hypercorn on trio": ["hypercorn-trio"],
    "granian": ["granian-asyncio", "granian-uvloop"],
    "gunicorn": ["gunicorn", "gunicorn-http2"],
    "daphne": ["daphne"],
}

# Else these two would cancel the application 3 and 10 seconds after the leave.
OPTIONS = {"gunicorn": ["--asgi-disconnect-grace-period", "60"], "daphne": ["--application-close-timeout", "60"]}

ENOUGH = 120  # seconds for all questions to one server, on a machine with much else to do
Probe = Callable[[Client], Awaitable[str]]
Words = dict[str, dict[str, str]]  # by row, by column

TELLS: dict[str, Probe] = {
    "`spec_version` of ASGI": probes.spec_version,
    "client leaves": probes.leave,
    "client closes its sending side only": probes.half_close,
    "`receive()` after a complete response": probes.receive_after_response,
    "body not yet read when the client leaves": probes.unread_body,
    "`send()` when the client has left": probes.send_after_leave,
    "`100 Continue`": probes.invitation,
    "16 MiB that nobody reads": probes.big_upload,
    "TCP keep-alive": probes.keep_alive,
}
TELLS_ON_HTTP2: dict[str, Probe] = {
    "HTTP/2: client resets one of two streams": probes.reset_stream,
    "HTTP/2: `send()` to that stream": probes.send_after_reset,
}
PLAIN_OR_DECORATED = {
    "client leaves": probes.waiting,
    "client leaves its `StreamingResponse`": probes.streaming,
    "`receive()` again, after the disconnect": probes.receiving_again,
    "`receive()` cancelled, and called again": probes.giving_up,
    "`is_disconnected()` asked again and again": probes.polling,
    "`body()` after `is_disconnected()`": probes.reading_after_polling,
}
DECORATED = {
    "client leaves, 32 KiB are unread": probes.small_upload,
    "client leaves, 256 KiB are unread": probes.large_upload,
    "client leaves, `100 Continue` is still due": probes.uninvited_upload,
    "client closes its sending side only": probes.half_closing,
    "client pipelines a request, then leaves": probes.pipelining,
}
BECOMES: dict[str, Probe] = {
    **{
        f"{title} | {kind}": partial(probe, kind=kind)
        for title, probe in PLAIN_OR_DECORATED.items()
        for kind in ("plain", "decorated")
    },
    **{f"{title} | decorated": partial(probe, kind="decorated") for title, probe in DECORATED.items()},
}


def update(readme: Path, names: Iterable[str]) -> None:
    """Measure what the tables say of these servers, and write it there."""
    text = readme.read_text(encoding="utf-8")
    words = said(text)
    for name in names:
        (column,) = [column for column in COLUMNS if name in COLUMNS[column]]
        for question, word in measure(name).items():
            words.setdefault(question, {})[column] = word
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    tables = (
        table("what a server tells", TELLS | TELLS_ON_HTTP2, words) + "\n" + table("an endpoint | ", BECOMES, words)
    )
    readme.write_text(before + BEGIN + tables + END + after, encoding="utf-8")


def said(text: str) -> Words:
    """Return what the tables say."""
    lines = text.split(BEGIN)[1].split(END)[0].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line]
    return {" | ".join(row[: -len(COLUMNS)]): dict(zip(COLUMNS, row[-len(COLUMNS) :], strict=True)) for row in rows}


def table(corner: str, rows: Iterable[str], words: Words) -> str:
    lines = [[row, *(words.get(row, {}).get(column, "-") for column in COLUMNS)] for row in rows]
    head = [[corner, *COLUMNS], ["---"] * (corner.count("|") + 1 + len(COLUMNS))]
    return "".join(f"| {' | '.join(line)} |\n" for line in head + lines)


def measure(name: str) -> dict[str, str]:
    """Return what the server answers to those questions that can be asked of it."""
    questions = (TELLS | BECOMES if name in HTTP1 else {}) | (TELLS_ON_HTTP2 if name in HTTP2 else {})
    with tempfile.TemporaryDirectory() as directory:
        server = Server(name, "puppet:app", Path(directory, "log"), *OPTIONS.get(name, []))
        try:
            return anyio.run(_ask_all, server, questions)
        finally:
            server.stop(within=2)


async def _ask_all(server: Server, questions: dict[str, Probe]) -> dict[str, str]:
    words: dict[str, str] = {}

    async def ask(question: str) -> None:
        words[question] = await questions[question](client)

    with anyio.fail_after(ENOUGH):
        async with Client(server) as client, anyio.create_task_group() as tasks:
            for question in questions:
                tasks.start_soon(ask, question)
    return words


if __name__ == "__main__":
    update(Path(sys.argv[1]), sys.argv[2:] or COMMANDS)

"""Hundreds of clients that disconnect at any time, some just as the response arrives."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import Counter
from contextlib import suppress

from tests.servers.client import APPS, TIMEOUT, Live, groups

DISCONNECTS = 500
AT_ONCE = 20
ENDS = [
    [],
    ["on_disconnect"],  # its client had disconnected before the endpoint could begin
    ["begun", "answer"],
    ["begun", "Cancelled", "clean", "on_disconnect"],
    ["begun", "ClientDisconnect", "clean", "on_disconnect"],
]


async def visit(live: Live, key: str) -> None:
    """Send a request that takes up to 0.1 s, or a part of it, and disconnect before, during or after the response."""
    after = random.uniform(0, 0.1)
    target = f"/{random.choice(APPS)}/answer?key={key}&after={after}"
    size = random.choice([0, 5, 5000])
    sent = random.choice([size, size, size // 2])
    reader, writer = await asyncio.open_connection(*live.address)
    method = "POST" if size else "GET"
    writer.write(f"{method} {target} HTTP/1.1\r\nHost: test\r\nContent-Length: {size}\r\n\r\n".encode())
    writer.write(bytes(sent))
    until_answered = TIMEOUT if sent == size else 0.1
    wait = random.choice([random.uniform(0, after), after + random.uniform(-0.001, 0.005), until_answered])
    with suppress(TimeoutError):
        async with asyncio.timeout(max(wait, 0)):
            await reader.read(1)
    if random.random() < 0.5:  # send RST instead of FIN
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


async def visits(live: Live, group: str) -> None:
    numbers = iter(range(DISCONNECTS))

    async def visit_again() -> None:
        for number in numbers:
            await visit(live, f"{group}.{number}")

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(visit_again())


def test_each_request_ends_exactly_once_and_leaves_nothing_behind(live: Live) -> None:
    group = str(next(groups))
    before, records = live.census(), live.records()
    asyncio.run(visits(live, group))
    events = live.wait_for(group, lambda events: all(end in ENDS for end in events.values()))
    assert [end for end in events.values() if end not in ENDS] == []
    assert live.left_behind(before) == {}
    ends = Counter(end[-1] for end in events.values())
    assert ends["answer"] > 0
    assert ends["on_disconnect"] == live.records() - records > 0

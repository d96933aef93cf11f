"""What a server tells of a client that leaves, and what becomes of an endpoint: a question each, answered in a word."""

from __future__ import annotations

from pathlib import Path

import anyio
from anyio.abc import SocketAttribute

from puppeteer import Client, Exchange, head, length

EXPECT = "Expect: 100-continue\r\n"


async def spec_version(client: Client) -> str:
    async with client.request() as exchange:
        return await exchange.ask("spec_version")


async def leave(client: Client) -> str:
    told: set[str] = set()
    for how in ("FIN", "RST"):
        async with client.request() as exchange:
            await exchange.ask("receive")
            await exchange.leave(how)
            told.add(await exchange.ask("receive"))
    return "told" if told == {"disconnect"} else "not told"


async def half_close(client: Client) -> str:
    async with client.request() as exchange:
        await exchange.ask("receive")
        await exchange.connection.send_eof()
        told = await exchange.ask("receive") == "disconnect"
        await exchange.ask("answer")
        answered = "answer" in await exchange.answer()
        return ("told" if told else "not told") + (", answer arrives" if answered else ", answer lost")


async def receive_after_response(client: Client) -> str:
    async with client.request() as exchange:
        await exchange.ask("receive")
        await exchange.ask("answer")
        return "told" if await exchange.ask("receive") == "disconnect" else "waits"


async def unread_body(client: Client) -> str:
    async with client.request(more=length(5), body=b"12345") as exchange:
        await exchange.leave()
        return "kept" if await exchange.ask("receive") == "5 bytes" else "dropped"


async def invitation(client: Client) -> str:
    async with client.request(more=length(5) + EXPECT) as exchange:
        return "at once" if "100" in await exchange.answer() else "when read"


async def big_upload(client: Client) -> str:
    async with client.request(more=length(2**24)) as exchange:
        for _ in range(2**8):
            with anyio.move_on_after(3) as stuck:
                await exchange.connection.send(bytes(2**16))
            if stuck.cancelled_caught:
                return "in part"
        return "all"


async def send_after_leave(client: Client) -> str:
    async with client.request() as exchange:
        await exchange.ask("begin_answer")
        await exchange.leave()
        return "silent" if {await exchange.ask("send_piece") for _ in range(3)} == {"sent"} else "OSError"


async def keep_alive(client: Client) -> str:
    async with client.request() as exchange:
        return "on" if "02" in timers(exchange) else "off"


async def reset_stream(client: Client) -> str:
    async with client.streams() as (stays, leaves, reset):
        for exchange in (stays, leaves):
            await exchange.ask("receive")
        await reset()
        told = [await exchange.ask("receive") == "disconnect" for exchange in (leaves, stays)]
        return "told" if told == [True, False] else "not told"


async def send_after_reset(client: Client) -> str:
    async with client.streams() as (_, leaves, reset):
        await leaves.ask("begin_answer")
        await reset()
        return "silent" if await leaves.ask("send_piece") == "sent" else "OSError"


async def waiting(client: Client, kind: str) -> str:
    async with client.request(f"/{kind}") as exchange:
        await exchange.leave()
        return await end(exchange)


async def streaming(client: Client, kind: str) -> str:
    async with client.request(f"/{kind}-stream") as exchange:
        await exchange.leave()
        return await end(exchange)


async def polling(client: Client, kind: str) -> str:
    async with client.request(f"/{kind}") as exchange:
        answers = [await exchange.ask("is_disconnected") for _ in range(4)]
        return "false alarm" if "True" in answers else "right"


async def reading_after_polling(client: Client, kind: str) -> str:
    async with client.request(f"/{kind}", length(5), b"12345") as exchange:
        await exchange.ask("is_disconnected")
        return "whole" if await exchange.ask("body") == "5 bytes" else "lost"


async def receiving_again(client: Client, kind: str) -> str:
    async with client.request(f"/{kind}") as exchange:
        for _ in range(2):
            await exchange.ask("receive")
        await exchange.leave()
        told = [await exchange.ask("receive") == "disconnect" for _ in range(3)]
        return "told again" if all(told) else "waits"


async def giving_up(client: Client, kind: str) -> str:
    async with client.request(f"/{kind}", length(160)) as exchange, anyio.create_task_group() as tasks:
        tasks.start_soon(exchange.send_slowly, 20)
        while (read := await exchange.ask("read_and_give_up")) == "nothing":
            pass
        if read != "160 bytes":
            return "body lost"
    async with client.request(f"/{kind}") as exchange:
        await exchange.ask("receive")
        await exchange.ask("wait_and_give_up")
        return "false alarm" if await exchange.ask("receive") == "disconnect" else "right"


async def pipelining(client: Client, kind: str) -> str:
    async with client.request(f"/{kind}") as exchange:
        await exchange.ask("is_disconnected")  # then the decorator's watch has begun
        await exchange.connection.send(head())
        await exchange.let_it_sink_in()
        await exchange.leave()
        return await end(exchange)


async def half_closing(client: Client, kind: str) -> str:
    async with client.request(f"/{kind}") as exchange:
        await exchange.connection.send_eof()
        return await end(exchange)


async def small_upload(client: Client, kind: str) -> str:
    async with client.request(f"/{kind}", length(2**15), bytes(2**15)) as exchange:
        await exchange.leave()
        return await end(exchange)


async def large_upload(client: Client, kind: str) -> str:
    async with client.request(f"/{kind}", length(2**18), bytes(2**18)) as exchange:
        await exchange.leave()
        return await end_when_read(exchange)


async def uninvited_upload(client: Client, kind: str) -> str:
    async with client.request(f"/{kind}", length(5) + EXPECT, b"12345") as exchange:
        await exchange.leave()
        return await end_when_read(exchange)


def timers(exchange: Exchange) -> list[str]:
    """Return which timers the server's end of a connection has, where the system tells: 02 is that of keep-alive."""
    system = Path("/proc/net/tcp")
    sockets = system.read_text(encoding="ascii").splitlines() if system.exists() else []
    ours = exchange.connection.extra(SocketAttribute.local_port)
    theirs = exchange.connection.extra(SocketAttribute.remote_port)
    return [line.split()[5][:2] for line in sockets if f"0100007F:{theirs:04X} 0100007F:{ours:04X}" in line]


async def end(exchange: Exchange) -> str:
    return "runs on" if await exchange.ask("ended") == "nothing" else "stops"


async def end_when_read(exchange: Exchange) -> str:
    before = await end(exchange)
    read = await exchange.ask("body")
    is_told = read == "ClientDisconnect" or await end(exchange) == "stops"
    return "when it reads" if before == "runs on" and is_told else before

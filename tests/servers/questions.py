"""The questions of tests/servers.md: each function measures the answer on a server, and returns it in one word."""

from __future__ import annotations

from pathlib import Path

import anyio
from anyio.abc import SocketAttribute

from tests.servers.remote_calls_client import Client, Exchange, head, length

EXPECT = "Expect: 100-continue\r\n"


async def spec_version(client: Client) -> str:
    async with client.request() as exchange:
        return await exchange.ask("spec_version")


async def disconnect(client: Client) -> str:
    received: set[str] = set()
    for how in ("FIN", "RST"):
        async with client.request() as exchange:
            await exchange.ask("receive")
            await exchange.disconnect(how)
            received.add(await exchange.ask("receive"))
    return "reported" if received == {"disconnect"} else "not reported"


async def half_close(client: Client) -> str:
    async with client.request() as exchange:
        await exchange.ask("receive")
        await exchange.connection.send_eof()
        is_reported = await exchange.ask("receive") == "disconnect"
        await exchange.ask("answer")
        answered = "answer" in await exchange.answer()
        return ("reported" if is_reported else "not reported") + (", answer arrives" if answered else ", answer lost")


async def receive_after_response(client: Client) -> str:
    async with client.request() as exchange:
        await exchange.ask("receive")
        await exchange.ask("answer")
        return "reported" if await exchange.ask("receive") == "disconnect" else "waits"


async def unread_body(client: Client) -> str:
    async with client.request(more=length(5), body=b"12345") as exchange:
        await exchange.disconnect()
        return "kept" if await exchange.ask("receive") == "5 bytes" else "dropped"


async def expect_continue(client: Client) -> str:
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


async def send_after_disconnect(client: Client) -> str:
    async with client.request() as exchange:
        await exchange.ask("begin_answer")
        await exchange.disconnect()
        return "silent" if {await exchange.ask("send_chunk") for _ in range(3)} == {"sent"} else "OSError"


async def keep_alive(client: Client) -> str:
    async with client.request() as exchange:
        return "on" if "02" in timers(exchange) else "off"


async def reset_stream(client: Client) -> str:
    async with client.streams() as (stays, disconnects, reset):
        for exchange in (stays, disconnects):
            await exchange.ask("receive")
        await reset()
        reported = [await exchange.ask("receive") == "disconnect" for exchange in (disconnects, stays)]
        return "reported" if reported == [True, False] else "not reported"


async def send_after_reset(client: Client) -> str:
    async with client.streams() as (_, disconnects, reset):
        await disconnects.ask("begin_answer")
        await reset()
        return "silent" if await disconnects.ask("send_chunk") == "sent" else "OSError"


async def waiting(client: Client, kind: str) -> str:
    async with client.request(f"/{kind}") as exchange:
        await exchange.disconnect()
        return await end(exchange)


async def streaming(client: Client, kind: str) -> str:
    async with client.request(f"/{kind}-stream") as exchange:
        await exchange.disconnect()
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
        await exchange.ask("receive")
        await exchange.ask("receive_thrice")  # this waits for the disconnect
        await exchange.disconnect()
        reported = await exchange.ask("receive_thrice")
        return "reported again" if reported == "disconnect disconnect disconnect" else "waits"


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
        await exchange.ask("is_disconnected")  # from now on the decorator watches for the disconnect
        await exchange.connection.send(head())
        await exchange.let_it_sink_in()
        await exchange.disconnect()
        return await end(exchange)


async def half_closing(client: Client, kind: str) -> str:
    async with client.request(f"/{kind}") as exchange:
        await exchange.connection.send_eof()
        return await end(exchange)


async def small_upload(client: Client, kind: str) -> str:
    async with client.request(f"/{kind}", length(2**15), bytes(2**15)) as exchange:
        await exchange.disconnect()
        return await end(exchange)


async def large_upload(client: Client, kind: str) -> str:
    async with client.request(f"/{kind}", length(2**18), bytes(2**18)) as exchange:
        await exchange.disconnect()
        return await end_when_read(exchange)


async def upload_awaiting_continue(client: Client, kind: str) -> str:
    async with client.request(f"/{kind}", length(5) + EXPECT, b"12345") as exchange:
        await exchange.disconnect()
        return await end_when_read(exchange)


def timers(exchange: Exchange) -> list[str]:
    """Return the timers of the server's end of a connection, as Linux lists them; 02 is keep-alive."""
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
    is_stopped = read == "ClientDisconnect" or await end(exchange) == "stops"
    return "when it reads" if before == "runs on" and is_stopped else before

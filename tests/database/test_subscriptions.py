"""The subscriptions of a WebSocket endpoint end when its client disconnects."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Annotated, Any

import anyio
import pytest
from fastapi import Depends, FastAPI, WebSocket, WebSocketDisconnect

from benchmarks.shared.postgres import NEEDED, is_installed, postgres
from cancelonleave import cancel_on_disconnect
from tests.shared.websocket_in_memory import Socket, connected

asyncpg: Any = import_module("asyncpg")  # Any: it has no types
DISCONNECTS = 200
AT_ONCE = 10


class Broker:
    """Puts each message into the queue of each subscriber, as a Redis client does."""

    def __init__(self) -> None:
        self.queues: set[asyncio.Queue[str]] = set()

    @asynccontextmanager
    async def subscribe(self) -> AsyncGenerator[AsyncIterator[str]]:
        queue = asyncio.Queue[str]()
        self.queues.add(queue)

        async def messages() -> AsyncIterator[str]:
            while True:
                yield await queue.get()

        try:
            yield messages()
        finally:
            await asyncio.sleep(0.001)  # UNSUBSCRIBE
            self.queues.discard(queue)


async def disconnect_often(app: FastAPI) -> None:
    async def visit(number: int) -> None:
        async with connected(app, Socket("/prices")) as socket:
            await anyio.sleep(number % 7 / 100)
            socket.close(1001)
        assert socket.error is None

    for begin in range(0, DISCONNECTS, AT_ONCE):
        async with anyio.create_task_group() as tasks:
            for number in range(begin, begin + AT_ONCE):
                tasks.start_soon(visit, number)


async def of_queues() -> None:
    app = FastAPI()
    broker = Broker()

    @app.websocket("/prices")
    @cancel_on_disconnect
    async def prices(websocket: WebSocket) -> None:
        await websocket.accept()
        async with broker.subscribe() as messages:
            async for message in messages:
                await websocket.send_text(message)

    tasks = asyncio.all_tasks()
    async with anyio.create_task_group() as group:

        async def publish() -> None:
            while True:
                for queue in broker.queues:
                    queue.put_nowait("price")
                await asyncio.sleep(0.003)

        group.start_soon(publish)
        await disconnect_often(app)
        group.cancel_scope.cancel()
    assert broker.queues == set()
    assert asyncio.all_tasks() == tasks


async def of_postgresql() -> None:
    app = FastAPI()
    rolled_back = 0
    async with asyncpg.create_pool(min_size=AT_ONCE, max_size=AT_ONCE) as pool:

        async def session() -> AsyncGenerator[Any]:
            nonlocal rolled_back
            async with pool.acquire() as connection:
                try:
                    yield connection
                except WebSocketDisconnect:
                    rolled_back += 1
                    raise

        @app.websocket("/prices")
        @cancel_on_disconnect
        async def prices(websocket: WebSocket, connection: Annotated[Any, Depends(session)]) -> None:
            await websocket.accept()
            queue = asyncio.Queue[str]()

            def listener(*arguments: str) -> None:
                queue.put_nowait(arguments[-1])

            await connection.add_listener("prices", listener)
            try:
                await connection.execute("NOTIFY prices, 'the first'")
                while True:
                    await websocket.send_text(await queue.get())
            finally:
                await connection.remove_listener("prices", listener)

        tasks = asyncio.all_tasks()
        await disconnect_often(app)
        assert asyncio.all_tasks() == tasks
        async with pool.acquire() as connection:
            assert await connection.fetch("SELECT pg_listening_channels()") == []
        assert pool.get_idle_size() == AT_ONCE
    assert rolled_back == DISCONNECTS


def test_a_disconnect_removes_every_queue_subscription() -> None:
    asyncio.run(of_queues())


@pytest.mark.skipif(not is_installed(), reason=NEEDED)
def test_a_disconnect_removes_every_postgresql_listener_and_session(monkeypatch: pytest.MonkeyPatch) -> None:
    with postgres() as directory:
        monkeypatch.setenv("PGHOST", str(directory))
        monkeypatch.setenv("PGUSER", "postgres")
        asyncio.run(of_postgresql())

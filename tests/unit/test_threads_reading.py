"""Threads that read the request with their own event loop, like `asyncio.run(request.json())` in a sync endpoint."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import pytest
from fastapi import Depends, FastAPI, Request
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive

from cancelonleave import cancel_on_disconnect
from cancelonleave._loop import loop_of
from cancelonleave._watch import LEARN, Watch, watch_of
from cancelonleave.testing import SERVERS, Client, Exchange
from tests.conftest import BACKENDS
from tests.shared.asking import LONGER_THAN_GRACE

pytestmark = pytest.mark.anyio

T = TypeVar("T")
Read = Callable[[Request], Awaitable[object]]
ALL_SERVERS = ("strict", *SERVERS)
BODY = b'{"a": 1}'
on_asyncio = pytest.mark.parametrize(
    "anyio_backend", [BACKENDS["asyncio"], BACKENDS["uvloop"]], ids=["asyncio", "uvloop"]
)
FORM = {"content-type": "application/x-www-form-urlencoded"}


def run(read: Callable[[Request], Awaitable[T]], request: Request) -> T:
    """Read with `asyncio.run()`, for at most five seconds, since nothing can end a thread that hangs."""

    async def main() -> T:
        with anyio.fail_after(5):
            return await read(request)

    return asyncio.run(main())


async def body(request: Request) -> object:
    return (await request.body()).decode()


async def parsed(request: Request) -> object:
    return str(await request.json())


async def streamed(request: Request) -> object:
    return b"".join([chunk async for chunk in request.stream()]).decode()


async def form(request: Request) -> object:
    return str((await request.form())["b"])


async def asked_and_read(request: Request) -> object:
    assert not await request.is_disconnected()
    return (await request.body()).decode()


READS: list[tuple[Read, object]] = [
    (body, BODY.decode()),
    (parsed, "{'a': 1}"),
    (streamed, BODY.decode()),
]

# Where threads read.

Site = Callable[[Callable[[Request], object]], ASGIApp]


def route(endpoint: Any) -> ASGIApp:  # Any: whatever Route takes
    return Starlette(routes=[Route("/", endpoint, methods=["POST"])])


def starlette_endpoint(work: Callable[[Request], object]) -> ASGIApp:
    @cancel_on_disconnect
    def endpoint(request: Request) -> Response:
        return JSONResponse(work(request))

    return route(endpoint)


def fastapi_endpoint(work: Callable[[Request], object]) -> ASGIApp:
    app = FastAPI()

    @app.post("/")
    @cancel_on_disconnect
    def endpoint(request: Request) -> object:
        return work(request)

    return app


def fastapi_dependency(work: Callable[[Request], object]) -> ASGIApp:
    app = FastAPI()

    @cancel_on_disconnect
    def dependency(request: Request) -> object:
        return work(request)

    needed = Depends(dependency)

    @app.post("/")
    @cancel_on_disconnect
    async def endpoint(result: Any = needed) -> object:  # Any: FastAPI would take any other type for a body
        await anyio.sleep(0.001)
        return result

    return app


def async_endpoint(work: Callable[[Request], object]) -> ASGIApp:
    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        return JSONResponse(await anyio.to_thread.run_sync(work, request))

    return route(endpoint)


SITES: tuple[Site, ...] = (starlette_endpoint, fastapi_endpoint, fastapi_dependency, async_endpoint)


def asyncio_to_thread(work: Callable[[Request], object]) -> ASGIApp:
    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(lambda: work(request)))

    return route(endpoint)


async def at_once() -> AsyncIterator[bytes]:
    for place in range(len(BODY)):
        yield BODY[place : place + 1]


async def later() -> AsyncIterator[bytes]:
    for place in range(0, len(BODY), 2):
        await anyio.sleep(0.02)
        yield BODY[place : place + 2]


Content = Callable[[], bytes | AsyncIterator[bytes]]
CONTENTS = pytest.mark.parametrize(
    "content", [lambda: BODY, at_once, later], ids=["complete", "chunks", "later chunks"]
)


async def post(app: ASGIApp, server: str = "strict", **options: Any) -> Exchange:  # Any: see Client
    with anyio.fail_after(10):
        exchange = await Client(app, server=server).post("/", **options)
    assert exchange.error is None, exchange
    return exchange


@pytest.mark.parametrize(("read", "result"), READS)
@pytest.mark.parametrize("site", SITES)
@CONTENTS
async def test_a_thread_that_reads_gets_the_whole_body(
    site: Site, read: Read, result: object, content: Content
) -> None:
    exchange = await post(site(lambda request: run(read, request)), content=content())
    assert exchange.json() == result


@pytest.mark.parametrize(("read", "result"), READS)
@pytest.mark.parametrize("site", SITES)
@CONTENTS
async def test_a_thread_that_reads_late_gets_the_whole_body(
    site: Site, read: Read, result: object, content: Content
) -> None:
    def work(request: Request) -> object:
        time.sleep(LONGER_THAN_GRACE)  # until the watch has begun, and perhaps has read ahead
        return run(read, request)

    assert (await post(site(work), content=content())).json() == result


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("server", ALL_SERVERS)
@CONTENTS
async def test_a_thread_gets_the_whole_body_on_every_server(site: Site, server: str, content: Content) -> None:
    exchange = await post(site(lambda request: run(body, request)), server, content=content())
    assert exchange.json() == BODY.decode()


@pytest.mark.parametrize(("read", "result"), READS)
@CONTENTS
@on_asyncio
async def test_a_thread_of_asyncio_to_thread_gets_the_whole_body(read: Read, result: object, content: Content) -> None:
    exchange = await post(asyncio_to_thread(lambda request: run(read, request)), content=content())
    assert exchange.json() == result


@pytest.mark.parametrize("site", SITES)
async def test_a_thread_can_read_a_form(site: Site) -> None:
    exchange = await post(site(lambda request: run(form, request)), content=[b"a=1&", b"b=2"], headers=FORM)
    assert exchange.json() == "2"


@pytest.mark.parametrize("site", SITES)
async def test_a_thread_can_read_the_body_with_plain_asyncio_run(site: Site) -> None:
    def read(coroutine: Coroutine[Any, Any, bytes]) -> str:  # Any: coroutines' own types for what tasks ignore
        return asyncio.run(coroutine).decode()

    exchange = await post(site(lambda request: read(request.body())), content=BODY)
    assert exchange.json() == BODY.decode()


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("pause", [0, LONGER_THAN_GRACE])
async def test_is_disconnected_in_a_thread_is_false_while_the_client_stays(site: Site, pause: float) -> None:
    def work(request: Request) -> object:
        time.sleep(pause)
        return run(lambda request: request.is_disconnected(), request)

    assert (await post(site(work))).json() is False


@pytest.mark.parametrize("site", SITES)
@CONTENTS
async def test_a_thread_that_has_called_is_disconnected_still_gets_the_whole_body(site: Site, content: Content) -> None:
    def work(request: Request) -> object:
        time.sleep(LONGER_THAN_GRACE)
        return run(asked_and_read, request)

    assert (await post(site(work), content=content())).json() == BODY.decode()


@pytest.mark.parametrize("site", SITES)
async def test_a_thread_can_read_with_one_event_loop_after_another(site: Site) -> None:
    def work(request: Request) -> object:
        assert run(lambda request: request.is_disconnected(), request) is False
        assert run(body, request) == BODY.decode()
        return run(parsed, request)

    assert (await post(site(work), content=later())).json() == "{'a': 1}"


async def breaks_off() -> AsyncIterator[bytes]:
    yield b"{"
    await anyio.sleep_forever()


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("server", ["strict", "uvicorn", "gunicorn", "hypercorn"])
async def test_a_thread_that_is_reading_when_the_client_disconnects_gets_the_disconnect(
    site: Site, server: str
) -> None:
    seen: list[str] = []

    def work(request: Request) -> object:
        try:
            return run(body, request)
        except (ClientDisconnect, TimeoutError) as error:
            seen.append(type(error).__name__)
            raise

    exchange = await post(site(work), server, content=breaks_off(), leave_after=0.1)
    assert exchange.status == 499
    assert exchange.seconds_after_leave is not None
    assert seen == ["ClientDisconnect"]


def watch_on_this_loop(receive: Receive) -> Watch:
    watch = Watch(receive, {"type": "http"})
    watch.loop = loop_of(asyncio.get_running_loop())
    return watch


@pytest.mark.parametrize("arrives", ["before the thread gives up", "before the thread gets it"])
@on_asyncio
async def test_a_message_that_arrives_as_a_thread_gives_up_is_kept_for_the_next(arrives: str) -> None:
    message: Message = {"type": "http.request", "body": BODY, "more_body": False}
    messages: asyncio.Queue[Message] = asyncio.Queue()
    watch = watch_on_this_loop(messages.get)
    reads, has_arrived, given_up = threading.Event(), threading.Event(), threading.Event()

    async def give_up() -> None:
        receiving = asyncio.ensure_future(watch())
        await asyncio.sleep(0)
        reads.set()
        has_arrived.wait(5)  # so the event loop of this thread can't run meanwhile
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        given_up.set()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, lambda: asyncio.run(give_up()))
            await anyio.to_thread.run_sync(reads.wait, 5)
            await anyio.sleep(0.01)  # until receive() waits
            messages.put_nowait(message)
            if arrives == "before the thread gets it":
                await anyio.sleep(0.01)  # until receive() has returned it
                has_arrived.set()
            else:
                has_arrived.set()
                given_up.wait(5)  # so nothing here can run before that
        assert await watch() == message


@on_asyncio
async def test_an_endpoint_that_reads_the_disconnect_which_a_thread_gave_up_is_not_cancelled_as_well() -> None:
    read: list[Message] = []

    class Server:
        async def receive(self) -> Message:
            return {"type": "http.disconnect"}

    @cancel_on_disconnect
    async def endpoint(request: Request) -> None:
        watch = watch_of(request)
        watch.give_back(await asyncio.create_task(watch()))  # as when a thread gives up
        read.append(await request.receive())
        await asyncio.sleep(LEARN * 1.5)
        read.append({})

    with anyio.fail_after(10):
        await endpoint(Request({"type": "http", "headers": []}, Server().receive))
    assert read == [{"type": "http.disconnect"}, {}]


@on_asyncio
async def test_what_receive_raises_for_a_thread_that_has_given_up_is_dropped() -> None:
    class Server:
        async def receive(self) -> Message:
            never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
            try:
                return await never
            except asyncio.CancelledError:
                raise OSError from None

    watch = watch_on_this_loop(Server().receive)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(watch(), 0.05)

    with anyio.fail_after(10):
        await anyio.to_thread.run_sync(lambda: asyncio.run(give_up()))


@on_asyncio
async def test_a_thread_that_reads_is_cancelled_when_all_tasks_of_the_servers_event_loop_are() -> None:
    class Server:
        async def receive(self) -> Message:
            waits.set()
            never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
            return await never

    watch = watch_on_this_loop(Server().receive)
    waits = anyio.Event()

    async def read() -> None:
        with pytest.raises(asyncio.CancelledError), anyio.fail_after(5):
            await watch()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            before = asyncio.all_tasks()
            tasks.start_soon(anyio.to_thread.run_sync, lambda: asyncio.run(read()))
            await waits.wait()
            for task in asyncio.all_tasks() - before:
                if "to_thread" not in str(task):
                    task.cancel()


@pytest.mark.parametrize("site", [starlette_endpoint, fastapi_endpoint, fastapi_dependency])
async def test_is_disconnected_in_a_thread_is_true_after_the_disconnect(site: Site) -> None:
    seen: list[object] = []

    def work(request: Request) -> object:
        async def asks(request: Request) -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(0.005)

        run(asks, request)
        seen.append("disconnected")
        return run(body, request)

    exchange = await post(site(work), content=BODY, leave_after=0.1)
    assert seen == ["disconnected"]
    assert exchange.seconds_after_leave is not None


def test_a_thread_does_not_wait_forever_if_the_servers_event_loop_ends_before_the_reading_begins() -> None:
    submitted = threading.Event()
    ends: list[BaseException] = []

    async def read(watch: Watch) -> None:
        reading = asyncio.ensure_future(watch())
        await asyncio.sleep(0)
        submitted.set()
        try:
            with anyio.fail_after(5):
                await reading
        except BaseException as error:
            ends.append(error)

    async def serve() -> threading.Thread:
        messages: asyncio.Queue[Message] = asyncio.Queue()
        watch = watch_on_this_loop(messages.get)
        thread = threading.Thread(target=lambda: asyncio.run(read(watch)))
        thread.start()
        submitted.wait(5)  # and so nothing else runs before all tasks are cancelled
        return thread

    asyncio.run(serve()).join()
    assert [type(error) for error in ends] == [asyncio.CancelledError]

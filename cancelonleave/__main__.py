"""Shows what the decorator does, on a real server with a real client."""

import argparse
import asyncio
import socket
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Annotated

from . import cancel_on_disconnect

DISCONNECT_AFTER = 0.5  # seconds from the requests
STEPS = 15  # of work, each a fifth of a second
LIMIT = 20  # seconds until the demo gives up
NEXT = """\
Next: decorate an endpoint that is slow or expensive, right below its route:

    @app.get("/report")
    @cancel_on_disconnect
    async def report(): ...

The README says which endpoints not to decorate, and how to test those you do."""

Endpoint = Callable[..., Awaitable[None]]
Decorator = Callable[[Endpoint], Endpoint]


@dataclass
class Run:
    """What an endpoint did during its one request."""

    name: str
    database: str
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    written: int = 0
    stopped: float = 0.0
    cleaned: bool = False
    kept: int = 0


def main(arguments: Sequence[str] | None = None, decorator: Decorator = cancel_on_disconnect) -> int:
    """Call a plain and a decorated endpoint, and disconnect. Exit with 0 if the decorated one stops and rolls back."""
    argparse.ArgumentParser(prog="python -m cancelonleave", description=main.__doc__).parse_args(arguments)
    try:
        for name in ("fastapi", "httpx", "uvicorn"):
            import_module(name)  # not in the event loop, where an import would delay a Ctrl-C
        with tempfile.TemporaryDirectory() as directory:
            return _demonstrate(directory, decorator)
    except ModuleNotFoundError as error:
        print(f'The demo needs {error.name}: pip install "cancelonleave[demo]"', file=sys.stderr)
        return 2
    except TimeoutError:
        print(f"The endpoints did not start and end within {LIMIT} s.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _demonstrate(directory: str, decorator: Decorator) -> int:
    plain, decorated = runs = [Run(name, f"{directory}/{name}") for name in ("plain", "decorated")]
    requested, disconnected = asyncio.run(_serve(runs, [_endpoint(plain), decorator(_endpoint(decorated))]))
    for run in runs:
        with closing(sqlite3.connect(run.database)) as connection:
            run.kept = len(connection.execute("SELECT step FROM work").fetchall())
    print(draw(runs, requested, disconnected, sys.stdout.encoding))
    success = decorated.stopped > disconnected and decorated.written < STEPS and not decorated.kept
    print("\nThe decorated endpoint", "stopped and rolled back." if success else "did not stop and roll back.")
    if success:
        print(f"\n{NEXT}")
    return 0 if success else 1


async def _serve(runs: Sequence[Run], endpoints: Sequence[Endpoint]) -> tuple[float, float]:
    import uvicorn
    from fastapi import FastAPI

    app = FastAPI()
    for run, endpoint in zip(runs, endpoints, strict=True):
        app.get(f"/{run.name}")(endpoint)
    server = uvicorn.Server(
        uvicorn.Config(app, ws="none", log_config=None, log_level="critical", timeout_graceful_shutdown=0)
    )
    server.config.load()  # now, so that the chart doesn't include the time that uvicorn's own imports take
    with socket.create_server(("127.0.0.1", 0)) as listener:  # listens already, so there is no start to wait for
        host, port = listener.getsockname()
        print(
            f"Two endpoints on {host}:{port} take {STEPS / 5:g} s. The client disconnects at {DISCONNECT_AFTER:g} s.\n"
        )
        serving = asyncio.create_task(server.serve([listener]))
        try:
            async with asyncio.timeout(LIMIT):
                times = await _request_and_disconnect(f"http://{host}:{port}", runs)
                await asyncio.gather(*server.server_state.tasks)  # endpoints that go on after the disconnect
        finally:
            server.should_exit = True
            with suppress(KeyboardInterrupt):  # after a second Ctrl-C, which uvicorn raises here as well
                await serving
    return times


def _endpoint(run: Run) -> Endpoint:
    from fastapi import Depends

    async def transaction() -> AsyncIterator[sqlite3.Connection]:
        with closing(sqlite3.connect(run.database)) as connection:
            connection.execute(
                "CREATE TABLE work (step)"
            )  # commits by itself: the transaction begins with the first INSERT
            with connection:  # commits, or rolls back if it fails
                yield connection

    async def work(connection: Annotated[sqlite3.Connection, Depends(transaction)]) -> None:
        try:
            for step in range(STEPS):
                connection.execute("INSERT INTO work VALUES (?)", [step])
                run.written += 1
                run.begun.set()
                await asyncio.sleep(0.2)
        finally:
            run.stopped = time.perf_counter()
            await asyncio.sleep(0.01)  # as long as it takes to release a remote lock
            run.cleaned = True

    return work


async def _request_and_disconnect(url: str, runs: Sequence[Run]) -> tuple[float, float]:
    import httpx

    async with httpx.AsyncClient(base_url=url, timeout=None, trust_env=False) as client, asyncio.TaskGroup() as group:
        requested = time.perf_counter()
        requests = [group.create_task(client.get(run.name)) for run in runs]
        for run in runs:
            await run.begun.wait()
        await asyncio.sleep(requested + DISCONNECT_AFTER - time.perf_counter())
        disconnected = time.perf_counter()
        for request in requests:
            request.cancel()
    return requested, disconnected


def draw(runs: Sequence[Run], requested: float, disconnected: float, encoding: str) -> str:
    """Return a chart and a table of the runs, in characters that the encoding has."""
    worked, wasted = "#-" if b"?" in "█▒".encode(encoding, "replace") else "█▒"
    end = max(run.stopped for run in runs) - requested
    scale = min(20, int(64 / end))  # columns a second
    width = round((disconnected - requested) * scale)
    bars = " " * 12 + "".join(f"{second} s".ljust(scale) for second in range(int(end) + 1)).rstrip()
    table = "            stopped at   after disconnect    cleanup     transaction"
    for run in runs:
        length = round((run.stopped - requested) * scale)
        bars += f"\n{run.name:12}{worked * min(width, length)}{wasted * (length - width)}"
        rows = f"{run.kept} rows committed" if run.kept else f"{run.written} rows rolled back"
        table += f"\n{run.name:12}{run.stopped - requested:8.3f} s   {run.stopped - disconnected:15.3f} s"
        table += f"   {'ran' if run.cleaned else 'cut short':9}   {rows}"
    return f"{bars}\n{' ' * (12 + width)}^ the client disconnected at {disconnected - requested:.3f} s\n\n{table}"


if __name__ == "__main__":
    sys.exit(main())

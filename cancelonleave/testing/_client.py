"""The client: sends the request of a test, returns what happened, and fails the test if something was wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from starlette.types import ASGIApp
from typing_extensions import Unpack

from ._connection import Connection
from ._exchange import Exchange
from ._faults import Check
from ._request import Options, scope_and_body
from ._run import run
from ._servers import TABLE


class Client:
    """Send requests to an ASGI application in memory, and disconnect when told to.

    Use it to test what an application does when its client disconnects during a request, which neither Starlette's
    TestClient nor httpx's ASGITransport can simulate. It takes any ASGI application, decorated or not, and needs no
    fixture, thread or socket. The application runs in a task of its own. The client doesn't run its lifespan: enter
    `app.router.lifespan_context(app)` around the requests. Time is the event loop's, so with trio's MockClock, or a
    loop whose time is virtual, waiting takes no time.

    Servers differ in what an application can rely on. By default the client simulates a server that guarantees only
    what all of them do, as far as they don't contradict each other. There, an application

    - has to read on to learn of the disconnect: `http.disconnect` comes after the unread body (hypercorn, granian,
      daphne);
    - has to remember it: it comes once, and a later `receive()` waits forever (hypercorn, daphne);
    - has to ignore the disconnect that follows a complete response (all but gunicorn);
    - can't cancel a `receive()` and call it again, as Starlette's `is_disconnected()` does: if it was about to return
      body, that is lost (granian), and if it waited for the disconnect, a false one follows (gunicorn);
    - can't rely on `send()` to raise an error, though `spec_version` is 2.4 (gunicorn). Starlette's StreamingResponse
      has relied on that since 0.42, so an undecorated one runs until everything is sent.

    Choose a server by name for what contradicts this: no `spec_version` (daphne), unread body dropped (uvicorn,
    gunicorn), no disconnect after a response (gunicorn), a `send()` that raises OSError (gunicorn-h2) or never returns
    (gunicorn-uvloop). Buffers aren't simulated, nor is the way in which some servers cancel a request by themselves,
    3 s (gunicorn) or 10 s (daphne) after the disconnect.

    https://github.com/cancelonleave/cancelonleave/blob/main/cancelonleave/testing/README.md has examples, and a table
    of the checks.

    Args:
        app: The ASGI application.
        server: The server to simulate: "strict", "gunicorn-uvloop" or one of `SERVERS`.
        timeout: Seconds that the application may go on after the disconnect or, if the client stays, in all. Time
            that the whole process spends halted, as by a debugger, hardly counts.
        unchecked: Checks to leave out, each with the reason: "tasks left behind", "unbalanced cancelling" (of the
            application's asyncio task), "concurrent receive" or "message order".

    Raises:
        ValueError: If there is no such server or check, or a check is left out without a reason.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        server: str = "strict",
        timeout: float = 5,
        unchecked: Mapping[Check, str] | None = None,
    ) -> None:
        if server not in TABLE:
            raise ValueError(f"There is no server {server!r}. Choose one of {', '.join(TABLE)}.")
        for check, reason in (unchecked or {}).items():
            if check not in get_args(Check):
                raise ValueError(f"There is no check {check!r}. Choose from {', '.join(get_args(Check))}.")
            if not reason.strip():
                raise ValueError(f"The check {check!r} is left out without a reason. Say why: {{{check!r}: '...'}}.")
        self._app = app
        self._server = server
        self._timeout = timeout
        self._unchecked = unchecked or {}

    async def get(self, path: str, **options: Unpack[Options]) -> Exchange:
        """Send a GET request; see `request()`."""
        return await self.request("GET", path, **options)

    async def post(self, path: str, **options: Unpack[Options]) -> Exchange:
        """Send a POST request; see `request()`."""
        return await self.request("POST", path, **options)

    async def put(self, path: str, **options: Unpack[Options]) -> Exchange:
        """Send a PUT request; see `request()`."""
        return await self.request("PUT", path, **options)

    async def patch(self, path: str, **options: Unpack[Options]) -> Exchange:
        """Send a PATCH request; see `request()`."""
        return await self.request("PATCH", path, **options)

    async def delete(self, path: str, **options: Unpack[Options]) -> Exchange:
        """Send a DELETE request; see `request()`."""
        return await self.request("DELETE", path, **options)

    async def head(self, path: str, **options: Unpack[Options]) -> Exchange:
        """Send a HEAD request; see `request()`."""
        return await self.request("HEAD", path, **options)

    async def options(self, path: str, **options: Unpack[Options]) -> Exchange:
        """Send an OPTIONS request; see `request()`."""
        return await self.request("OPTIONS", path, **options)

    async def request(self, method: str, path: str, **options: Unpack[Options]) -> Exchange:
        """Send a request, disconnect when told to, and return what happened when the application has ended.

        What the application raises isn't raised here: it is `Exchange.error`, since servers only log it. Once the
        response is complete, the client no longer disconnects.

        Args:
            method: The HTTP method.
            path: The path, with or without a query.
            options: The rest of the request, and when to disconnect; see `Options`.

        Raises:
            AssertionError: If the application goes on for longer than the timeout, or fails a check.
            TypeError: If there is no such option, more than one body, or a whole URL that isn't the client's.
        """
        __tracebackhide__ = True
        server = TABLE[self._server]
        scope, body = scope_and_body(method, path, options, server)
        connection = Connection(server, options.get("leave_after_received"), options.get("leave_after_sent"))
        await run(self._app, connection, scope, body, options, self._timeout)
        return self._judge(connection, f"{method.upper()} {path}")

    def _judge(self, connection: Connection, request: str) -> Exchange:
        __tracebackhide__ = True
        assert connection.ended_after is not None  # run() has returned
        exchange = Exchange(
            request=request,
            server=self._server,
            messages=tuple(connection.messages),
            left_after=connection.left_after,
            ended_after=connection.ended_after,
            error=connection.error,
            asked_for_body=connection.asked_for_body,
            body_consumed=connection.body_consumed,
        )
        faults = [fault for fault in connection.faults if fault.check not in self._unchecked]
        if faults:
            ways_out = dict.fromkeys(fault.way_out for fault in faults)
            raise AssertionError(
                "\n".join([*(fault.text for fault in faults), repr(exchange), *ways_out])
            ) from exchange.error
        return exchange

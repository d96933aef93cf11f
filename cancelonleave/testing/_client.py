"""The client: takes what a test asks for, returns what happened, and fails the test if something was wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from starlette.types import ASGIApp
from typing_extensions import Unpack

from ._connection import Check, Connection
from ._exchange import Exchange
from ._request import Options, scope_and_body
from ._run import run
from ._servers import TABLE


class Client:
    """Ask an ASGI application in memory, as a client that leaves when told to.

    Use it in tests of what an application does when its client leaves in mid-request, which Starlette's TestClient
    and httpx's transports don't deliver. It is for any ASGI application, decorated or not, and needs no fixture, thread
    or socket. The application runs in a task of its own; its lifespan is not run. Time is the event loop's, so that
    trio's MockClock and loops with virtual time make waiting free.

    What an application may count on differs between servers. By default the client stands behind one that promises
    only what all keep, as far as they don't contradict each other. An application that behaves well there:

    - reads on to learn of the leave: `http.disconnect` comes after the unread body (hypercorn, granian, daphne);
    - remembers it: it comes once, and a later `receive()` waits for ever (hypercorn, daphne);
    - doesn't take the one that follows a complete response for a leave (all but gunicorn);
    - doesn't cancel a waiting `receive()` and call it again: body is lost (granian), and after the body the client is
      said to be gone (gunicorn), as with Starlette's `is_disconnected()`;
    - doesn't wait for `send()` to fail, though `spec_version` is 2.4: nothing happens (gunicorn), so that a
      StreamingResponse of Starlette's, from 0.42 on, goes on and on;
    - can be cancelled in `send()`: one under way when the client leaves never returns (gunicorn on uvloop).

    What contradicts this is left to the servers by name: no `spec_version` (daphne), unread body dropped (uvicorn,
    gunicorn), no disconnect after a response (gunicorn), `OSError` from `send()` (gunicorn-h2). Not modelled are
    buffers, and that a server itself cancels a request, 3 s (gunicorn) or 10 s (daphne) after the leave.

    Args:
        app: The ASGI application.
        server: Whose behaviour the application meets, "strict" or one of `SERVERS`.
        timeout: Seconds that the application may go on after the leave or, if the client stays, in all.
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

    async def request(self, method: str, path: str, **options: Unpack[Options]) -> Exchange:
        """Send a request, leave when told to, and return what happened once the application has ended.

        What the application raises is not raised here but reported, as servers do. Once its response is complete, the
        client no longer leaves.

        Args:
            method: Of HTTP.
            path: With a query, or without.
            options: The rest of the request, and when to leave; see `Options`.

        Raises:
            AssertionError: If the application goes on for longer than the timeout, or fails a check.
            TypeError: If more than one body is given.
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
        # Unlike the checks, the timeout has no name to leave it out by.
        faults = [fault for check, fault in connection.faults if check not in self._unchecked]
        if faults:
            raise AssertionError("\n".join((*faults, repr(exchange)))) from exchange.error
        return exchange

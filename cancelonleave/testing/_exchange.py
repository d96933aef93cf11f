"""What happened during one request, in one object that doesn't change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from starlette.datastructures import Headers

from ._messages import is_last


class Sent(NamedTuple):
    """An ASGI message that the application sent, and when."""

    seconds: float
    """Seconds since the request began."""
    message: Mapping[str, Any]  # Any: ASGI's own type for a message
    """The message, as it was at that time."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Exchange:
    """What the client requested, when it disconnected, and what the application did.

    The response is what the application sent, whether or not the client was still there: a decorated endpoint's status
    is 499 although nobody reads it. To see what was sent before the disconnect, compare the times in `messages`
    with `left_after`.
    """

    request: str
    """Method and path."""
    server: str
    """The name of the server that was simulated."""
    messages: tuple[Sent, ...]
    """Every message that the application sent, in order."""
    left_after: float | None
    """Seconds from the request to the disconnect; None if the client stayed until the response was complete."""
    ended_after: float
    """Seconds from the request to the end of the application's call, including background tasks."""
    error: BaseException | None
    """What the application raised, which a server would log."""
    asked_for_body: bool
    """Whether the application called `receive()`, at which most servers send `100 Continue`."""
    body_consumed: bool
    """Whether the application received the last chunk of the request's body."""

    @property
    def seconds_after_leave(self) -> float | None:
        """Seconds from the disconnect to the end of the application's call; None if the client stayed."""
        return None if self.left_after is None else self.ended_after - self.left_after

    @property
    def status(self) -> int | None:
        """The response's status; None if there is no response."""
        return next((message.get("status") for message in self._of("http.response.start")), None)

    @property
    def status_code(self) -> int | None:
        """The same as `status`, by the name that it has in httpx."""
        return self.status

    @property
    def headers(self) -> Headers:
        """The response's headers."""
        return Headers(raw=[pair for message in self._of("http.response.start") for pair in message.get("headers", ())])

    @property
    def body(self) -> bytes:
        """The response's body, as far as it was sent."""
        chunks = (message.get("body") for message in self._of("http.response.body"))
        return b"".join(chunk for chunk in chunks if isinstance(chunk, bytes))

    @property
    def text(self) -> str:
        """The response's body as text, in UTF-8."""
        return self.body.decode()

    @property
    def complete(self) -> bool:
        """Whether the application sent the last message of its response."""
        return any(is_last(sent.message) for sent in self.messages)

    def json(self) -> Any:  # Any: as json.loads() has it
        """Return the response's body, parsed."""
        return json.loads(self.body)

    def _of(self, kind: str) -> list[Mapping[str, Any]]:  # Any: see Sent
        return [sent.message for sent in self.messages if sent.message.get("type") == kind]

    def __repr__(self) -> str:
        response = "no response" if self.status is None else str(self.status)
        if self.status is not None and not self.complete:
            response += " incomplete"
        if self.left_after is None:
            course = f"stayed, ended after {self.ended_after:.3f} s"
        else:
            course = f"disconnected at {self.left_after:.3f} s, ended {self.seconds_after_leave:.3f} s later"
        raised = "" if self.error is None else f", RAISED {self.error!r}"
        return f"<Exchange {self.request} on {self.server}: {response}, {len(self.body)} bytes, {course}{raised}>"

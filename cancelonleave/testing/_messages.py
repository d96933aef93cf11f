"""What ASGI demands of the messages that make a response."""

from collections.abc import Mapping
from typing import Any


def is_last(message: Mapping[str, Any]) -> bool:  # Any: ASGI's own type for a message
    """Whether the message ends the response."""
    kind = message.get("type")
    return kind == "http.response.pathsend" or (kind == "http.response.body" and not message.get("more_body", False))


class Order:
    """How far a response has come, and whether the next message may follow.

    Args:
        extensions: Types of messages that the server takes at any time, besides ASGI's own.
    """

    complete = False
    _started = False

    def __init__(self, extensions: tuple[str, ...]) -> None:
        self._extensions = extensions

    def fault_in(self, message: Mapping[str, Any]) -> str | None:  # Any: ASGI's own type for a message
        """Take the next message, and say what is wrong with it, if anything is."""
        kind = message.get("type")
        fault = self._fault_in(message)
        self._started = self._started or kind == "http.response.start"
        self.complete = self.complete or is_last(message)
        return None if fault is None else f"{kind} {fault}"

    def _fault_in(self, message: Mapping[str, Any]) -> str | None:  # Any: ASGI's own type for a message
        kind = message.get("type")
        if kind in self._extensions:
            return None
        if kind not in ("http.response.start", "http.response.body"):
            return "is not a message that this server takes"
        if self.complete:
            return "came after the response was complete"
        if kind == "http.response.body":
            if not self._started:
                return "came before http.response.start"
            return None if isinstance(message.get("body", b""), bytes) else "has a body that is not bytes"
        if self._started:
            return "came twice"
        if not isinstance(message.get("status"), int):
            return "has no status that is an int"
        texts = (text for pair in message.get("headers", ()) for text in pair)
        return None if all(isinstance(text, bytes) for text in texts) else "has headers that are not pairs of bytes"

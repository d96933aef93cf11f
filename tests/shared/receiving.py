"""A server's receive() that isn't a coroutine function, as granian's."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from typing import Any

from starlette.types import Message


class Receiving:
    """The awaitable that such a receive() returns."""

    def __init__(self, receive: Callable[[], Coroutine[Any, Any, Message]]) -> None:  # Any: as in create_task()
        self._receive = receive

    def __await__(self) -> Generator[Any, Any, Message]:
        return self._receive().__await__()

"""All that is different when the client has opened a WebSocket."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from anyio import move_on_after
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from ._exceptions import ClientClosedWebSocket
from ._loop import GRACE
from ._receive import MESSAGE_SIZE
from ._watch import Phase, Watch

NO_CODE = 1005  # what RFC 6455 has for a close without a code
LOST = 1006  # and for a connection that was lost
ENDS = ("websocket.close", "websocket.http.response.start")  # by which an endpoint ends it


class WebSocketWatch(Watch):
    """Stands in the place of a WebSocket's receive() and send()."""

    may_read_ahead = True
    read_as = WebSocketDisconnect
    _reads_here = True

    def __init__(self, receive: Receive, send: Send, scope: Scope) -> None:
        super().__init__(receive, scope)
        self._send = send

    async def __call__(self) -> Message:
        """Return the messages in their order and then the disconnect, also in a cancelled scope."""
        is_here = self.loop.is_running_here()
        return await (self.next_message() if is_here else self.loop.run(self.next_message, self.give_back))

    def start(self) -> None:
        if self.phase is not Phase.CLOSED:  # it was open when this became due
            super().start()

    def read_on(self) -> None:
        """Read ahead when the endpoint hasn't read for 25 to 50 ms: a task for each message would cost too much."""
        if not self._reads_here:
            self.read_ahead()
        else:
            self._reads_ahead = False
            self.loop.add(self)

    async def send(self, message: Message) -> None:
        """Be what the WebSocket sends by, to see that the endpoint closes it, or that the server has lost it."""
        # Two comparisons for what is sent all the time.
        if (message["type"] != "websocket.send" or self.disconnect) and await self._is_too_late(message):
            return
        try:
            await self._send(message)
        except Exception as error:
            is_gone = not self._is_closed(message) and (isinstance(error, OSError) or await self._comes_soon())
            if not is_gone or self._is_closed(message):  # it may have been closed since
                raise
            self.learn()
            if self.phase is Phase.CLOSED:
                self.phase = Phase.OPEN  # the client was gone before the endpoint could close it
            self.came()
            raise self.exception() from error

    def _is_closed(self, message: Message) -> bool:
        """Whether another task has closed the WebSocket meanwhile."""
        return self.phase is Phase.CLOSED and message["type"] == "websocket.send"

    async def _is_too_late(self, message: Message) -> bool:
        """Raise the disconnect, unless the endpoint ends the WebSocket; return whether that is too late."""
        if self.phase is Phase.CAME:
            if message["type"] != "websocket.close":
                self.learn()
                raise self.exception()
            with suppress(Exception):  # a RuntimeError or an OSError, of uvicorn's and gunicorn's
                await self._send(message)
            return True
        if message["type"] in ENDS:
            self.close()  # before it is sent: after it, servers report a disconnect that isn't one
            self._read_no_more()
        return False

    def _read_no_more(self) -> None:
        self.loop.discard(self)
        self._reads_ahead = False
        self.cancel()  # granian doesn't send a close while a receive() is pending

    async def _comes_soon(self) -> bool:
        """Whether send() has failed because of the disconnect, which daphne says a moment later."""
        self.read_ahead()
        with move_on_after(GRACE):
            await self.wait_for_disconnect()
        return self.disconnect is not None

    def exception(self) -> ClientClosedWebSocket:
        # If it is unknown, there was no room to read it, and send() has failed. A server may leave out either.
        told = self.disconnect or {"code": LOST}
        return ClientClosedWebSocket(told.get("code", NO_CODE), told.get("reason"))

    def keep_message(self, message: Message) -> float:
        super().keep_message(message)
        if self._waiting and self._reads_here and self._reads_ahead and self.disconnect is None:
            self.read_on()
        return 0

    def note(self, message: Message) -> Message:
        return self.mark_disconnected(message) if message["type"] == "websocket.disconnect" else message

    def size_of(self, message: Message) -> int:
        return len(message.get("bytes") or message.get("text") or "") + MESSAGE_SIZE


async def _stay_silent(websocket: WebSocket, error: Any) -> None:  # Any: as Starlette has it
    """Answer the exception with nothing, since there is nobody to answer."""
    # uvicorn's `websockets` logs an error if an application ends that has neither accepted nor refused.
    if websocket.application_state is WebSocketState.CONNECTING:
        with suppress(Exception):
            await websocket.close()


def watch_of_websocket(websocket: WebSocket) -> WebSocketWatch:
    """Return what stands in the place of the WebSocket's receive() and send(), now at the latest."""
    receive = websocket._receive  # pyright: ignore[reportPrivateUsage]  # see below
    if isinstance(receive, WebSocketWatch):
        return receive
    send = websocket._send  # pyright: ignore[reportPrivateUsage]  # see below
    watch = WebSocketWatch(receive, send, websocket.scope)
    is_gone = websocket.client_state is WebSocketState.DISCONNECTED
    if not is_gone and websocket.application_state in (WebSocketState.DISCONNECTED, WebSocketState.RESPONSE):
        watch.close()  # the application has ended it, so no disconnect will follow
        return watch
    # The endpoint, and whoever reads this WebSocket after it, must get what was read ahead, in the states of this one.
    websocket._receive = watch  # pyright: ignore[reportPrivateUsage]  # see above
    websocket._send = watch.send  # pyright: ignore[reportPrivateUsage]  # see above
    if is_gone:  # as somebody has read, and most servers say once only
        watch.mark_disconnected({"type": "websocket.disconnect", "code": NO_CODE})
    handlers: dict[object, object] = websocket.scope.get("starlette.exception_handlers", ({},))[0]
    if WebSocketDisconnect not in handlers:  # one of the application's gets our exception, too
        handlers.setdefault(ClientClosedWebSocket, _stay_silent)  # without one, it would be logged with a traceback
    return watch

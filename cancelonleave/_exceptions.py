"""What is raised in the place of an endpoint whose client has disconnected."""

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.websockets import WebSocketDisconnect


class ClientClosedRequest(ClientDisconnect, HTTPException):
    """Raised in place of the result when the client disconnects before the response is ready.

    A decorated endpoint raises it once its cleanup has ended, so dependencies with `yield` roll back and
    queued background tasks don't run. Exception handlers for `starlette.requests.ClientDisconnect`, for
    `starlette.exceptions.HTTPException` and for status 499 get it; without one, Starlette's and FastAPI's own
    handler turns it into a response with status 499 (nginx's "client closed request"), which no client reads.
    """

    def __init__(self) -> None:
        super().__init__(status_code=499, detail="Client Closed Request")


class ClientClosedWebSocket(WebSocketDisconnect):
    """Raised when the client has closed the WebSocket: catch it as `WebSocketDisconnect`, with its `code` and `reason`.

    Like `ClientClosedRequest`, it is not logged with a traceback in Starlette and FastAPI.
    """

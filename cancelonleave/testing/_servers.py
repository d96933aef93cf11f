"""What each server reports to an application, and what it doesn't, as a table."""

from types import MappingProxyType
from typing import NamedTuple


class Server(NamedTuple):
    """How a server behaves. The defaults are what most servers do."""

    spec_version: str | None
    extensions: tuple[str, ...] | None = None
    repeats_disconnect: bool = True  # else receive() reports it once, and a later receive() waits forever
    drops_body: bool = False  # the part that the application has not read when the client disconnects
    takes_body_first: bool = False  # the application starts when the server has the whole body
    continues_at_once: bool = False  # sends "100 Continue" by itself, not at the first receive()
    disconnects_after_response: bool = True
    disconnects_after_cancel: bool = False  # of a receive() that waited for the disconnect; the client is still there
    loses_body_by_cancel: bool = False  # if the receive() that was about to return it is cancelled
    raises_in_send: bool = False  # OSError, once the client has disconnected
    blocks_in_send: bool = False  # forever, if the client disconnects during the send()


_GUNICORN = Server("2.4", (), drops_body=True, disconnects_after_response=False, disconnects_after_cancel=True)

# Measured with uvicorn 0.54, hypercorn 0.18, granian 2.8.7, gunicorn 27.0.1 and daphne 4.2.3.
TABLE: MappingProxyType[str, Server] = MappingProxyType(
    {
        "strict": Server("2.4", (), repeats_disconnect=False, disconnects_after_cancel=True, loses_body_by_cancel=True),
        "uvicorn": Server("2.3", drops_body=True),
        "hypercorn": Server("2.1", (), repeats_disconnect=False, continues_at_once=True),
        "granian": Server("2.3", ("http.response.pathsend", "websocket.http.response"), loses_body_by_cancel=True),
        "gunicorn": _GUNICORN,
        "gunicorn-uvloop": _GUNICORN._replace(blocks_in_send=True),
        "gunicorn-h2": Server(
            "2.4", ("http.response.priority", "http.response.trailers"), drops_body=True, raises_in_send=True
        ),
        "daphne": Server(None, repeats_disconnect=False, takes_body_first=True, continues_at_once=True),
    }
)

SERVERS = tuple(name for name, server in TABLE.items() if name != "strict" and not server.blocks_in_send)
"""The names of the real servers that a `Client` can simulate, for tests that try them all.

"gunicorn-uvloop" isn't among them: no application can end a `send()` that blocks inside the framework.
"""

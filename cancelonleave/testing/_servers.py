"""What each server tells an application, and what it keeps to itself, as a table."""

from types import MappingProxyType
from typing import NamedTuple


class Server(NamedTuple):
    """How a server behaves; the defaults are those of most."""

    spec_version: str | None
    extensions: tuple[str, ...] | None = None
    repeats_disconnect: bool = True  # else it tells once, and a later receive() waits for ever
    drops_body: bool = False  # what the application has not read when the client leaves
    takes_body_first: bool = False  # the application starts when the whole body is there
    invites_body: bool = False  # sends "100 Continue" by itself, not at the first receive()
    disconnects_after_response: bool = True
    disconnects_after_cancel: bool = False  # of a receive() that waited for the disconnect, though the client is there
    loses_body_by_cancel: bool = False  # of the receive() that was to bring it
    raises_in_send: bool = False  # OSError, once the client has left
    blocks_in_send: bool = False  # for ever, in the send() during which the client leaves


# Measured with uvicorn 0.54, hypercorn 0.18, granian 2.8.7, gunicorn 27.0.1 and daphne 4.2.3.
TABLE: MappingProxyType[str, Server] = MappingProxyType(
    {
        "strict": Server(
            "2.4",
            (),
            repeats_disconnect=False,
            disconnects_after_cancel=True,
            loses_body_by_cancel=True,
            blocks_in_send=True,
        ),
        "uvicorn": Server("2.3", drops_body=True),
        "hypercorn": Server("2.1", (), repeats_disconnect=False, invites_body=True),
        "granian": Server("2.3", ("http.response.pathsend", "websocket.http.response"), loses_body_by_cancel=True),
        "gunicorn": Server(
            "2.4",
            (),
            drops_body=True,
            disconnects_after_response=False,
            disconnects_after_cancel=True,
            blocks_in_send=True,
        ),
        "gunicorn-h2": Server(
            "2.4", ("http.response.priority", "http.response.trailers"), drops_body=True, raises_in_send=True
        ),
        "daphne": Server(None, repeats_disconnect=False, takes_body_first=True, invites_body=True),
    }
)

SERVERS = tuple(name for name in TABLE if name != "strict")
"""The names of the real servers that a `Client` can stand behind, for tests that try them all."""

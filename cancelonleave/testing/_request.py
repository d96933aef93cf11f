"""Turns what a test says about a request into a scope and a body."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from typing import Any, TypedDict
from urllib.parse import quote, unquote, urlencode

from anyio import Event
from starlette.datastructures import MutableHeaders
from starlette.types import Scope

from ._servers import Server

Body = bytes | Iterable[bytes] | AsyncIterable[bytes]


class Options(TypedDict, total=False):
    """What a request can have beside its method and path, and when its client leaves: at the first that happens."""

    params: Mapping[str, object]
    """Of the query, beside those in the path; lists for what comes several times."""
    headers: Mapping[str, str] | Sequence[tuple[str, str]]
    """With `Expect: 100-continue` the body waits until the server asks for it."""
    json: Any  # whatever json.dumps() takes
    """The body."""
    data: Mapping[str, object]
    """The body, as a form."""
    content: Body
    """The body: bytes, or pieces to be sent one by one, each when the application has received the one before."""
    leave_after: float
    """Seconds from the request; 0 is before the application starts."""
    leave_when: Event
    """An event of anyio's, which the application or the test sets."""
    leave_after_received: int
    """Pieces of the response's body; 0 is the start of the response."""
    leave_after_sent: int
    """Pieces of the request's body that the application has received (daphne: the server); 0 is before the first."""


def scope_and_body(method: str, path: str, options: Options, server: Server) -> tuple[Scope, Body]:
    """Return what the server passes to the application, and what the client sends to the server."""
    body, content_type = _body(options)
    path, _, query = path.partition("?")
    query = "&".join(part for part in (query, urlencode(options.get("params", {}), doseq=True)) if part)
    asgi = {"version": "3.0"} | ({"spec_version": server.spec_version} if server.spec_version else {})
    scope: Scope = {
        "type": "http",
        "asgi": asgi,
        "http_version": "1.1",
        "method": method.upper(),
        "scheme": "http",
        "path": unquote(path),
        "raw_path": quote(path, safe="/%:@!$&'()*+,;=").encode("ascii"),
        "query_string": quote(query, safe="/%:@!$&'()*+,;=?").encode("ascii"),
        "root_path": "",
        "headers": _headers(options, body, content_type),
        "client": ("127.0.0.1", 50000),
        "server": ("testserver", 80),
    }
    if server.extensions is not None:
        scope["extensions"] = {name: {} for name in server.extensions}
    return scope, body


def _body(options: Options) -> tuple[Body, str | None]:
    given = options.keys() & {"json", "data", "content"}
    if len(given) > 1:
        raise TypeError(f"A request has one body, but {' and '.join(sorted(given))} are given. Choose one.")
    if "json" in options:
        return json.dumps(options["json"]).encode(), "application/json"
    if "data" in options:
        return urlencode(options["data"], doseq=True).encode(), "application/x-www-form-urlencoded"
    return options.get("content", b""), None


def _headers(options: Options, body: Body, content_type: str | None) -> list[tuple[bytes, bytes]]:
    given = options.get("headers", {})
    pairs = given.items() if isinstance(given, Mapping) else given
    headers = MutableHeaders(raw=[(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in pairs])
    headers.setdefault("host", "testserver")
    if content_type is not None:
        headers.setdefault("content-type", content_type)
    if not isinstance(body, bytes):
        headers.setdefault("transfer-encoding", "chunked")
    elif body:
        headers.setdefault("content-length", str(len(body)))
    return headers.raw

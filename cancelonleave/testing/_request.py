"""Turns what a test says about a request into a scope and a body."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from typing import Any, TypedDict, cast
from urllib.parse import quote, unquote, urlencode, urlsplit

from anyio import Event
from starlette.datastructures import MutableHeaders
from starlette.types import Scope

from ._servers import Server

HOST = "testserver"
Body = bytes | Iterable[bytes] | AsyncIterable[bytes]


class Options(TypedDict, total=False):
    """The rest of a request, and when its client disconnects: if several are given, the first to come due counts.

    An option that is None counts as left out, except for `json`.
    """

    params: Mapping[str, object] | None
    """The query, in addition to the path's own. A list gives a parameter several times."""
    headers: Mapping[str, str] | Sequence[tuple[str, str]] | None
    """With `Expect: 100-continue` the client sends its body only when the server asks for it."""
    cookies: Mapping[str, str] | None
    """Sent with this request; the client keeps none from one request to the next."""
    json: Any  # whatever json.dumps() takes
    """The body, as JSON."""
    data: Mapping[str, object] | None
    """The body, as a form."""
    content: Body | None
    """The body: bytes, or chunks to be sent one by one, each when the application has received the one before."""
    leave_after: float | None
    """Disconnect so many seconds after the request; 0 is before the application starts."""
    leave_when: Event | None
    """Disconnect when this event of anyio's is set, by the application or the test."""
    leave_after_received: int | None
    """Disconnect after so many chunks of the response's body; 0 is the start of the response."""
    leave_after_sent: int | None
    """Disconnect after the application has received so many chunks of the request's body; 0 is before the first.

    With daphne it is the server that receives them.
    """


def scope_and_body(method: str, path: str, options: Options, server: Server) -> tuple[Scope, Body]:
    """Return what the server passes to the application, and what the client sends to the server."""
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        known = ", ".join(Options.__annotations__)
        raise TypeError(f"A request has no option {' or '.join(map(repr, sorted(unknown)))}. Choose from {known}.")
    body, content_type = _body(options)
    path, query = _path_and_query(path)
    query = "&".join(part for part in (query, _encoded(options.get("params") or {})) if part)
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
        "server": (HOST, 80),
    }
    if server.extensions is not None:
        scope["extensions"] = {name: {} for name in server.extensions}
    return scope, body


def _path_and_query(url: str) -> tuple[str, str]:
    """Take a path with or without a query, or a whole URL of the client's own host."""
    parts = urlsplit(url)
    if (parts.scheme, parts.netloc) not in (("", ""), ("http", HOST), ("http", f"{HOST}:80")):
        raise TypeError(f"This client only requests http://{HOST}. Pass a path instead of {url!r}.")
    return f"/{parts.path.removeprefix('/')}", parts.query


def _body(options: Options) -> tuple[Body, str | None]:
    given = {name for name in ("data", "content") if options.get(name) is not None} | options.keys() & {"json"}
    if len(given) > 1:
        raise TypeError(f"A request has one body, but {' and '.join(sorted(given))} were given. Choose one.")
    if "json" in options:
        return json.dumps(options["json"]).encode(), "application/json"
    if (form := options.get("data")) is not None:
        return _encoded(form).encode(), "application/x-www-form-urlencoded"
    content = options.get("content")
    return b"" if content is None else content, None


def _encoded(pairs: Mapping[str, object]) -> str:
    """Encode a query or a form."""
    return urlencode({name: _text(value) for name, value in pairs.items()}, doseq=True)


def _text(value: object) -> object:
    """Write True, False and None as httpx does: as true, false and nothing. Lists are written item by item."""
    if isinstance(value, list | tuple):
        return [_text(each) for each in cast("list[object]", value)]  # whatever is in it
    return str(value).lower() if isinstance(value, bool) else "" if value is None else value


def _headers(options: Options, body: Body, content_type: str | None) -> list[tuple[bytes, bytes]]:
    given = options.get("headers") or {}
    pairs = given.items() if isinstance(given, Mapping) else given
    headers = MutableHeaders(raw=[(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in pairs])
    headers.setdefault("host", HOST)
    if cookies := options.get("cookies"):
        headers.append("cookie", "; ".join(f"{name}={value}" for name, value in cookies.items()))
    if content_type is not None:
        headers.setdefault("content-type", content_type)
    if not isinstance(body, bytes):
        headers.setdefault("transfer-encoding", "chunked")
    elif body:
        headers.setdefault("content-length", str(len(body)))
    return headers.raw

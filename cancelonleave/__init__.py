"""Stop an endpoint of Starlette or FastAPI, or a function that takes a Request or a WebSocket, when its client is gone.

Where to start reading: `_decorator` wraps an endpoint. `_endpoint` guards each call of it. `_watch` learns of the
disconnect by way of `_receive`, and cancels the call by way of `_cancel`. These five are the whole story for an
endpoint that returns; `_trio`, `_stream`, `_response`, `_websocket` and `_fastapi` can be left for another day.

Four nouns:

- A *call* (`_watch.Call`) is one awaitable that ends when the client disconnects. It knows its *host*, the task that
  awaits it, and is cancelled once, by `Task.cancel()` on asyncio and by a cancel scope on trio.
- The *watch* (`_watch.Watch`), one for each request, knows its calls, and stands in the place of its receive().
- The *reader* (`_receive.Reader`), of which the watch is one, is the only one to call the server's receive().
- A *stream* (`_stream.Stream`) is what goes on when the endpoint has returned: a response's body, a generator's items.

What this does to other libraries' objects: it replaces `request._receive` (`_watch`), `response.__class__`
(`_response`), `websocket._receive` and `websocket._send`, for which it adds a handler to
`scope["starlette.exception_handlers"]` (`_websocket`), `scope["asgi"]` of generator endpoints and what is in FastAPI's
exit stack (`_fastapi`), and adds `scope["cancelonleave"]` for hooks (`_endpoint`). It looks at
`Request._is_disconnected` (`_watch`), at `Task._fut_waiter` (`_cancel`), at anyio's record of the cancel scopes that a
task is in (`_anyio`), and at the routes that FastAPI has included (`_route`).
"""

from ._decorator import cancel_on_disconnect as cancel_on_disconnect
from ._exceptions import ClientClosedRequest as ClientClosedRequest

__all__ = ["ClientClosedRequest", "cancel_on_disconnect"]

"""Wrong uses are refused at decoration time; the error names the object, the fault and the way out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import anyio
import pytest
from fastapi import APIRouter, Depends, FastAPI
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route, Router
from starlette.types import Message, Receive, Scope, Send

from cancelonleave import cancel_on_disconnect
from cancelonleave.testing import Client
from tests.shared.asking import ask

pytestmark = pytest.mark.anyio


async def unannotated_application(scope, receive, send): ...  # type: ignore[no-untyped-def]
async def application(s: Scope, r: Receive, w: Send) -> None: ...
async def middleware_function(request: Request, call_next: RequestResponseEndpoint) -> Response: ...  # type: ignore[empty-body]
async def renamed(request: Request, proceed: RequestResponseEndpoint) -> Response: ...  # type: ignore[empty-body]
async def unannotated(request, call_next): ...  # type: ignore[no-untyped-def]


class Middleware(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response: ...  # type: ignore[empty-body]


class Application:
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


APPLICATIONS: list[Any] = [  # Any: each mistake
    unannotated_application,
    application,
    Application(),
    Application.__call__,
    Starlette(),
    FastAPI(),
    Router(),
    APIRouter(),
    Route("/", application),
    Mount("/", Application()),
    Middleware(Application()),
]
MIDDLEWARE: list[Any] = [
    middleware_function,
    renamed,
    unannotated,
    Middleware.dispatch,
    Middleware(Application()).dispatch,
]
FAULTS = [
    *((mistake, "an ASGI application", "Decorate the endpoints in it") for mistake in APPLICATIONS),
    *((mistake, "an HTTP middleware", "Decorate the endpoint") for mistake in MIDDLEWARE),
    ("/path", "not a function", "right below the route decorator"),
    (None.__class__, "a class", "Decorate its methods"),
]


@pytest.mark.parametrize(("mistake", "fault", "way_out"), FAULTS, ids=count())
def test_applications_and_middleware_are_refused(mistake: Any, fault: str, way_out: str) -> None:
    for decorate in (cancel_on_disconnect, cancel_on_disconnect(on_disconnect=print)):
        with pytest.raises(TypeError, match=f"^@cancel_on_disconnect can't guard .*: it is {fault}.*{way_out}"):
            decorate(mistake)


async def test_adding_the_decorator_as_a_middleware_is_refused() -> None:
    app = FastAPI()
    app.add_middleware(cancel_on_disconnect)
    exchange = await Client(app).get("/")
    assert isinstance(exchange.error, TypeError)
    assert "it is an ASGI application" in str(exchange.error)


async def test_using_the_decorator_itself_as_a_dependency_fails_visibly() -> None:
    app = FastAPI()

    @app.get("/")
    async def endpoint(guard: object = Depends(cancel_on_disconnect)) -> None: ...  # the mistake

    exchange = await Client(app).get("/")
    assert isinstance(exchange.error, TypeError)
    assert "cancel_on_disconnect" in str(exchange.error)


def takes_nothing() -> None: ...
def takes_more(request: Request, reason: str) -> None: ...
def takes_a_name(*, request: Request) -> None: ...


BAD_HOOKS: list[Any] = ["hook", 3, takes_nothing, takes_more, takes_a_name, Application]  # Any: each mistake


@pytest.mark.parametrize("hook", BAD_HOOKS)
def test_a_hook_that_cannot_be_called_with_the_request_is_refused(hook: Any) -> None:
    async def endpoint(request: Request) -> None: ...

    mistakes: list[Callable[[], object]] = [
        lambda: cancel_on_disconnect(on_disconnect=hook),
        lambda: cancel_on_disconnect(endpoint, on_disconnect=hook),
    ]
    for mistake in mistakes:
        with pytest.raises(
            TypeError, match=r"can't call on_disconnect=.*takes the Request \(or WebSocket\) as its only argument"
        ):
            mistake()


def takes_any(*requests: Request) -> None: ...
def takes_more_by_default(request: Request, reason: str = "") -> None: ...


untyped: dict[Any, Any] = {}  # Any: the type doesn't matter here
GOOD_HOOKS: list[Callable[..., object]] = [
    takes_any,
    takes_more_by_default,
    print,
    [Request].append,
    untyped.update,  # its signature is unknown
]


@pytest.mark.parametrize("hook", GOOD_HOOKS)
def test_every_other_hook_is_accepted(hook: Callable[[Request], object]) -> None:
    assert callable(cancel_on_disconnect(on_disconnect=hook))


def test_a_hook_passed_as_the_endpoint_or_after_it_is_refused() -> None:
    async def endpoint(request: Request) -> None: ...

    def hook(request: Request) -> None: ...

    with pytest.raises(TypeError, match="positional"):
        cancel_on_disconnect(endpoint, hook)  # type: ignore[call-overload]  # the mistake


async def test_endpoint_and_hook_can_be_passed_in_one_call() -> None:
    notified: list[Request] = []

    async def endpoint(request: Request) -> None:
        await anyio.sleep_forever()

    decorated = cancel_on_disconnect(endpoint, on_disconnect=notified.append)
    exchange = await ask(Starlette(routes=[Route("/", decorated)]), leave_after=0.06)
    assert exchange.status == 499
    assert len(notified) == 1
    assert decorated.__name__ == "endpoint"


async def test_an_endpoint_with_only_some_asgi_parameter_names_is_accepted() -> None:
    async def message(scope: str, send: str) -> Message:
        return {"type": scope + send}

    app = FastAPI()
    app.get("/")(cancel_on_disconnect(message))
    assert (await ask(app, "/?scope=a&send=b")).body == b'{"type":"ab"}'

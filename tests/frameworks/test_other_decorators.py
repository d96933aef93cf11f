"""Other decorators, injectors and test doubles: none of them disables the decorator or makes an endpoint fail."""

import functools
import inspect
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Annotated, Any, cast, get_type_hints
from unittest.mock import AsyncMock, MagicMock, Mock, create_autospec

import anyio
import pytest
from dishka import Provider, make_async_container
from dishka import Scope as Lifetime
from dishka.integrations.fastapi import DishkaRoute, FromDishka, inject, setup_dishka
from fastapi import Depends, FastAPI, Query
from fastapi.routing import APIRoute
from pydantic import ConfigDict, validate_call
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.websockets import WebSocket

from cancelonleave import cancel_on_disconnect
from tests.conftest import BACKENDS
from tests.shared.annotated_endpoints import Endpoint, Guard
from tests.shared.asking import ask, some_work, undecorated
from tests.shared.readme_code import module

pytestmark = pytest.mark.anyio

StoppingRoute: type[APIRoute] = module("everywhere.py")["StoppingRoute"]


def stack(*decorators: Guard) -> Guard:
    """Return one decorator that applies all of these, the first above the others."""
    return lambda endpoint: functools.reduce(lambda below, above: above(below), reversed(decorators), endpoint)


# Injectors.


class Word(str):
    __slots__ = ()


class InjectingAboveStopping(StoppingRoute, DishkaRoute):  # type: ignore[misc,valid-type]  # from the README
    pass


class StoppingAboveInjecting(DishkaRoute, StoppingRoute):  # type: ignore[misc,valid-type]  # as above
    pass


DISHKA: dict[str, tuple[Guard, type[APIRoute]]] = {
    "above": (stack(inject, cancel_on_disconnect), APIRoute),
    "below": (stack(cancel_on_disconnect, inject), APIRoute),
    "between": (stack(cancel_on_disconnect, inject, cancel_on_disconnect), APIRoute),
    "its route": (cancel_on_disconnect, DishkaRoute),
    "below our route": (inject, StoppingRoute),
    "around ours, below our route": (stack(inject, cancel_on_disconnect), StoppingRoute),
    "its route above ours": (undecorated, InjectingAboveStopping),
    "its route below ours": (undecorated, StoppingAboveInjecting),
}


async def injected(word: FromDishka[Word], seconds: float) -> str:
    await anyio.sleep(seconds)
    return word


async def injected_beside_a_request(seconds: float, word: FromDishka[Word], request: Request) -> str:
    await anyio.sleep(seconds)
    return f"{request.method} {word}"


def dishka_app(decorate: Guard, route_class: type[APIRoute], endpoint: Endpoint) -> FastAPI:
    provider = Provider(scope=Lifetime.REQUEST)
    provider.provide(lambda: Word("injected"), provides=Word)
    app = FastAPI()
    app.router.route_class = route_class

    @functools.wraps(endpoint)  # dishka writes into the functions that it is given
    async def copy(*args: Any, **kwargs: Any) -> object:  # Any: the endpoint's own
        return await endpoint(*args, **kwargs)

    app.get("/")(decorate(copy))
    setup_dishka(make_async_container(provider), app)
    return app


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("endpoint", [injected, injected_beside_a_request])
@pytest.mark.parametrize(("decorate", "route_class"), DISHKA.values(), ids=list(DISHKA))
async def test_dishka_injects_and_the_endpoint_ends_with_its_client(
    decorate: Guard, route_class: type[APIRoute], endpoint: Endpoint
) -> None:
    app = dishka_app(decorate, route_class, endpoint)
    assert "injected" in (await ask(app, "/?seconds=0")).text
    assert (await ask(app, "/?seconds=60", leave_after=0.06)).status == 499
    parameters = app.openapi()["paths"]["/"]["get"]["parameters"]
    assert [parameter["name"] for parameter in parameters] == ["seconds"]


def with_a_request(endpoint: Endpoint) -> Endpoint:
    """Decorate as home-made injectors do: with a hidden parameter, to which FastAPI passes its only Request."""
    signature = inspect.signature(endpoint)

    @functools.wraps(endpoint)
    async def call(*args: Any, **kwargs: Any) -> object:  # Any: the endpoint's own
        assert type(kwargs.pop("hidden")) is Request
        return await endpoint(*args, **kwargs)

    own = inspect.Parameter("hidden", inspect.Parameter.KEYWORD_ONLY, annotation=Request)
    call.__signature__ = signature.replace(parameters=[*signature.parameters.values(), own])  # type: ignore[attr-defined]
    return call


with_validation = validate_call(config=ConfigDict(arbitrary_types_allowed=True))


async def waits(seconds: Annotated[float, Query(ge=0)]) -> str:
    await anyio.sleep(seconds)
    return "waited"


async def waits_beside_a_request(seconds: float, request: Request = None) -> str:  # type: ignore[assignment]
    await anyio.sleep(seconds)
    return "waited"


async def waits_beside_a_connection(seconds: float, connection: HTTPConnection) -> str:
    await anyio.sleep(seconds)
    return f"waited for {connection.url.path}"


OTHERS: dict[str, Guard] = {"a request": with_a_request, "validation": with_validation}


@pytest.mark.parametrize("endpoint", [waits, waits_beside_a_request, waits_beside_a_connection])
@pytest.mark.parametrize("other", OTHERS.values(), ids=list(OTHERS))
@pytest.mark.parametrize("is_above", [True, False], ids=["above", "below"])
async def test_another_decorator_that_reads_or_changes_the_signature_keeps_the_endpoint_guarded(
    other: Guard, endpoint: Endpoint, is_above: bool
) -> None:
    decorators = (other, cancel_on_disconnect) if is_above else (cancel_on_disconnect, other)
    texts: list[str] = []
    for decorate in (other, stack(*decorators)):
        app = FastAPI()
        app.get("/")(decorate(endpoint))
        texts.append((await ask(app, "/?seconds=0")).text)
    assert texts[0] == texts[1]
    assert "waited" in texts[0]
    assert (await ask(app, "/?seconds=60", leave_after=0.06)).status == 499


@pytest.mark.parametrize("is_above", [True, False], ids=["above", "below"])
async def test_validation_works_without_configuration(is_above: bool) -> None:
    decorators = (validate_call, cancel_on_disconnect) if is_above else (cancel_on_disconnect, validate_call)
    app = FastAPI()
    app.get("/")(stack(*decorators)(waits))
    assert (await ask(app, "/?seconds=0")).text == '"waited"'
    assert (await ask(app, "/?seconds=60", leave_after=0.06)).status == 499


async def test_the_hook_of_an_endpoint_is_called_if_the_injector_above_is_decorated_too() -> None:
    notified: list[Request] = []
    app = FastAPI()
    app.get("/")(
        stack(cancel_on_disconnect, with_a_request, cancel_on_disconnect(on_disconnect=notified.append))(waits)
    )
    assert (await ask(app, "/?seconds=60", leave_after=0.06)).status == 499
    assert len(notified) == 1


async def test_a_function_that_validates_its_arguments_can_be_called_without_a_request() -> None:
    assert await with_validation(cancel_on_disconnect(waits))(0) == "waited"
    with pytest.raises(ValueError, match="greater than or equal"):
        await with_validation(cancel_on_disconnect(waits))(-1)


async def unannotated(number: int, unknown) -> str: ...  # type: ignore[no-untyped-def,empty-body]


def test_signature_and_annotations_agree_and_those_of_the_endpoint_stay() -> None:
    endpoint = cast(Any, unannotated)  # Any: its type is partly unknown
    before = dict(endpoint.__annotations__)
    decorated = cancel_on_disconnect(endpoint)
    parameters = inspect.signature(decorated).parameters
    annotated = {name: p.annotation for name, p in parameters.items() if p.annotation is not p.empty}
    assert list(annotated) == ["number", "cancelonleave_request"]
    assert decorated.__annotations__ == {**annotated, "return": str}
    assert get_type_hints(decorated)["cancelonleave_request"] is HTTPConnection
    assert endpoint.__annotations__ == before


# A dependency for routes of both kinds.


async def by_parameters(request: Request = None, websocket: WebSocket = None) -> str:  # type: ignore[assignment]
    connection = request or websocket
    await anyio.sleep(float(connection.query_params["seconds"]))
    return str(connection.url.path)


async def by_connection(connection: HTTPConnection) -> str:
    await anyio.sleep(float(connection.query_params["seconds"]))
    return str(connection.url.path)


@pytest.mark.parametrize("dependency", [by_parameters, by_connection])
def test_a_dependency_of_both_kinds_of_routes_is_guarded_when_it_gets_a_request(
    dependency: Callable[..., Awaitable[str]],
) -> None:
    needed = Depends(cancel_on_disconnect(dependency))
    app = FastAPI()

    @app.get("/http")
    async def http(path: str = needed) -> str:
        return path

    @app.websocket("/websocket")
    async def websocket(websocket: WebSocket, path: str = needed) -> None:
        await websocket.accept()
        await websocket.send_text(path)
        await websocket.close()

    async def main() -> None:
        assert (await ask(app, "/http?seconds=0")).text == '"/http"'
        assert (await ask(app, "/http?seconds=60", leave_after=0.06)).status == 499

    anyio.run(main)
    with TestClient(app) as client, client.websocket_connect("/websocket?seconds=0.06") as connection:
        assert connection.receive_text() == "/websocket"


def test_a_dependency_of_both_kinds_of_routes_is_guarded_when_called_directly() -> None:
    decorated = cancel_on_disconnect(by_parameters)

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse(await decorated(request) + await decorated(request=request))

    async def main() -> None:
        app = Starlette(routes=[Route("/", endpoint)])
        assert (await ask(app, "/?seconds=0")).text == "//"
        assert (await ask(app, "/?seconds=60", leave_after=0.06)).status == 499

    anyio.run(main)


# Doubles of a Request in unit tests.

DOUBLES: dict[str, Any] = {  # Any: a double has the type of what it replaces, or none
    "Mock": Mock(spec=Request),
    "MagicMock": MagicMock(spec=Request),
    "AsyncMock": AsyncMock(spec=Request),
    "create_autospec": create_autospec(Request, instance=True),
    "without a spec": MagicMock(),
}


@pytest.mark.parametrize("double", DOUBLES.values(), ids=list(DOUBLES))
async def test_a_function_runs_unguarded_when_it_gets_a_double_of_a_request(double: Any) -> None:
    @cancel_on_disconnect
    async def own(request: Request) -> str:
        return f"got {request is double}"

    @cancel_on_disconnect
    async def other(user: object) -> str:
        return f"got {user is double}"

    @cancel_on_disconnect
    def sync(request: Request) -> str:
        return f"got {request is double}"

    assert [await own(double), await own(request=double), await other(double)] == ["got True"] * 3
    assert await sync(double) == "got True"  # type: ignore[misc]  # a decorated function must be awaited


# What other code sees of the function.


async def coroutine(number: int) -> int:
    return number


def sync(number: int) -> int:
    return number


async def generator(number: int) -> AsyncIterator[int]:
    yield number


def sync_generator(number: int) -> Iterator[int]:
    yield number


class Callee:
    def __call__(self, number: int) -> int:
        return number


def timed(function: Callable[..., Any]) -> Callable[..., Any]:  # Any: a function of any result
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


KINDS: list[Callable[..., object]] = [coroutine, sync, generator, sync_generator]


@pytest.mark.parametrize("endpoint", KINDS)
def test_source_code_inspection_finds_the_endpoint(endpoint: Callable[..., object]) -> None:
    # FastAPI does this for its validation errors, but it caches by id(), even of deleted objects: no use here.
    for decorate in (cancel_on_disconnect, stack(timed, cancel_on_disconnect), stack(cancel_on_disconnect, timed)):
        decorated: Any = decorate(endpoint)  # type: ignore[arg-type]  # Any: as the endpoint
        assert inspect.getsourcelines(decorated) == inspect.getsourcelines(endpoint)
        innermost: Any = inspect.unwrap(decorated)
        assert inspect.getsourcefile(innermost) == __file__
        assert innermost.__globals__ is globals()
        assert innermost.__qualname__ == endpoint.__qualname__


@pytest.mark.parametrize(
    ("endpoint", "kind"),
    [
        (coroutine, inspect.iscoroutinefunction),
        (sync, inspect.iscoroutinefunction),
        (Callee(), inspect.iscoroutinefunction),
        (abs, inspect.iscoroutinefunction),
        (generator, inspect.isasyncgenfunction),
        (sync_generator, inspect.isasyncgenfunction),
    ],
)
def test_the_innermost_function_is_of_the_kind_that_is_called(
    endpoint: Callable[..., object], kind: Callable[[object], bool]
) -> None:
    decorated: Any = cancel_on_disconnect(endpoint)  # Any: as the endpoint
    assert kind(inspect.unwrap(timed(decorated)))
    assert kind(inspect.unwrap(timed(cancel_on_disconnect(timed(decorated)))))


async def test_without_a_request_a_function_of_any_kind_just_runs_below_wrappers() -> None:
    def decorate(function: Callable[..., object]) -> Any:  # Any: as the function
        return timed(cancel_on_disconnect(timed(function)))

    assert [await decorate(function)(3) for function in (coroutine, sync, Callee(), abs)] == [3] * 4
    assert [item async for item in decorate(generator)(3)] == [3]
    assert list(decorate(sync_generator)(3)) == [3]


# Sync callables whose result must be awaited.


class View:
    """Records in which thread it is called, and whether the awaitable that it returns can clean up."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, request: Request) -> Awaitable[Response]:
        self.seen.append(
            "in the event loop" if threading.current_thread() is threading.main_thread() else "in a thread"
        )
        return self.respond(float(request.query_params["seconds"]))

    async def respond(self, seconds: float) -> Response:
        try:
            await anyio.sleep(seconds)
        finally:
            await anyio.sleep(0.01)
            self.seen.append("cleaned up")
        return PlainTextResponse("done")


def calling(view: View) -> Callable[[Request], Awaitable[Response]]:
    return lambda request: view(request)


VIEWS: dict[str, tuple[Callable[[View], Any], str]] = {  # Any: whatever Route accepts
    "a function": (calling, "in a thread"),
    "an instance": (lambda view: view, "in a thread"),
    **(
        {"a marked instance": (inspect.markcoroutinefunction, "in the event loop")}
        if sys.version_info >= (3, 12)
        else {}
    ),
}


@pytest.mark.parametrize("anyio_backend", [BACKENDS["asyncio"], BACKENDS["uvloop"]], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize(("make", "place"), VIEWS.values(), ids=list(VIEWS))
async def test_an_awaitable_that_a_sync_callable_returns_is_awaited_and_cancelled_once(
    make: Callable[[View], Any],
    place: str,
) -> None:
    view = View()
    notified: list[Request] = []
    app = Starlette(routes=[Route("/", cancel_on_disconnect(make(view), on_disconnect=notified.append))])
    assert (await ask(app, "/?seconds=0")).text == "done"
    assert (await ask(app, "/?seconds=60", leave_after=0.06)).status == 499
    assert view.seen == [place, "cleaned up"] * 2
    assert len(notified) == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_awaitable_that_a_sync_callable_returns_is_awaited_without_a_request() -> None:
    async def answer() -> str:
        await some_work()
        return "answer"

    assert await cancel_on_disconnect(lambda: answer())() == "answer"


async def test_methods_of_an_endpoint_class_can_be_wrapped_by_other_decorators() -> None:
    class Page(HTTPEndpoint):
        @cancel_on_disconnect
        @timed
        async def get(self, request: Request) -> Response:
            await anyio.sleep(float(request.query_params["seconds"]))
            return PlainTextResponse("page")

    app = Starlette(routes=[Route("/", Page)])
    assert (await ask(app, "/?seconds=0")).text == "page"
    assert (await ask(app, "/?seconds=60", leave_after=0.06)).status == 499


# Results that have any attribute.


class Collections:
    """Has every attribute that is requested, like pymongo's databases and addict's dicts."""

    def __getattr__(self, name: str) -> "Collections":
        return Collections()


@pytest.mark.parametrize("decorate", [cancel_on_disconnect, stack(cancel_on_disconnect, timed)])
async def test_a_result_that_has_any_attribute_is_not_taken_for_a_response(decorate: Guard) -> None:
    database = Collections()
    assert isinstance(database.body_iterator, Collections)
    results: list[object] = []

    async def get(request: Request) -> Collections:
        return database

    @cancel_on_disconnect
    async def endpoint(request: Request) -> Response:
        results.append(await decorate(get)(request))
        return PlainTextResponse("done")

    assert (await ask(Starlette(routes=[Route("/", endpoint)]))).text == "done"
    assert results == [database]
    assert type(database) is Collections
    assert vars(database) == {}

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, get_args

import pytest
from starlette.datastructures import State
from starlette.requests import HTTPConnection, Request
from starlette.websockets import WebSocket

from cancelonleave._signature import request_parameter, resolved_signature

if TYPE_CHECKING:
    from starlette.requests import Request as CheckedRequest
    from starlette.responses import Response as CheckedResponse


class OwnRequest(Request[State]):
    pass


GIVEN = Request({"type": "http"})


async def annotated(year: int, req: Request) -> None: ...
async def subclass(year: int, req: OwnRequest) -> None: ...
async def with_metadata(year: int, req: Annotated[Request, "metadata"]) -> None: ...
async def union(year: int, req: Request | None) -> None: ...
async def both_kinds(year: int, req: Request | WebSocket) -> None: ...
async def connection(year: int, req: HTTPConnection) -> None: ...
async def connection_by_default(year: int, req: HTTPConnection | None = None) -> None: ...
async def generic(year: int, req: Request[State]) -> None: ...
async def keyword_only(year: int, *args: int, req: Request) -> None: ...
async def positional_only(year: int, req: Request, /) -> None: ...
async def named(year, request): ...  # type: ignore[no-untyped-def]  # as in Starlette's documentation
async def named_for_checkers(year: int, request: CheckedRequest) -> CheckedResponse: ...  # type: ignore[empty-body]


OWN: list[Callable[..., object]] = [
    annotated,
    subclass,
    with_metadata,
    union,
    both_kinds,
    connection,
    connection_by_default,
    generic,
    keyword_only,
    positional_only,
    named,
    named_for_checkers,
]


@pytest.mark.parametrize("endpoint", OWN)
def test_an_existing_request_parameter_is_found_and_the_signature_stays(endpoint: Callable[..., object]) -> None:
    signature = resolved_signature(endpoint)
    parameter = request_parameter(endpoint)
    assert parameter.signature == signature
    assert not parameter.added
    bound = signature.bind(2026, GIVEN) if endpoint is not keyword_only else signature.bind(2026, req=GIVEN)
    assert parameter.take(bound.args, bound.kwargs) is GIVEN
    if endpoint is not positional_only:
        assert parameter.take((), {"year": 2026, parameter.name: GIVEN}) is GIVEN


async def without(year: int) -> None: ...
async def with_kwargs(year: int, **rest: object) -> None: ...
async def with_a_model(request: list[int]) -> None: ...
async def with_a_default(request=None): ...  # type: ignore[no-untyped-def]  # a query parameter of FastAPI's
async def with_an_own_that_others_may_take(year: int, req: Request | None = None) -> None: ...
async def taken(cancelonleave_request: int) -> None: ...


NONE: list[Callable[..., object]] = [
    without,
    with_kwargs,
    with_a_model,
    with_a_default,
    with_an_own_that_others_may_take,
    taken,
]


@pytest.mark.parametrize("endpoint", NONE)
def test_a_request_parameter_is_added_where_there_is_none(endpoint: Callable[..., object]) -> None:
    parameter = request_parameter(endpoint)
    added = parameter.signature.parameters[parameter.name]
    assert parameter.added
    assert get_args(added.annotation)[0] is HTTPConnection
    assert added.kind is inspect.Parameter.KEYWORD_ONLY
    assert added.default is None
    kwargs: dict[str, object] = {"year": 2026, parameter.name: GIVEN}
    assert parameter.take((), kwargs) is GIVEN
    assert kwargs == {"year": 2026}


def test_without_a_request_parameter_the_first_request_among_the_arguments_is_used() -> None:
    parameter = request_parameter(without)
    other = Request({"type": "http"})
    assert parameter.take((1, GIVEN, other), {}) is GIVEN
    assert parameter.take((1,), {"any": GIVEN, "other": other}) is GIVEN
    assert parameter.take((1,), {}) is None


def test_the_request_parameter_comes_before_another_request_among_the_arguments() -> None:
    parameter = request_parameter(annotated)
    other = Request({"type": "http"})
    assert parameter.take((), {"year": other, "req": GIVEN}) is GIVEN
    assert parameter.take((other,), {}) is other


def test_each_annotation_is_resolved_separately() -> None:
    signature = resolved_signature(named_for_checkers)
    assert signature.parameters["year"].annotation is int
    assert signature.parameters["request"].annotation == "CheckedRequest"
    assert signature.return_annotation == "CheckedResponse"


class Endpoints:
    async def method(self, req: Request) -> None: ...

    @classmethod
    async def of_class(cls, req: Request) -> None: ...

    async def __call__(self, req: Request) -> None: ...


def decorated(function: Callable[..., object]) -> Callable[..., object]:
    def wrapper() -> None: ...

    return functools.update_wrapper(wrapper, function)


@pytest.mark.parametrize(
    "endpoint",
    [
        Endpoints().method,
        Endpoints.of_class,
        Endpoints(),
        functools.partial(annotated, 2026),
        functools.partial(functools.partial(annotated), year=2026),
        decorated(annotated),
        decorated(functools.partial(Endpoints().method)),
        print,
    ],
)
def test_names_are_looked_up_where_the_innermost_function_was_defined(endpoint: Callable[..., object]) -> None:
    parameters = resolved_signature(endpoint).parameters.values()
    assert [p.annotation for p in parameters if p.name == "req"] == [Request] * (endpoint is not print)


def test_a_websocket_is_recognized_as_a_request_is() -> None:
    async def by_kind(socket: WebSocket) -> None: ...

    async def by_name(websocket) -> None: ...  # type: ignore[no-untyped-def]  # as in Starlette's documentation

    async def of_either_kind(connection: HTTPConnection) -> None: ...

    async def other(websocket: int) -> None: ...

    functions: list[Callable[..., object]] = [by_kind, by_name, of_either_kind, other]
    names = [request_parameter(function).name for function in functions]
    assert names == ["socket", "websocket", "connection", "cancelonleave_request"]


@pytest.mark.parametrize(
    "bound", [functools.partial(annotated, 2026, GIVEN), functools.partial(with_kwargs, 2026, any=GIVEN)]
)
def test_a_request_that_a_partial_has_bound_is_found(bound: Callable[..., object]) -> None:
    assert request_parameter(bound).take((), {}) is GIVEN

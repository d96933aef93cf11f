"""Finds, or adds, the parameter through which the framework hands over the Request, or the WebSocket."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from typing import Annotated, Any, ForwardRef, NamedTuple, Union, get_args, get_origin

from starlette.requests import HTTPConnection, Request
from starlette.websockets import WebSocket
from typing_extensions import Format, TypeIs

from ._kind import written_function

# From 3.14 on annotations are evaluated when read, and one name known to type checkers only would fail them all.
_LENIENT: dict[str, Any] = (
    {"annotation_format": Format.FORWARDREF} if sys.version_info >= (3, 14) else {}
)  # Any: kwargs


class NotValidated:
    """Has pydantic's `validate_call()`, above the decorator, take whatever FastAPI gives."""

    def __get_pydantic_core_schema__(self, *_: object) -> dict[str, str]:
        return {"type": "any"}


class RequestParameter(NamedTuple):
    """Where the Request stands among the arguments of an endpoint, and the signature for the framework to read."""

    name: str
    position: int
    added: bool
    signature: inspect.Signature
    bound: tuple[object, ...]  # if it is a functools.partial

    def take(self, args: tuple[object, ...], kwargs: dict[str, object]) -> Request | WebSocket | None:
        """Return the Request or WebSocket of a call, if any; remove an added one from `kwargs`, the endpoint's own."""
        request: object
        if self.added:
            request = kwargs.pop(self.name, None)
        else:
            request = args[self.position] if self.position < len(args) else kwargs.get(self.name)
        if _is_request(request):
            return request
        return next((value for value in (*args, *kwargs.values(), *self.bound) if _is_request(value)), None)


def resolved_signature(endpoint: Callable[..., object]) -> inspect.Signature:
    """Return the signature with each annotation that is a string evaluated, if that can be done.

    FastAPI before 0.123.5 looks the names up in the module of the decorator's wrapper, where they mean nothing.
    """
    signature = inspect.signature(endpoint, **_LENIENT)
    names = getattr(written_function(endpoint), "__globals__", {})
    parameters = [p.replace(annotation=_resolved(p.annotation, names)) for p in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=_resolved(signature.return_annotation, names))


def request_parameter(endpoint: Callable[..., object]) -> RequestParameter:
    """Find the parameter that always takes the Request, or add one that FastAPI fills and OpenAPI doesn't show."""
    signature = resolved_signature(endpoint)
    bound: tuple[object, ...] = (*getattr(endpoint, "args", ()), *getattr(endpoint, "keywords", {}).values())
    parameters = list(signature.parameters.values())
    # FastAPI fills one Request only, the last; a decorator above may add its own. An HTTPConnection it fills besides.
    own = [p for p in parameters if all(taken := _kinds_taken(p)) or (any(taken) and p.default is p.empty)]
    if own:
        position = sys.maxsize if own[0].kind is own[0].KEYWORD_ONLY else parameters.index(own[0])
        return RequestParameter(own[0].name, position, False, signature, bound)
    name = "cancelonleave_request"
    while name in signature.parameters:
        name += "_"
    annotation = Annotated[HTTPConnection, NotValidated()]
    added = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=None)
    parameters.insert(len(parameters) - any(p.kind is p.VAR_KEYWORD for p in parameters), added)
    return RequestParameter(name, sys.maxsize, True, signature.replace(parameters=parameters), bound)


def _kinds_taken(parameter: inspect.Parameter) -> list[bool]:
    """Whether it takes a Request, and whether it takes a WebSocket.

    Starlette gives it by position: it need not be annotated, or may be with a name known to type checkers only.
    """
    unknown = parameter.annotation is parameter.empty or isinstance(parameter.annotation, (str, ForwardRef))
    name = parameter.name if unknown and parameter.default is parameter.empty else None
    return [name == kind.__name__.lower() or _is_kind(parameter.annotation, kind) for kind in (Request, WebSocket)]


def _is_kind(annotation: object, kind: type) -> bool:
    """Whether it is `kind`, a subclass, or HTTPConnection; or one in Annotated, a union or with type arguments."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _is_kind(get_args(annotation)[0], kind)
    if origin in (Union, types.UnionType):
        return any(_is_kind(member, kind) for member in get_args(annotation))
    candidate = origin or annotation
    return isinstance(candidate, type) and (issubclass(candidate, kind) or candidate is HTTPConnection)


def _is_request(value: object) -> TypeIs[Request | WebSocket]:
    # Not by isinstance(), which believes a Mock(spec=Request), which has no receive().
    return issubclass(type(value), (Request, WebSocket))


def _resolved(annotation: object, names: dict[str, object]) -> object:
    try:  # as inspect.signature(eval_str=True) does, which gives up on all at the first that fails
        return eval(annotation, names) if isinstance(annotation, str) else annotation
    except Exception:  # a name imported for type checkers only, or whatever else code in an annotation may raise
        return annotation

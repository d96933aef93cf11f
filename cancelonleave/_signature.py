"""Finds, or adds, the parameter through which the framework hands over the Request."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Annotated, Any, ForwardRef, NamedTuple, Union, get_args, get_origin

from starlette.requests import Request
from starlette.websockets import WebSocket
from typing_extensions import Format, TypeIs

# From 3.14 on annotations are evaluated when read, and one name known to type checkers only would fail them all.
_LENIENT: dict[str, Any] = (
    {"annotation_format": Format.FORWARDREF} if sys.version_info >= (3, 14) else {}
)  # Any: kwargs


class RequestParameter(NamedTuple):
    """Where the Request stands among the arguments of an endpoint, and the signature for the framework to read."""

    name: str
    position: int
    added: bool
    signature: inspect.Signature
    bound: tuple[object, ...]  # if it is a functools.partial

    def take(self, args: tuple[object, ...], kwargs: dict[str, object]) -> Request | None:
        """Return the Request of a call, if it has one; remove an added one from `kwargs`, the endpoint's own."""
        own = args[self.position] if self.position < len(args) else kwargs.get(self.name)
        request = kwargs.pop(self.name, None) if self.added else own
        if _is_request(request):
            return request
        return next((value for value in (*args, *kwargs.values(), *self.bound) if _is_request(value)), None)


def resolved_signature(endpoint: Callable[..., object]) -> inspect.Signature:
    """Return the signature with each annotation that is a string evaluated, if that can be done.

    FastAPI before 0.123.5 looks the names up in the module of the decorator's wrapper, where they mean nothing.
    """
    signature = inspect.signature(endpoint, **_LENIENT)
    names = _global_names(endpoint)
    parameters = [p.replace(annotation=_resolved(p.annotation, names)) for p in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=_resolved(signature.return_annotation, names))


def request_parameter(endpoint: Callable[..., object]) -> RequestParameter:
    """Find the parameter that takes the Request, or add one that FastAPI fills and OpenAPI doesn't show."""
    signature = resolved_signature(endpoint)
    bound: tuple[object, ...] = (*getattr(endpoint, "args", ()), *getattr(endpoint, "keywords", {}).values())
    parameters = list(signature.parameters.values())
    own = [p for p in parameters if _is_kind(p.annotation, Request) or _is_named(p, "request")]
    if own:
        position = sys.maxsize if own[0].kind is own[0].KEYWORD_ONLY else parameters.index(own[0])
        return RequestParameter(own[0].name, position, False, signature, bound)
    name = "cancelonleave_request"
    while name in signature.parameters:
        name += "_"
    added = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Request)
    parameters.insert(len(parameters) - any(p.kind is p.VAR_KEYWORD for p in parameters), added)
    return RequestParameter(name, sys.maxsize, True, signature.replace(parameters=parameters), bound)


def takes_websocket(endpoint: Callable[..., object]) -> bool:
    parameters = resolved_signature(endpoint).parameters.values()
    return any(
        _is_kind(parameter.annotation, WebSocket) or _is_named(parameter, "websocket") for parameter in parameters
    )


def _is_kind(annotation: object, kind: type) -> bool:
    """Whether it is `kind`, a subclass, or one of them in Annotated, Optional, a union or with type arguments."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _is_kind(get_args(annotation)[0], kind)
    if origin in (Union, types.UnionType):
        return any(_is_kind(member, kind) for member in get_args(annotation))
    candidate = origin or annotation
    return isinstance(candidate, type) and issubclass(candidate, kind)


def _is_named(parameter: inspect.Parameter, name: str) -> bool:
    """Starlette gives it by position: it need not be annotated, or may be with a name known to type checkers only."""
    unknown = parameter.annotation is parameter.empty or isinstance(parameter.annotation, (str, ForwardRef))
    return parameter.name == name and unknown and parameter.default is parameter.empty


def _is_request(value: object) -> TypeIs[Request]:
    return isinstance(value, Request)


def _resolved(annotation: object, names: dict[str, object]) -> object:
    try:  # as inspect.signature(eval_str=True) does, which gives up on all at the first that fails
        return eval(annotation, names) if isinstance(annotation, str) else annotation
    except Exception:  # a name imported for type checkers only, or whatever else code in an annotation may raise
        return annotation


def innermost(endpoint: Any) -> Any:  # Any: all kinds of callables, and what they wrap
    """Return the function at the bottom of decorators and partials."""
    function = inspect.unwrap(endpoint)
    return innermost(function.func) if isinstance(function, functools.partial) else function


def _global_names(endpoint: Callable[..., object]) -> dict[str, object]:
    function = innermost(endpoint)
    return getattr(function if inspect.isroutine(function) else type(function).__call__, "__globals__", {})

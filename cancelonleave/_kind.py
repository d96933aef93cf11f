"""Finds what kind of function an endpoint is, and has the frameworks see the kind that it becomes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Callable
from types import FunctionType
from typing import Any


def is_kind(kind: Callable[[object], bool], endpoint: Any) -> bool:  # Any: here and below, whatever can be called
    """Whether it is, say, a coroutine function, or calls one. Like FastAPI, this looks below decorators, too."""
    function = endpoint.func if isinstance(endpoint, functools.partial) else endpoint
    calls = [each if inspect.isroutine(each) else type(each).__call__ for each in (function, inspect.unwrap(function))]
    return any(kind(each) for each in (function, *calls, *map(inspect.unwrap, calls)))


def innermost(endpoint: Any) -> Any:
    """Return the function at the bottom of decorators and partials."""
    function = inspect.unwrap(endpoint)
    return innermost(function.func) if isinstance(function, functools.partial) else function


def written_function(endpoint: Any) -> Any:
    """Return the function that somebody has written: the innermost, or the `__call__` of an instance there."""
    function = innermost(endpoint)
    return function if inspect.isroutine(function) else type(function).__call__


def in_place_of(endpoint: Any, function: Any) -> FunctionType:
    """Return a copy of a function that seems to stand where an endpoint was written.

    FastAPI takes what it finds below all decorators for the kind of what it calls; and a decorated sync function must
    be awaited. What inspects source code still gets the endpoint's.
    """
    written = written_function(endpoint)
    code = getattr(written, "__code__", function.__code__)
    place = {name: getattr(code, name) for name in ("co_filename", "co_firstlineno", "co_name", "co_qualname")}
    return FunctionType(function.__code__.replace(**place), getattr(written, "__globals__", {}))


async def coroutine_function() -> None: ...


async def async_generator_function() -> AsyncGenerator[None]:
    yield

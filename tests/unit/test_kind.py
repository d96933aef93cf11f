"""What stands in the place of a decorated function, for frameworks to look at."""

from __future__ import annotations

import inspect

import pytest

from cancelonleave._kind import async_generator_function, coroutine_function, in_place_of

pytestmark = pytest.mark.anyio


def endpoint() -> None: ...


async def test_a_coroutine_function_that_does_nothing_stands_where_the_endpoint_is() -> None:
    function = in_place_of(endpoint, coroutine_function)
    assert inspect.iscoroutinefunction(function)
    assert function.__code__.co_firstlineno == endpoint.__code__.co_firstlineno
    assert await coroutine_function() is None  # type: ignore[func-returns-value]  # that is the point


async def test_an_async_generator_function_that_yields_once_stands_where_the_endpoint_is() -> None:
    function = in_place_of(endpoint, async_generator_function)
    assert inspect.isasyncgenfunction(function)
    assert function.__code__.co_filename == __file__
    assert [each async for each in async_generator_function()] == [None]

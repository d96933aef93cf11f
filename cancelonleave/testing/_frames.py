"""Says of a coroutine where it is defined and where it waits, leaving out what is a library's."""

from __future__ import annotations

import gc
import inspect
import sysconfig
from collections.abc import Iterator
from os.path import dirname, join
from traceback import FrameSummary, format_list
from types import CodeType, FrameType

import anyio
from starlette.types import ASGIApp, Scope

INSTALLED = tuple(map(sysconfig.get_path, ("purelib", "platlib")))
_STDLIB = tuple(map(sysconfig.get_path, ("stdlib", "platstdlib")))
_HERE = dirname(__file__)
_SERVER = join(_HERE, "_connection.py")
_COROUTINE = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_GENERATOR


def describe(coroutine: object) -> str:
    """Name a coroutine that waits, with where it is defined, and show where it waits."""
    frames = list(_frames(coroutine))
    if not frames:
        return repr(coroutine)
    telling = _telling(frames)
    shown = [frame for frame in frames[:-1] if frame in telling or frame.f_code.co_filename == _SERVER]
    places = [(frame.f_code, frame.f_lineno) for frame in [*shown[-5:], frames[-1]]]
    lines = format_list([FrameSummary(code.co_filename, line, code.co_name) for code, line in places])
    return f"{_definition(telling[0].f_code)}\n{''.join(lines)}".rstrip()


def caller() -> str:
    """Name the coroutine that has just called the server, and where it is defined."""
    frames: list[FrameType] = []
    frame = inspect.currentframe()
    while frame is not None and (not frames or frame.f_code.co_flags & _COROUTINE):
        frames.append(frame)
        frame = frame.f_back
    frames = frames[2:]  # without this function's own, and the server's
    return _definition(_telling(frames)[0].f_code) if frames else "a task that runs receive() itself"


def endpoint_of(scope: Scope, app: ASGIApp) -> str:
    """Name the endpoint that Starlette or FastAPI chose for a request, or else the application."""
    endpoint = inspect.unwrap(scope.get("endpoint", app))
    return _definition(endpoint.__code__) if inspect.isfunction(endpoint) else repr(endpoint)


def _telling(frames: list[FrameType]) -> list[FrameType]:
    """Return the frames of the application and the test; else those of frameworks; else all."""
    best = min(map(_rank, frames))
    return [frame for frame in frames if _rank(frame) == best]


def _rank(frame: FrameType) -> int:
    name = frame.f_code.co_filename
    if name.startswith((_HERE, dirname(anyio.__file__))):
        return 2  # it runs every coroutine, and says nothing about this one
    if name.startswith(INSTALLED):  # before the standard library, whose directory that is often in
        return 1
    return 2 if name.startswith(_STDLIB) else 0


def _definition(code: CodeType) -> str:
    return f"{code.co_qualname}(), defined at {code.co_filename}:{code.co_firstlineno}"


def _frames(awaited: object) -> Iterator[FrameType]:
    """Return the frames of a coroutine that waits, from the outermost to the innermost."""
    while awaited is not None:
        for kind in ("cr", "gi", "ag"):
            frame = getattr(awaited, f"{kind}_frame", None)
            if frame is not None:
                yield frame
        awaited = _awaited_by(awaited)


def _awaited_by(awaited: object) -> object:
    for name in ("cr_await", "gi_yieldfrom", "ag_await"):
        if hasattr(awaited, name):
            return getattr(awaited, name)
    # Neither `async for` nor __await__() has an attribute for what it waits for.
    inner = (each for each in gc.get_referents(awaited) if hasattr(each, "ag_frame") or hasattr(each, "cr_frame"))
    return next(inner, None)

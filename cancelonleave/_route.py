"""Names the route that a request has taken, with the prefixes of mounts and included routers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from starlette.types import Scope


def route_template(scope: Scope) -> str | None:
    """Return the template of the request's path, such as `/reports/{year}`.

    The scope says the last part of it at most, since each router puts its own there. So find the way once more.
    """
    outside = {**scope, "root_path": scope.get("app_root_path", scope.get("root_path", ""))}
    routes = getattr(scope.get("router"), "routes", ())
    known = getattr(scope.get("route"), "path", getattr(scope.get("endpoint"), "__name__", None))
    return _template(routes, outside) or known


def _template(routes: Iterable[Any], scope: Scope) -> str:  # Any: routes of all kinds
    from starlette.routing import Match  # here, so that to import us loads nothing else

    for route in _flat(routes):
        match, child_scope = route.matches(scope)
        if match is Match.FULL:
            path: str = getattr(route, "path", "")  # a Host has none
            return path + _template(getattr(route, "routes", ()), {**scope, **child_scope})
    return ""


def _flat(routes: Iterable[Any]) -> Iterable[Any]:
    """Put in the place of a router that FastAPI (0.137 and newer) has included, its routes with their whole paths."""
    for route in routes:
        contexts = getattr(route, "effective_route_contexts", None)
        if contexts is None:
            yield route
        else:
            yield from (context.starlette_route or context for context in contexts())

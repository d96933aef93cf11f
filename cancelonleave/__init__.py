"""Stop an endpoint of Starlette or FastAPI, or any async function that takes a Request, when its client leaves."""

from ._decorator import cancel_on_disconnect as cancel_on_disconnect
from ._exceptions import ClientClosedRequest as ClientClosedRequest

__all__ = ["ClientClosedRequest", "cancel_on_disconnect"]

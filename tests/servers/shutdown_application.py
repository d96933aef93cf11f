"""An application for servers that are shut down during a request; it prints what happens to the request."""

from __future__ import annotations

import logging
import sys

import anyio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from cancelonleave import cancel_on_disconnect

logger = logging.getLogger("cancelonleave")
logger.setLevel(logging.INFO)
logger.addHandler(logging.StreamHandler(sys.stdout))


def say(what: str) -> None:
    print(what, flush=True)


async def ready(request: Request) -> Response:
    return PlainTextResponse("ready")


@cancel_on_disconnect(on_disconnect=lambda request: say("on_disconnect"))
async def wait(request: Request) -> None:
    say("begun")
    try:
        await anyio.sleep(60)
    finally:
        say("cancelled")
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.01)
        say("clean")


app = Starlette(routes=[Route("/", ready), Route("/wait", wait)])

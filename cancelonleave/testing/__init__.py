"""Test what an ASGI application does when its client disconnects: an in-memory client that disconnects when told to."""

from ._client import Client as Client
from ._exchange import Exchange as Exchange
from ._exchange import Sent as Sent
from ._request import Options as Options
from ._servers import SERVERS as SERVERS

__all__ = ["SERVERS", "Client", "Exchange", "Options", "Sent"]

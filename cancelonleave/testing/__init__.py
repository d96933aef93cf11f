"""Ask an ASGI application as a client that leaves when told to, in memory, and see what it does about it."""

from ._client import Client as Client
from ._exchange import Exchange as Exchange
from ._exchange import Sent as Sent
from ._request import Options as Options
from ._servers import SERVERS as SERVERS

__all__ = ["SERVERS", "Client", "Exchange", "Options", "Sent"]

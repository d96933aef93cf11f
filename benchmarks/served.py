"""The application that a server process serves: which, is in its environment."""

from __future__ import annotations

import os
from importlib import import_module

app = import_module(os.environ["BENCHMARK"]).app(os.environ["CONTESTANT"], os.environ["FRAMEWORK"])

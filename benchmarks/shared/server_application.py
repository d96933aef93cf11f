"""The application that a server process serves; the environment says which one."""

from __future__ import annotations

import os
from importlib import import_module

app = import_module(os.environ["BENCHMARK"]).app(os.environ["IMPLEMENTATION"], os.environ["FRAMEWORK"])

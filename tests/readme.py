"""The files in the README."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")


def block(name: str) -> str:
    """Return the code of the file of that name."""
    found = re.search(rf"^```python\n(# {name}\n.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


@functools.cache  # a metric can't be defined twice in a process
def module(name: str) -> dict[str, Any]:  # Any: whatever is in it
    """Run that file, and return what is in it."""
    names: dict[str, Any] = {"__name__": name}
    exec(compile(block(name), name, "exec"), names)
    return names

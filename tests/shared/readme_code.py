"""The files in the documents: code blocks that begin with the same file name are one file."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
SERVERS = Path(__file__).parent.parent.joinpath("servers.md").read_text(encoding="utf-8")


def files(text: str = TEXT) -> dict[str, str]:
    """Return the code of each file in a document, by file name."""
    found: dict[str, str] = {}
    for code, name in re.findall(r"^```python\n(# (\S+)\n.*?)^```$", text, re.DOTALL | re.MULTILINE):
        found[name] = f"{found[name]}\n\n{code}" if name in found else code
    return found


@functools.cache  # a process can't define a metric twice
def module(name: str, text: str = TEXT) -> dict[str, Any]:  # Any: values of any type
    """Run a file, and return its global names."""
    names: dict[str, Any] = {"__name__": name}
    exec(compile(files(text)[name], name, "exec"), names)
    return names

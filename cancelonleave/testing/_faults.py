"""What a test can fail for, and what its author can do about that."""

from __future__ import annotations

from typing import Literal, NamedTuple

Check = Literal["tasks left behind", "unbalanced cancelling", "concurrent receive", "message order"]


class Fault(NamedTuple):
    """What is wrong with an application."""

    check: Check | None
    """The check that found it; None for the timeout, which can't be left out."""
    text: str
    advice: str = ""

    @property
    def way_out(self) -> str:
        """What to do if nothing is wrong."""
        out = f'If this is intended, leave the check out: Client(app, unchecked={{"{self.check}": "the reason"}})'
        return self.advice or out

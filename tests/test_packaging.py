from __future__ import annotations

import subprocess
import sys
from importlib import metadata, resources

import cancelonleave


def test_what_users_import_is_all_there_is() -> None:
    assert cancelonleave.__all__ == ["ClientClosedRequest", "cancel_on_disconnect"]
    assert all(hasattr(cancelonleave, name) for name in cancelonleave.__all__)


def test_the_types_are_for_all_to_see() -> None:
    assert resources.files(cancelonleave).joinpath("py.typed").is_file()


def test_it_needs_three_packages_and_no_more() -> None:
    needed = [entry for entry in metadata.requires("cancelonleave") or [] if "extra ==" not in entry]
    assert sorted(entry.split(">=")[0] for entry in needed) == ["anyio", "starlette", "typing-extensions"]


def test_importing_it_is_silent_and_does_not_import_fastapi() -> None:
    program = "import sys, cancelonleave; assert 'fastapi' not in sys.modules"
    warnings = ["-W", "error", "-W", "ignore::PendingDeprecationWarning"]  # one of Starlette 0.40's own
    done = subprocess.run([sys.executable, *warnings, "-c", program], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")

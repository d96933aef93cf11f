"""What happens to rows, locks, queries and connections in PostgreSQL when clients disconnect at random times."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from benchmarks.shared.postgres import NEEDED, is_installed, postgres
from tests.database.client import Database
from tests.database.drivers import DRIVERS

pytestmark = pytest.mark.skipif(not is_installed(), reason=NEEDED)

DISCONNECTS = 200
DISCONNECTS_BY_LEVEL = 50  # enough to see the damage

HALVES = "SELECT FROM entries GROUP BY pair HAVING count(*) <> 2"
LOCKS = "SELECT FROM locks"
UNMARKED = "SELECT FROM jobs WHERE state <> 'failed'"
ADVISORY_LOCKS = """
    SELECT FROM pg_locks JOIN pg_database ON pg_database.oid = database
    WHERE locktype = 'advisory' AND datname = current_database()
"""
SESSIONS = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = '{}' AND "
OPEN_TRANSACTIONS = SESSIONS + "state LIKE 'idle in transaction%'"
QUERIES = SESSIONS + "state = 'active' AND query LIKE '%pg_sleep(30)'"

# A cancel request that overtakes its query has no effect in PostgreSQL's protocol: the query goes on, and psycopg drops
# its connection after 5 seconds. With a plain `task.cancel()`, that also happened to 7 of psycopg's 1,000 queries.
LOST = 0.05
OF_LOST = ("query not terminated after cancellation: ", "discarding closed connection: ")

each_driver = pytest.mark.parametrize("driver", DRIVERS)


@pytest.fixture(scope="module")
def directory() -> Generator[Path]:
    with postgres() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGHOST", str(directory))
        patch.setenv("PGUSER", "postgres")
        yield directory


@pytest.fixture(scope="module")
def database(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Database]:
    database = Database("guarded", directory, tmp_path_factory.mktemp("guarded") / "log")
    yield database
    assert [line for line in database.stop().splitlines() if not line.startswith(OF_LOST)] == []


@pytest.fixture(scope="module")
def database_by_level(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Database]:
    database = Database("guarded_by_level", directory, tmp_path_factory.mktemp("guarded_by_level") / "log")
    yield database
    database.stop()


@each_driver
def test_a_pair_is_committed_if_the_client_stays(database: Database, driver: str) -> None:
    committed = database.count("SELECT FROM entries")
    database.stay(driver, "order")
    assert database.count("SELECT FROM entries") == committed + 2


@each_driver
@pytest.mark.parametrize("work", ["transfers", "order"])
def test_a_disconnect_never_commits_half_of_a_pair(database: Database, driver: str, work: str) -> None:
    counts = database.disconnect(driver, work, DISCONNECTS)
    assert counts["499"] > DISCONNECTS / 2
    assert database.count(HALVES) == 0
    assert database.count(ADVISORY_LOCKS) == 0
    assert database.count(OPEN_TRANSACTIONS.format(driver)) == 0
    if driver != "sqlalchemy":  # it drops a connection whose query is cancelled
        assert counts["opened"] == 0


@each_driver
def test_a_disconnect_releases_locks_and_keeps_connections(database: Database, driver: str) -> None:
    counts = database.disconnect(driver, "lock", DISCONNECTS)
    assert counts["holders"] > DISCONNECTS / 4
    assert database.count(LOCKS) == 0
    assert database.count(OPEN_TRANSACTIONS.format(driver)) == 0
    # SQLAlchemy drops a connection whose query is cancelled; no request with a lock was cancelled during a query.
    assert counts["opened"] <= (counts["499"] - counts["holders"] if driver == "sqlalchemy" else 0)


@each_driver
def test_jobs_are_marked_as_failed_and_their_queries_cancelled(database: Database, driver: str) -> None:
    counts = database.disconnect(driver, "job", DISCONNECTS)
    assert database.count("SELECT FROM jobs") > DISCONNECTS / 4
    assert database.count(UNMARKED) == 0
    assert database.count(OPEN_TRANSACTIONS.format(driver)) == 0
    assert database.count(QUERIES.format(driver)) <= LOST * DISCONNECTS
    if driver != "sqlalchemy":
        assert counts["opened"] <= LOST * DISCONNECTS


@each_driver
def test_halves_would_be_committed_if_the_guard_did_not_raise(database_by_level: Database, driver: str) -> None:
    database_by_level.disconnect(driver, "order", DISCONNECTS_BY_LEVEL)
    assert database_by_level.count(HALVES) > 0


@each_driver
def test_level_cancellation_would_leave_locks_and_lose_connections(database_by_level: Database, driver: str) -> None:
    counts = database_by_level.disconnect(driver, "lock", DISCONNECTS_BY_LEVEL)
    assert database_by_level.count(LOCKS) > 0
    if driver != "asyncpg":  # it restores connections in separate tasks
        assert counts["opened"] > counts["499"] - counts["holders"]


@each_driver
def test_level_cancellation_would_leave_jobs_running(database_by_level: Database, driver: str) -> None:
    counts = database_by_level.disconnect(driver, "job", DISCONNECTS_BY_LEVEL)
    assert database_by_level.count(UNMARKED) > 0
    if driver == "sqlalchemy":
        assert database_by_level.count(QUERIES.format(driver)) > LOST * DISCONNECTS_BY_LEVEL
    if driver == "psycopg":
        assert counts["opened"] > LOST * DISCONNECTS_BY_LEVEL

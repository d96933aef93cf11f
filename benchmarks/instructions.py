"""How many machine instructions are added to a request: they vary less from run to run than microseconds."""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

from benchmarks import report
from benchmarks.overhead import BACKENDS, CASES, block, build
from benchmarks.shared import charts
from benchmarks.shared.implementations import ARTICLE, BARE, FASTAPI_DISCONNECT, OURS, implementations

WARM_UP = 100  # requests
FEW, MANY = 100, 400  # requests: the difference excludes what a process costs by itself
COUNTED = ["at once", "3 awaits", "reads its body"]  # the other cases depend on the clock, or take too long


async def run(case: str, implementation: str, requests: int) -> None:
    """Answer this many requests."""
    app = build(CASES[case], implementations()[implementation])
    stopped = asyncio.get_running_loop().time()
    # valgrind is so slow that the event loop would lag, and what happens then depends on how much it lags.
    asyncio.get_running_loop().time = lambda: stopped  # type: ignore[method-assign]
    await block(app, BACKENDS["asyncio"], WARM_UP, 1)
    gc.collect()
    gc.disable()  # otherwise the moment of a collection would depend on the number of requests
    await block(app, BACKENDS["asyncio"], requests, 1)


def run_each(names: list[str]) -> None:
    """Run each count in a process of its own, under valgrind, and print their ids.

    They are forked from here, since under valgrind the imports take much longer than the requests.
    """
    fork = multiprocessing.get_context("fork")
    for name, case, requests in product(names, COUNTED, (FEW, MANY)):
        process = fork.Process(target=lambda *each: asyncio.run(run(*each)), args=(case, name, requests))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"{name}, {case}: the process ended with {process.exitcode}")
        print(process.pid)


def measure(names: list[str]) -> dict[str, dict[str, float]]:
    """Return the instructions of a request, in thousands, by implementation and case."""
    script = [sys.executable, "-m", "benchmarks.instructions", "--run", "--only", *names]
    with tempfile.TemporaryDirectory() as directory:
        options = ["--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
        command = ["valgrind", *options, f"--log-file={directory}/%p", *script]
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        ids = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout.split()
        counts = [counted((Path(directory) / each).read_text()) for each in ids]
    # A process also counts what its parent did before the fork: the difference leaves what it did between two forks.
    pairs = zip(counts[::2], counts[1::2], strict=True)
    thousands = iter([(many - few) / (MANY - FEW) / 1000 for few, many in pairs])
    return {name: {case: next(thousands) for case in COUNTED} for name in names}


def counted(log: str) -> int:
    found = re.search(r"I +refs: +([\d,]+)", log)
    assert found is not None
    return int(found[1].replace(",", ""))


def main() -> None:
    """Count for every implementation; `valgrind` must be installed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(implementations()), help="some of: %(default)s")
    parser.add_argument("--run", action="store_true", help="run the requests that are counted; for valgrind")
    options = parser.parse_args()
    if options.run:
        run_each(options.only)
        return
    thousands = measure(options.only)
    added = {
        name: {case: number - thousands[BARE][case] for case, number in row.items()} for name, row in thousands.items()
    }
    rows = {BARE: [f"{number:.1f}" for number in thousands[BARE].values()]}
    rows |= {
        f"added by {name}": [f"{each:+.1f}" for each in row.values()] for name, row in added.items() if name != BARE
    }
    for name in (ARTICLE, FASTAPI_DISCONNECT):
        if name in added:
            rows[f"{OURS} / {name}"] = [f"{added[OURS][case] / added[name][case]:.3f}" for case in COUNTED]
    charts.bars(
        "instructions", "Thousands of instructions added to a request", {n: r for n, r in added.items() if n != BARE}
    )
    tables = [report.table("asyncio: thousands of instructions a request", COUNTED, rows)]
    report.save("instructions", tables, thousands, {"instructions": "Thousands of instructions added to a request"})


if __name__ == "__main__":
    main()

"""How many machine instructions are added to a request: unlike microseconds, they are the same in each run."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import charts, report
from benchmarks.overhead import BACKENDS, CASES, block, build
from benchmarks.shared.implementations import ARTICLE, BARE, FASTAPI_DISCONNECT, OURS, implementations

WARM_UP = 100  # requests
FEW, MANY = 100, 400  # requests: the difference excludes what a process costs by itself
COUNTED = ["at once", "3 awaits", "reads its body"]  # the other cases depend on the clock, or take too long


async def run(case: str, implementation: str, requests: int) -> None:
    """Answer this many requests, under valgrind."""
    app = build(CASES[case], implementations()[implementation])
    stopped = asyncio.get_running_loop().time()
    # valgrind is so slow that the event loop would lag, and what happens then depends on how much it lags.
    asyncio.get_running_loop().time = lambda: stopped  # type: ignore[method-assign]
    await block(app, BACKENDS["asyncio"], WARM_UP, 1)
    gc.collect()
    gc.disable()  # otherwise the moment of a collection would depend on the number of requests
    await block(app, BACKENDS["asyncio"], requests, 1)


def instructions(case: str, implementation: str, requests: int) -> int:
    """Return how many instructions a process takes for this many requests."""
    script = [sys.executable, "-m", "benchmarks.instructions", "--run", case, implementation, str(requests)]
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        options = ["--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null", f"--log-file={log}"]
        subprocess.run(["valgrind", *options, *script], check=True, env={**os.environ, "PYTHONHASHSEED": "0"})
        found = re.search(r"I +refs: +([\d,]+)", log.read_text())
    assert found is not None
    return int(found[1].replace(",", ""))


def measure(names: list[str]) -> dict[str, dict[str, float]]:
    """Return the instructions of a request, in thousands, by implementation and case."""

    def of_one(name: str) -> dict[str, float]:
        counts = {case: instructions(case, name, MANY) - instructions(case, name, FEW) for case in COUNTED}
        return {case: count / (MANY - FEW) / 1000 for case, count in counts.items()}

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # other processes don't change the count
        return dict(zip(names, pool.map(of_one, names), strict=True))


def main() -> None:
    """Count for every implementation; `valgrind` must be installed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", nargs=3, metavar=("CASE", "IMPLEMENTATION", "REQUESTS"), help="what is to be counted")
    parser.add_argument("--only", nargs="+", default=list(implementations()), help="some of: %(default)s")
    options = parser.parse_args()
    if options.run:
        case, implementation, requests = options.run
        asyncio.run(run(case, implementation, int(requests)))
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

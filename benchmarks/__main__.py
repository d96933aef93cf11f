"""Runs every benchmark, at a size that fits into an hour on 2 cores, and copies the results into the README."""

from __future__ import annotations

import subprocess
import sys
import time

QUESTIONS = {
    "overhead": ["--rounds", "11"],
    "instructions": [],
    "throughput": ["--rounds", "3", "--seconds", "1"],
    "messages": ["--rounds", "7"],
    "latency": ["--rounds", "1"],
    "memory": [],
    "scale": ["--rounds", "1"],
    "savings": ["--rounds", "1", "--seconds", "15"],
    "damage": [],
    "report": [],
}


def main() -> None:
    """Run the benchmarks one after another, so that none disturbs another."""
    for name, options in QUESTIONS.items():
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], check=True)
        print(f"{name}: {time.monotonic() - began:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()

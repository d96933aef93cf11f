"""Writes the results of a benchmark: its tables and raw numbers to results/, and all tables into the README.

    python -m benchmarks.report

puts the newest tables between the markers of this directory's README.
"""

from __future__ import annotations

import json
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import fill
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PACKAGES = ["anyio", "starlette", "fastapi", "uvloop", "httptools", "uvicorn", "hypercorn", "granian", "gunicorn"]
PACKAGES.extend(["daphne", "trio", "psycopg", "fastapi-disconnect", "aiofence"])

Rows = dict[str, list[str]]


def table(corner: str, columns: list[str], rows: Rows) -> str:
    """Return a Markdown table; cells that are missing at the end of a row stay empty."""
    widths = [max(len(cell) for cell in (title, *cells)) for title, *cells in zip(columns, *rows.values(), strict=True)]
    first = max(len(title) for title in (corner, *rows))
    lines = [f"| {corner:{first}} |" + "".join(f" {c:>{w}} |" for c, w in zip(columns, widths, strict=True))]
    lines.append(f"|{'-' * (first + 2)}|" + "".join(f"{'-' * (w + 1)}:|" for w in widths))
    for title, cells in rows.items():
        lines.append(f"| {title:{first}} |" + "".join(f" {c:>{w}} |" for c, w in zip(cells, widths, strict=True)))
    return "\n".join(lines) + "\n"


def save(name: str, tables: list[str], raw: Any, pictures: dict[str, str] | None = None) -> None:  # Any: JSON
    """Print the tables, and write them with their pictures and the raw numbers.

    Args:
        name: The name of the benchmark.
        tables: The tables, in Markdown.
        raw: The numbers, as JSON.
        pictures: What each picture shows, by the name of its file without the suffix.
    """
    shown = [f"![{text}](results/{picture}.svg)\n" for picture, text in (pictures or {}).items()]
    text = "\n".join([*tables, *shown])
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    everything = {"machine": machine(), "versions": versions(), "numbers": raw}
    (RESULTS / f"{name}.json").write_text(json.dumps(everything) + "\n", encoding="utf-8")


def machine() -> str:
    """Return a line about the machine."""
    cores = len(re.findall("^processor", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    return f"{cores} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"


def versions() -> dict[str, str]:
    """Return the versions of the compared packages that are installed."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def main() -> None:
    """Put the machine, the versions and the newest tables between the markers of the README."""
    packages = ", ".join(f"{package} {number}" for package, number in versions().items())
    parts = {"machine": f"Machine: {machine()}.\n{fill(f'Versions: {packages}.', 120)}\n"}
    parts.update((file.stem, file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.md")))
    fill_in(HERE / "README.md", parts)


def fill_in(path: Path, parts: dict[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    for name, part in parts.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if begin:
            text = f"{before}{begin}\n{part}\n{end}{after}"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

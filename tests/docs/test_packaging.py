"""What users get: the contents of the packages, and what an import loads."""

from __future__ import annotations

import pydoc
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from hatchling.build import build_sdist, build_wheel

import cancelonleave
import cancelonleave.testing

ROOT = Path(__file__).parent.parent.parent
PACKAGE = {
    path.relative_to(ROOT).as_posix()
    for path in ROOT.joinpath("cancelonleave").rglob("*")
    if path.suffix == ".py" or path.name == "py.typed"
}
# Outside the standard library, an import may load only the package itself, and parts that anyio loads lazily.
IMPORT = """
import sys
import anyio, anyio.lowlevel, typing_extensions
import starlette.background, starlette.concurrency, starlette.responses, starlette.websockets
before = set(sys.modules)
import cancelonleave
new = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(sorted(new), "fastapi" in sys.modules, "cancelonleave.testing" in sys.modules)
"""


def run(*arguments: str) -> tuple[str, str, int]:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)
    return done.stdout, done.stderr, done.returncode


def test_the_public_names_are_complete() -> None:
    assert cancelonleave.__all__ == ["ClientClosedRequest", "cancel_on_disconnect"]
    assert cancelonleave.testing.__all__ == ["SERVERS", "Client", "Exchange", "Options", "Sent"]
    for module in (cancelonleave, cancelonleave.testing):
        assert all(hasattr(module, name) for name in module.__all__)


def test_help_shows_the_documentation() -> None:
    text = pydoc.plain(pydoc.render_doc(cancelonleave.cancel_on_disconnect))
    assert text.startswith("Python Library Documentation: function cancel_on_disconnect in module cancelonleave")
    assert "Cancel an endpoint when its client disconnects.\n" in text
    sections = re.findall(r"^ +(\w+):", text[text.index("Args:") - 4 :], re.MULTILINE)
    assert sections == ["Args", "endpoint", "on_disconnect", "Raises", "TypeError"]


def test_the_package_needs_three_others_and_no_more() -> None:
    needed = [entry for entry in metadata.requires("cancelonleave") or [] if "extra ==" not in entry]
    assert sorted(entry.split(">=")[0] for entry in needed) == ["anyio", "starlette", "typing-extensions"]


def test_the_classifiers_name_the_pythons_that_the_gate_tests() -> None:
    tested = re.search(r"^for version in ([\d. ]+); do$", ROOT.joinpath(".ci", "run").read_text(), re.MULTILINE)
    assert tested is not None
    python = "Programming Language :: Python :: 3."
    classifiers = metadata.metadata("cancelonleave").get_all("Classifier") or []
    assert [name.removeprefix(python[:-2]) for name in classifiers if name.startswith(python)] == tested[1].split()


def test_importing_the_package_is_silent_and_imports_nothing_else() -> None:
    warnings = ["-W", "error", "-W", "ignore::PendingDeprecationWarning"]  # Starlette 0.40 emits one
    assert run(*warnings, "-c", IMPORT) == ("['anyio', 'cancelonleave'] False False\n", "", 0)


def build(builder: Callable[[str], str], directory: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the builders expect to run here
        return directory / builder(str(directory))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(build(build_wheel, tmp_path_factory.mktemp("wheel"))) as wheel:
        yield wheel


def test_the_wheel_contains_the_package_its_types_and_its_licence(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    described = f"cancelonleave-{metadata.version('cancelonleave')}.dist-info"
    assert names - PACKAGE == {f"{described}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    assert names > PACKAGE


def test_the_sdist_contains_what_is_needed_to_build_and_try_the_package(tmp_path: Path) -> None:
    with tarfile.open(build(build_sdist, tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    top = {name.partition("/")[0] for name in names}
    assert top == {
        *(".gitignore", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"),
        *(".ci", "benchmarks", "cancelonleave", "tests"),
    }
    assert {name for name in names if name.startswith("cancelonleave/")} == {
        *PACKAGE,
        "cancelonleave/testing/README.md",
    }


def test_the_description_has_no_relative_links(wheel: zipfile.ZipFile) -> None:
    description = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("METADATA"))
    links = re.findall(r"\]\(([^)]+)\)", description)
    assert any(link.endswith("/raw/main/benchmarks/timeline.svg") for link in links)
    assert [link for link in links if not link.startswith("https://")] == []

"""House rules that a machine can check: file length, no private addresses, one table row per method."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 400
PRIVATE = {
    "a path on someone's machine": re.compile(r"(?<![\w.$}~*-])/(?:home|root|Users|work)/\w"),
    "a package registry's address": re.compile(
        r"https?://[\w.-]*(?:pypi\.org|pythonhosted\.org|npmjs\.\w+)|index[-]url", re.IGNORECASE
    ),
}


def text_files() -> dict[str, str]:
    """Every text file of the project by its path: what git tracks, or outside a clone every file not hidden."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached"]
    listed = subprocess.run(command, capture_output=True, text=True).stdout if shutil.which("git") else ""
    paths = [ROOT / name for name in filter(None, listed.split("\0"))]
    if not paths:
        inside = [path for path in ROOT.iterdir() if not path.name.startswith(".") and path.name != "runs"]
        paths = [p for path in [*inside, ROOT / ".ci/run"] for p in ([path] if path.is_file() else path.rglob("*"))]
    files = {}
    for path in sorted(set(paths)):
        content = path.read_bytes() if path.is_file() else b"\0"
        if b"\0" not in content:
            files[str(path.relative_to(ROOT))] = content.decode("utf-8")
    return files


def private(text: str) -> list[str]:
    lines = text.splitlines()
    return [f"line {i}: {what}" for i, line in enumerate(lines, 1) for what, bad in PRIVATE.items() if bad.search(line)]


def method_rows() -> dict[str, dict[str, str]]:
    """The rows of docs/methods.md by the stem of their file, each a column -> path."""
    lines = [line for line in (ROOT / "docs/methods.md").read_text().splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = [dict(zip(header, (cell.strip("`") for cell in row), strict=True)) for row in rows]
    return {Path(row["File"]).stem: row for row in table}


def test_library_files_hold_one_idea():
    lengths = {p.relative_to(ROOT): len(p.read_text().splitlines()) for p in (ROOT / "jaxdiff").rglob("*.py")}
    assert {str(p): n for p, n in lengths.items() if n > MAX_LINES} == {}


def test_library_files_open_with_a_paragraph():
    files = [p for p in (ROOT / "jaxdiff").rglob("*.py") if p.name != "__init__.py"]
    assert [str(p.relative_to(ROOT)) for p in files if not p.read_text().startswith('"""')] == []


def test_no_file_names_a_machine_or_a_registry():
    files = text_files()
    assert "pyproject.toml" in files
    found = [f"{name} {hit}" for name, text in files.items() for hit in private(text)]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "data = '/ho" + "me/ann/cifar'",
        "see /wo" + "rk/notes",
        "pip install --index" + "-url X",
        "https://py" + "pi.org/simple/jax",
    ],
)
def test_private_addresses_are_found(line):
    assert len(private(f"fine\n{line}")) == 1


@pytest.mark.parametrize(
    "line", ["net/wo" + "rk/unet", "https://arxiv.org/abs/2006.11239", "gs://bucket/ro" + "ot/run", "a/ho" + "me"]
)
def test_public_text_passes(line):
    assert private(line) == []


def test_every_method_has_a_row():
    methods = {path.stem for path in (ROOT / "jaxdiff/methods").glob("*.py")} - {"__init__", "base"}
    assert methods <= method_rows().keys()


def test_rows_name_files_that_exist():
    named = [row[column] for row in method_rows().values() for column in ("File", "Experiment", "Test")]
    assert [name for name in named if not (ROOT / name).is_file()] == []

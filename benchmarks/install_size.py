"""How much disk an installation takes: the files of site-packages, by distribution.

python -m benchmarks.install_size           a fresh virtual environment with the core of this checkout (network)
python -m benchmarks.install_size PYTHON    the environment of that interpreter, as it is
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.processes import ROOT

TOOLS = ("pip", "setuptools", "wheel")
LARGEST = 8
PROBE = """
import importlib.metadata, json, sysconfig
sizes = {}
for found in importlib.metadata.distributions(path=[sysconfig.get_paths()["purelib"]]):
    files = [found.locate_file(f) for f in found.files or () if not str(f).endswith(".pyc")]
    sizes[found.metadata["Name"]] = sum(f.stat().st_size for f in files if f.is_file())
print(json.dumps(sizes))
"""


def sizes(python: str) -> dict[str, int]:
    """Bytes of every distribution beside an interpreter, without installers and without compiled bytecode."""
    done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=True)
    return {name: size for name, size in json.loads(done.stdout).items() if name not in TOOLS}


def fresh_core() -> dict[str, int]:
    """Bytes of every distribution of a fresh installation of this checkout without extras. Needs a network."""
    with tempfile.TemporaryDirectory() as folder:
        python = str(Path(folder) / "bin" / "python")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        quiet = ["--quiet", "--disable-pip-version-check"]
        constraints = ["-c", str(ROOT / "constraints.txt")]
        subprocess.run([python, "-m", "pip", "install", *quiet, str(ROOT), *constraints], check=True)
        return sizes(python)


def tables(raw: dict[str, dict[str, int]]) -> list[report.Table]:
    """Totals in MB (10^6 bytes) and the largest parts."""
    rows = []
    for name, by_package in raw.items():
        largest = sorted(by_package.items(), key=lambda item: -item[1])[:LARGEST]
        parts = ", ".join(f"{package} {size / 1e6:.0f}" for package, size in largest)
        rows.append([name, f"{sum(by_package.values()) / 1e6:.0f}", str(len(by_package)), parts])
    return [report.Table("Installed size: MB", ["", "MB", "packages", "largest"], rows)]


def main(arguments: list[str]) -> None:
    """Prints the table of one environment."""
    raw: dict[str, Any] = {arguments[0]: sizes(arguments[0])} if arguments else {"jaxdiff core": fresh_core()}
    print(report.markdown("Installed size", {}, tables(raw)))


if __name__ == "__main__":
    main(sys.argv[1:])

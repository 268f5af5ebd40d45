"""CONTRIBUTING's worked example, carried out in a copy of the project: a new method is four files and no more."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n# (\S+\.py)\n(.*?)```", re.DOTALL)
ROW = re.compile(r"```\n(\| .*iadb.*\|)\n```")


def test_the_example_method_costs_four_files(tmp_path):
    copy = tmp_path / "project"
    copy.mkdir()
    for name in ("jaxdiff", "experiments", "tests", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    for name in ("pyproject.toml", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, copy / name)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    added = dict(BLOCK.findall(text))
    assert sorted(added) == ["experiments/toy_iadb.py", "jaxdiff/methods/iadb.py", "tests/methods/test_iadb.py"]
    for name, code in added.items():
        assert not (copy / name).exists()
        (copy / name).write_text(code)
    with (copy / "docs/methods.md").open("a") as table:
        table.write(ROW.search(text).group(1) + "\n")

    chosen = "iadb or table or methods"
    tests = ["tests/methods/test_iadb.py", "tests/test_contracts.py", "tests/test_style.py", "tests/test_imports.py"]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen, *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "test_experiment_keeps_the_contract[toy_iadb] PASSED" in done.stdout

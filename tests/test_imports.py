"""Who may import whom: the table of docs/design.md, checked on the syntax trees, so nothing is imported to check it.

A file that needs an edge which is not in the table usually holds two ideas. Change the table only together with
docs/design.md.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each of these may import those before it.
FLOOR = ("types", "schedules", "process", "parameterization", "times", "weighting", "losses")
CORE = (*FLOOR, "health", "denoiser", "guidance", "solvers", "editing", "one_step")
MAY_IMPORT = {name: set(CORE[:i]) for i, name in enumerate(CORE)} | {
    "": set(CORE),  # jaxdiff/__init__.py
    "solvers": set(CORE),
    "networks": {"types", "networks"},
    "methods.base": {"types", "schedules", "solvers.base"},  # the latter two for the types Schedule and Solver
    "methods": {*CORE, "methods.base"},
    "training": {"types", "methods.base", "training"},
    "data": {"types", "data"},
    "metrics": {*CORE, "networks", "metrics"},
    "pretrained": {"types", "networks", "schedules", "pretrained"},
}
# What people start. They may import anything, and only each other import them.
PROGRAMS = (
    "arguments",
    "cli",
    "commands",
    "drawing",
    "edit",
    "evaluation",
    "flops",
    "frozen",
    "generate",
    "info",
    "inspection",
    "options",
    "pictures",
    "profiling",
    "runs",
    "settings",
    "weights",
)
OUTSIDE = ("experiments", "tests", "benchmarks", "notebooks", "scripts")  # not in the wheel

# Too slow or too rarely needed for `import jaxdiff`: imported by the functions that use them.
HEAVY = {"grain", "matplotlib", "orbax", "PIL", "tensorboardX", "tensorflow_datasets"}
# Not dependencies of the library, or able to run code that a file holds.
NEVER = {"cloudpickle", "dill", "joblib", "pickle", "shelve", "sklearn", "tensorflow", "torch"}


def module_name(path: Path) -> str:
    """`solvers.ddim` for jaxdiff/solvers/ddim.py, `solvers` for its __init__.py."""
    return ".".join(p for p in path.relative_to(ROOT / "jaxdiff").with_suffix("").parts if p != "__init__")


FILES = {module_name(path): path for path in sorted((ROOT / "jaxdiff").rglob("*.py"))}
PACKAGES = {name for name, path in FILES.items() if path.name == "__init__.py"}


def imports(tree: ast.AST, package: str, in_function: bool = False):
    """(dotted name, line, whether it waits for a call) of every import below a node, relative ones made absolute.

    `from a import b` gives `a.b`: whether b is a module is not asked, because a name inside an allowed module is
    allowed too.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) + 1 - node.level]) if node.level else ""
            origin = ".".join(p for p in (base, node.module) if p)
            yield from ((f"{origin}.{alias.name}", node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value), node.lineno, in_function
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(node, package, in_function or function)


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def row_of(module: str) -> str | None:
    """The table's row for a module: its own if it has one, else its package's."""
    return next((row for row in (module, module.split(".")[0]) if row in MAY_IMPORT), None)


def violations(module: str, source: str) -> list[str]:
    """One line for every import in the source of jaxdiff.<module> that the table forbids."""
    program = module.split(".")[0] in PROGRAMS
    row = row_of(module)
    if row is None and not program:
        return [f"jaxdiff.{module} has no row in MAY_IMPORT; say in docs/design.md and there what it may import"]
    own = ".".join(p for p in ("jaxdiff", module) if p)
    package = own if module in PACKAGES else own.rpartition(".")[0]
    found = []
    for name, line, waits in imports(ast.parse(source), package):
        where, top = f"jaxdiff.{module} line {line}: imports {name}", name.split(".")[0]
        target = name.removeprefix("jaxdiff").removeprefix(".")
        if top in NEVER:
            found.append(f"{where}, which the library must do without")
        elif top in HEAVY and not waits:
            found.append(f"{where} when it is imported; do so inside the function that needs it")
        elif top in OUTSIDE:
            found.append(f"{where}, which is not part of the package")
        elif top == "jaxdiff" and not program and target and not any(within(target, a) for a in MAY_IMPORT[row or ""]):
            found.append(f"{where}; allowed are {sorted(MAY_IMPORT[row or ''])}")
    return found


@pytest.mark.parametrize("module", FILES, ids=lambda name: name or "jaxdiff")
def test_module_keeps_the_import_table(module):
    assert not violations(module, FILES[module].read_text())


def test_experiments_import_the_library_and_nothing_beside_it():
    found = []
    for path in sorted((ROOT / "experiments").glob("*.py")):
        for name, line, _ in imports(ast.parse(path.read_text()), "experiments"):
            if name.split(".")[0] in OUTSIDE or within(name, "jaxdiff.cli"):
                found.append(f"{path.name} line {line}: imports {name}")
    assert not found


def test_the_example_method_of_the_contributing_guide_keeps_the_table():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    methods = [block for block in blocks if block.startswith("# jaxdiff/methods/")]
    assert len(methods) == 1
    assert not violations("methods.example", methods[0])


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("types", "from jaxdiff.schedules import Schedule"),
        ("schedules", "from jaxdiff import process"),
        ("process", "import jaxdiff.losses as losses"),
        ("losses", "from jaxdiff.solvers import base"),
        ("denoiser", "import importlib\nsolver = importlib.import_module('jaxdiff.solvers.base')"),
        ("networks.unet", "from jaxdiff.schedules import ve"),
        ("methods.base", "from jaxdiff.solvers.ddim import ddim"),
        ("methods.ddpm", "from jaxdiff.networks.unet import UNet"),
        ("methods.ddpm", "from jaxdiff.methods.edm import edm"),
        ("methods.ddpm", "from . import edm"),
        ("methods.ddpm", "from .edm import edm"),
        ("methods.ddpm", "def late():\n    from jaxdiff.data.toy import ring"),
        ("training.step", "if True:\n    import jaxdiff.methods.ddpm"),
        ("training.loop", "from jaxdiff.cli import main"),
        ("data.toy", "from ..schedules import ve"),
        ("metrics.fid", "from jaxdiff.data.images import digits"),
        ("pretrained.openai", "from jaxdiff.methods import base"),
        ("solvers.ddim", "from experiments.quickstart import build"),
        ("cli", "import tests.conftest"),
        ("data.folder", "from PIL import Image"),
        ("training.checkpoint", "class Store:\n    import orbax.checkpoint as ocp"),
        ("metrics.features", "def load():\n    import torch"),
        ("cli", "import pickle"),
        ("newcomer", ""),
    ],
)
def test_checker_finds_forbidden_edges(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("solvers.heun", "from .base import Solver\nfrom ..types import Level\nfrom jaxdiff import process"),
        ("methods.ddpm", "from jaxdiff.methods.base import Method\nfrom jaxdiff import denoiser\nimport jaxdiff"),
        ("training.loop", "from jaxdiff.training import step\nfrom jaxdiff.methods.base import Method"),
        ("training.loop", "def save():\n    import orbax.checkpoint"),
        ("metrics.fid", "from jaxdiff.networks.inception import Inception"),
        ("cli", "from jaxdiff.methods.ddpm import ddpm\nfrom jaxdiff import settings"),
    ],
)
def test_checker_passes_allowed_edges(module, source):
    assert violations(module, source) == []


def test_importing_the_whole_library_loads_nothing_heavy():
    modules = [f"jaxdiff.{m}".rstrip(".") for m in FILES if m.split(".")[0] not in PROGRAMS]
    heavy = HEAVY | {"sklearn", "tensorflow", "torch"}
    code = f"""
import importlib, sys
for module in {modules!r}:
    importlib.import_module(module)
print(sorted({heavy!r} & sys.modules.keys()))
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr

"""Every notebook runs from its first cell to its last in smoke mode, and its .ipynb is the same notebook.

The percent source is executed by a fresh kernel under the strict numerics of conftest.py, so a call of the library
that has changed, a missing import or a cell that depends on an earlier session fails here.
"""

import base64
import io
import os
import re
from pathlib import Path

import jupytext
import matplotlib.image
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
SMOKE = {
    "JAXDIFF_SMOKE": "1",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    # Nearly all of the time is compilation, and nothing here depends on speed.
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
    # The notebook's own backend, whatever the tests run under.
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


def execute(source: Path, folder: Path) -> nbformat.NotebookNode:
    """The executed notebook; its kernel works in `folder` and finds the library of this checkout."""
    notebook = jupytext.read(source)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **SMOKE, "PYTHONPATH": os.pathsep.join(paths)}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    return client.execute(env=environment)


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in outputs(notebook) if output.get("name") == "stdout")


def figures(notebook: nbformat.NotebookNode) -> list[np.ndarray]:
    pngs = [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    return [matplotlib.image.imread(io.BytesIO(base64.b64decode(png))) for png in pngs]


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


# Numbers in the tables: 10 samplers with calls and two metrics, and 5 settings with guidance, eta and two metrics; in
# the second notebook 7 samplers and 2 runs with three metrics, and 2 edits with three figures; in the third 6 samplers
# and 3 runs with three metrics.
@pytest.mark.parametrize(
    ("name", "num_figures", "num_numbers", "said"),
    [
        ("diffusion_on_digits", 8, 10 * 3 + 5 * 4, "5 settings, traced 1 time(s)"),
        pytest.param("one_step_digits", 4, 9 * 3 + 2 * 3, "45,393 parameters", marks=pytest.mark.slow),
        pytest.param("ufogen_digits", 3, 9 * 3, "this output (eps?) determines x0 only up to", marks=pytest.mark.slow),
    ],
)
def test_a_notebook_runs(tmp_path, name, num_figures, num_numbers, said):
    source = ROOT / "notebooks" / f"{name}.py"
    notebook = execute(source, tmp_path)
    assert [output.ename for output in outputs(notebook) if output.output_type == "error"] == []
    drawn = figures(notebook)
    assert len(drawn) == source.read_text().count("plt.show()") == num_figures
    assert [i for i, figure in enumerate(drawn) if figure[..., :3].std() < 0.01] == []
    text = printed(notebook)
    assert said in text
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    numbers = [float(cell) for row in rows for cell in row if re.fullmatch(r"\s*-?[\d.]+(e[+-]\d+)?\s*", cell)]
    assert len(numbers) == num_numbers
    assert np.isfinite(numbers).all()


@pytest.mark.parametrize("source", SOURCES, ids=[source.stem for source in SOURCES])
def test_ipynb_is_its_source_without_outputs(source):
    paired = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(paired)
    assert cells(paired) == cells(jupytext.read(source)), f"run `jupytext --to ipynb notebooks/{source.name}`"
    assert outputs(paired) == []
    assert {cell.execution_count for cell in paired.cells if cell.cell_type == "code"} == {None}

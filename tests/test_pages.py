"""What the scripts that write docs/plane.md and docs/grid.md count, and what they keep."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@dataclasses.dataclass(eq=False)
class Plain:
    """A row."""

    name: str
    steps: int


@pytest.fixture
def script(monkeypatch):
    """Imports a script by its name."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


def test_the_grid_counts_modes_samples_near_them_and_their_shares(script):
    grid = script("grid")
    true = grid.judged(grid.MIXTURE.draw(np.random.default_rng(0), 10_000)[0])
    assert true["modes"] == 25 and true["near"] == pytest.approx(1 - np.exp(-4.5), abs=0.005) and true["uneven"] < 0.04
    one, between = np.zeros((100, 2)), np.full((100, 2), 0.25)
    assert grid.judged(one) == {"modes": 1, "near": 1.0, "uneven": pytest.approx(0.96)}
    assert grid.judged(between) == {"modes": 0, "near": 0.0, "uneven": pytest.approx(0.5)}


def test_a_row_is_trained_again_only_if_its_settings_changed(script, monkeypatch, tmp_path):
    plane, done = script("plane"), []
    row = Plain("a", 5)
    monkeypatch.setattr(sys, "argv", ["plane.py", "--runs", str(tmp_path), "--out", str(tmp_path / "a.md")])

    def settings_of(row):
        return [row.name, row.steps]

    def run(row, seed, folder):
        done.append((row.name, seed))
        (folder / f"{row.name}-{seed}.json").write_text(json.dumps({"settings": settings_of(row), "seed": seed}))

    args = plane.arguments("plane", "About.", [row])
    found = plane.results(args.rows, args, settings_of, run)
    assert done == [("a", 0), ("a", 1), ("a", 2)]
    assert [(seed, f["seed"]) for seed, f in found[row].items()] == [(0, 0), (1, 1), (2, 2)]
    plane.results(args.rows, args, settings_of, run)
    assert len(done) == 3
    row.steps = 6
    args.no_train = True
    assert plane.results(args.rows, args, settings_of, run) == {}
    args.no_train = False
    plane.results(args.rows, args, settings_of, run)
    assert len(done) == 6
    monkeypatch.setattr(sys, "argv", ["plane.py", "--only", "b"])
    with pytest.raises(SystemExit):
        plane.arguments("plane", "About.", [row])

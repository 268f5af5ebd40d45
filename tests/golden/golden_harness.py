"""Compares what jaxdiff computes with arrays made by the official releases.

A topic is a function that takes a `GoldenFile`. It reads inputs with `file.input(key)`, hands every output array to
`file.compare(key, value, ...)`, and names arrays that are deliberately not compared, with the reason, through
`file.leave(pattern, reason)`. `file.finish()` fails if any array of the file was not accounted for, so a topic
cannot quietly check a selection. Everything a topic needs (seeds, shapes, configurations) comes from the file.
"""

import dataclasses
import fnmatch
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

FAMILIES = ("core", "consistency", "gan", "apt")
TOPICS: dict[str, Callable[["GoldenFile"], None]] = {}


def topic(name: str):
    """Registers a function as the test of topic `family/name`."""

    def register(function):
        if name in TOPICS:
            raise ValueError(f"golden topic {name} has two tests")
        TOPICS[name] = function
        return function

    return register


def topic_of(path: Path) -> str:
    """`core/schedules` for .../core/schedules_a.npz: the nearest folder that names a family, and the file's stem.

    A file in a folder of another name belongs to the one known topic of its stem; if several families have it, the
    folder must say which, and the returned name has no test.
    """
    stem = path.stem[:-2] if path.stem.endswith(("_a", "_b")) else path.stem
    for parent in path.resolve().parents:
        if parent.name in FAMILIES:
            return f"{parent.name}/{stem}"
    known = [name for name in (*TOPICS, *pending()) if name.split("/")[1] == stem]
    return known[0] if len(known) == 1 else f"{path.resolve().parent.name}/{stem}"


def pending() -> list[str]:
    """Topics that no test covers yet, from pending.txt."""
    lines = (Path(__file__).parent / "pending.txt").read_text().splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


@dataclasses.dataclass
class Comparison:
    """One array compared: largest absolute error, and largest error as a share of its tolerance."""

    key: str
    error: float
    tolerance: str
    share: float


class Outcome(NamedTuple):
    """One file in numbers: arrays compared and left, and the largest error with the tolerance it was held to."""

    topic: str
    compared: int
    left: int
    error: float
    tolerance: str
    share: float


class GoldenFile:
    """One .npz of official arrays, with a record of what was read and compared."""

    def __init__(self, path: Path):
        self.path, self.topic = path, topic_of(path)
        with np.load(path, allow_pickle=False) as data:
            self.arrays = {key: data[key] for key in data.files}
        self.meta = json.loads(str(self.arrays.pop("meta_json"))) if "meta_json" in self.arrays else {}
        self.inputs: set[str] = set()
        self.left: dict[str, str] = {}
        self.compared: list[Comparison] = []

    def keys(self, pattern: str = "*") -> list[str]:
        """Keys that match a shell pattern (`*` crosses slashes), in file order."""
        return [key for key in self.arrays if fnmatch.fnmatchcase(key, pattern)]

    def input(self, key: str) -> np.ndarray:
        """An array that the computation starts from. float16 weights come back as float32."""
        self.inputs.add(key)
        value = self.arrays[key]
        return value.astype(np.float32) if value.dtype == np.float16 else value

    def leave(self, pattern: str, reason: str) -> None:
        """Arrays that are deliberately not compared."""
        for key in self.keys(pattern):
            self.left[key] = reason

    def compare(self, key: str, value, *, rtol: float = 0.0, atol: float = 0.0) -> None:
        """Requires |value - golden| <= atol + rtol |golden| everywhere, equal shapes, and infinities in place."""
        golden = np.asarray(self.arrays[key])
        value = np.asarray(value)
        assert value.shape == golden.shape, f"{key}: shape {value.shape}, the release has {golden.shape}"
        if golden.dtype.kind in "US":
            assert (value == golden).all(), f"{key}: strings differ"
            self.compared.append(Comparison(key, 0.0, "equal", 0.0))
            return
        value, golden = value.astype(np.float64), golden.astype(np.float64)
        same = (value == golden) | (np.isnan(value) & np.isnan(golden))
        with np.errstate(invalid="ignore"):
            error = np.where(same, 0.0, np.abs(value - golden))
        allowed = atol + rtol * np.where(np.isfinite(golden), np.abs(golden), 0.0)
        error = np.where(np.isnan(error), np.inf, error)
        shares = np.divide(error, allowed, out=np.where(error > 0, np.inf, 0.0), where=allowed > 0)
        share = float(np.max(shares, initial=0.0))
        tolerance = (
            " + ".join(p for p in (f"{atol:g}" if atol else "", f"{rtol:g} rel" if rtol else "") if p) or "equal"
        )
        self.compared.append(Comparison(key, float(error.max(initial=0.0)), tolerance, share))

    def outcome(self) -> Outcome:
        """The file's row for the summary."""
        if not self.compared:
            return Outcome(self.topic, 0, len(self.left), 0.0, "", 0.0)
        worst = max(self.compared, key=lambda c: c.error)
        share = max(c.share for c in self.compared)
        return Outcome(self.topic, len(self.compared), len(self.left), worst.error, worst.tolerance, share)

    def finish(self) -> None:
        """Fails with the worst arrays if any is out of tolerance, or with those that nothing accounted for."""
        done = self.inputs | set(self.left) | {c.key for c in self.compared}
        missed = [key for key in self.arrays if key not in done]
        assert not missed, f"{self.path.name}: {len(missed)} arrays neither read nor compared: {missed[:12]}"
        assert self.compared, f"{self.path.name}: nothing was compared"
        bad = sorted((c for c in self.compared if not c.share <= 1.0), key=lambda c: -c.share)
        lines = [f"{c.key}: error {c.error:.3g}, tolerance {c.tolerance}" for c in bad[:12]]
        assert not bad, f"{self.path.name}: {len(bad)} of {len(self.compared)} arrays differ\n  " + "\n  ".join(lines)

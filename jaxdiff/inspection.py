"""What `jaxdiff checkpoint inspect` and `verify` print: what lies in a folder of checkpoints, and whether it is sound.

Neither needs the experiment file: everything is said by the checkpoints themselves, and nothing of what they hold is
executed. `inspect` reads descriptions only; `verify` reads every byte that training would need.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxdiff.training import manifest
from jaxdiff.training.checkpoint import CheckpointError, Checkpoints, as_path
from jaxdiff.training.verification import verify as verify_one

FOLDER = "checkpoints"  # of a run


def inspect(folder: str | os.PathLike[str]) -> str:
    """Describes all checkpoints of a run.

    Args:
      folder: of the run, or of its checkpoints.

    Returns:
      Lines of text.

    Raises:
      CheckpointError: if there is no such folder, or no checkpoint in it.
    """
    with _opened(folder) as checkpoints:
        steps = checkpoints.steps()
        sizes = {entry.name: _size(entry) for entry in sorted(checkpoints.folder.iterdir())}
        listed = ", ".join(str(step) for step in steps)
        lines = [f"{checkpoints.folder}: {_count(steps, 'checkpoint')} ({listed}), {_bytes(sum(sizes.values()))}"]
        for step in steps:
            lines.append(f"step {step}, {_bytes(sizes.get(str(step), 0))}")
            lines += [f"  {line}" for line in _about(checkpoints, step)]
        for name in sorted(set(sizes) - {str(step) for step in steps}):
            lines.append(f"{name}, {_bytes(sizes[name])}: {_what_is(name)}")
    return "\n".join(lines)


def verify(folder: str | os.PathLike[str], step: int | None = None) -> tuple[str, bool]:
    """Reads checkpoints whole and compares every leaf with its digest.

    Args:
      folder: of the run, or of its checkpoints.
      step: which checkpoint; None for all.

    Returns:
      (one line for each checkpoint, whether all of them are sound). One without digests is not known to be sound.

    Raises:
      CheckpointError: if there is no such folder, or no such checkpoint in it.
    """
    with _opened(folder) as checkpoints:
        steps = checkpoints.steps()
        if step is not None and step not in steps:
            raise CheckpointError(step, "all", f"does not exist, {steps} do: choose one of them")
        lines, sound = [], True
        for one in steps if step is None else [step]:
            try:
                found = verify_one(checkpoints, one)
            except CheckpointError as error:
                where = "" if error.item == "all" else f"item {error.item}: "
                lines.append(f"step {one}: damaged: {where}{error.reason}")
                sound = False
                continue
            size = f"{_count(range(found.leaves), 'leaf', 'leaves')}, {_bytes(found.bytes)}"
            said = "sound" if found.verified else "carries no digests, all can be read but not verified"
            lines.append(f"step {one}: {said}, {size}")
            sound = sound and found.verified
    return "\n".join(lines), sound


@contextlib.contextmanager
def _opened(folder: str | os.PathLike[str]) -> Iterator[Checkpoints]:
    path = as_path(folder)
    if not path.is_dir():
        raise CheckpointError(0, "folder", f"there is no folder {os.fspath(folder)!r}: name a run, or its checkpoints")
    below = path / FOLDER
    with Checkpoints(below if below.is_dir() else path, create=False, max_to_keep=None) as checkpoints:
        if not checkpoints.steps():
            raise CheckpointError(0, "folder", f"no checkpoint in {os.fspath(folder)!r}: train first, or name a run")
        yield checkpoints


def _about(checkpoints: Checkpoints, step: int) -> Iterator[str]:
    try:
        meta = checkpoints.meta(step)
    except CheckpointError as error:
        yield f"damaged: {error.reason}"
        return
    experiment, leaves = meta["experiment"], meta["leaves"]
    yield f"experiment  {experiment.get('name')}: " + _settings(experiment, without=("name", "config", "ema"))
    yield f"config      {_settings(experiment.get('config') or {}) or 'none'}"
    yield f"versions    {', '.join(f'{name} {version}' for name, version in sorted(meta['versions'].items()))}"
    for player, table in _branches(leaves, "params").items():
        numbers = sum(int(np.prod(leaf["shape"])) for leaf in table.values())
        yield f"player      {player}: {numbers:,} parameters"
    for name, average in _branches(leaves, "ema").items():
        kind = (experiment.get("ema") or {}).get(name, ["unknown"])[0]
        yield f"average     {name}: {kind}, of {', '.join(_branches(average, ''))}"
    parts = {path.split("/")[0]: None for path in leaves}
    told = [f"{part} {_table(_below(leaves, part))}" for part in parts]
    yield f"state       {_table(leaves)}: {'; '.join(told)}"
    try:
        yield f"data        {_settings(data) if isinstance(data := checkpoints.data(step), dict) else data}"
    except CheckpointError as error:
        yield f"data        damaged: {error.reason}"
    yield f"meta        {'a digest of every leaf' if manifest.has_digests(meta) else 'no digests'}"


def _branches(table: manifest.LeafTable, field: str) -> dict[str, manifest.LeafTable]:
    """{name: leaves below it} for the names directly below a field, in order."""
    below = _below(table, field) if field else table
    return {name: _below(below, name) for name in {path.split("/")[0]: None for path in below}}


def _below(table: manifest.LeafTable, prefix: str) -> manifest.LeafTable:
    """Leaves below a path, the path taken off; the leaf itself under its own name."""
    found = {path: leaf for path, leaf in table.items() if path == prefix or path.startswith(f"{prefix}/")}
    return {path.removeprefix(f"{prefix}/"): leaf for path, leaf in found.items()}


def _table(table: manifest.LeafTable) -> str:
    size = sum(manifest.nbytes(leaf) for leaf in table.values())
    return f"{_count(table, 'leaf', 'leaves')} of {_bytes(size)}"


def _settings(about: dict[str, Any], without: tuple[str, ...] = ()) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in about.items() if name not in without)


def _what_is(name: str) -> str:
    if "orbax-checkpoint-tmp" in name:
        return "left by a save that was killed, the next training removes it"
    if ".damaged" in name:
        return "damaged and set aside by training, delete it when you have looked at it"
    return "no checkpoint, not read"


def _count(things: Any, one: str, many: str | None = None) -> str:
    return f"{len(things)} {one if len(things) == 1 else many or one + 's'}"


def _size(path: Any) -> int:
    if path.is_dir():
        return sum(_size(entry) for entry in path.iterdir())
    stat = path.stat()
    return int(getattr(stat, "st_size", None) or getattr(stat, "length", 0))


def _bytes(number: int) -> str:
    if number < 1000:
        return f"{number} B"
    size, unit = next(
        ((1000**n, unit) for n, unit in enumerate(("kB", "MB"), 1) if number < 1000 ** (n + 1)), (1e9, "GB")
    )
    return f"{number / size:.1f} {unit}"

"""What a checkpoint says about itself: its item `meta`, how it is made and how it is checked.

`meta` is JSON: the step, the experiment's description, versions, the form of a batch, a table of every leaf with
shape, dtype and digest, the digest of the item `data`, and a digest of all this. Checkpoints from before there were
digests are still read. No file is touched here.
"""

import contextlib
import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxdiff.training.digests import digests, json_digest

LeafTable = dict[str, dict[str, Any]]
WITHOUT_DIGESTS = {"experiment", "versions", "batch", "leaves"}
ENTRIES = {*WITHOUT_DIGESTS, "step", "data_digest"}


def describe(step: int, tree: PyTree[Any], *, data: Any, experiment: Any, batch: Any) -> dict[str, Any]:
    """The `meta` item of a checkpoint.

    Args:
      step: its number.
      tree: the item `state`.
      data: the item `data`, JSON.
      experiment: `Experiment.describe()`.
      batch: an example batch; its shapes are noted.

    Raises:
      TypeError: if data or experiment is not JSON.
      ValueError: if a leaf has a dtype without digest.
    """
    table = leaf_table(tree)
    for leaf, digest in zip(table.values(), digests(jax.tree.leaves(tree)), strict=True):
        leaf["digest"] = digest
    meta = {
        "step": step,
        "experiment": experiment,
        "versions": _versions(),
        "batch": leaf_table(dict(batch)),
        "leaves": table,
        "data_digest": json_digest(data),
    }
    return meta | {"digest": json_digest(meta)}


def fault(meta: Any, step: int) -> str | None:
    """What is wrong with a `meta` item as read, in words, or None.

    Args:
      meta: what JSON gave.
      step: of the checkpoint it was found in.
    """
    if not isinstance(meta, dict):
        return f"is {type(meta).__name__}, expected an object"
    if "digest" not in meta:
        lost = sorted(WITHOUT_DIGESTS - set(meta))
        odd = sorted(set(meta) - WITHOUT_DIGESTS)
        if lost or odd:
            return f"entry {lost[0]!r} is missing" if lost else f"entry 'digest' is missing beside {odd[0]!r}"
        return _old_fault(meta)
    rest = {name: value for name, value in meta.items() if name != "digest"}
    if json_digest(rest) != meta["digest"]:
        return "is not what was saved: its digest differs"
    lost = sorted(ENTRIES - set(meta))
    if lost:
        return f"entry {lost[0]!r} is missing: written by another version of jaxdiff"
    if meta["step"] != step:
        return f"was written as step {meta['step']}: give the folder its old name"
    return None


def has_digests(meta: dict[str, Any]) -> bool:
    """Whether what a checkpoint holds can be verified."""
    return "digest" in meta


def changed_leaves(meta: dict[str, Any], found: dict[str, str]) -> str | None:
    """The leaves whose digests are not those of the table, in words, or None.

    Args:
      meta: the `meta` item.
      found: {path: digest} of what was read.
    """
    wrong = [path for path, digest in found.items() if meta["leaves"][path].get("digest") != digest]
    if not wrong:
        return None
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"leaf {wrong[0]}{more} is not what was saved: its digest differs"


def leaf_table(tree: PyTree[Any]) -> LeafTable:
    """Path -> shape and dtype of every leaf, in a form that JSON can hold."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {leaf_name(path): {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for path, leaf in leaves}


def leaf_name(path: Any) -> str:
    """The path of a leaf as the table writes it: params/model/weights."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def nbytes(leaf: dict[str, Any]) -> int:
    """Size in memory of a leaf of the table; a key counts as two words."""
    dtype = leaf["dtype"]
    return int(np.prod(leaf["shape"])) * (8 if dtype.startswith("key<") else jnp.dtype(dtype).itemsize)


def first_difference(expected: LeafTable, found: LeafTable) -> str | None:
    """The first leaf whose path, shape or dtype differs, in words, or None."""
    # Parameters first: whatever differs there differs in the optimiser and the averages, too.
    for path in sorted([*expected, *found], key=lambda path: not path.startswith("params/")):
        ours, theirs = expected.get(path), found.get(path)
        if theirs is None:
            return f"leaf {path} is missing: it was written by another model"
        if ours is None:
            return f"leaf {path} is not expected: it was written by another model"
        for what in ("shape", "dtype"):
            if ours[what] != theirs.get(what):
                return f"leaf {path} has {what} {theirs.get(what)}, expected {ours[what]}: change the model back"
    return None


def _old_fault(meta: dict[str, Any]) -> str | None:
    for entry in ("experiment", "batch", "leaves"):
        if not isinstance(meta[entry], dict):
            return f"entry {entry!r} is no object"
    for entry in ("batch", "leaves"):
        for path, leaf in meta[entry].items():
            if not isinstance(leaf, dict) or set(leaf) != {"shape", "dtype"} or not isinstance(leaf["shape"], list):
                return f"entry {entry}/{path} is damaged, expected shape and dtype"
    return None


def _versions() -> dict[str, str]:
    versions = {"numpy": np.__version__}
    for package in ("jaxdiff", "jax", "flax", "optax", "orbax-checkpoint"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions

"""Verifying a checkpoint without its experiment: every leaf is read and compared with what `meta` says of it.

Leaves are read into host memory as NumPy, a few at a time, so that a checkpoint of many devices can be verified
anywhere, and a float64 one without switching JAX to 64 bits. Nothing is compiled and nothing is written.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.training import manifest
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.checkpoint_errors import CheckpointError, translated
from jaxdiff.training.digests import host_digest
from jaxdiff.training.reading import item_folder, read_leaves, stored_tree

GROUP = 2**28  # bytes that are held at once, more only for a single larger leaf


class Sound(NamedTuple):
    """What was read.

    Attributes:
      leaves: number of leaves.
      bytes: of all leaves together.
      verified: False for a checkpoint without digests, of which only shapes and dtypes are known to be right.
    """

    leaves: int
    bytes: int
    verified: bool


def verify(checkpoints: Checkpoints, step: int) -> Sound:
    """Reads all of a checkpoint and compares every digest.

    Args:
      checkpoints: the folder, opened with `create=False`.
      step: which one.

    Raises:
      CheckpointError: if it cannot be read, or is not what was saved.
    """
    meta = checkpoints.meta(step)
    read = 0
    with translated(step, "state", "cannot be read"):
        folder = item_folder(checkpoints.folder, step, "state")
        tree = stored_tree(folder, step)
        names = {manifest.leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
        for name in sorted(set(meta["leaves"]) ^ names):
            raise CheckpointError(step, "state", f"leaf {name} is in only one of its two tables: damaged")
        for group in _groups(meta["leaves"]):
            wrong = _changed(meta, read_leaves(folder, tree, meta["leaves"], group, step))
            if wrong:
                raise CheckpointError(step, "state", wrong)
            read += sum(manifest.nbytes(meta["leaves"][name]) for name in group)
    checkpoints.data(step)
    return Sound(len(names), read, manifest.has_digests(meta))


def _changed(meta: dict[str, Any], values: dict[str, Any]) -> str | None:
    found = {}
    for path, value in values.items():
        said = meta["leaves"][path]
        if [list(value.shape), str(value.dtype)] != [said["shape"], said["dtype"]]:
            return f"leaf {path} is not in its files as it was saved: damaged"
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        found[path] = host_digest(np.asarray(jax.random.key_data(value) if is_key else value))
    return manifest.changed_leaves(meta, found) if manifest.has_digests(meta) else None


def _groups(table: manifest.LeafTable) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for path in table:
        here = manifest.nbytes(table[path])
        if group and size + here > GROUP:
            yield group
            group, size = [], 0
        group.append(path)
        size += here
    if group:
        yield group

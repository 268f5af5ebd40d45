"""Reading the items of one checkpoint with Orbax' handlers, past its manager.

The manager waits at barriers, for ever if another process met an error; the handlers do not. They read all arrays at
once, and where several fail, TensorStore and asyncio print a page for each, whoever catches the error: what is printed
here is the error alone. Nothing here compares what was read with what was saved.
"""

import gc
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxdiff.training.checkpoint_errors import TENSORSTORE, CheckpointError, reason_of
from jaxdiff.training.manifest import LeafTable, leaf_name, leaf_table

logger = logging.getLogger(__name__)


def item_folder(folder: Any, step: int, item: str) -> Any:
    """The folder of an item.

    Args:
      folder: of the checkpoints, an `etils.epath.Path`.
      step: which checkpoint.
      item: "state", "data" or "meta".

    Raises:
      CheckpointError: if it is missing, or lacks the file that holds the others together.
    """
    checkpoint = folder / str(step)
    if not checkpoint.is_dir():
        raise CheckpointError(step, "all", "its folder is missing")
    if not any(checkpoint.iterdir()):
        raise CheckpointError(step, "all", "its folder is empty")
    if not (checkpoint / item).is_dir():
        raise CheckpointError(step, item, "its folder is missing")
    for name in ("_METADATA", "manifest.ocdbt") if item == "state" else ("metadata",):
        if not (checkpoint / item / name).exists():
            raise CheckpointError(step, item, f"{item}/{name} is missing")
    return checkpoint / item


def read_json(folder: Any) -> Any:
    """The item `data` or `meta`, of any form."""
    import orbax.checkpoint as ocp

    return ocp.JsonCheckpointHandler().restore(folder, args=ocp.args.JsonRestore())


def read_tree(folder: Any, like: PyTree[Any], step: int) -> PyTree[Any]:
    """The leaves of `like` from the item `state`, with its shapes, dtypes and shardings.

    Args:
      folder: of the item.
      like: arrays, or shapes with shardings.
      step: for the message.

    Raises:
      CheckpointError: if a leaf is not there in that form.
    """
    import orbax.checkpoint as ocp

    target = jax.tree.map(_shape_of, like)
    how = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True)
    tree = _attempt(step, folder, lambda: ocp.PyTreeCheckpointHandler().restore(folder, args=args))
    # Where its own table of leaves is damaged, Orbax gives back the shapes it was given, or arrays of other shapes.
    for (path, expected), leaf in zip(leaf_table(like).items(), jax.tree.leaves(tree), strict=True):
        if not isinstance(leaf, jax.Array) or leaf_table(leaf)[""] != expected:
            raise CheckpointError(step, "state", f"leaf {path} is not in its files as it was saved: damaged")
    return tree


def stored_tree(folder: Any, step: int) -> PyTree[Any]:
    """The tree of the item `state` as Orbax has it, with descriptions for leaves.

    Raises:
      CheckpointError: if it cannot be read.
    """
    import orbax.checkpoint as ocp

    found = _attempt(step, folder, lambda: ocp.PyTreeCheckpointHandler().metadata(folder))
    return getattr(found, "tree", found)


def read_leaves(folder: Any, tree: PyTree[Any], table: LeafTable, names: Sequence[str], step: int) -> dict[str, Any]:
    """Some leaves as NumPy arrays, keys as JAX arrays: Orbax keeps what makes a key in a file that NumPy does without.

    Args:
      folder: of the item `state`.
      tree: from `stored_tree`.
      table: {path: shape and dtype} of every leaf in it.
      names: the paths to read.
      step: for the message.

    Raises:
      CheckpointError: if they cannot be read.
    """
    import orbax.checkpoint as ocp

    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def wanted(path: Any, leaf: Any) -> Any:
        return leaf if leaf_name(path) in names else ocp.PLACEHOLDER

    def how(path: Any, leaf: Any) -> Any:
        del leaf
        if table[leaf_name(path)]["dtype"].startswith("key<"):
            return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=place)
        return ocp.RestoreArgs(restore_type=np.ndarray)

    item = jax.tree_util.tree_map_with_path(wanted, tree)
    restore_args = jax.tree_util.tree_map_with_path(how, tree)
    args = ocp.args.PyTreeRestore(item, restore_args=restore_args)
    found = _attempt(step, folder, lambda: ocp.PyTreeCheckpointHandler().restore(folder, args=args))
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
    return {name: leaves[name] for name in names}


def _attempt(step: int, folder: Any, read: Callable[[], Any]) -> Any:
    logging.getLogger("asyncio").addFilter(_no_repetition)  # once, however often it is added
    try:
        _check_index(folder)
        return read()
    except Exception as error:
        reason = reason_of(error, "cannot be read")
        logger.debug("checkpoint %d: %s", step, error)
    # What was not awaited when the first array failed complains when it is collected: here and now, to nobody.
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            gc.collect()
    finally:
        sys.unraisablehook = hook
    raise CheckpointError(step, "state", reason)


def _check_index(folder: Any) -> None:
    """Reads the index of all arrays, which is small, on its own: with a bad one every array fails."""
    import tensorstore

    if "://" not in str(folder):
        base = {"driver": "file", "path": f"{folder}/"}
        tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()


def _no_repetition(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not ("never retrieved" in record.getMessage() and TENSORSTORE in str(error).lower())


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))

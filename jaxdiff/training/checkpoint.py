"""Checkpoints: a small facade over Orbax that checks what it restores and says in one line what is wrong.

A checkpoint has three items: `state` (the train state), `data` (where the batch source stands) and `meta` (the
experiment's description, versions, and a table of every leaf with shape and dtype). Orbax writes them asynchronously
and commits them together, and deletes old ones only after a newer one is complete. Before anything is read, the table
is compared with what the caller expects, because Orbax casts a wrong dtype silently. What lies inside the leaves is
not verified here.
"""

import contextlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdiff.training.experiment import Experiment, difference
from jaxdiff.training.state import TrainState, Weights, abstract_state

logger = logging.getLogger(__name__)

LeafTable = dict[str, dict[str, Any]]
FIELDS = ("step", "key", "params", "opt_state", "ema", "aux")


class CheckpointError(Exception):
    """A checkpoint cannot be written or read.

    Attributes:
      step: of the checkpoint.
      item: "state", "data", "meta", or "all".
      reason: one line.
    """

    def __init__(self, step: int, item: str, reason: str):
        super().__init__(f"checkpoint {step}, item {item}: {reason}")
        self.step, self.item, self.reason = step, item, reason


class CheckpointMismatch(CheckpointError):
    """A sound checkpoint, but of another experiment or another model. Older ones would not fit either."""


class Restored(NamedTuple):
    """A train state and where its batch source stood."""

    state: TrainState
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints in one folder. Use it as a context manager: leaving it waits for pending writes.

    Args:
      folder: made if `create`; one subfolder per step.
      max_to_keep: number of newest checkpoints that survive a save; None keeps all.
      keep_every: checkpoints at multiples of this step survive besides; 0 for none.
      create: False for readers: nothing is made and leftovers of killed writers stay.
    """

    def __init__(self, folder: Path, *, max_to_keep: int | None = 3, keep_every: int = 0, create: bool = True):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._folder = Path(folder).absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=max_to_keep,
                keep_period=keep_every or None,
                create=create,
                cleanup_tmp_directories=create,
                enable_async_checkpointing=True,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            self.wait()
            self._manager.close()
            return
        with contextlib.suppress(Exception):  # the error on its way out is the one to report
            self._manager.close()

    def steps(self) -> list[int]:
        """Steps with a checkpoint, sound or not, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, *, data: Any, experiment: Any, batch: Any) -> None:
        """Starts writing a checkpoint; returns when the state may be donated again.

        Args:
          step: finished steps.
          state: what to save.
          data: state of the batch source, JSON.
          experiment: `Experiment.describe()`.
          batch: an example batch; its shapes are noted, so that weights can be loaded without the data.

        Raises:
          CheckpointError: if this checkpoint, or the one before, could not be written.
        """
        tree = {field: getattr(state, field) for field in FIELDS}
        meta = {
            "experiment": experiment,
            "versions": _versions(),
            "batch": leaf_table(dict(batch)),
            "leaves": leaf_table(tree),
        }
        args = self._ocp.args
        with _translated(step, "all"):
            items = args.Composite(state=args.PyTreeSave(tree), data=args.JsonSave(data), meta=args.JsonSave(meta))
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Waits until everything saved is on disk.

        Raises:
          CheckpointError: if the last write failed.
        """
        with _translated(self._manager.latest_step() or 0, "all"):
            self._manager.wait_until_finished()

    def meta(self, step: int) -> dict[str, Any]:
        """The `meta` item: "experiment", "versions", "batch", "leaves".

        Raises:
          CheckpointError: if it cannot be read or lacks an entry.
        """
        with _translated(step, "meta"):
            args = self._ocp.args
            meta = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
        for entry in ("experiment", "batch", "leaves"):
            if not isinstance(meta, dict) or not isinstance(meta.get(entry), dict):
                raise CheckpointError(step, "meta", f"entry {entry!r} is missing or no object")
        return meta

    def restore(self, step: int, like: TrainState, experiment: Any) -> Restored:
        """Restores one checkpoint.

        Args:
          step: which one.
          like: a state, or its shapes with shardings, of exactly the expected form; the result lies where it lies.
          experiment: `Experiment.describe()` of the run that asks.

        Raises:
          CheckpointMismatch: if the checkpoint is of another experiment, or a leaf differs in path, shape or dtype.
          CheckpointError: if it cannot be read.
        """
        tree = self._restore_fields(step, {field: getattr(like, field) for field in FIELDS}, experiment)
        with _translated(step, "data"):
            args = self._ocp.args
            data = self._manager.restore(step, args=args.Composite(data=args.JsonRestore()))["data"]
        return Restored(TrainState(**tree), data)

    def restore_weights(self, step: int, like: Weights, experiment: Any) -> Weights:
        """Restores what sampling needs and reads nothing else. Arguments and errors as in `restore`."""
        return Weights(**self._restore_fields(step, like._asdict(), experiment))

    def newest(self, read: Callable[[int], Any], *, set_aside: bool = False) -> Any:
        """Walks from the newest checkpoint back to the first that can be read, with a warning for each that cannot.

        Args:
          read: step -> result, for example a partial `restore`.
          set_aside: rename the unreadable ones to STEP.damaged, so that training may write those steps again.

        Returns:
          What `read` returned, or None if there is no checkpoint at all.

        Raises:
          CheckpointMismatch: from `read`, at once.
          CheckpointError: if there are checkpoints and none can be read.
        """
        damaged: list[CheckpointError] = []
        for step in reversed(self.steps()):
            try:
                result = read(step)
            except CheckpointMismatch:
                raise
            except CheckpointError as error:
                logger.warning("%s; trying the one before", error)
                damaged.append(error)
                continue
            if set_aside:
                self._set_aside([error.step for error in damaged])
            return result
        if damaged:
            steps = ", ".join(str(error.step) for error in damaged)
            raise CheckpointError(damaged[0].step, "all", f"none can be read (tried {steps}): start in a new workdir")
        return None

    def _restore_fields(self, step: int, like: dict[str, PyTree[Any]], experiment: Any) -> dict[str, PyTree[Any]]:
        meta = self.meta(step)
        differs = difference(experiment, meta["experiment"])
        if differs:
            raise CheckpointMismatch(step, "meta", f"of another experiment: {differs}; use its settings or new workdir")
        expected = leaf_table(like)
        found = {path: leaf for path, leaf in meta["leaves"].items() if path.split("/")[0] in like}
        wrong = _first_difference(expected, found)
        if wrong:
            raise CheckpointMismatch(step, "state", wrong)
        target = jax.tree.map(_shape_of, like)
        with _translated(step, "state"):
            restore_args = self._ocp.checkpoint_utils.construct_restore_args(target)
            args = self._ocp.args
            pytree = args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
            tree = self._manager.restore(step, args=args.Composite(state=pytree))["state"]
        wrong = _first_difference(expected, leaf_table(tree))
        if wrong:
            raise CheckpointError(step, "state", wrong)
        return tree

    def _set_aside(self, steps: Sequence[int]) -> None:
        for step in steps:
            source = self._folder / str(step)
            number = 1
            while (target := self._folder / f"{step}.damaged{number}").exists():
                number += 1
            if jax.process_index() == 0:
                source.rename(target)
            logger.warning("damaged checkpoint %d now lies in %s", step, target.name)
        if steps:
            self._manager.reload()


def load_weights(
    experiment: Experiment, folder: Path, *, step: int | None = None, mesh: Mesh | None = None
) -> tuple[Weights, int]:
    """Loads the weights of a run for sampling: no data, no optimiser.

    Args:
      experiment: of the run.
      folder: its checkpoints.
      step: which checkpoint; None for the newest that can be read.
      mesh: where the weights go; the first device by default.

    Returns:
      (weights, step).

    Raises:
      CheckpointMismatch: if the checkpoint is of another experiment or model.
      CheckpointError: if there is no such checkpoint, or it cannot be read.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(step or 0, "all", f"there is no folder {str(folder)!r}: train first")
    with Checkpoints(folder, create=False, max_to_keep=None) as checkpoints:

        def read(step: int) -> tuple[Weights, int]:
            meta = checkpoints.meta(step)
            differs = difference(experiment.describe(), meta["experiment"])
            if differs:
                raise CheckpointMismatch(step, "meta", f"of another experiment: {differs}; use its settings")
            batch = {name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for name, leaf in meta["batch"].items()}
            form = abstract_state(experiment.method, experiment.optimizers, experiment.ema, batch, mesh=mesh)
            like = Weights(form.params, form.ema, form.aux)
            return checkpoints.restore_weights(step, like, experiment.describe()), step

        if step is not None and step not in checkpoints.steps():
            raise CheckpointError(step, "all", f"does not exist: {checkpoints.steps()} do")
        found = checkpoints.newest(read) if step is None else read(step)
    if found is None:
        raise CheckpointError(0, "all", f"no checkpoint in {str(folder)!r}: train first")
    return found


def leaf_table(tree: PyTree[Any]) -> LeafTable:
    """Path -> shape and dtype of every leaf, in a form that JSON can hold. The place for a digest of each leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        for path, leaf in leaves
    }


def _first_difference(expected: LeafTable, found: LeafTable) -> str | None:
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


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _versions() -> dict[str, str]:
    versions = {"numpy": np.__version__}
    for package in ("jaxdiff", "jax", "flax", "optax", "orbax-checkpoint"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


@contextlib.contextmanager
def _translated(step: int, item: str) -> Iterator[None]:
    """Turns whatever Orbax and TensorStore raise into one line."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        reason = f"{type(error).__name__}: {text[:200]}" + ("..." if len(text) > 200 else "")
        raise CheckpointError(step, item, reason) from error

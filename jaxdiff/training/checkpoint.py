"""Checkpoints: a small facade over Orbax that verifies what it restores and says in one line what is wrong.

A checkpoint has three items: `state` (the train state), `data` (where the batch source stands) and `meta` (what the
checkpoint says about itself, see `manifest.py`). Orbax writes them asynchronously and commits them together, and
deletes old ones only after a newer one is complete. Before anything is read, the table of leaves is compared with what
the caller expects, because Orbax casts a wrong dtype silently; after reading, the digest of every leaf is compared with
the one taken when it was saved, because neither Orbax nor the disk notices a flipped bit.
"""

import contextlib
import errno
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdiff.training import manifest
from jaxdiff.training.checkpoint_errors import CheckpointError as CheckpointError
from jaxdiff.training.checkpoint_errors import CheckpointMismatch as CheckpointMismatch
from jaxdiff.training.checkpoint_errors import first_says, together, translated
from jaxdiff.training.digests import digests
from jaxdiff.training.experiment import Experiment, difference
from jaxdiff.training.manifest import leaf_table as leaf_table
from jaxdiff.training.reading import item_folder, read_json, read_tree
from jaxdiff.training.state import TrainState, Weights, abstract_state

logger = logging.getLogger(__name__)

FIELDS = ("step", "key", "params", "opt_state", "ema", "aux")
# How deep a part of a state may be named: a player of the parameters, a player of one average.
DEPTH = {"params": 1, "opt_state": 1, "ema": 2}


class Restored(NamedTuple):
    """A train state and where its batch source stood."""

    state: TrainState
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints in one folder. Use it as a context manager: leaving it waits for pending writes.

    Args:
      folder: made if `create`; one subfolder per step. "gs://bucket/..." and the like as text, see `as_path`.
      max_to_keep: number of newest checkpoints that survive a save; None keeps all.
      keep_every: checkpoints at multiples of this step survive besides; 0 for none.
      create: False for readers: nothing is made and leftovers of killed writers stay.

    Raises:
      CheckpointError: if the folder cannot be made or read.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, max_to_keep: int | None = 3, keep_every: int = 0, create: bool = True
    ):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._saving = 0
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            keep_period=keep_every or None,
            create=create,
            cleanup_tmp_directories=create,
            enable_async_checkpointing=True,
        )
        path = as_path(folder)
        with translated(0, "folder"):
            if path.exists() and not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(path))
            # Orbax finds this out in the background and waits a minute before it says so.
            if create and path.exists() and isinstance(path, Path) and not os.access(path, os.W_OK, effective_ids=True):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
            self._manager = ocp.CheckpointManager(path, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            self.wait()
            self._manager.close()
            return
        with contextlib.suppress(Exception):  # the error on its way out is the one to report
            self._manager.close()

    @property
    def folder(self) -> Any:
        """Where they are, an `etils.epath.Path`."""
        return self._manager.directory

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
        self.wait()
        self._saving = step
        tree = {field: getattr(state, field) for field in FIELDS}
        args = self._ocp.args
        with translated(step, "all"):
            meta = manifest.describe(step, tree, data=data, experiment=experiment, batch=batch)
            items = args.Composite(state=args.PyTreeSave(tree), data=args.JsonSave(data), meta=args.JsonSave(meta))
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Waits until everything saved is on disk.

        Raises:
          CheckpointError: if the last write failed.
        """
        with translated(self._saving, "all"):
            self._manager.wait_until_finished()

    def meta(self, step: int) -> dict[str, Any]:
        """The `meta` item: "experiment", "versions", "batch", "leaves" and, if it has digests, "step".

        Raises:
          CheckpointError: if it cannot be read, or is not what was saved.
        """
        self.wait()
        meta = self._text(step, "meta")
        wrong = manifest.fault(meta, step)
        if wrong:
            raise CheckpointError(step, "meta", wrong)
        return meta

    def data(self, step: int) -> Any:
        """The `data` item: where the batch source stood.

        Raises:
          CheckpointError: if it cannot be read, or is not what was saved.
        """
        return self._data(step, self.meta(step))

    def restore(self, step: int, like: TrainState, experiment: Any) -> Restored:
        """Restores one checkpoint.

        Args:
          step: which one.
          like: a state, or its shapes with shardings, of exactly the expected form; the result lies where it lies.
          experiment: `Experiment.describe()` of the run that asks.

        Raises:
          CheckpointMismatch: if the checkpoint is of another experiment, or a leaf differs in path, shape or dtype.
          CheckpointError: if it cannot be read, or is not what was saved.
        """
        meta = self._meta_of(step, experiment)
        tree = self._state(step, {field: getattr(like, field) for field in FIELDS}, meta, FIELDS)
        return Restored(TrainState(**tree), self._data(step, meta))

    def restore_part(self, step: int, like: Mapping[str, PyTree[Any]], experiment: Any) -> dict[str, PyTree[Any]]:
        """Restores a part of the state and reads nothing else.

        Args:
          step: which one.
          like: {field of the train state: tree}, as for `restore`. `params` and `opt_state` may name some of the
            players, `ema` some averages and some of their players; what is named must be complete.
          experiment: as for `restore`.

        Returns:
          {field: tree}, in the form of `like`.

        Raises:
          CheckpointMismatch, CheckpointError: as `restore`.
        """
        return self._state(step, dict(like), self._meta_of(step, experiment), _prefixes(like))

    def restore_weights(self, step: int, like: Weights, experiment: Any) -> Weights:
        """Restores what sampling needs and reads nothing else. Arguments and errors as in `restore_part`."""
        return Weights(**self.restore_part(step, like._asdict(), experiment))

    def newest(self, read: Callable[[int], Any], *, set_aside: bool = False) -> Any:
        """Walks from the newest checkpoint back to the first that can be read, with a warning for each that cannot.

        On several processes, process 0 says which checkpoints there are, and one that any process cannot read is
        passed over by all.

        Args:
          read: step -> result, for example a partial `restore`.
          set_aside: rename the unreadable ones to STEP.damaged1, so that training may write those steps again.

        Returns:
          What `read` returned, or None if there is no checkpoint at all.

        Raises:
          CheckpointMismatch: from `read`, at once.
          CheckpointError: if there are checkpoints and none can be read.
        """
        damaged: list[CheckpointError] = []
        steps = self.steps()
        while (step := first_says(steps.pop() if steps else -1)) >= 0:
            steps = [other for other in steps if other < step]
            try:
                result = read(step)
            except CheckpointMismatch:
                raise
            except CheckpointError as error:
                logger.warning("%s; trying the one before" if steps else "%s", error)
                damaged.append(error)
                continue
            if set_aside:
                self._set_aside([error.step for error in damaged])
            return result
        if damaged:
            first, tried = damaged[0], ", ".join(str(error.step) for error in damaged)
            reason = f"{first.reason}; none can be read (tried {tried}): restore a copy, or start in a new workdir"
            raise CheckpointError(first.step, first.item, reason)
        return None

    def _text(self, step: int, item: str) -> Any:
        with together(step, item):
            return read_json(item_folder(self.folder, step, item))

    def _data(self, step: int, meta: dict[str, Any]) -> Any:
        data = self._text(step, "data")
        if manifest.has_digests(meta) and manifest.json_digest(data) != meta["data_digest"]:
            raise CheckpointError(step, "data", "is not what was saved: its digest differs")
        return data

    def _meta_of(self, step: int, experiment: Any) -> dict[str, Any]:
        meta = self.meta(step)
        differs = difference(experiment, meta["experiment"])
        if differs:
            raise CheckpointMismatch(step, "meta", f"of another experiment: {differs}; use its settings or new workdir")
        return meta

    def _state(
        self, step: int, like: dict[str, PyTree[Any]], meta: dict[str, Any], prefixes: Sequence[str]
    ) -> dict[str, PyTree[Any]]:
        expected = leaf_table(like)
        found = {path: leaf for path, leaf in meta["leaves"].items() if _within(path, prefixes)}
        wrong = manifest.first_difference(expected, found)
        if wrong:
            raise CheckpointMismatch(step, "state", wrong)
        # Orbax takes an empty branch for a leaf.
        full = {field: tree for field, tree in like.items() if jax.tree.leaves(tree)}
        with together(step, "state"):
            folder = item_folder(self.folder, step, "state")
            tree = like | (read_tree(folder, full, step) if full else {})
        if not manifest.has_digests(meta):
            logger.warning("checkpoint %d carries no digests: what it holds is not verified", step)
            return tree
        wrong = manifest.changed_leaves(meta, dict(zip(expected, digests(jax.tree.leaves(tree)), strict=True)))
        if wrong:
            raise CheckpointError(step, "state", wrong)
        return tree

    def _set_aside(self, steps: Sequence[int]) -> None:
        if not steps:
            return
        for step in steps:
            with together(step, "all"):
                if jax.process_index() == 0:
                    number = 1
                    while (target := self.folder / f"{step}.damaged{number}").exists():
                        number += 1
                    (self.folder / str(step)).rename(target)
                    logger.warning("damaged checkpoint %d now lies in %s", step, target.name)
        self._manager.reload()


def as_path(text: str | os.PathLike[str]) -> Any:
    """The path of a folder: local, or in a bucket.

    Args:
      text: "scheme://..." gives an `etils.epath.Path`, which Orbax and this library can use like any other;
        everything else gives an absolute `pathlib.Path`.

    Raises:
      ValueError: for a scheme that epath does not know, and for an address that `pathlib` has spoilt: its "gs://b" is
        "gs:/b".
    """
    name = os.fspath(text)
    if "://" in name:
        from etils import epath

        try:
            return epath.Path(name)
        except KeyError:
            raise ValueError(f"{name}: no way to reach such an address is known, use gs:// or s3://") from None
    if re.match(r"[a-z][a-z0-9]+:/", name):
        raise ValueError(f"{name} was an address before pathlib.Path took a slash away: pass it as text")
    return Path(name).absolute()


def load_weights(
    experiment: Experiment, folder: str | os.PathLike[str], *, step: int | None = None, mesh: Mesh | None = None
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
    with translated(step or 0, "folder"):
        if not as_path(folder).is_dir():
            raise CheckpointError(step or 0, "folder", f"there is no folder {os.fspath(folder)!r}: train first")
    with Checkpoints(folder, create=False, max_to_keep=None) as checkpoints:

        def read(step: int) -> tuple[Weights, int]:
            meta = checkpoints.meta(step)
            differs = difference(experiment.describe(), meta["experiment"])
            if differs:
                raise CheckpointMismatch(step, "meta", f"of another experiment: {differs}; use its settings")
            batch = {name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for name, leaf in meta["batch"].items()}
            parts = experiment.method, experiment.optimizers, experiment.ema
            form = abstract_state(*parts, batch, mesh=mesh, partition=experiment.partition)
            like = Weights(form.params, form.ema, form.aux)
            return checkpoints.restore_weights(step, like, experiment.describe()), step

        if step is not None and step not in checkpoints.steps():
            raise CheckpointError(step, "all", f"does not exist, {checkpoints.steps()} do: choose one of them")
        found = checkpoints.newest(read) if step is None else read(step)
    if found is None:
        raise CheckpointError(0, "folder", f"no checkpoint in {os.fspath(folder)!r}: train first")
    return found


def _prefixes(like: Mapping[str, PyTree[Any]]) -> list[str]:
    """Paths of what a part names, as deep as `DEPTH` allows."""

    def below(path: str, tree: Any, depth: int) -> list[str]:
        if depth == 0 or not isinstance(tree, Mapping):
            return [path]
        return [deep for name, branch in tree.items() for deep in below(f"{path}/{name}", branch, depth - 1)]

    return [path for field, tree in like.items() for path in below(field, tree, DEPTH.get(field, 0))]


def _within(path: str, prefixes: Sequence[str]) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in prefixes)

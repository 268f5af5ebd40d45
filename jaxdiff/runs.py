"""A run's folder: which experiment file and settings made it, and opening it again to sample or evaluate.

`run.json` names the file, its SHA-256 and all settings. Opening a run imports that file, so a file that lies inside
the run's folder is refused unless it is named on the command line: a folder that somebody sends must not execute.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdiff.settings import UsageError, build_experiment, call_build, first_line, hint, load_build, settings_of
from jaxdiff.training import sharding
from jaxdiff.training.checkpoint import CheckpointError, as_path, load_weights
from jaxdiff.training.ema import at_least_float32
from jaxdiff.training.experiment import Experiment
from jaxdiff.training.state import Weights
from jaxdiff.types import Params

RECORD = "run.json"
CHECKPOINTS = "checkpoints"


class Record(NamedTuple):
    """What `run.json` holds: the experiment file, its SHA-256 when the run began or went on, and all settings."""

    file: Path
    sha256: str
    settings: dict[str, Any]


def experiment_from(path: str | Path, pairs: list[str]) -> Experiment:
    """The experiment of a file with `name=value` settings, its config filled in with all settings."""
    experiment, settings = build_experiment(path, pairs)
    return _checked(experiment, path, settings)


def write_record(workdir: Any, file: str | Path, experiment: Experiment) -> None:
    """Writes `run.json` into a run's folder."""
    source = Path(file).resolve()
    about = {"file": str(source), "sha256": _digest(source), "settings": dict(experiment.config)}
    (workdir / RECORD).write_text(json.dumps(about, indent=2) + "\n")


def read_record(workdir: Any) -> Record:
    """Reads `run.json` of a run's folder.

    Raises:
      UsageError: if it is damaged.
    """
    path = workdir / RECORD
    try:
        about = json.loads(path.read_text())
        settings = {name: tuple(v) if isinstance(v, list) else v for name, v in dict(about["settings"]).items()}
        return Record(Path(about["file"]), str(about["sha256"]), settings)
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"{path} is damaged, expected JSON with file, sha256 and settings; restore it or use another folder"
        ) from None


def check_workdir(workdir: Any) -> None:
    """Refuses a folder to train in that is something else: a file, or a folder of other things.

    Raises:
      UsageError: saying which.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UsageError(f"workdir {workdir} is a file, expected a folder; choose another name")
    if (workdir / RECORD).is_file():
        read_record(workdir)
    elif workdir.is_dir() and any(workdir.iterdir()):
        raise UsageError(f"workdir {workdir} is not empty and not a run of jaxdiff; choose another folder")


def changed(workdir: Any, file: str | Path) -> str | None:
    """A sentence if the experiment file is not the one that the run was last trained with, else None."""
    if not (workdir / RECORD).is_file() or _digest(Path(file)) == read_record(workdir).sha256:
        return None
    return f"{file} has changed since {workdir} was last trained; what settings do not say may differ"


def source_of(workdir: str | Path, file: str | None = None) -> Path:
    """The experiment file of a run.

    Args:
      workdir: the run's folder.
      file: a file to use instead of the recorded one, for runs that moved.

    Raises:
      UsageError: if there is no such run, its record is damaged, or its experiment file is missing or unsafe.
    """
    folder = as_path(workdir)
    if not (folder / RECORD).is_file():
        raise UsageError(f"run folder {workdir} {_why_no_run(folder)}")
    recorded = read_record(folder).file
    if file is None and isinstance(folder, Path) and recorded.resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            f"{folder / RECORD} names code inside the run folder ({recorded.name}), which is not run unasked; "
            f"read it, then name it with --experiment {recorded}"
        )
    source = Path(file) if file else recorded
    if not source.is_file():
        raise UsageError(
            f"experiment file {source} of run {workdir} is gone; name its new place with --experiment FILE"
        )
    return source


def open_run(workdir: str | Path, file: str | None = None) -> Experiment:
    """The experiment of a run, rebuilt from its record.

    Args and Raises: as `source_of`; also UsageError for a file that does not have the run's settings.
    """
    source = source_of(workdir, file)
    build, settings = load_build(source), read_record(as_path(workdir)).settings
    unknown = sorted(set(settings) - set(settings_of(build)))
    if unknown:
        raise UsageError(
            f"{source.name} has no setting {unknown[0]!r}, which run {workdir} was made with; name its own file"
        )
    return _checked(call_build(build, source, settings), source, settings)


def weights_of(
    experiment: Experiment, workdir: str | Path, average: str | None, mesh: Mesh, *, step: int | None = None
) -> tuple[Any, Any, int, str]:
    """(params, aux, step, name) of a run's checkpoint; name says which average the parameters are.

    They lie on `mesh` by the rule of `training/sharding.py`.

    Args:
      experiment: of the run.
      workdir: the run's folder.
      average: an EMA's name, "raw" for the trained parameters, or None for the last EMA of the experiment.
      mesh: from `sharding.make_mesh`.
      step: which checkpoint; None for the newest.

    Raises:
      UsageError: for an unknown average, and for a checkpoint that is missing, damaged or of another experiment.
    """
    name = average_name(experiment, average)
    folder = as_path(workdir) / CHECKPOINTS
    if not folder.is_dir() or not any(entry.name.isdecimal() for entry in folder.iterdir()):
        raise UsageError(
            f"run {workdir} has no checkpoint yet; train it further: jaxdiff train FILE --workdir {workdir}"
        )
    try:
        with _held_warnings():
            loaded: tuple[Weights, int] = load_weights(experiment, folder, step=step, mesh=mesh)
    except CheckpointError as error:
        raise UsageError(f"run {workdir}: {first_line(error)}") from error
    weights, step = loaded
    return weights.select(None if name == "raw" else name), weights.aux, step, name


def player_params(workdir: str | Path, *, player: str = "model", average: str | None = None) -> Params:
    """The parameters of one player of a finished run, on the host: what a student starts from or learns from.

    Args:
      workdir: the run's folder. Its experiment file is executed, under the rules of `open_run`.
      player: whose parameters.
      average: as for `weights_of`.

    Raises:
      UsageError: for a run that cannot be opened or has no checkpoint, an unknown player or average.
    """
    return params_of(open_run(workdir), workdir, player, average)


def params_of(experiment: Experiment, workdir: str | Path, player: str, average: str | None) -> Params:
    """`player_params` of a run that is open already."""
    params, _, _, _ = weights_of(experiment, workdir, average, sharding.make_mesh(devices=jax.local_devices()[:1]))
    if player not in params:
        raise UsageError(f"run {workdir} has no player {player!r}; {hint(player, params)}")
    return jax.device_get(params[player])


def teacher_params(path: str | Path) -> Params:
    """The parameters to distil, on the host: of a finished run of ours, or of published weights that were imported.

    Args:
      path: a run's folder, as for `player_params`, or a folder that `jaxdiff import` made.

    Returns:
      A nested dict of arrays, in float32 or wider: a student that starts from bfloat16 would hardly move.

    Raises:
      UsageError: for a folder that is neither, or is damaged.
    """
    from jaxdiff.pretrained import folders  # all networks, which few commands need

    folder = as_path(path)
    if (folder / RECORD).is_file():
        params = player_params(path)
    elif (folder / folders.NETWORK).is_file() or folders.parts_of(folder):
        try:
            params = folders.load(folder).params
        except ValueError as error:
            raise UsageError(f"teacher: {first_line(error)}") from error
    else:
        raise UsageError(
            f"teacher {path} is neither a run nor imported weights; train it with: jaxdiff train FILE --workdir "
            f"{path}, or get it with: jaxdiff import KIND FILE {path}"
        )
    return jax.tree.map(lambda leaf: np.asarray(leaf, at_least_float32(leaf.dtype)), params)


def average_name(experiment: Experiment, average: str | None) -> str:
    """Which parameters to use: `average` if the experiment has it, by default its last EMA or "raw".

    Raises:
      UsageError: for an unknown name.
    """
    names = [*(ema.name for ema in experiment.ema), "raw"]
    if average is None:
        return names[-2] if len(names) > 1 else "raw"
    if average not in names:
        raise UsageError(f"experiment {experiment.name} has no EMA {average!r}; {hint(average, names)}")
    return average


@contextlib.contextmanager
def _held_warnings() -> Iterator[None]:
    """Shows the log of passed-over checkpoints only if another one could be read; the error says the rest."""
    logger, records = logging.getLogger("jaxdiff.training.checkpoint"), []

    def hold(record: logging.LogRecord) -> bool:
        records.append(record)
        return False

    logger.addFilter(hold)
    try:
        yield
    finally:
        logger.removeFilter(hold)
    for record in records:
        logger.handle(record)


def _checked(experiment: Any, path: str | Path, settings: dict[str, Any]) -> Experiment:
    if not isinstance(experiment, Experiment):
        raise UsageError(
            f"{Path(path).name}: build(...) returned {type(experiment).__name__}, expected an Experiment; "
            "end it with return Experiment(...)"
        )
    try:
        return dataclasses.replace(experiment, config=settings)
    except ValueError as error:
        raise UsageError(f"{Path(path).name}: {first_line(error)}") from error


def _why_no_run(workdir: Any) -> str:
    if workdir.is_file():
        return "is a file, expected the folder of a run"
    if workdir.is_dir():
        return f"is not a run: it has no run.json; make one with: jaxdiff train FILE --workdir {workdir}"
    near = [str(entry.parent) for entry in sorted(workdir.parent.glob(f"*/{RECORD}"))]
    remedy = hint(str(workdir), near) if near else f"train it with: jaxdiff train FILE --workdir {workdir}"
    return f"does not exist; {remedy}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

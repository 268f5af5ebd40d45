"""A run's folder: which experiment file and settings made it, and opening it again to sample or evaluate.

`run.json` names the file, its SHA-256 and all settings. Opening a run imports that file, so a file that lies inside
the run's folder is refused unless it is named on the command line: a folder that somebody sends must not execute.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxdiff.settings import UsageError, build_experiment, load_build, settings_of
from jaxdiff.training.checkpoint import load_weights
from jaxdiff.training.experiment import Experiment
from jaxdiff.training.state import Weights

RECORD = "run.json"


def experiment_from(path: str | Path, pairs: list[str]) -> Experiment:
    """The experiment of a file with `name=value` settings, its config filled in with all settings."""
    experiment, settings = build_experiment(path, pairs)
    if not isinstance(experiment, Experiment):
        raise UsageError(f"{Path(path).name}: build(...) returned {type(experiment).__name__}, expected an Experiment")
    return dataclasses.replace(experiment, config=settings)


def write_record(workdir: Path, file: str | Path, experiment: Experiment) -> None:
    """Writes `run.json` into a run's folder."""
    source = Path(file).resolve()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    about = {"file": str(source), "sha256": digest, "settings": dict(experiment.config)}
    (workdir / RECORD).write_text(json.dumps(about, indent=2) + "\n")


def open_run(workdir: str | Path, file: str | None = None) -> Experiment:
    """The experiment of a run, rebuilt from its record.

    Args:
      workdir: the run's folder.
      file: an experiment file to use instead of the recorded one, for runs that moved.

    Raises:
      UsageError: if there is no such run, its record is damaged, or its experiment file is missing or unsafe.
    """
    workdir = Path(workdir)
    record = workdir / RECORD
    if not record.is_file():
        what = "is not a run: it has no run.json" if workdir.is_dir() else "does not exist"
        raise UsageError(f"run folder {workdir} {what}; make one with: jaxdiff train FILE --workdir {workdir}")
    try:
        about = json.loads(record.read_text())
        recorded, settings = Path(about["file"]), dict(about["settings"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{record} is damaged; expected JSON with file and settings; train again or restore it") from None
    if file is None and recorded.resolve().is_relative_to(workdir.resolve()):
        raise UsageError(
            f"{record} names code inside the run folder ({recorded.name}), which is not run unasked; "
            f"read it, then name it with --experiment {recorded}"
        )
    source = Path(file) if file else recorded
    if not source.is_file():
        raise UsageError(f"experiment file {source} of run {workdir} is gone; name its new place with --experiment FILE")
    build = load_build(source)
    unknown = sorted(set(settings) - set(settings_of(build)))
    if unknown:
        raise UsageError(f"{source.name} has no setting {unknown[0]!r}, which run {workdir} was made with; name its own file")
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
    return dataclasses.replace(build(**settings), config=settings)


def weights_of(experiment: Experiment, workdir: str | Path, average: str | None, mesh: Mesh) -> tuple[Any, Any, int, str]:
    """(params, aux, step, name) of a run's newest checkpoint; name says which average the parameters are.

    They lie on `mesh` by the rule of `training/sharding.py`. `average` is an EMA's name, "raw" for the trained parameters, or None for the last EMA of the experiment.
    """
    names = [ema.name for ema in experiment.ema]
    name = average or (names[-1] if names else "raw")
    if name != "raw" and name not in names:
        raise UsageError(f"no EMA is called {name!r}; choose from: {', '.join([*names, 'raw'])}")
    loaded: tuple[Weights, int] = load_weights(experiment, Path(workdir) / "checkpoints", mesh=mesh)
    weights, step = loaded
    return weights.select(None if name == "raw" else name), weights.aux, step, name

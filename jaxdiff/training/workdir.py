"""The folder of a run: what may be trained there, and `config.json`, which says what is.

A workdir belongs to one experiment; another one, or other settings, are refused before anything is written. It may lie
in a bucket ("gs://..."). What else lies in it is the business of those who write it.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax

from jaxdiff.training import logs
from jaxdiff.training.experiment import Experiment, difference

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"


def check_workdir(experiment: Experiment, workdir: Any, resume: bool) -> None:
    """Refuses a workdir with another run. One that failed before its first log line left nothing worth keeping.

    Args:
      experiment: what is to be trained.
      workdir: its folder, from `as_path`.
      resume: False refuses checkpoints of whatever run.

    Raises:
      ValueError: saying what is in the way.
    """
    config, checkpoints, metrics = workdir / CONFIG, workdir / CHECKPOINTS, workdir / logs.METRICS
    saved = checkpoints.is_dir() and any(checkpoints.iterdir())
    if saved and not resume:
        raise ValueError(f"workdir {workdir} already holds a run: pass resume=True, or choose another workdir")
    if not saved and not (metrics.exists() and metrics.read_bytes()):
        return
    if not config.exists():
        raise ValueError(f"workdir {workdir} holds a run but no {CONFIG}: choose another workdir")
    try:
        theirs = json.loads(config.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{config} is not JSON: restore it, or choose another workdir") from None
    differs = difference(experiment.describe(), theirs if isinstance(theirs, dict) else {})
    if differs:
        raise ValueError(f"workdir {workdir} holds another run: {differs}; use its settings or another workdir")


def open_workdir(experiment: Experiment, workdir: Any) -> None:
    """Makes the folder and, on process 0, writes `config.json`.

    Raises:
      ValueError: if the folder cannot be made or written.
      OSError: if the file cannot be written.
    """
    make_folder(workdir, "workdir")
    if jax.process_index():
        return
    text = json.dumps(experiment.describe(), indent=2) + "\n"
    if not isinstance(workdir, Path):
        (workdir / CONFIG).write_text(text)  # object stores write whole objects or nothing
        return
    scratch = workdir / f"{CONFIG}.new"
    scratch.write_text(text)
    os.replace(scratch, workdir / CONFIG)


def make_folder(folder: Any, what: str) -> None:
    """Makes a folder, if it is not there, and refuses one that cannot be written.

    Args:
      folder: a path.
      what: its name in the error message.

    Raises:
      ValueError: saying why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{what} {folder} cannot be made: {error.strerror}; choose another folder") from None
    if isinstance(folder, Path) and not os.access(folder, os.W_OK):
        raise ValueError(f"{what} {folder} is not writable: choose another folder")

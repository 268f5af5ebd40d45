"""The training loop: a Python loop over one compiled, donated step, which can be stopped and continued exactly.

It draws batches, writes logs and checkpoints, calls the sample hook, and stops on SIGINT, SIGTERM or a number that is
not finite. A run of k steps, a stop and a resumed run of n - k steps give the same bits as a run of n steps: the key,
the averages, the optimiser and the place in the data are all in the checkpoint, and no wall clock enters a number.
Nothing here knows how a step computes or a sample is drawn.
"""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdiff.training import logs, sharding
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.experiment import BatchSource, Experiment, difference
from jaxdiff.training.state import TrainState, abstract_state, create_state
from jaxdiff.training.step import make_train_step

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"

SampleHook = Callable[[TrainState, int], None]


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
      state: the last state; it is also the newest checkpoint.
      step: number of finished steps.
      stopped: name of the signal that ended the run early, or None.
    """

    state: TrainState
    step: int
    stopped: str | None


def train(
    experiment: Experiment,
    workdir: Path,
    *,
    resume: bool = True,
    mesh: Mesh | None = None,
    on_sample: SampleHook | None = None,
    on_open: Callable[[], None] | None = None,
) -> Outcome:
    """Trains an experiment, from its newest checkpoint if the workdir has one.

    The workdir gets `config.json`, `metrics.jsonl`, `checkpoints/`, and `tensorboard/` if tensorboardX is installed.

    Args:
      experiment: what to train.
      workdir: folder of this run; made if it is not there.
      resume: False refuses a workdir that already has checkpoints.
      mesh: from `make_mesh`; all devices along `data` by default.
      on_sample: called with (state, step) every `sample_every` steps and at the end; must not keep the state, whose
        buffers the next step reuses.
      on_open: called once the workdir is known to be this run's, before anything else is written.

    Returns:
      The outcome. On SIGINT or SIGTERM the current step is finished and saved first; a second signal ends at once.

    Raises:
      ValueError: if the workdir holds another run, or the data, batch size and mesh do not fit together.
      FloatingPointError: naming the first step whose loss or gradient was not finite. That step changed nothing, and
        the last checkpoint is from before it. Also if parameters are not finite when they are to be saved.
      CheckpointError: if a checkpoint cannot be written, or none of those that are there can be read.
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    _check_sizes(experiment, mesh)
    workdir = Path(workdir)
    _check_workdir(experiment, workdir, resume)
    source = experiment.data()
    example = _example(source, experiment)
    _open_workdir(experiment, workdir)
    if on_open is not None:
        on_open()
    with ExitStack() as stack:
        kept = Checkpoints(workdir / CHECKPOINTS, max_to_keep=experiment.max_to_keep, keep_every=experiment.keep_every)
        checkpoints = stack.enter_context(kept)
        state, start = _begin(experiment, checkpoints, source, example, mesh)
        writers = logs.open_writers(workdir, start)
        progress = logs.Progress(experiment.num_steps, start)
        for writer in (*writers, progress):
            stack.callback(writer.close)
        if start:
            progress.say(f"{experiment.name}: continued from the checkpoint of step {start}")
        if start >= experiment.num_steps:
            progress.say(f"{experiment.name}: all {experiment.num_steps} steps are done")
            return Outcome(state, start, None)

        step_fn = make_train_step(
            experiment.method, experiment.optimizers, experiment.ema, accumulate=experiment.accumulate
        )
        step_fn = sharding.jit_train_step(step_fn, mesh, sharding.state_shardings(state, mesh))
        about = {"experiment": experiment.describe(), "batch": example}
        window = logs.Window(experiment.batch_size)
        stop = stack.enter_context(_stop_signals())
        last_saved, previous = start, None
        for step in range(start + 1, experiment.num_steps + 1):
            state, metrics = step_fn(state, sharding.put_batch(_next(source, step), mesh))
            window.add(metrics)
            progress.advance()
            # One step late, so that the host never waits for the step it has just sent off.
            _check_finite(previous, writers, workdir, last_saved)
            previous = (step, metrics)
            if step == start + 1:
                jax.block_until_ready(metrics)
                progress.say(f"first step after {window.restart_clock():.1f} s, compilation included")
            stopped = stop()
            last = step == experiment.num_steps or stopped is not None
            sample = _due(step, experiment.sample_every, step == experiment.num_steps)
            save = _due(step, experiment.checkpoint_every, last)
            if sample or save:
                _check_finite(previous, writers, workdir, last_saved)
            if _due(step, experiment.log_every, last):
                scalars = window.summary()
                _check_finite(previous, writers, workdir, last_saved)
                for writer in (*writers, progress):
                    writer.write(step, {name: value for name, value in scalars.items() if name != "finite"})
            if save:
                _check_params(state, step, workdir, last_saved)
                checkpoints.save(step, state, data=source.get_state(), **about)
                last_saved = step
            if sample and on_sample is not None:
                on_sample(state, step)
            if stopped is not None:
                checkpoints.wait()
                progress.say(f"stopped by {stopped} after step {step}, saved: the same command goes on from here")
                return Outcome(state, step, stopped)
        checkpoints.wait()
        return Outcome(state, experiment.num_steps, None)


def enable_compilation_cache(folder: Path) -> None:
    """Keeps compiled programs on disk, all of them, so that the next process starts without compiling.

    Args:
      folder: made if it is not there. Do not share it between machines with other processors.

    Raises:
      ValueError: if the folder cannot be written.
    """
    folder = Path(folder).absolute()
    _make_folder(folder, "compilation cache")
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # a cache that was opened before keeps its old folder otherwise


def _begin(
    experiment: Experiment, checkpoints: Checkpoints, source: BatchSource, example: Mapping[str, Any], mesh: Mesh
) -> tuple[TrainState, int]:
    parts = experiment.method, experiment.optimizers, experiment.ema
    if not checkpoints.steps():
        return create_state(*parts, jax.random.key(experiment.seed), example, mesh=mesh), 0
    like = abstract_state(*parts, example, mesh=mesh)
    about = experiment.describe()
    restored = checkpoints.newest(lambda step: checkpoints.restore(step, like, about), set_aside=True)
    source.set_state(restored.data)
    return restored.state, int(restored.state.step)


def _example(source: BatchSource, experiment: Experiment) -> dict[str, np.ndarray]:
    """The first batch, without moving the source."""
    begin = source.get_state()
    example = {name: np.asarray(value) for name, value in _next(source, 1).items()}
    source.set_state(begin)
    rows = sorted({value.shape[0] if value.ndim else 0 for value in example.values()})
    expected = experiment.batch_size // jax.process_count()
    if rows != [expected]:
        raise ValueError(f"data gives batches of {rows}, expected {expected}: batch_size over number of processes")
    return example


def _next(source: BatchSource, step: int) -> Mapping[str, Any]:
    try:
        return next(source)
    except StopIteration:
        raise ValueError(f"data ended before step {step}: a batch source must be endless, let it repeat") from None


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)


def _check_finite(entry: Any, writers: list[logs.MetricWriter], workdir: Path, last_saved: int) -> None:
    if entry is None or bool(entry[1]["finite"]):
        return
    step = entry[0]
    scalars = {name: float(value) for name, value in entry[1].items() if name != "finite"}
    for writer in writers:
        writer.write(step, scalars)
    names = sorted((name for name in scalars if "/" in name), key=lambda name: not name.endswith("/loss"))
    losses = ", ".join(f"{name}={scalars[name]:.4g}" for name in names)
    raise FloatingPointError(
        f"step {step} is not finite and was not applied ({losses}); {_advice(workdir, last_saved)}"
    )


def _check_params(state: TrainState, step: int, workdir: Path, last_saved: int) -> None:
    """An update can break parameters while loss and gradient are finite; such a state must not become a checkpoint."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        shards = [shard.data for shard in leaf.addressable_shards if shard.replica_id == 0]
        if not all(np.isfinite(np.asarray(shard)).all() for shard in shards):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            advice = _advice(workdir, last_saved)
            raise FloatingPointError(f"parameter {name} is not finite after step {step}, nothing was saved; {advice}")


def _advice(workdir: Path, last_saved: int) -> str:
    kept = f"the checkpoint of step {last_saved} in {workdir / CHECKPOINTS}" if last_saved else "no checkpoint yet"
    return f"last good state: {kept}; lower the learning rate or clip gradients"


def _check_sizes(experiment: Experiment, mesh: Mesh) -> None:
    parts = sharding.batch_devices(mesh)
    micro = experiment.batch_size // experiment.accumulate
    if micro % parts:
        raise ValueError(
            f"batch_size / accumulate is {micro}, which does not divide among {parts} devices (data x fsdp): "
            f"make it a multiple of {parts}, or pass a smaller mesh"
        )


def _check_workdir(experiment: Experiment, workdir: Path, resume: bool) -> None:
    """Refuses a workdir with another run. One that failed before its first log line left nothing worth keeping."""
    config, checkpoints, metrics = workdir / CONFIG, workdir / CHECKPOINTS, workdir / logs.METRICS
    saved = checkpoints.is_dir() and any(checkpoints.iterdir())
    if saved and not resume:
        raise ValueError(f"workdir {workdir} already holds a run: pass resume=True, or choose another workdir")
    if not saved and not (metrics.exists() and metrics.stat().st_size):
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


def _open_workdir(experiment: Experiment, workdir: Path) -> None:
    _make_folder(workdir, "workdir")
    if jax.process_index() == 0:
        scratch = workdir / f"{CONFIG}.new"
        scratch.write_text(json.dumps(experiment.describe(), indent=2) + "\n")
        os.replace(scratch, workdir / CONFIG)


def _make_folder(folder: Path, what: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{what} {folder} cannot be made: {error.strerror}; choose another folder") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{what} {folder} is not writable: choose another folder")


@contextmanager
def _stop_signals() -> Iterator[Callable[[], str | None]]:
    """Turns the first SIGINT or SIGTERM into a flag; yields a function that gives its name. The second one acts."""
    caught: list[str] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def catch(number: int, frame: Any) -> None:
        del frame
        caught.append(signal.Signals(number).name)
        restore()
        # os.write, since print may be interrupted half-way by this very handler.
        os.write(2, f"\n{caught[0]}: finishing this step and saving; once more to stop at once\n".encode())

    # Python allows handlers in the main thread only; elsewhere signals keep their usual effect.
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: caught[0] if caught else None
    finally:
        restore()

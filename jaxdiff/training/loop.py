"""The training loop: a Python loop over one compiled, donated step, which can be stopped and continued exactly.

It draws batches, writes logs and checkpoints, calls the sample hook, and stops when the processes of the run agree to
(`stopping.py`) or steps are not finite (`faults.py`). A run of k steps, a stop and a resumed run of n - k steps give
the same bits as a run of n steps: the key, the averages, the optimiser and the place in the data are all in the
checkpoint, and no wall clock enters a number. Nothing here knows how a step computes or a sample is drawn.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdiff.training import distributed, ema, faults, logs, sharding
from jaxdiff.training.checkpoint import Checkpoints, as_path
from jaxdiff.training.experiment import BatchSource, Experiment
from jaxdiff.training.goodput import COMPILE, INPUT, RESTORE, SAMPLE, SAVE, STEP, Record, Stopwatch
from jaxdiff.training.state import TrainState, abstract_state, create_state
from jaxdiff.training.step import make_train_step
from jaxdiff.training.stopping import stop_signals
from jaxdiff.training.workdir import CHECKPOINTS, check_workdir, make_folder, open_workdir
from jaxdiff.types import Metrics

SampleHook = Callable[[TrainState, int], None]
LOWER = "lower the learning rate or clip gradients"


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
      state: the last state; it is also the newest checkpoint.
      step: number of finished steps.
      stopped: name of the signal that ended the run early, or None. The same on every process.
    """

    state: TrainState
    step: int
    stopped: str | None


def train(
    experiment: Experiment,
    workdir: str | os.PathLike[str],
    *,
    resume: bool = True,
    mesh: Mesh | None = None,
    on_sample: SampleHook | None = None,
    on_open: Callable[[], None] | None = None,
) -> Outcome:
    """Trains an experiment, from its newest checkpoint if the workdir has one.

    The workdir gets `config.json`, `metrics.jsonl`, `goodput.jsonl`, `checkpoints/`, `faults/` if something was odd,
    and `tensorboard/` if it is local and tensorboardX is installed. With several processes all call this with the same
    arguments and a workdir that all of them see; process 0 writes and speaks.

    Args:
      experiment: what to train.
      workdir: folder of this run, made if it is not there; as text also in a bucket, "gs://...".
      resume: False refuses a workdir that already has checkpoints.
      mesh: from `make_mesh`; `usual_mesh` by default.
      on_sample: called with (state, step) every `sample_every` steps and at the end, on every process; must not keep
        the state, whose buffers the next step reuses. An OSError from it is said and passed over.
      on_open: called on process 0 once the workdir is known to be this run's, before anything else is written.

    Returns:
      The outcome. On SIGINT, SIGTERM or a preemption notice, on any process, all finish and save the same step; a
      second signal ends at once.

    Raises:
      ValueError: if the workdir holds another run, or the data, batch size and mesh do not fit together.
      FloatingPointError: naming the first step whose loss or gradient was not finite, after `max_skipped` others in a
        row. Such steps change nothing, and the last checkpoint has none of them. Also if parameters are not finite
        when they are to be saved, or if an alarm of the experiment was out of its range for too long.
      CheckpointError: if a checkpoint cannot be written, or none of those that are there can be read.
      OSError: if the workdir cannot be written at the start. Later, log lines and pictures that cannot be written are
        said and cost nothing else.
    """
    stopwatch = Stopwatch()
    mesh = sharding.usual_mesh() if mesh is None else mesh
    _check_sizes(experiment, mesh)
    folder = as_path(workdir)
    check_workdir(experiment, folder, resume)
    source = experiment.data()
    example = _example(source, experiment)
    distributed.wait_for_all("the workdir is checked")  # before process 0 writes what the others would find
    open_workdir(experiment, folder)
    if on_open is not None and jax.process_index() == 0:
        on_open()
    with ExitStack() as stack:
        kept = Checkpoints(folder / CHECKPOINTS, max_to_keep=experiment.max_to_keep, keep_every=experiment.keep_every)
        checkpoints = stack.enter_context(kept)
        with stopwatch.during(RESTORE):
            state, start = _begin(experiment, checkpoints, source, example, mesh)
        report = _Report(experiment, folder, start, stopwatch)
        stack.callback(report.close)
        if start:
            report.say(f"{experiment.name}: continued from the checkpoint of step {start}")
        if start >= experiment.num_steps:
            report.say(f"{experiment.name}: all {experiment.num_steps} steps are done")
            return Outcome(state, start, None)
        report.start()

        method = sharding.on_mesh(experiment.method, mesh, partition=experiment.partition)
        step_fn = make_train_step(method, experiment.optimizers, experiment.ema, accumulate=experiment.accumulate)
        places = sharding.state_shardings(state, mesh, partition=experiment.partition)
        step_fn = sharding.jit_train_step(step_fn, mesh, places)
        drift = jax.jit(lambda state: ema.drift(state.ema, state.params))  # not in every step: it costs messages
        about = {"experiment": experiment.describe(), "batch": example}
        stop_at = stack.enter_context(stop_signals())
        owed = False  # a checkpoint that an alarm put off
        for step in range(start + 1, experiment.num_steps + 1):
            stopwatch.enter(INPUT)
            batch = _next(source, step, experiment)
            waited = stopwatch.enter(STEP if step > start + 1 else COMPILE)
            state, metrics = step_fn(state, sharding.put_batch(batch, mesh))
            report.step(step, metrics, batch, waited)
            if step == start + 1:
                jax.block_until_ready(metrics)
                report.first_step()
            stopped = stop_at(step)
            last = step == experiment.num_steps or stopped is not None
            sample = _due(step, experiment.sample_every, step == experiment.num_steps)
            save = owed or _due(step, experiment.checkpoint_every, last)
            log = _due(step, experiment.log_every, last)
            if sample or save or log:
                report.check()
            owed = save and report.alarmed and not last
            if log:
                report.log(drift(state))
            if save and not owed:
                with stopwatch.during(SAVE):
                    report.check_params(state)
                    checkpoints.save(step, state, data=source.get_state(), **about)
                    if last:
                        checkpoints.wait()
                report.saved()
            if sample and on_sample is not None:
                with stopwatch.during(SAMPLE):
                    report.guard("the sample hook", lambda state=state, step=step: on_sample(state, step))
            if last:
                report.end(stopped)
                return Outcome(state, step, stopped)
        raise AssertionError("the last step returns")


class _Report:
    """All that a run says and writes besides its checkpoints, so that the loop stays one screen."""

    def __init__(self, experiment: Experiment, folder: Any, start: int, stopwatch: Stopwatch):
        leads = jax.process_index() == 0
        self._folder, self._stopwatch = folder, stopwatch
        self._progress = logs.Progress(experiment.num_steps, start, shown=leads)
        self.say = self._progress.say
        self._writers = logs.open_writers(folder, start, self.say)
        self._record = Record(folder, stopwatch, self.say, shown=leads)
        self._window = logs.Window(experiment.batch_size, count_skipped=experiment.max_skipped > 0)
        self._inspector = faults.Inspector(
            folder / faults.FAULTS, experiment.max_skipped, self.say, start_step=start, alarms=experiment.alarms
        )
        self._watchdog: faults.Watchdog | None = None
        self._step = self._last_saved = start

    def start(self) -> None:
        self._record.write("start", self._step)
        self._watchdog = faults.Watchdog(self._stopwatch, self._complain)
        self._window.restart_clock()

    def step(self, step: int, metrics: Any, batch: Mapping[str, Any], waited: float) -> None:
        """Takes note of a step that was sent off, and looks at the one before, for which the device need not wait."""
        self._step = step
        self._window.add(metrics, waited)
        self._progress.advance()
        self.check()
        self._inspector.sent(step, metrics, batch)
        if self._watchdog is not None:
            self._watchdog.step_done(step)

    def first_step(self) -> None:
        self.say(f"first step after {self._window.restart_clock():.1f} s, compilation included")
        self._record.write("first step", self._step)

    def check(self) -> None:
        """Judges the steps that were sent; the last of them must be done for it."""
        try:
            self._inspector.look()
        except faults.FaultError as error:
            for writer in self._writers:
                writer.write(error.step, error.scalars)
            remedy = "" if isinstance(error, faults.AlarmError) else f"; {LOWER}"
            raise FloatingPointError(f"{error}; {self._kept()}{remedy}") from None

    @property
    def alarmed(self) -> bool:
        """Whether an alarm may soon stop the run."""
        return self._inspector.alarmed

    def log(self, drift: Metrics) -> None:
        """Writes the means since the last line, and how far each player is from its averages."""
        scalars = self._window.summary() | {name: float(value) for name, value in drift.items()}
        for writer in (*self._writers, self._progress):
            writer.write(self._step, scalars)
        self._record.write("alive", self._step)

    def check_params(self, state: TrainState) -> None:
        """An update can break parameters while loss and gradient are finite; such a state must not be saved."""
        if not faults.all_finite(state.params):
            name = faults.first_not_finite(state.params)
            raise FloatingPointError(
                f"parameter {name} is not finite after step {self._step}, nothing was saved; {self._kept()}; {LOWER}"
            )

    def saved(self) -> None:
        self._last_saved = self._step
        self._record.write("saved", self._step)

    def guard(self, what: str, call: Callable[[], None]) -> None:
        """A picture is not worth a run: an OSError is said and passed over."""
        try:
            call()
        except OSError as error:
            self.say(f"{what} failed at step {self._step} ({error}): going on without it")

    def end(self, stopped: str | None) -> None:
        self._record.write("done" if stopped is None else "stopped", self._step)
        self.say(self._record.line())
        if stopped is not None:
            self.say(f"stopped by {stopped} after step {self._step}, saved: the same command goes on from here")

    def close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.close()
        for writer in (*self._writers, self._progress):
            writer.close()

    def _kept(self) -> str:
        saved = self._last_saved
        kept = f"the checkpoint of step {saved} in {self._folder / CHECKPOINTS}" if saved else "no checkpoint yet"
        return f"last good state: {kept}"

    def _complain(self, line: str) -> None:
        count = jax.process_count()
        self._progress.shout(line if count == 1 else f"process {jax.process_index()} of {count}: {line}")


def enable_compilation_cache(folder: Path) -> None:
    """Keeps compiled programs on disk, all of them, so that the next process starts without compiling.

    Args:
      folder: made if it is not there. Do not share it between machines with other processors.

    Raises:
      ValueError: if the folder cannot be written.
    """
    folder = Path(folder).absolute()
    make_folder(folder, "compilation cache")
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # a cache that was opened before keeps its old folder otherwise


def _begin(
    experiment: Experiment, checkpoints: Checkpoints, source: BatchSource, example: Mapping[str, Any], mesh: Mesh
) -> tuple[TrainState, int]:
    parts = experiment.method, experiment.optimizers, experiment.ema
    places = {"mesh": mesh, "partition": experiment.partition}
    if not checkpoints.steps():
        return create_state(*parts, jax.random.key(experiment.seed), example, **places), 0
    like = abstract_state(*parts, example, **places)
    about = experiment.describe()
    restored = checkpoints.newest(lambda step: checkpoints.restore(step, like, about), set_aside=True)
    source.set_state(restored.data)
    return restored.state, int(restored.state.step)


def _example(source: BatchSource, experiment: Experiment) -> dict[str, np.ndarray]:
    """The first batch, without moving the source."""
    begin = source.get_state()
    example = {name: np.asarray(value) for name, value in _next(source, 1, experiment).items()}
    source.set_state(begin)
    rows = sorted({value.shape[0] if value.ndim else 0 for value in example.values()})
    expected = experiment.batch_size // jax.process_count()
    if rows != [expected]:
        raise ValueError(f"data gives batches of {rows}, expected {expected}: batch_size over number of processes")
    return example


def _next(source: BatchSource, step: int, experiment: Experiment) -> Mapping[str, Any]:
    try:
        batch = next(source)
    except StopIteration:
        raise ValueError(f"data ended before step {step}: a batch source must be endless, let it repeat") from None
    classes, labels = experiment.num_classes, batch.get("label")
    # Checked here, where it is free: the network would answer with NaN, or take the label for the null label.
    if classes is not None and labels is not None and not (0 <= np.min(labels) and np.max(labels) < classes):
        raise ValueError(
            f"labels must be 0 to {classes - 1}, got {np.min(labels)} to {np.max(labels)} in the batch of step {step}; "
            "mend the data or num_classes"
        )
    return batch


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)


def _check_sizes(experiment: Experiment, mesh: Mesh) -> None:
    parts = sharding.batch_devices(mesh)
    micro = experiment.batch_size // experiment.accumulate
    if micro % parts:
        raise ValueError(
            f"batch_size / accumulate is {micro}, which does not divide among {parts} devices (data x fsdp): "
            f"make it a multiple of {parts}, or pass a smaller mesh"
        )

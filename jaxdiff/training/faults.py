"""What can go wrong in a step, and what is said about it: not finite, out of range, losses that jump, steps that hang.

A step that is not finite was not applied (`step.py`). `Inspector` writes its batch to `faults/`, and stops the run when
more than `max_skipped` follow one another, or when an `Alarm` was out of its range for too long. It also notes losses
far above their recent median, and changes nothing about them. `Watchdog` is a thread that speaks while a step, the data
or a save takes far longer than steps usually do. Parameters that an update broke are found by `all_finite`, before they
are saved.
"""

import io
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxdiff.training.alarms import Alarm
from jaxdiff.training.goodput import COMPILE, INPUT, SAMPLE, SAVE, STEP, Stopwatch
from jaxdiff.training.lines import Lines
from jaxdiff.types import Metrics

FAULTS = "faults"
SPIKES = "spikes.jsonl"
MAX_BATCHES = 100  # files of one process in one life: enough to look at, too few to fill a disk

Say = Callable[[str], None]
NAMES = {STEP: "the step", INPUT: "the wait for data", SAVE: "saving", SAMPLE: "the sample hook", COMPILE: "compiling"}


class Sent(NamedTuple):
    """A step that is under way: its number, its metrics on the device, and this process' rows of its batch."""

    step: int
    metrics: Metrics
    batch: Mapping[str, Any]


class Inspector:
    """Looks at the metrics of steps once they are there; the loop asks one step late, so that no device waits.

    Args:
      folder: for `faults/`; made when there is something to write.
      max_skipped: how many steps in a row may be not finite. The row begins anew when a run is continued.
      say: gets lines for people.
      start_step: steps already done.
      alarms: which metrics may not stay out of which range.
    """

    def __init__(self, folder: Any, max_skipped: int, say: Say, *, start_step: int = 0, alarms: Sequence[Alarm] = ()):
        self._folder, self._max_skipped, self._say = folder, max_skipped, say
        self._sent: list[Sent] = []
        self._skipped = 0
        self._batches = 0
        self._outside = dict.fromkeys(alarms, 0)
        self._spikes = Spikes(folder, say, start_step)

    def sent(self, step: int, metrics: Metrics, batch: Mapping[str, Any]) -> None:
        """Takes note of a step that was sent off."""
        self._sent.append(Sent(step, metrics, batch))

    def look(self) -> None:
        """Waits for the steps that were sent since the last look, and judges them.

        Raises:
          NotFiniteError: if more than `max_skipped` steps in a row were not finite.
          AlarmError: if a metric was out of range for too long.
          ValueError: for an alarm on a metric that the method does not have.
        """
        sent, self._sent = self._sent, []
        for step, metrics, batch in sent:
            losses = {name: value for name, value in metrics.items() if name.endswith("/loss")}
            finite, losses, watched = jax.device_get((metrics["finite"], losses, self._watched(metrics)))
            if finite:
                self._skipped = 0
                self._spikes.look(step, losses)
                self._judge(step, metrics, watched)
            else:
                self._not_finite(step, metrics, batch)

    @property
    def alarmed(self) -> bool:
        """Whether a metric is out of its range at the last step that was looked at."""
        return any(self._outside.values())

    def _watched(self, metrics: Metrics) -> Metrics:
        names = [alarm.metric for alarm in self._outside]
        if missing := [name for name in names if name not in metrics]:
            raise ValueError(
                f"an alarm watches {missing[0]!r}, which this method does not log; it logs {sorted(metrics)}"
            )
        return {name: metrics[name] for name in names}

    def _judge(self, step: int, metrics: Metrics, watched: Mapping[str, Any]) -> None:
        for alarm, row in self._outside.items():
            value = float(watched[alarm.metric])
            if math.isnan(value):
                continue
            self._outside[alarm] = 0 if alarm.low <= value <= alarm.high else row + 1
            if self._outside[alarm] >= alarm.patience:
                side = f"below {alarm.low:g}" if value < alarm.low else f"above {alarm.high:g}"
                what = f"{alarm.metric} was {side} for {alarm.patience} steps in a row, {value:.4g} at step {step}"
                raise AlarmError(step, _scalars(metrics), f"{what}: {alarm.meaning}")

    def _not_finite(self, step: int, metrics: Metrics, batch: Mapping[str, Any]) -> None:
        scalars = _scalars(metrics)
        names = sorted((name for name in scalars if "/" in name), key=lambda name: not name.endswith("/loss"))
        numbers = ", ".join(f"{name}={scalars[name]:.4g}" for name in names)
        what = f"step {step} is not finite and was not applied ({numbers})"
        where = self._keep(step, batch)
        self._skipped += 1
        if self._skipped > self._max_skipped:
            self._say(where)
            before = f", nor were the {self._max_skipped} before it" if self._max_skipped else ""
            raise NotFiniteError(step, scalars, what + before)
        self._say(f"{what}; {where}; going on, {self._skipped} of at most {self._max_skipped} in a row")

    def _keep(self, step: int, batch: Mapping[str, Any]) -> str:
        """Writes the batch, and says so in words."""
        share = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self._folder / f"step_{step}{share}.npz"
        self._batches += 1
        if self._batches > MAX_BATCHES:
            return f"its batch was not written, there are {MAX_BATCHES} already"
        content = io.BytesIO()
        try:
            np.savez(content, allow_pickle=False, **{name: np.asarray(value) for name, value in batch.items()})
            self._folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.getvalue())
        except (OSError, ValueError) as error:
            return f"its batch could not be written to {path} ({getattr(error, 'strerror', None) or error})"
        return f"its batch is in {path}" + (" and beside it, one file a process" if share else "")


class FaultError(FloatingPointError):
    """A run that must not go on.

    Attributes:
      step: the last of them.
      scalars: its metrics.
    """

    def __init__(self, step: int, scalars: dict[str, float], what: str):
        super().__init__(what)
        self.step, self.scalars = step, scalars


class NotFiniteError(FaultError):
    """Too many steps in a row were not finite."""


class AlarmError(FaultError):
    """A metric was out of its range for too long."""


def _scalars(metrics: Metrics) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if name != "finite"}


class Spikes:
    """Notes losses far above the last ones, in `spikes.jsonl` and, now and then, in a line.

    A loss is a spike if it lies more than `limit` robust deviations (1.4826 times the median absolute deviation, at
    least 1 % of the median) above the median of the last `window` steps. It then belongs to the window, so that a loss
    which stays high is soon nothing special.

    Args:
      folder: for the file.
      say: gets a line for a spike, at most one per `window` steps.
      start_step: steps already done; spikes noted after it are dropped, their steps run again.
      limit: robust deviations; the loss of a diffusion model varies a lot from batch to batch.
      window: steps; nothing is judged before half as many are known.
    """

    def __init__(self, folder: Any, say: Say, start_step: int = 0, *, limit: float = 10.0, window: int = 128):
        self._path, self._say, self._start, self._limit, self._window = folder / SPIKES, say, start_step, limit, window
        self._seen: dict[str, deque[float]] = {}
        self._said = -math.inf
        self._lines = self._open() if self._path.exists() else None

    def look(self, step: int, losses: Mapping[str, Any]) -> None:
        """Judges the losses of one step; NaN stands for a loss that the step did not have."""
        for name, loss in losses.items():
            seen = self._seen.setdefault(name, deque(maxlen=self._window))
            value = float(loss)
            if math.isnan(value):
                continue
            if 2 * len(seen) >= self._window:
                middle = _median(seen)
                deviation = max(1.4826 * _median([abs(other - middle) for other in seen]), 0.01 * abs(middle))
                if value - middle > self._limit * deviation > 0:
                    self._note(step, name, value, middle, (value - middle) / deviation)
            seen.append(value)

    def _note(self, step: int, name: str, value: float, middle: float, deviations: float) -> None:
        if jax.process_index():
            return
        if self._lines is None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._lines = self._open()
            except OSError:
                return  # the line below still says it
        entry = {"step": step, "name": name, "loss": value, "median": middle, "deviations": round(deviations, 2)}
        self._lines.append(entry)
        if step - self._said >= self._window:
            self._said = step
            self._say(f"step {step}: {name} {value:.4g} is {deviations:.0f} deviations above its median {middle:.4g}")

    def _open(self) -> Lines:
        return Lines(self._path, self._say, keep=lambda entry: entry.get("step", 0) <= self._start)


class Watchdog:
    """Speaks while something takes far too long: more than `factor` median steps, and more than `floor_s`.

    Args:
      stopwatch: of the loop.
      say: gets the lines; called from another thread.
      factor: times the median of the last steps.
      floor_s: seconds; shorter hangs are not worth a line.
      first_s: seconds, as long as no median is known: compiling takes its time.
    """

    def __init__(
        self, stopwatch: Stopwatch, say: Say, *, factor: float = 10.0, floor_s: float = 15.0, first_s: float = 600.0
    ):
        self._stopwatch, self._say = stopwatch, say
        self._factor, self._floor, self._first = factor, floor_s, first_s
        self._seconds: deque[float] = deque(maxlen=64)
        self._step = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def step_done(self, step: int) -> None:
        """Takes note of the number of finished steps; the phase that is on has lasted as long as the last one took."""
        self._step = step
        phase, since = self._stopwatch.now
        if phase == STEP:
            self._seconds.append(time.monotonic() - since)

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        spoken, limit = None, math.inf  # what is being complained about, and when to do so again
        while not self._end.wait(min(self._floor, self._first) / 10):
            now = self._stopwatch.now
            phase, since = now
            elapsed = time.monotonic() - since
            if spoken is not None and spoken != now:
                self._say(f"after step {self._step}: {NAMES[spoken[0]]} is over after {since - spoken[1]:.0f} s")
                spoken = None
            if phase not in NAMES:
                continue
            usual = _median(self._seconds.copy()) if self._seconds else None
            if spoken is None:
                limit = self._first if usual is None else max(self._factor * usual, self._floor)
            if elapsed > limit:
                median = "" if usual is None else f" (a step takes {usual:.2g} s)"
                self._say(f"after step {self._step}: {NAMES[phase]} has taken {elapsed:.0f} s so far{median}")
                spoken, limit = now, 2 * elapsed


@jax.jit
def all_finite(tree: PyTree[Any]) -> jax.Array:
    """Whether every number of a tree is finite: one boolean scalar, whatever mesh the tree lies on."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)] or [jnp.bool_(True)]).all()


def first_not_finite(tree: PyTree[Any]) -> str:
    """Path of the first leaf that is not finite everywhere; empty if there is none."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not all_finite(leaf):
            return jax.tree_util.keystr(path, simple=True, separator="/")
    return ""


def _median(values: Any) -> float:
    return sorted(values)[len(values) // 2]

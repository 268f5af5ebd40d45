"""Where the numbers of a run go: JSON lines always, TensorBoard if it is installed, a bar or plain lines for people.

Metrics stay on the device until a window of steps is full; what is written is their mean over the window, so a number
that exists on every second step only is not lost, and a step that was skipped does not count. On resume, lines of
steps that will be run again are dropped. A disk that fails costs log lines at most. Nothing here decides when to log.
"""

import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TextIO, cast, runtime_checkable

import jax
import numpy as np

from jaxdiff.training.lines import Lines

METRICS = "metrics.jsonl"

Scalars = Mapping[str, float]


@runtime_checkable
class MetricWriter(Protocol):
    """Takes the scalars of one log step; NaN stands for a number that the window did not have."""

    def write(self, step: int, scalars: Scalars) -> None: ...

    def close(self) -> None: ...


class Window:
    """Metrics of the steps since the last log line, and how fast those steps were.

    Args:
      batch_size: examples in one step.
      count_skipped: whether the summary tells how many steps were not finite.
    """

    def __init__(self, batch_size: int, *, count_skipped: bool = False):
        self._batch_size, self._count_skipped = batch_size, count_skipped
        self._started = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        """Forgets all metrics and starts the clock again."""
        self._pending: list[Mapping[str, Any]] = []
        self._waited = 0.0
        self.restart_clock()

    def restart_clock(self) -> float:
        """Leaves the steps so far out of the speed (the first one compiles); returns how long they took, seconds."""
        now = time.perf_counter()
        seconds, self._started, self._timed = now - self._started, now, 0
        return seconds

    def add(self, metrics: Mapping[str, Any], waited: float = 0.0) -> None:
        """Keeps the metrics of one step without waiting for them; `waited` are the seconds its batch took to come."""
        self._pending.append(metrics)
        self._waited += waited
        self._timed += 1

    def summary(self) -> dict[str, float]:
        """Waits for the metrics, gives their means and the speed, and restarts.

        Returns:
          Means over the finite steps that had a number (NaN where none had), then `steps_per_s`, `examples_per_s`,
          `input_s` (mean seconds a step waited for its batch), and `skipped` if asked for.
        """
        fetched = jax.device_get(self._pending)
        seconds = max(time.perf_counter() - self._started, 1e-9)
        good = [step for step in fetched if bool(step.get("finite", True))]
        names = [name for name in (fetched[0] if fetched else ()) if name != "finite"]
        means = {name: _mean([step[name] for step in good]) for name in names}
        speed = self._timed / seconds if self._timed else math.nan
        means |= {"steps_per_s": speed, "examples_per_s": speed * self._batch_size}
        means["input_s"] = self._waited / len(fetched) if fetched else math.nan
        if self._count_skipped:
            means["skipped"] = float(len(fetched) - len(good))
        self.restart()
        return means


class JsonLines:
    """`metrics.jsonl`: one object a line, "step" first, null for a number that is not there.

    Args:
      path: the file, local or in a bucket; it is created or continued.
      start_step: steps already done. Lines of later steps, and a last line cut short by a kill, are dropped.
      say: gets one line when the file cannot be written.
    """

    def __init__(self, path: Any, start_step: int = 0, say: Callable[[str], None] = print):
        self._lines = Lines(
            path, say, keep=lambda entry: isinstance(entry.get("step"), int) and entry["step"] <= start_step
        )

    def write(self, step: int, scalars: Scalars) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._lines.append({"step": step, **values})

    def close(self) -> None:
        self._lines.retry()


class TensorBoard:
    """Event files for TensorBoard; needs the extra `tensorboard`. After a failure it stays silent.

    Args:
      folder: where the event files go; local.
      start_step: steps already done; TensorBoard drops what an earlier process wrote after it.
      say: gets one line when the files cannot be written.
    """

    def __init__(self, folder: Path, start_step: int = 0, say: Callable[[str], None] = print):
        # Not SummaryWriter: its thread dies on a full disk, and then every process that logs waits for it for ever.
        with _without_torch():
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2
            from tensorboardX.summary import scalar

        folder.mkdir(exist_ok=True)
        made: Any = event_pb2  # its classes are made when it is imported
        self._event, self._scalar, self._folder, self._say = made.Event, scalar, folder, say
        self._events: Any = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        if start_step:
            log = made.SessionLog(status=made.SessionLog.START)
            self._events.write_event(made.Event(step=start_step + 1, session_log=log))

    def write(self, step: int, scalars: Scalars) -> None:
        if self._events is None:
            return
        try:
            for name, value in scalars.items():
                if math.isfinite(value):
                    event = self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value))
                    self._events.write_event(event)
            self._events.flush()
        except OSError as error:
            self._say(f"{self._folder} cannot be written ({error.strerror}): no more of it in this process")
            self._events = None

    def close(self) -> None:
        if self._events is not None:
            with suppress(OSError):
                self._events.close()


class Progress:
    """A tqdm bar on a terminal, one plain line per log step elsewhere. A stream that has gone away is ignored.

    Args:
      num_steps: length of the run.
      start_step: steps already done.
      stream: where to write; standard error by default.
      shown: False for a process that is not to be heard.
    """

    def __init__(self, num_steps: int, start_step: int = 0, stream: TextIO | None = None, *, shown: bool = True):
        self._stream = sys.stderr if stream is None else stream
        self._num_steps, self._shown = num_steps, shown
        self._bar = None
        if shown and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=num_steps, initial=start_step, unit="step", file=self._stream, dynamic_ncols=True)

    def advance(self) -> None:
        """One step is under way."""
        if self._bar is not None:
            self._bar.update()

    def write(self, step: int, scalars: Scalars) -> None:
        losses = [f"{name} {value:.4g}" for name, value in scalars.items() if name.endswith("/loss")]
        if self._bar is not None:
            self._bar.set_postfix_str(" ".join(losses))
        else:
            self.say(" ".join([f"step {step}/{self._num_steps}", *losses, f"{scalars['steps_per_s']:.3g} steps/s"]))

    def say(self, line: str) -> None:
        """Writes one line without breaking the bar."""
        if self._shown:
            self.shout(line)

    def shout(self, line: str) -> None:
        """As `say`, but also from a process that is not shown."""
        with suppress(OSError):
            if self._bar is not None:
                self._bar.write(line, file=self._stream)
            else:
                print(line, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def open_writers(workdir: Any, start_step: int, say: Callable[[str], None]) -> list[MetricWriter]:
    """The files of a run: JSON lines, and for a local run TensorBoard if tensorboardX is there. Only process 0 writes.

    Args:
      workdir: folder of the run; exists; a path as `as_path` gives it.
      start_step: steps already done.
      say: gets a line when something cannot be written.

    Raises:
      OSError: if they cannot be written from the start.
    """
    if jax.process_index():
        return []
    writers: list[MetricWriter] = [JsonLines(workdir / METRICS, start_step, say)]
    if isinstance(workdir, Path) and importlib.util.find_spec("tensorboardX") is not None:
        writers.append(TensorBoard(workdir / "tensorboard", start_step, say))
    return writers


def _mean(values: Sequence[Any]) -> float:
    numbers = np.asarray(values, np.float64)
    there = numbers[~np.isnan(numbers)]
    return float(there.mean()) if there.size else math.nan


@contextmanager
def _without_torch() -> Iterator[None]:
    """tensorboardX loads torch where it is installed, which takes seconds and is of no use here."""
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = cast(Any, None)  # makes `import torch` an ImportError, which tensorboardX expects
    try:
        yield
    finally:
        if absent:
            del sys.modules["torch"]

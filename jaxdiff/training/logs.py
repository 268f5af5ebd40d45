"""Where the numbers of a run go: JSON lines always, TensorBoard if it is installed, a bar or plain lines for people.

Metrics stay on the device until a window of steps is full; what is written is their mean over the window, so a number
that exists on every second step only is not lost. On resume, lines of steps that will be run again are dropped.
Nothing here decides when to log.
"""

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

import jax
import numpy as np

METRICS = "metrics.jsonl"

Scalars = Mapping[str, float]


@runtime_checkable
class MetricWriter(Protocol):
    """Takes the scalars of one log step; NaN stands for a number that the window did not have."""

    def write(self, step: int, scalars: Scalars) -> None: ...

    def close(self) -> None: ...


class Window:
    """Metrics of the steps since the last log line, and how fast those steps were."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._started = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        """Forgets all metrics and starts the clock again."""
        self._pending: list[Mapping[str, Any]] = []
        self.restart_clock()

    def restart_clock(self) -> float:
        """Leaves the steps so far out of the speed (the first one compiles); returns how long they took, seconds."""
        now = time.perf_counter()
        seconds, self._started, self._timed = now - self._started, now, 0
        return seconds

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Keeps the metrics of one step without waiting for them."""
        self._pending.append(metrics)
        self._timed += 1

    def summary(self) -> dict[str, float]:
        """Waits for the metrics, gives their means and the speed, and restarts.

        Returns:
          Means over the steps that had a number (NaN where none had), then `steps_per_s` and `examples_per_s`.
        """
        fetched = jax.device_get(self._pending)
        seconds = max(time.perf_counter() - self._started, 1e-9)
        means = {name: _mean([step[name] for step in fetched]) for name in (fetched[0] if fetched else ())}
        speed = self._timed / seconds if self._timed else math.nan
        self.restart()
        return means | {"steps_per_s": speed, "examples_per_s": speed * self._batch_size}


class JsonLines:
    """`metrics.jsonl`: one object a line, "step" first, null for a number that is not there.

    Args:
      path: the file; it is created or continued.
      start_step: steps already done. Lines of later steps, and a last line cut short by a kill, are dropped.
    """

    def __init__(self, path: Path, start_step: int = 0):
        kept = [line for line in _lines(path) if line["step"] <= start_step]
        scratch = path.with_name(path.name + ".new")
        scratch.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(scratch, path)
        self._file = path.open("a")

    def write(self, step: int, scalars: Scalars) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files for TensorBoard; needs the extra `tensorboard`.

    Args:
      folder: where the event files go.
      start_step: steps already done; TensorBoard drops what an earlier process wrote after it.
    """

    def __init__(self, folder: Path, start_step: int = 0):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)

    def write(self, step: int, scalars: Scalars) -> None:
        for name, value in scalars.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Progress:
    """A tqdm bar on a terminal, one plain line per log step elsewhere.

    Args:
      num_steps: length of the run.
      start_step: steps already done.
      stream: where to write; standard error by default.
    """

    def __init__(self, num_steps: int, start_step: int = 0, stream: TextIO | None = None):
        self._stream = sys.stderr if stream is None else stream
        self._num_steps = num_steps
        self._bar = None
        if self._stream.isatty():
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
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def open_writers(workdir: Path, start_step: int) -> list[MetricWriter]:
    """The files of a run: JSON lines, and TensorBoard if tensorboardX is installed. Only process 0 writes.

    Args:
      workdir: folder of the run; exists.
      start_step: steps already done.
    """
    if jax.process_index():
        return []
    writers: list[MetricWriter] = [JsonLines(workdir / METRICS, start_step)]
    if importlib.util.find_spec("tensorboardX") is not None:
        writers.append(TensorBoard(workdir / "tensorboard", start_step))
    return writers


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            lines.append(entry)
    return lines


def _mean(values: Sequence[Any]) -> float:
    numbers = np.asarray(values, np.float64)
    there = numbers[~np.isnan(numbers)]
    return float(there.mean()) if there.size else math.nan

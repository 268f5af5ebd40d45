"""Goodput: the share of wall time, since a run first began, that went into training steps that count.

Every process that trains keeps a stopwatch and writes what it shows to `goodput.jsonl`: when it starts, after its first
step, with every log line and checkpoint, and when it stops. After a kill the last line tells how far it came. Steps
that a later process did again count once. Wall times stay here: none enters a number of training.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from jaxdiff.training.checkpoint import as_path
from jaxdiff.training.lines import Entry, Lines, read_lines

GOODPUT = "goodput.jsonl"
# What a process does: set up, read a checkpoint, first step with its compilation, steps, wait for data, save, sample.
START, RESTORE, COMPILE, STEP, INPUT, SAVE, SAMPLE = "start", "restore", "compile", "step", "input", "save", "sample"
PHASES: tuple[str, ...] = (START, RESTORE, COMPILE, STEP, INPUT, SAVE, SAMPLE)
# Known only afterwards: steps that were done again, and all between the last line of one process and the next start.
LOST, DOWN = "lost", "down"


class Stopwatch:
    """Seconds by phase; exactly one phase is on at any time, so that they add up to the life of the process.

    Attributes:
      began: when it was made, seconds since 1970.
      now: (phase, its beginning on the monotonic clock); replaced as a whole, so other threads may read it.
    """

    def __init__(self) -> None:
        self.began = time.time()
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.now: tuple[str, float] = (START, time.monotonic())

    def enter(self, phase: str) -> float:
        """Ends the current phase, and returns how long it has been on, seconds."""
        ended, since = self.now
        self.now = (phase, time.monotonic())
        self._seconds[ended] += self.now[1] - since
        return self.now[1] - since

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """The phase is on while the body runs, and then the one from before."""
        before, _ = self.now
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self) -> dict[str, float]:
        """Seconds by phase until now."""
        phase, _ = self.now
        self.enter(phase)
        return dict(self._seconds)


class Record:
    """Writes the stopwatch of one process to `goodput.jsonl`.

    Args:
      workdir: folder of the run.
      stopwatch: of this process.
      say: see `Lines`.
      shown: False writes nothing; only process 0 writes.
    """

    def __init__(self, workdir: Any, stopwatch: Stopwatch, say: Callable[[str], None], *, shown: bool = True):
        self._stopwatch, self._workdir = stopwatch, as_path(workdir)
        self._lines = Lines(self._workdir / GOODPUT, say) if shown else None

    def write(self, event: str, step: int) -> None:
        """Notes that `step` steps are done, and what the stopwatch shows.

        Args:
          event: "start", "first step", "alive", "saved", "stopped" or "done".
          step: number of finished steps.
        """
        if self._lines is not None:
            shown = {phase: round(seconds, 4) for phase, seconds in self._stopwatch.seconds().items()}
            now = self._stopwatch.began if event == "start" else time.time()
            self._lines.append({"event": event, "step": step, "time": round(now, 3), "seconds": shown})

    def line(self) -> str:
        """The goodput of the run so far, in words."""
        try:
            return summary(self._workdir).line()
        except (OSError, ValueError) as error:
            return f"goodput is not known: {error}"


class Goodput(NamedTuple):
    """What became of the wall time of a run.

    Attributes:
      share: goodput, 0 to 1: time in steps that count over `wall`.
      wall: seconds from the first start to the last line.
      seconds: by phase, with "lost" and "down"; they add up to `wall` as far as clocks agree. "step" holds only steps
        that count.
      starts: number of processes that trained.
      redone: number of steps that were known to be done and had to be done again.
    """

    share: float
    wall: float
    seconds: dict[str, float]
    starts: int
    redone: int

    def line(self) -> str:
        """The whole in one line for people."""
        parts = sorted(self.seconds.items(), key=lambda part: -part[1])
        spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts if seconds >= 0.05)
        again = f", {self.starts} starts, {self.redone} steps done again" if self.starts > 1 else ""
        return f"goodput {100 * self.share:.1f} % of {self.wall:.1f} s (seconds: {spent}{again})"


def summary(workdir: Any) -> Goodput:
    """Reads `goodput.jsonl` of a run, which may be running or killed.

    Args:
      workdir: folder of the run, local or "scheme://...".

    Raises:
      ValueError: if there is no such file, or no start in it.
    """
    path = as_path(workdir) / GOODPUT
    lives = _lives(read_lines(path))
    if not lives:
        raise ValueError(f"{path} has no record of a run: train it first, or name the folder of a run")
    seconds = dict.fromkeys((*PHASES, LOST, DOWN), 0.0)
    redone = 0
    for number, life in enumerate(lives):
        for phase in PHASES:
            seconds[phase] += life[-1]["seconds"].get(phase, 0.0)
        if number + 1 < len(lives):
            begin, end = life[0]["step"], life[-1]["step"]
            stays = min(later[0]["step"] for later in lives[number + 1 :])
            lost = end - min(max(begin, stays), end)
            again = life[-1]["seconds"].get(STEP, 0.0) * lost / max(end - begin, 1)
            seconds[STEP], seconds[LOST] = seconds[STEP] - again, seconds[LOST] + again
            seconds[DOWN] += max(lives[number + 1][0]["time"] - life[-1]["time"], 0.0)
            redone += lost
    wall = max(lives[-1][-1]["time"] - lives[0][0]["time"], 0.0)
    return Goodput(seconds[STEP] / wall if wall else 0.0, wall, seconds, len(lives), redone)


def _lives(entries: list[Entry]) -> list[list[Entry]]:
    lives: list[list[Entry]] = []
    for entry in entries:
        if not {"event", "step", "time", "seconds"} <= entry.keys():
            continue
        if entry["event"] == "start":
            lives.append([])
        if lives:
            lives[-1].append(entry)
    return lives

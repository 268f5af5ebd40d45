"""An experiment: what `build(...)` in a file of experiments/ returns, and all that training needs to know.

It holds real objects (a method, optimisers, averages, a way to get data) and plain numbers, checks them when it is
made, and can describe itself as JSON, by which a run and its checkpoints recognise each other. It reads no file and
touches no device.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import optax

from jaxdiff.methods.base import Method
from jaxdiff.training.alarms import Alarm
from jaxdiff.training.ema import EMA
from jaxdiff.training.sharding import Partition
from jaxdiff.training.state import check_players

# What may change between the start of a run and its continuation: how long, how often, never what is learnt. Skipping
# is among them: it is asked for when a run has stopped, and changes nothing where every step is finite.
FREE = (
    "num_steps",
    "log_every",
    "checkpoint_every",
    "sample_every",
    "max_to_keep",
    "keep_every",
    "max_skipped",
    "preview_steps",
)


@runtime_checkable
class BatchSource(Protocol):
    """An endless, deterministic stream of batches that can be resumed exactly.

    A batch is a dict of arrays with leading axis B / (number of processes): this process' rows of the global batch.
    The state is a small dict that JSON can hold, the same on every process; after `set_state(get_state())` the same
    batches follow.
    """

    def __next__(self) -> Mapping[str, np.ndarray]: ...

    def get_state(self) -> Mapping[str, Any]: ...

    def set_state(self, state: Any) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run we claim something about.

    Attributes:
      name: letters, digits, dot, dash and underscore; a checkpoint of another name is refused.
      method: what is trained.
      data: makes a fresh batch source, at its beginning.
      optimizers: {player: optimiser}, one for every player that an objective trains.
      sample_shape: shape of one generated example without the batch axis, e.g. (32, 32, 3).
      batch_size: examples in one step, over all devices and micro-batches.
      num_steps: length of the training.
      ema: moving averages, each with its own name.
      seed: of parameters and of everything that training draws. The order of the data is the source's own business.
      accumulate: micro-batches in one step, divides batch_size.
      log_every: steps between two log lines.
      checkpoint_every: steps between two checkpoints; the last step is saved in any case.
      sample_every: steps between two calls of the sample hook; 0 for never.
      max_to_keep: number of newest checkpoints that are kept.
      keep_every: checkpoints at multiples of this step are kept besides; 0 for none.
      alarms: ranges that metrics must not leave for long, such as `alarms.collapse()` of a GAN.
      max_skipped: how many steps in a row may have a loss or gradient that is not finite. They are not applied, and
        counted as `skipped`; one more, and the run stops. 0 stops at the first.
      num_classes: labels are 0 .. num_classes - 1; None without labels.
      config: the arguments that `build` was called with, as JSON can hold them. A continued run must have the same,
        except for the names in `FREE`.
      partition: how parameters are split over the tensor axis of a mesh, such as `networks.partition.UNET`; see
        `sharding.Partition`. A run may go on with another one.
      preview_steps: length of the sampling grid for pictures during training; None for the method's own.
      evaluation: what `evaluate` compares samples with; training never reads it.
      conditioning: {name: shape and dtype of one example} of arrays that a batch holds besides x0 and label.
      networks: {player: Flax module}; only `jaxdiff export` reads them.

    Raises:
      ValueError: when made, naming the field, what it got and what it takes.
    """

    name: str
    method: Method
    data: Callable[[], BatchSource]
    optimizers: Mapping[str, optax.GradientTransformation]
    sample_shape: tuple[int, ...]
    batch_size: int
    num_steps: int
    ema: tuple[EMA, ...] = ()
    seed: int = 0
    accumulate: int = 1
    log_every: int = 100
    checkpoint_every: int = 1000
    sample_every: int = 0
    max_to_keep: int = 3
    keep_every: int = 0
    max_skipped: int = 0
    alarms: tuple[Alarm, ...] = ()
    num_classes: int | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    partition: Partition = ()
    preview_steps: int | None = None
    evaluation: Any = None
    conditioning: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)
    networks: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"experiment name takes letters, digits and '._-', got {self.name!r}")
        lowest = {"batch_size": 1, "num_steps": 1, "seed": 0, "accumulate": 1, "log_every": 1}
        lowest |= {"checkpoint_every": 1, "sample_every": 0, "max_to_keep": 1, "keep_every": 0, "max_skipped": 0}
        for field, low in lowest.items():
            _check_int(field, getattr(self, field), low)
        for field in ("num_classes", "preview_steps"):
            if getattr(self, field) is not None:
                _check_int(field, getattr(self, field), 1)
        for size in self.sample_shape:
            _check_int("every size in sample_shape", size, 1)
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate must divide batch_size, got {self.accumulate} and {self.batch_size}")
        if not self.method.objectives:
            raise ValueError(f"the method of experiment {self.name!r} has no objective: there is nothing to train")
        check_players(self.method, self.optimizers)
        for alarm in self.alarms:
            if not alarm.low <= alarm.high or alarm.patience < 1:
                raise ValueError(
                    f"alarm {alarm.metric!r} takes low <= high and a patience of at least 1 step, got {alarm.low:g}, "
                    f"{alarm.high:g} and {alarm.patience}"
                )
        names = [average.name for average in self.ema]
        if len(set(names)) != len(names) or not all(names):
            raise ValueError(f"every EMA needs a name of its own, got {names}")
        for key, value in self.config.items():
            _check_json(key, value)

    def describe(self) -> dict[str, Any]:
        """What identifies this experiment, as JSON would give it back: name, sizes, averages, config."""
        fields = ["name", "batch_size", "num_steps", "seed", "accumulate", "log_every", "checkpoint_every"]
        fields += ["sample_every", "max_to_keep", "keep_every", "max_skipped", "num_classes", "sample_shape"]
        about = {field: getattr(self, field) for field in fields}
        about["ema"] = {average.name: [average.about, average.players] for average in self.ema}
        return json.loads(json.dumps(about | {"config": dict(self.config)}))


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first field in which two descriptions differ, in words, or None.

    Args:
      ours: `Experiment.describe()` of this run.
      theirs: what was found on disk.

    Returns:
      For example "batch_size is 64 there and 32 here". Fields in `FREE` may differ.
    """
    mine, other = _flat(ours), _flat(theirs)
    for field in [*mine, *other]:
        if field.removeprefix("config.") in FREE:
            continue
        if mine.get(field, "absent") != other.get(field, "absent"):
            return f"{field} is {other.get(field, 'absent')!r} there and {mine.get(field, 'absent')!r} here"
    return None


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for field, value in about.items():
        if isinstance(value, Mapping):
            flat |= {f"{field}.{inner}": deep for inner, deep in _flat(value).items()}
        else:
            flat[field] = value
    return flat


def _check_int(field: str, value: Any, low: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < low:
        raise ValueError(f"{field} must be an integer of at least {low}, got {value!r}")


def _check_json(key: Any, value: Any) -> None:
    try:
        json.dumps({key: value}, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError(f"config takes names and values that JSON can hold, got {key!r}: {value!r}") from None

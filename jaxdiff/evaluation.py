"""Judging the samples of a run: what an experiment compares them with, and the table of many samplers.

A Frechet distance alone misleads (a collapsed model can have a high accuracy, an overfitted one a low distance), so
the default metrics are four together, and beside them the floor: the same numbers for real training images.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdiff.data.images import ArraySource
from jaxdiff.methods.base import Players
from jaxdiff.metrics import evaluate as judge
from jaxdiff.metrics.bits_per_dim import BitsPerDim
from jaxdiff.metrics.features import Extractor, HostFeatures
from jaxdiff.types import Array, Cond, Key

FLOOR_SUBSETS = 8  # one subset of 1024 digits moves the Frechet distance by 13 %
BITS = "bits_per_dim"
Bits = Callable[[Players, Key, Array, Cond], BitsPerDim]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an experiment's samples are judged by.

    Attributes:
      name: of the reference images, as results show it.
      extractor: makes the feature extractor.
      held_out: opens the reference images, which no training saw.
      train: opens the training images, for the floor and for nearest neighbours.
      num: default number of samples.
      metrics: default metrics, names of `metrics.evaluate.METRICS`.
      solvers: what `compare` compares, names of `solvers.named.SOLVERS`.
      calls: at how many network calls.
      bits: (params, key, x0 [B, ...], cond) -> BitsPerDim, the bound of a chain for "bits_per_dim"; None if there is
        none, or if the data are not uint8 images.
      sets: `compare` draws that many sets of samples and shows means, since one set moves as much as the floor does.
    """

    name: str
    extractor: Callable[[], Extractor]
    held_out: Callable[[], ArraySource]
    train: Callable[[], ArraySource]
    num: int = 1024
    metrics: tuple[str, ...] = judge.DEFAULT_METRICS
    solvers: tuple[str, ...] = ("ancestral", "ddim", "dpmpp_2m", "heun")
    calls: tuple[int, ...] = (50, 20, 10, 1)
    sets: int = 1
    bits: Bits | None = None

    @functools.cached_property
    def train_source(self) -> ArraySource:
        """The training images, opened once."""
        return self.train()

    def reference(self, mesh: Mesh | None = None) -> judge.Reference:
        """The reference images and their features, for which the devices of a mesh share the work."""
        return judge.reference(
            self.name, self.held_out().x0, self.extractor(), train_images=self.train_source.x0, mesh=mesh
        )

    def require_bits(self) -> Bits:
        """`bits`, or a ValueError if this experiment has no bound."""
        if self.bits is None:
            raise ValueError(f"{BITS} needs a chain's bound on uint8 images, there is none; leave {BITS} out")
        return self.bits

    def bits_per_dim(self, params: Players, num: int, *, seed: int = 0, batch_size: int = 64) -> judge.Result:
        """The mean bound in bits per dimension of up to `num` held-out images.

        Raises:
          ValueError: if this experiment has no bound.
        """
        source, bound, totals = self.held_out(), jax.jit(self.require_bits()), []
        count = min(num, len(source))
        for start in range(0, count, batch_size):
            rows = np.minimum(np.arange(start, start + batch_size), count - 1)
            cond = {} if source.label is None else {"label": jnp.asarray(source.label[rows])}
            key = jax.random.fold_in(jax.random.key(seed), start)
            terms = bound(params, key, jnp.asarray(source.x0[rows]), cond)
            totals.append(np.asarray(terms.total, np.float64)[: count - start])
        total, steps = np.concatenate(totals), terms.vb.shape[1]
        error = total.std(ddof=1) / np.sqrt(count) if count > 1 else float("nan")
        about = f"{steps} terms, one noise draw each, standard error {error:.2g}"
        return judge.Result(BITS, float(total.mean()), count, self.name, "none", "none", about)

    def floor(self, reference: judge.Reference, names: Sequence[str], num: int) -> dict[str, judge.Result]:
        """What `num` real training images score (all of them, if there are fewer), the mean over 8 random subsets.

        Metrics against the training images take the reference images instead, always all of them. `settings` of a
        result says how many subsets and how far they lie apart.
        """
        labels, size = self.train_source.label, min(num, len(self.train_source))
        once = [name for name in names if judge.METRICS[name].against == "train"]
        drawn = [name for name in names if name not in once]
        results = judge.floor(reference, labels, once, num_samples=size) if once else {}
        seeds = range(FLOOR_SUBSETS if size < len(self.train_source) else 1)
        draws = [judge.floor(reference, labels, drawn, num_samples=size, seed=s) for s in seeds] if drawn else []
        results |= mean(draws) if drawn else {}
        return {name: results[name] for name in names}


def mean(draws: Sequence[Mapping[str, judge.Result]]) -> dict[str, judge.Result]:
    """The mean of every metric over sets of equal n; `settings` says how many sets and how far they lie apart."""
    return {name: _mean([draw[name] for draw in draws]) for name in draws[0]}


def _mean(results: Sequence[judge.Result]) -> judge.Result:
    first, values = results[0], [r.value for r in results]
    if len(values) == 1:
        return first
    about = f"mean of {len(values)} subsets, {min(values):.4g} to {max(values):.4g}"
    return first._replace(value=float(np.mean(values)), settings=", ".join(filter(None, (first.settings, about))))


def check_metrics(names: Sequence[str], reference: judge.Reference, num: int, num_classes: int | None) -> None:
    """Tries metrics on a few reference images, so that what they lack is known before anything is sampled.

    Args:
      names: of `metrics.evaluate.METRICS`.
      reference: what they will compare with.
      num: how many samples there will be.
      num_classes: samples will have labels below it; None for samples without labels.

    Raises:
      ValueError: naming the metric and what it lacks.
    """
    if num < 2:
        raise ValueError(f"metrics need at least 2 samples, got {num}; ask for more with --num")
    few = min(num, 16, len(reference.images))
    logits = reference.features.logits
    features = HostFeatures(reference.features.features[:few], None if logits is None else logits[:few])
    labels = None if num_classes is None else np.full(few, num_classes - 1, np.int32)
    small = reference._replace(images=reference.images[:few], features=features)
    present = {"labels": labels, "logits": logits, "train_images": reference.train_images}
    lacks = {
        "labels": "this experiment has no classes",
        "logits": f"extractor {reference.extractor.name} is no classifier",
        "train_images": "the evaluation has no training images",
    }
    for name in names:
        metric = judge.METRICS[name]
        for need in metric.needs:
            if present[need] is None:
                raise ValueError(f"metric {name} needs {need}, but {lacks[need]}; leave {name} out of --metrics")
        try:
            metric.value(judge.Samples(small.images, features, small.statistics, labels), small)
        except ValueError as error:
            raise ValueError(f"metric {name} cannot judge {num} samples: {error}; ask for more with --num") from error


def table(rows: Sequence[Mapping[str, str | float | int]]) -> str:
    """Rows with equal keys as an aligned Markdown table: numbers to the right, floats with four digits."""
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    cells = [list(rows[0]), *cells]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(cells[0]))]
    right = [any(isinstance(row[name], int | float) for row in rows) for name in rows[0]]
    lines = []
    for line in cells:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
        lines.append("| " + " | ".join(padded) + " |")
    rule = [":".rjust(w + 2, "-") if r else "-" * (w + 2) for w, r in zip(widths, right, strict=True)]
    lines.insert(1, "|" + "|".join(rule) + "|")
    return "\n".join(lines)

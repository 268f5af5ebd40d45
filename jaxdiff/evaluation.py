"""Judging the samples of a run: what an experiment compares them with, and the table of many samplers.

A Frechet distance alone misleads (a collapsed model can have a high accuracy, an overfitted one a low distance), so
the default metrics are four together, and beside them the floor: the same numbers for real training images.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from jaxdiff.data.images import ArraySource
from jaxdiff.metrics import evaluate as judge
from jaxdiff.metrics.features import Extractor


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
    """

    name: str
    extractor: Callable[[], Extractor]
    held_out: Callable[[], ArraySource]
    train: Callable[[], ArraySource]
    num: int = 1024
    metrics: tuple[str, ...] = judge.DEFAULT_METRICS
    solvers: tuple[str, ...] = ("ancestral", "ddim", "dpmpp_2m", "heun")
    calls: tuple[int, ...] = (50, 20, 10, 1)

    def reference(self) -> judge.Reference:
        """The reference images and their features."""
        return judge.reference(self.name, self.held_out().x0, self.extractor(), train_images=self.train().x0)

    def floor(self, reference: judge.Reference, names: Sequence[str], num: int) -> dict[str, judge.Result]:
        """What `num` real training images score (all of them, if there are fewer)."""
        train = self.train()
        return judge.floor(reference, train.label, names, num_samples=min(num, len(train)))


def table(rows: Sequence[Mapping[str, str | float | int]]) -> str:
    """Rows with equal keys as an aligned Markdown table; floats with four digits."""
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    cells = [list(rows[0]), *cells]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)

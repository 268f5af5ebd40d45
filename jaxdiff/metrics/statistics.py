"""Mean and covariance of features, gathered as they come, in float64, and merged over batches, files or processes.

The pairwise update of Chan et al. keeps count, mean and the centred sum of products, so it does not cancel as sums of
squares do. A `Statistics` carries the extractor's name and preprocessing and refuses to be merged or compared with one
made another way. Files are plain `.npz` without pickles.
"""

import hashlib
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdiff.metrics.features import Extractor

FIELDS = ("n", "mean", "scatter", "extractor", "preprocessing", "name")


class Statistics(NamedTuple):
    """Moments of the features of n images.

    Attributes:
      n: number of images.
      mean: float64 [d].
      scatter: float64 [d, d], the sum over images of the outer product of (feature - mean) with itself.
      extractor: name of the extractor.
      preprocessing: the extractor's own words.
      name: what the images are, such as "digits held_out"; shown as the reference of a result.
    """

    n: int
    mean: np.ndarray
    scatter: np.ndarray
    extractor: str
    preprocessing: str
    name: str = "unnamed"

    @property
    def covariance(self) -> np.ndarray:
        """float64 [d, d], divided by n - 1 as numpy.cov and the released FID code do.

        Raises:
          ValueError: if n < 2.
        """
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 images, {self.name} has {self.n}")
        return self.scatter / (self.n - 1)


def empty(extractor: Extractor, num_features: int, *, name: str = "unnamed") -> Statistics:
    """Statistics of no images, to which batches are added."""
    d = num_features
    return Statistics(0, np.zeros(d), np.zeros((d, d)), extractor.name, extractor.preprocessing, name)


def of(extractor: Extractor, features: Float[np.ndarray, "n d"], *, name: str = "unnamed") -> Statistics:
    """Statistics of one array of features [n, d]."""
    return update(empty(extractor, features.shape[1], name=name), features)


def update(statistics: Statistics, features: Float[np.ndarray, "n d"]) -> Statistics:
    """Adds a batch of features [n, d].

    Raises:
      ValueError: if the features have another dimension or are not finite.
    """
    if features.shape[1] != len(statistics.mean):
        raise ValueError(
            f"features have dimension {features.shape[1]}, the statistics {len(statistics.mean)}; use one extractor"
        )
    if not np.isfinite(features).all():
        raise ValueError("features hold values that are not finite; look at the images or the extractor's weights")
    if len(features) == 0:
        return statistics
    features = features.astype(np.float64)
    mean = features.mean(0)
    centred = features - mean
    return merge(statistics, statistics._replace(n=len(features), mean=mean, scatter=centred.T @ centred))


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Statistics of both sets of images together; the order and the grouping do not matter.

    Raises:
      ValueError: if they are of different extractors, preprocessing or dimension.

    Source: Chan, Golub and LeVeque 1979, updating formulae for sample variances, eq. 2.1, for matrices.
    """
    check_comparable(a, b)
    if a.n == 0 or b.n == 0:
        return (b if a.n == 0 else a)._replace(name=a.name)
    n = a.n + b.n
    delta = b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(delta, delta) * (a.n * b.n / n)
    return a._replace(n=n, mean=a.mean + delta * (b.n / n), scatter=scatter)


def across_processes(statistics: Statistics) -> Statistics:
    """Statistics of the images of all processes; every process must call it and gets the same answer.

    Raises:
      ValueError: on every process, if they used different extractors.
    """
    d = len(statistics.mean)
    made = repr((statistics.extractor, statistics.preprocessing, d))
    if len({row.tobytes() for row in _gather(np.frombuffer(hashlib.sha256(made.encode()).digest(), np.uint8))}) > 1:
        raise ValueError(f"processes used different extractors, this one {made}; make all statistics with one")
    # As bytes: a gather of float64 would round to float32 unless x64 is on.
    packed = np.concatenate([[float(statistics.n)], statistics.mean, statistics.scatter.ravel()]).astype(np.float64)
    total = statistics._replace(n=0)
    for row in _gather(packed.view(np.uint8)):
        values = row.copy().view(np.float64)
        scatter = values[1 + d :].reshape(d, d)
        total = merge(total, statistics._replace(n=int(values[0]), mean=values[1 : 1 + d], scatter=scatter))
    return total


def _gather(row: np.ndarray) -> np.ndarray:
    """uint8 [processes, bytes]: the rows of all processes, in their order."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(row), np.uint8).reshape(-1, row.size)


def check_comparable(a: Statistics, b: Statistics) -> None:
    """Refuses two statistics that were not made in the same way.

    Raises:
      ValueError: naming what differs.
    """
    for field in ("extractor", "preprocessing"):
        if getattr(a, field) != getattr(b, field):
            raise ValueError(
                f"cannot compare {a.name} and {b.name}: {field} {getattr(a, field)!r} against {getattr(b, field)!r}; "
                "make both with one extractor"
            )
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"cannot compare {a.name} and {b.name}: {len(a.mean)} features against {len(b.mean)}; "
            "make both with one extractor"
        )


def save(path: str | Path, statistics: Statistics) -> None:
    """Writes the statistics as `.npz`, exactly."""
    with open(path, "wb") as file:
        np.savez(file, **statistics._asdict())


def load(path: str | Path) -> Statistics:
    """Reads what `save` wrote.

    Raises:
      ValueError: naming the file, if it is missing, broken or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; make it with statistics.save")
    try:
        with np.load(path, allow_pickle=False) as file:
            f = {field: file[field] for field in FIELDS}
        d = len(f["mean"])
        sound = f["mean"].shape == (d,) and f["scatter"].shape == (d, d)
        sound = sound and all(np.isfinite(f[k]).all() and f[k].dtype == np.float64 for k in ("mean", "scatter"))
        if not sound:
            raise ValueError("arrays do not fit together")
        text = {key: str(f[key]) for key in ("extractor", "preprocessing", "name")}
        return Statistics(int(f["n"]), f["mean"], f["scatter"], **text)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OSError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(
            f"{path}: not a file of feature statistics, or broken; expected an .npz made by statistics.save"
        ) from error

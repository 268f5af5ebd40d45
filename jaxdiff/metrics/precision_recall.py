"""How much of the generated set looks real, and how much of the real set is reached, from balls around features.

Precision and recall as Kynkaanniemi et al., density and coverage as Naeem et al. A ball around a point reaches to its
k-th nearest other point of the same set and includes its border, to a relative 1e-9 for rounding. All four depend on
n and k; compare at equal ones.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdiff.metrics.neighbours import kth_squared_distances, squared_distances

BORDER = 1 + 1e-9


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density >= 0, about 1 for equal distributions; coverage in [0, 1]."""

    density: float
    coverage: float


def precision_recall(real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"], *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall.

    Args:
      real: [n, d] features of real images, n > k.
      fake: [m, d] features of generated images, m > k.
      k: which neighbour sets the radius.

    Returns:
      precision: share of fake points inside a real ball; recall: share of real points inside a fake ball.

    Raises:
      ValueError: if k is not below both n and m.

    Source: Kynkaanniemi et al. 2019 (arXiv:1904.06991) eq. 1-2.
    """
    return PrecisionRecall(_share_inside(fake, real, k), _share_inside(real, fake, k))


def density_coverage(real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"], *, k: int = 5) -> DensityCoverage:
    """Density and coverage.

    Args:
      real: [n, d] features of real images, n > k.
      fake: [m, d] features of generated images.
      k: which neighbour sets the radius of a real ball.

    Returns:
      density: how many real balls hold a fake point, on average, over k; coverage: share of real balls with a fake
      point in them.

    Raises:
      ValueError: if k is not below n, or there is no fake point.

    Source: Naeem et al. 2020 (arXiv:2002.09797) eq. 3-4. The released code leaves the border of a ball out.
    """
    if not len(fake):
        raise ValueError("density and coverage need at least 1 generated image, got 0")
    radii = kth_squared_distances(real, k) * BORDER
    inside, covered = 0, 0
    for rows, squared in squared_distances(real, fake):
        hits = squared <= radii[rows, None]
        inside += int(hits.sum())
        covered += int(hits.any(axis=1).sum())
    return DensityCoverage(inside / (k * len(fake)), covered / len(real))


def _share_inside(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    radii = kth_squared_distances(centres, k) * BORDER
    blocks = squared_distances(points, centres)
    return sum(int((squared <= radii[None, :]).any(axis=1).sum()) for _, squared in blocks) / len(points)

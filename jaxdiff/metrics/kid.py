"""Kernel distance between two sets of features: the squared maximum mean discrepancy with a cubic kernel.

With Inception features this is KID. It is unbiased at any n, so equal distributions give values around zero, also
negative ones. The kernel is k(x, y) = (x.y / d + 1)^3. Sums run over blocks of rows in float64.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

BLOCK_ROWS = 2048


class KernelDistance(NamedTuple):
    """Average over random subsets, as the paper reports it: mean and standard deviation of the subsets' values."""

    mean: float
    std: float


def kernel_distance(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    """Unbiased squared MMD from all samples.

    Args:
      x: [n, d] features, n >= 2.
      y: [m, d] features, m >= 2.

    Returns:
      The estimate; it may be negative.

    Raises:
      ValueError: if a set has fewer than 2 rows.

    Source: Binkowski et al. 2018 (arXiv:1801.01401) eq. 4; Gretton et al. 2012 eq. 3.
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"the kernel distance needs at least 2 rows in each set, got {n} and {m}")
    x, y = x.astype(np.float64), y.astype(np.float64)
    within = (_sum(x, x) - _diagonal(x)) / (n * (n - 1)) + (_sum(y, y) - _diagonal(y)) / (m * (m - 1))
    return float(within - 2 * _sum(x, y) / (n * m))


def kernel_distance_subsets(
    x: Float[np.ndarray, "n d"],
    y: Float[np.ndarray, "m d"],
    *,
    subset_size: int = 1000,
    num_subsets: int = 100,
    seed: int = 0,
) -> KernelDistance:
    """Mean and deviation of the unbiased estimate over random subsets.

    Args:
      x: [n, d] features.
      y: [m, d] features.
      subset_size: rows drawn from each set, without replacement; 2 to min(n, m).
      num_subsets: number of draws, >= 1.
      seed: fixes the draws.

    Raises:
      ValueError: if a number is out of range.

    Source: Binkowski et al. 2018 (arXiv:1801.01401) section 4, with 100 subsets of 1000 as in its released code.
    """
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise ValueError(
            f"subset_size must be 2 to {min(len(x), len(y))}, the smaller set, got {subset_size}; "
            "lower it or use kernel_distance"
        )
    if num_subsets < 1:
        raise ValueError(f"num_subsets must be at least 1, got {num_subsets}")
    rng = np.random.default_rng(seed)
    values = [
        kernel_distance(
            x[rng.choice(len(x), subset_size, replace=False)], y[rng.choice(len(y), subset_size, replace=False)]
        )
        for _ in range(num_subsets)
    ]
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def _sum(x: np.ndarray, y: np.ndarray) -> float:
    blocks = range(0, len(x), BLOCK_ROWS)
    return float(sum(((x[i : i + BLOCK_ROWS] @ y.T / x.shape[1] + 1) ** 3).sum() for i in blocks))


def _diagonal(x: np.ndarray) -> float:
    return float((((x * x).sum(1) / x.shape[1] + 1) ** 3).sum())

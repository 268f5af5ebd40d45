"""Nearest neighbours: distances in blocks of rows, and how close samples come to the training images.

Squared distances come from inner products of centred rows in float64. What is below ROUNDING of the squared norms is
set to 0, so that identical rows have distance 0.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

BLOCK_ROWS = 1024
ROUNDING = 1e-13


class Nearest(NamedTuple):
    """For each of n rows: the distance to its nearest row in the other set, and that row's index. Both [n]."""

    distance: np.ndarray
    index: np.ndarray


def squared_distances(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]
) -> Iterator[tuple[slice, Float[np.ndarray, "rows m"]]]:
    """Squared Euclidean distances, a block of rows of x at a time: (rows of x, [rows, m])."""
    centre = y.mean(0, dtype=np.float64)
    x, y = x.astype(np.float64) - centre, y.astype(np.float64) - centre
    y_norm = np.sum(y * y, axis=1)
    for start in range(0, len(x), BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, len(x)))
        block = x[rows]
        norms = np.sum(block * block, axis=1)[:, None] + y_norm[None, :]
        squared = norms - 2 * (block @ y.T)
        yield rows, np.where(squared > ROUNDING * norms, squared, 0.0)


def nearest(samples: Float[np.ndarray, "n ..."], train: Float[np.ndarray, "m ..."]) -> Nearest:
    """Distance of each sample to the nearest training image, as root mean square per value.

    A value near 0 is a copy. Averages below that of held-out images mean blur as often as copying: look at the pairs.

    Args:
      samples: [n, H, W, C] images, or features [n, d].
      train: [m, H, W, C] of the same shape.

    Returns:
      Nearest with distance [n] in units of the data, and index [n] into train.

    Raises:
      ValueError: if the shapes of single images differ or a set is empty.
    """
    if samples.shape[1:] != train.shape[1:] or not len(samples) or not len(train):
        raise ValueError(
            f"samples {list(samples.shape)} and training images {list(train.shape)} must be non-empty and of one shape"
        )
    flat, flat_train = samples.reshape(len(samples), -1), train.reshape(len(train), -1)
    distance, index = np.empty(len(flat)), np.empty(len(flat), np.int64)
    for rows, squared in squared_distances(flat, flat_train):
        index[rows] = squared.argmin(1)
        distance[rows] = np.sqrt(squared.min(1) / flat.shape[1])
    return Nearest(distance, index)


def kth_squared_distances(x: Float[np.ndarray, "n d"], k: int) -> Float[np.ndarray, " n"]:
    """Squared distance of every row to its k-th nearest other row.

    Raises:
      ValueError: unless 1 <= k < n.
    """
    if not 1 <= k < len(x):
        raise ValueError(f"k must be 1 to n - 1 = {len(x) - 1}, got {k}; use more images or a smaller k")
    result = np.empty(len(x))
    for rows, squared in squared_distances(x, x):
        squared[np.arange(rows.stop - rows.start), np.arange(rows.start, rows.stop)] = np.inf
        result[rows] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return result

"""Frechet distance between two sets of features, each taken as a Gaussian.

With Inception features this is FID; with any other extractor it is a Frechet distance and must not be called FID.
The matrix root is taken through symmetric eigenproblems in float64, which singular covariances do not disturb.
"""

import numpy as np
from jaxtyping import Float

from jaxdiff.metrics.statistics import Statistics, check_comparable


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Frechet distance of two sets of images, >= 0. It is biased upwards at small n: compare at equal n only.

    Args:
      a: statistics of at least 2 images.
      b: statistics of at least 2 images, made with the same extractor.

    Raises:
      ValueError: if the statistics are not comparable or have fewer than 2 images.

    Source: Heusel et al. 2017 (arXiv:1706.08500) eq. 6.
    """
    check_comparable(a, b)
    return gaussian_frechet(a.mean, a.covariance, b.mean, b.covariance)


def gaussian_frechet(
    mean_a: Float[np.ndarray, " d"],
    covariance_a: Float[np.ndarray, "d d"],
    mean_b: Float[np.ndarray, " d"],
    covariance_b: Float[np.ndarray, "d d"],
) -> float:
    """Squared 2-Wasserstein distance of two Gaussians,

        |mean_a - mean_b|^2 + tr(A + B - 2 (A^{1/2} B A^{1/2})^{1/2}).

    Args:
      mean_a: [d].
      covariance_a: [d, d], symmetric and positive semi-definite.
      mean_b: [d].
      covariance_b: [d, d].

    Returns:
      The distance, clipped at 0.

    Source: Dowson and Landau 1982, the Frechet distance between multivariate normal distributions, eq. 4.
    """
    difference = mean_a.astype(np.float64) - mean_b.astype(np.float64)
    covariance_a, covariance_b = covariance_a.astype(np.float64), covariance_b.astype(np.float64)
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    product = root @ covariance_b @ root
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0.0)).sum()
    trace = np.trace(covariance_a) + np.trace(covariance_b)
    return float(max(difference @ difference + trace - 2 * cross, 0.0))

"""Frechet distance against closed forms and an independent matrix square root."""

import numpy as np
import pytest
import scipy.linalg

from jaxdiff.metrics import statistics as stats
from jaxdiff.metrics.features import Extractor
from jaxdiff.metrics.fid import frechet_distance, gaussian_frechet

EXTRACTOR = Extractor("identity", "none", lambda images: images)


def covariance(seed, d, rank):
    factor = np.random.default_rng(seed).normal(size=(d, rank))
    return factor @ factor.T


def test_commuting_covariances_have_a_closed_form():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.0])
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    mean = np.array([1.0, 2.0, 2.0])
    got = gaussian_frechet(np.zeros(3), rotation * a @ rotation.T, mean, rotation * b @ rotation.T)
    assert got == pytest.approx(9 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), rel=1e-12)


def test_two_by_two_closed_form():
    # tr (A B)^{1/2} of 2 x 2 matrices is sqrt(tr AB + 2 sqrt(det AB)).
    a, b = covariance(0, 2, 3), covariance(1, 2, 3)
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    assert gaussian_frechet(np.zeros(2), a, np.zeros(2), b) == pytest.approx(np.trace(a + b) - 2 * root, rel=1e-10)


@pytest.mark.parametrize("rank", [20, 8])
def test_agrees_with_scipys_root(rank):
    a, b = covariance(2, 8, 20), covariance(3, 8, rank)
    mean_a, mean_b = np.random.default_rng(4).normal(size=(2, 8))
    root = scipy.linalg.sqrtm(a @ b).real
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(a + b - 2 * root)
    assert gaussian_frechet(mean_a, a, mean_b, b) == pytest.approx(expected, rel=1e-8)


def test_singular_covariances_are_no_trouble():
    a, b = covariance(5, 30, 3), covariance(6, 30, 3)
    # The rank is 3: the nuclear norm of the factors' product gives the trace of the root.
    f, g = (np.random.default_rng(seed).normal(size=(30, 3)) for seed in (5, 6))
    expected = np.trace(a + b) - 2 * np.linalg.svd(f.T @ g, compute_uv=False).sum()
    assert gaussian_frechet(np.zeros(30), a, np.zeros(30), b) == pytest.approx(expected, rel=1e-6)
    assert gaussian_frechet(np.zeros(30), a, np.zeros(30), a) == pytest.approx(0, abs=1e-6)


def test_is_symmetric():
    a, b, mean = covariance(7, 6, 9), covariance(8, 6, 9), np.ones(6)
    there, back = gaussian_frechet(np.zeros(6), a, mean, b), gaussian_frechet(mean, b, np.zeros(6), a)
    assert there == pytest.approx(back, rel=1e-10)


def test_samples_of_known_gaussians_approach_the_closed_form():
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(200_000, 2)), rng.normal(size=(200_000, 2)) * [2.0, 1.0] + [0.0, 3.0]
    distance = frechet_distance(stats.of(EXTRACTOR, x), stats.of(EXTRACTOR, y))
    assert distance == pytest.approx(9 + 1, abs=0.1)


def test_refuses_unlike_or_tiny_sets():
    x = np.random.default_rng(0).normal(size=(10, 3))
    other = Extractor("other", "none", EXTRACTOR.apply)
    with pytest.raises(ValueError, match="cannot compare x and y: extractor 'identity' against 'other'"):
        frechet_distance(stats.of(EXTRACTOR, x, name="x"), stats.of(other, x, name="y"))
    with pytest.raises(ValueError, match="a covariance needs at least 2 images, y has 1"):
        frechet_distance(stats.of(EXTRACTOR, x), stats.of(EXTRACTOR, x[:1], name="y"))

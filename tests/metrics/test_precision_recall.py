"""Precision, recall, density and coverage on points whose neighbours can be counted by hand."""

import numpy as np
import pytest

from jaxdiff.metrics import neighbours
from jaxdiff.metrics.precision_recall import density_coverage, precision_recall


def column(*values):
    return np.array(values, np.float64)[:, None]


REAL = column(0, 1, 2, 10)  # distances to the nearest other: 1, 1, 1, 8
FAKE = column(0.5, 3, 3.5, 30)  # 2.5, 0.5, 0.5, 26.5


def test_precision_and_recall_by_hand():
    # 0.5 and 3 lie in the ball of 0..2 or on its border, 3.5 in that of 10 (which starts at 2), 30 in none.
    # Of the real points 0, 1, 2 lie within 2.5 of 0.5, and 10 within 26.5 of 30.
    got = precision_recall(REAL, FAKE, k=1)
    assert got.precision == 0.75 and got.recall == 1.0


def test_recall_counts_what_is_missed():
    got = precision_recall(REAL, column(0, 0.25, 0.5), k=1)
    assert got.precision == 1.0 and got.recall == 0.25


def test_density_and_coverage_by_hand():
    # Balls: [-1, 1] and [0, 2] hold 0.5; [1, 3] holds 3; [2, 18] holds 3 and 3.5: 5 hits of 4 fakes.
    got = density_coverage(REAL, FAKE, k=1)
    assert got.density == 5 / 4 and got.coverage == 1.0
    far = density_coverage(REAL, column(0.5), k=1)
    assert far.density == 2.0 and far.coverage == 0.5
    # With k = 2 the radii are 2, 1, 2, 9 and the balls [-2, 2], [0, 2], [0, 4], [1, 19]; hits 1 + 1 + 3 + 2.
    assert density_coverage(REAL, FAKE, k=2).density == 7 / 8


def test_equal_sets_are_perfect():
    x = np.random.default_rng(0).normal(size=(50, 3))
    assert precision_recall(x, x, k=3) == (1.0, 1.0)
    assert density_coverage(x, x, k=5).coverage == 1.0


def test_copies_count_on_the_border():
    # Every ball holds itself and its k neighbours, the k-th exactly on the border: density (k + 1) / k.
    x = np.random.default_rng(1).normal(size=(60, 4)) * 100 + 1000
    assert density_coverage(x, x.copy(), k=5).density == pytest.approx(6 / 5)


def test_far_sets_are_strangers():
    x = np.random.default_rng(2).normal(size=(30, 3))
    assert precision_recall(x, x + 1000) == (0.0, 0.0)
    assert density_coverage(x, x + 1000) == (0.0, 0.0)


def test_equal_distributions_have_density_one():
    rng = np.random.default_rng(3)
    got = density_coverage(rng.normal(size=(1500, 2)), rng.normal(size=(1500, 2)), k=5)
    assert got.density == pytest.approx(1, abs=0.05)
    # Naeem et al. lemma 2: the expected coverage is 1 - (n-1)...(n-k) / ((2n-1)...(2n-k)) for n = m.
    i = np.arange(1, 6)
    assert got.coverage == pytest.approx(1 - np.prod((1500 - i) / (3000 - i)), abs=0.03)


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(40, 3)), rng.normal(size=(35, 3)) + 0.5
    whole = precision_recall(x, y), density_coverage(x, y)
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", 7)
    assert (precision_recall(x, y), density_coverage(x, y)) == whole


def test_refuses_too_few_points():
    with pytest.raises(ValueError, match="k must be 1 to n - 1 = 3, got 4"):
        precision_recall(REAL, FAKE, k=4)
    with pytest.raises(ValueError, match="k must be 1 to n - 1 = 3, got 0"):
        density_coverage(REAL, FAKE, k=0)
    with pytest.raises(ValueError, match="at least 1 generated image, got 0"):
        density_coverage(REAL, FAKE[:0], k=1)

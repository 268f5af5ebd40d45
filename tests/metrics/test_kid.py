"""Kernel distance against a double loop, and unbiased on equal distributions."""

import numpy as np
import pytest

from jaxdiff.metrics import kid
from jaxdiff.metrics.kid import kernel_distance, kernel_distance_subsets


def by_loops(x, y):
    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_equals_the_double_loop(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 4)), rng.normal(size=(7, 4)) + 0.5
    assert kernel_distance(x, y) == pytest.approx(by_loops(x, y), rel=1e-12)
    monkeypatch.setattr(kid, "BLOCK_ROWS", 2)
    assert kernel_distance(x, y) == pytest.approx(by_loops(x, y), rel=1e-12)


def test_one_dimension_closed_form():
    # Two points each: x = {0, 0}, y = {1, 1}: k(0, 0) = 1, k(1, 1) = 8, k(0, 1) = 1.
    assert kernel_distance(np.zeros((2, 1)), np.ones((2, 1))) == pytest.approx(1 + 8 - 2, abs=1e-12)


def test_is_zero_on_average_for_equal_distributions():
    rng = np.random.default_rng(1)
    values = [kernel_distance(*rng.normal(size=(2, 30, 3))) for _ in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(400)
    assert min(values) < 0 < max(values)


def test_shifted_gaussians_have_a_known_distance():
    # In one dimension with unit variances and means 0 and m: E (xy + 1)^3 over independent x, y.
    def expected_kernel(a, b):
        (x1, x2, x3), (y1, y2, y3) = ((m, m**2 + 1, m**3 + 3 * m) for m in (a, b))
        return x3 * y3 + 3 * x2 * y2 + 3 * x1 * y1 + 1

    exact = expected_kernel(0.0, 0.0) + expected_kernel(0.7, 0.7) - 2 * expected_kernel(0.0, 0.7)
    rng = np.random.default_rng(2)
    values = [kernel_distance(rng.normal(size=(200, 1)), rng.normal(size=(200, 1)) + 0.7) for _ in range(300)]
    assert np.mean(values) == pytest.approx(exact, abs=4 * np.std(values) / np.sqrt(300))


def test_subsets_are_averages_of_the_unbiased_form():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(40, 3)), rng.normal(size=(50, 3)) + 0.3
    got = kernel_distance_subsets(x, y, subset_size=10, num_subsets=500, seed=5)
    assert got.mean == pytest.approx(kernel_distance(x, y), abs=5 * got.std / np.sqrt(500))
    assert got == kernel_distance_subsets(x, y, subset_size=10, num_subsets=500, seed=5)
    assert got != kernel_distance_subsets(x, y, subset_size=10, num_subsets=500, seed=6)


def test_one_subset_of_everything_is_the_full_form():
    x, y = np.random.default_rng(4).normal(size=(2, 12, 3))
    got = kernel_distance_subsets(x, y, subset_size=12, num_subsets=1)
    assert got.mean == pytest.approx(kernel_distance(x, y), rel=1e-12) and got.std == 0


def test_refuses_impossible_sizes():
    x = np.zeros((5, 2))
    with pytest.raises(ValueError, match="needs at least 2 rows in each set, got 5 and 1"):
        kernel_distance(x, x[:1])
    with pytest.raises(ValueError, match="subset_size must be 2 to 5, the smaller set, got 1000"):
        kernel_distance_subsets(x, x)
    with pytest.raises(ValueError, match="num_subsets must be at least 1, got 0"):
        kernel_distance_subsets(x, x, subset_size=2, num_subsets=0)

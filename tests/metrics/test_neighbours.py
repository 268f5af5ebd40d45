"""Nearest training images: exact distances and indices, and copies at exactly 0."""

import numpy as np
import pytest

from jaxdiff.metrics import neighbours
from jaxdiff.metrics.neighbours import kth_squared_distances, nearest


def test_nearest_equals_the_full_table(monkeypatch):
    rng = np.random.default_rng(0)
    samples, train = rng.uniform(-1, 1, (9, 4, 4, 1)), rng.uniform(-1, 1, (13, 4, 4, 1))
    table = np.sqrt(((samples[:, None] - train[None]) ** 2).mean((2, 3, 4)))
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", 4)
    got = nearest(samples, train)
    assert np.allclose(got.distance, table.min(1), rtol=1e-12) and np.array_equal(got.index, table.argmin(1))


def test_distance_is_root_mean_square_per_value():
    train = np.zeros((1, 2, 2, 1), np.float32)
    assert nearest(train + np.float32(0.5), train).distance.tolist() == [0.5]


def test_copies_are_at_zero():
    train = np.random.default_rng(1).normal(size=(20, 8, 8, 3)).astype(np.float32)
    got = nearest(train[::-1], train)
    assert np.all(got.distance == 0) and np.array_equal(got.index, np.arange(20)[::-1])


def test_kth_distances_leave_the_point_itself_out():
    x = np.array([[0.0], [1.0], [3.0], [7.0]])
    assert np.allclose(kth_squared_distances(x, 1), [1, 1, 4, 16])
    assert np.allclose(kth_squared_distances(x, 3), [49, 36, 16, 49])


def test_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"samples \[2, 4, 4, 1\] and training images \[2, 5, 5, 1\]"):
        nearest(np.zeros((2, 4, 4, 1)), np.zeros((2, 5, 5, 1)))
    with pytest.raises(ValueError, match="must be non-empty"):
        nearest(np.zeros((2, 4)), np.zeros((0, 4)))

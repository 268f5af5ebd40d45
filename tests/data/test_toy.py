"""Toy densities: log-densities integrate to 1, and the points that are drawn follow them."""

import numpy as np
import pytest

from jaxdiff.data import toy

TOYS = {
    "gaussian_grid": toy.gaussian_grid(),
    "ring": toy.ring(),
    "swiss_roll": toy.swiss_roll(),
    "two_moons": toy.two_moons(),
    "checkerboard": toy.checkerboard(),
    "pinwheel": toy.pinwheel(),
}
SIDE, CELLS = 1.5, 240


def midpoints():
    axis = (np.arange(CELLS) + 0.5) / CELLS * 2 * SIDE - SIDE
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)


@pytest.fixture(scope="module", params=TOYS)
def density(request):
    """The toy and its density at the midpoints of a fine grid."""
    return TOYS[request.param], np.exp(TOYS[request.param].log_density(midpoints()))


def test_density_integrates_to_one(density):
    assert density[1].sum() * (2 * SIDE / CELLS) ** 2 == pytest.approx(1, abs=1e-9)


def test_points_follow_the_density(density):
    drawn, _ = density[0].draw(np.random.default_rng(0), 20_000)
    assert np.abs(drawn).max() < SIDE
    counts, _, _ = np.histogram2d(drawn[:, 0], drawn[:, 1], bins=20, range=[[-SIDE, SIDE]] * 2)
    mass = density[1].reshape(20, CELLS // 20, 20, CELLS // 20).sum((1, 3)) * (2 * SIDE / CELLS) ** 2
    assert np.all(counts[mass < 1e-12] == 0)
    seen = mass > 2e-4
    chi_squared = np.sum((counts[seen] - 20_000 * mass[seen]) ** 2 / (20_000 * mass[seen]))
    assert chi_squared < seen.sum() + 5 * np.sqrt(2 * seen.sum())


def test_gaussian_mixture_is_a_gaussian_when_alone():
    alone = toy.gaussian_mixture(np.array([[0.5, -0.25]]), std=0.3)
    x = np.random.default_rng(0).normal(size=(50, 2))
    exact = -np.sum((x - [0.5, -0.25]) ** 2, 1) / (2 * 0.09) - np.log(2 * np.pi * 0.09)
    assert np.allclose(alone.log_density(x), exact, atol=1e-12)


def moon(u, sign):
    return sign * np.stack([np.cos(np.pi * u) - 0.5, np.sin(np.pi * u) - 0.25], -1) / 1.5


def roll(u):
    angle = np.pi * (1.5 + 3 * u)
    return angle[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1) / (4.5 * np.pi)


@pytest.mark.parametrize(
    ("name", "std", "curves"),
    [("two_moons", 0.04, [lambda u: moon(u, 1), lambda u: moon(u, -1)]), ("swiss_roll", 0.03, [roll])],
)
def test_curve_density_is_the_integral_along_the_curve(name, std, curves):
    u = (np.arange(100_000) + 0.5) / 100_000
    x, _ = TOYS[name].draw(np.random.default_rng(2), 40)
    x = np.concatenate([x, [curve(np.array([0.0, 1.0]))[i] for curve in curves for i in (0, 1)]])
    terms = [np.exp(-np.sum((curve(u) - p) ** 2, -1) / (2 * std**2)).mean() for p in x for curve in curves]
    exact = np.reshape(terms, (len(x), len(curves))).mean(1) / (2 * np.pi * std**2)
    assert np.allclose(np.exp(TOYS[name].log_density(x)), exact, rtol=1e-6)


def test_components_are_the_nearest_modes():
    for name in ("gaussian_grid", "ring", "checkerboard"):
        points, component = TOYS[name].draw(np.random.default_rng(1), 500)
        distance = np.linalg.norm(points[:, None] - TOYS[name].modes[None], axis=-1)
        assert np.array_equal(distance.argmin(1), component)


def test_numbers_of_modes():
    assert TOYS["gaussian_grid"].modes.shape == (25, 2)
    assert TOYS["ring"].modes.shape == (8, 2) and np.allclose(np.linalg.norm(TOYS["ring"].modes, axis=1), 1)
    assert TOYS["checkerboard"].modes.shape == (8, 2)


def test_checkerboard_is_empty_beside_its_cells():
    x = np.array([[-0.9, -0.9], [-0.9, -0.4], [1.1, 0.0]])
    assert TOYS["checkerboard"].log_density(x).tolist() == [-np.log(2), -np.inf, -np.inf]


def test_source_is_fixed_by_its_seed():
    first, again, other = (toy.source(TOYS["ring"], num_points=30, seed=s) for s in (4, 4, 5))
    assert np.array_equal(first.x0, again.x0) and not np.array_equal(first.x0, other.x0)
    assert first[0]["x0"].shape == (2,) and first[0]["x0"].dtype == np.float32
    assert first[0]["label"].dtype == np.int32


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: toy.ring(0), "num_modes must be at least 1, got 0"),
        (lambda: toy.ring(std=0.0), "std must be positive, got 0.0"),
        (lambda: toy.gaussian_grid(1), "side must be at least 2, got 1"),
        (lambda: toy.checkerboard(1), "cells must be at least 2, got 1"),
        (lambda: toy.pinwheel(0), "arms must be at least 1, got 0"),
        (lambda: toy.pinwheel(radial_std=-1.0), "radial_std must be positive, got -1.0"),
        (lambda: toy.source(toy.ring(), num_points=0, seed=0), "num_points must be at least 1, got 0"),
        (lambda: toy.source(toy.ring(), num_points=1, seed=-1), "seed must be at least 0, got -1"),
    ],
)
def test_wrong_numbers_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()

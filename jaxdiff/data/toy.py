"""Densities in the plane with a known log-density, to see a method work in seconds.

Every `Toy` is drawn with NumPy from a seed and is scaled to a square of about [-1, 1]. The log-densities are exact:
Gaussian mixtures and the checkerboard in closed form, the pinwheel by an area-preserving change of variables, the
curves (swiss roll, two moons) as the integral of a Gaussian along the curve, by Gauss-Legendre panels of which each
is as long as two deviations. Nothing here trains or plots.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdiff.data.images import ArraySource

NODES, WEIGHTS = np.polynomial.legendre.leggauss(10)


class Toy(NamedTuple):
    """A distribution of points in the plane.

    Attributes:
      draw: (rng, n) -> (points float64 [n, 2], component int32 [n]); the component is the mode, arm, moon or cell a
        point came from, and 0 where there is one only.
      log_density: float64 [n, 2] -> [n], natural logarithm; -inf outside the support.
      modes: float64 [k, 2] centres of the components, or None where a component has no centre.
    """

    draw: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
    log_density: Callable[[np.ndarray], np.ndarray]
    modes: np.ndarray | None = None


def source(toy: Toy, *, num_points: int, seed: int) -> ArraySource:
    """Draws a fixed data set: x0 float32 [2] and label int32 (the component).

    Args:
      toy: the distribution.
      num_points: size of the data set, >= 1.
      seed: >= 0; equal seeds give equal data.

    Raises:
      ValueError: if num_points < 1 or seed < 0.
    """
    if num_points < 1:
        raise ValueError(f"num_points must be at least 1, got {num_points}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    points, component = toy.draw(np.random.default_rng(seed), num_points)
    return ArraySource(points.astype(np.float32), component.astype(np.int32))


def gaussian_mixture(modes: Float[np.ndarray, "k 2"], *, std: float) -> Toy:
    """Equal mixture of isotropic Gaussians with deviation `std` at the rows of `modes`.

    Raises:
      ValueError: if std <= 0.
    """
    _check_positive(std=std)
    modes = modes.astype(np.float64)

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        component = rng.integers(0, len(modes), size=n)
        return modes[component] + std * rng.standard_normal((n, 2)), component.astype(np.int32)

    return Toy(draw, lambda x: _log_mixture(x, modes, np.full(len(modes), 1 / len(modes)), std), modes)


def gaussian_grid(side: int = 5, *, std: float = 0.025) -> Toy:
    """Grid of side x side Gaussians over [-1, 1]^2; 25 by default, the usual test of mode coverage.

    Source: Srivastava et al. 2017 (arXiv:1705.07761), there on [-4, 4]^2.

    Raises:
      ValueError: if side < 2 or std <= 0.
    """
    if side < 2:
        raise ValueError(f"side must be at least 2, got {side}")
    axis = np.linspace(-1.0, 1.0, side)
    return gaussian_mixture(np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2), std=std)


def ring(num_modes: int = 8, *, std: float = 0.02) -> Toy:
    """Gaussians evenly spaced on the unit circle, the first at (1, 0).

    Raises:
      ValueError: if num_modes < 1 or std <= 0.
    """
    if num_modes < 1:
        raise ValueError(f"num_modes must be at least 1, got {num_modes}")
    angle = 2 * np.pi * np.arange(num_modes) / num_modes
    return gaussian_mixture(np.stack([np.cos(angle), np.sin(angle)], -1), std=std)


def swiss_roll(*, std: float = 0.03) -> Toy:
    """The spiral r = angle / (4.5 pi) for angles uniform in [1.5 pi, 4.5 pi], with Gaussian noise around it.

    Raises:
      ValueError: if std <= 0.
    """

    def curve(u: np.ndarray) -> np.ndarray:
        angle = 1.5 * np.pi * (1 + 2 * u)
        return np.stack([angle * np.cos(angle), angle * np.sin(angle)], -1) / (4.5 * np.pi)

    return _noisy_curves([curve], std, length=6.5)


def two_moons(*, std: float = 0.04) -> Toy:
    """Two interleaved half circles of radius 2/3, moon 0 opening downwards, with Gaussian noise around them.

    Raises:
      ValueError: if std <= 0.
    """

    def upper(u: np.ndarray) -> np.ndarray:
        return np.stack([np.cos(np.pi * u) - 0.5, np.sin(np.pi * u) - 0.25], -1) / 1.5

    return _noisy_curves([upper, lambda u: -upper(u)], std, length=2.1)


def checkerboard(cells: int = 4) -> Toy:
    """Uniform on every second cell of a cells x cells board over [-1, 1]^2, the cell at (-1, -1) among them.

    Raises:
      ValueError: if cells < 2.
    """
    if cells < 2:
        raise ValueError(f"cells must be at least 2, got {cells}")
    row, column = np.nonzero((np.arange(cells)[:, None] + np.arange(cells)[None, :]) % 2 == 0)
    corners = np.stack([row, column], -1).astype(np.float64)
    width = 2.0 / cells

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        component = rng.integers(0, len(corners), size=n)
        return (corners[component] + rng.random((n, 2))) * width - 1, component.astype(np.int32)

    def log_density(x: np.ndarray) -> np.ndarray:
        cell = np.floor((x + 1) / width)
        inside = np.all((cell >= 0) & (cell < cells), axis=-1) & (cell.sum(-1) % 2 == 0)
        return np.where(inside, -np.log(len(corners) * width**2), -np.inf)

    return Toy(draw, log_density, (corners + 0.5) * width - 1)


def pinwheel(arms: int = 5, *, radial_std: float = 0.15, tangential_std: float = 0.05, twist: float = 2.5) -> Toy:
    """Arms of a wheel, each an elongated Gaussian half a unit from the centre, bent by a twist.

    A point of the straight arm at distance r from the centre turns by the angle twist * r. The turn leaves r alone,
    so it keeps area and the density is that of the straight mixture. (The usual pinwheel twists by the radial
    coordinate of the arm; its density has no closed form.)

    Source: after Johnson et al. 2016 (arXiv:1603.06277), figure 1.

    Raises:
      ValueError: if arms < 1 or a deviation <= 0.
    """
    if arms < 1:
        raise ValueError(f"arms must be at least 1, got {arms}")
    _check_positive(radial_std=radial_std, tangential_std=tangential_std)
    centre, stds = np.array([0.5, 0.0]), np.array([radial_std, tangential_std])
    directions = 2 * np.pi * np.arange(arms) / arms

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        component = rng.integers(0, arms, size=n)
        straight = centre + stds * rng.standard_normal((n, 2))
        angle = directions[component] + twist * np.linalg.norm(straight, axis=-1)
        return _rotate(straight, angle), component.astype(np.int32)

    def log_density(x: np.ndarray) -> np.ndarray:
        untwist = -twist * np.linalg.norm(x, axis=-1)
        straight = [(_rotate(x, untwist - direction) - centre) / stds for direction in directions]
        terms = np.stack([-0.5 * np.sum(z**2, -1) for z in straight])
        log_weights = np.full((arms, 1), -np.log(arms * 2 * np.pi * radial_std * tangential_std))
        return _log_sum_exp(terms + log_weights)

    return Toy(draw, log_density)


def _noisy_curves(curves: list[Callable[[np.ndarray], np.ndarray]], std: float, *, length: float) -> Toy:
    _check_positive(std=std)
    panels = int(np.ceil(length / (2 * std)))
    u = ((np.arange(panels)[:, None] + (NODES[None, :] + 1) / 2) / panels).ravel()
    centres = np.concatenate([curve(u) for curve in curves])
    weights = np.tile(WEIGHTS / 2, panels * len(curves)) / (panels * len(curves))

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        component, u = rng.integers(0, len(curves), size=n), rng.random(n)
        on_curve = np.stack([curve(u) for curve in curves])[component, np.arange(n)]
        return on_curve + std * rng.standard_normal((n, 2)), component.astype(np.int32)

    return Toy(draw, lambda x: _log_mixture(x, centres, weights, std))


def _log_mixture(
    x: Float[np.ndarray, "n 2"], centres: Float[np.ndarray, "k 2"], weights: Float[np.ndarray, " k"], std: float
) -> Float[np.ndarray, " n"]:
    log_weights = np.log(weights / (2 * np.pi * std**2))[:, None]
    blocks = np.array_split(x.astype(np.float64), max(1, len(x) * len(centres) // 2**18))
    return np.concatenate([_log_sum_exp(log_weights - 0.5 * _squared(centres, b) / std**2) for b in blocks])


def _squared(a: Float[np.ndarray, "k 2"], b: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "k n"]:
    return (a[:, None, 0] - b[None, :, 0]) ** 2 + (a[:, None, 1] - b[None, :, 1]) ** 2


def _log_sum_exp(terms: Float[np.ndarray, "k n"]) -> Float[np.ndarray, " n"]:
    top = terms.max(0)
    return top + np.log(np.sum(np.exp(terms - top[None, :]), 0))


def _rotate(x: Float[np.ndarray, "n 2"], angle: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n 2"]:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([cos * x[:, 0] - sin * x[:, 1], sin * x[:, 0] + cos * x[:, 1]], -1)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")

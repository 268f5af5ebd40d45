"""What the DPM-Solver family shares: the exact linear part of the diffusion ODE and the functions of its step size.

With h the step in half log SNR and z = h for noise, -h for data, every member of the family is
    x_t = on_x x_s - scale (psi_1 m + psi_2 D1 + psi_3 D2 + ...),   psi_k(z) = z phi_k(z),
where phi_1 = (e^z - 1) / z, phi_{k+1} = (phi_k - 1 / k!) / z, m is the prediction at s and D1, D2 are h m', h^2 m''. A
`Form` says which prediction is expanded and whether the path is the ODE or an SDE; the solvers only choose how D1 and
D2 come from earlier predictions. No network is called here.
"""

import difflib
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.process import eps_from_x0, half_log_snr
from jaxdiff.schedules import Schedule
from jaxdiff.types import Level

VARIANTS = ("midpoint", "taylor", "heun")


class Move(NamedTuple):
    """The part of a step that is exact, from s to t. Each [n].

    Attributes:
      on_x: factor of x_s.
      scale: factor of the expansion of the prediction.
      z: argument of psi.
      on_noise: factor of fresh unit noise, 0 for an ODE.
    """

    on_x: Array
    scale: Array
    z: Array
    on_noise: Array


class Form(NamedTuple):
    """Which prediction a solver expands, along which path.

    Attributes:
      predict: (x0 [B, ...], x_t [B, ...], Level of [B]) -> the expanded prediction [B, ...].
      move: (s, t, h) -> Move, between Levels of [n] with h = half log SNR of t minus that of s.
      stochastic: whether the move adds noise. Such a form needs a decreasing grid.
    """

    predict: Callable[[Array, Array, Level], Array]
    move: Callable[[Level, Level, Array], Move]
    stochastic: bool = False


def _x0(x0, x_t, level):
    del x_t, level
    return x0


def _data_ode(s, t, h):
    return Move(t.sigma / s.sigma, t.alpha, -h, jnp.zeros_like(h))


def _noise_ode(s, t, h):
    return Move(t.alpha / s.alpha, t.sigma, h, jnp.zeros_like(h))


def _data_sde(s, t, h):
    return Move(t.sigma / s.sigma * jnp.exp(-h), t.alpha, -2 * h, t.sigma * jnp.sqrt(-jnp.expm1(-2 * h)))


def _noise_sde(s, t, h):
    return Move(t.alpha / s.alpha, 2 * t.sigma, h, t.sigma * jnp.sqrt(jnp.expm1(2 * h)))


DATA_ODE = Form(_x0, _data_ode)
"""DPM-Solver++: expands x0. Works from alpha = 0 on, and with clipped or thresholded x0. Source: Lu et al. 2022b."""

NOISE_ODE = Form(eps_from_x0, _noise_ode)
"""DPM-Solver: expands eps. Undefined at alpha = 0. Source: Lu et al. 2022 (arXiv:2206.00927) eq. 3.4."""

DATA_SDE = Form(_x0, _data_sde, stochastic=True)
"""SDE-DPM-Solver++. Source: Lu et al. 2022b (arXiv:2211.01095) section 5."""

NOISE_SDE = Form(eps_from_x0, _noise_sde, stochastic=True)
"""SDE-DPM-Solver. Undefined at alpha = 0. Source: Lu et al. 2022b section 5."""


class Steps(NamedTuple):
    """A grid of n times seen as n - 1 steps. Level of [n - 1] at either end, h [n - 1], half_log_snr [n]."""

    s: Level
    t: Level
    h: Array
    half_log_snr: Array


def steps_of(schedule: Schedule, times: Float[Array, " n"]) -> Steps:
    """The levels and the step sizes of a grid."""
    level = schedule.level(times)
    position = half_log_snr(level)
    s, t = Level(level.alpha[:-1], level.sigma[:-1]), Level(level.alpha[1:], level.sigma[1:])
    return Steps(s, t, position[1:] - position[:-1], position)


def psi(z: Float[Array, " n"], count: int) -> tuple[Array, ...]:
    """psi_k(z) = z phi_k(z) for k = 1 .. count: e^z - 1, then each is psi_k / z - 1 / k!.

    For |z| < 1 that recursion loses digits, more for each k; there the last one is a power series, from which
    phi_k = z phi_{k+1} + 1 / k! leads back. z = -inf, the step from pure noise, is allowed.
    """
    small = jnp.abs(z) < 1
    near, far = jnp.where(small, z, jnp.zeros_like(z)), jnp.where(small, jnp.ones_like(z), z)
    direct = [jnp.expm1(z), jnp.expm1(far)]
    for k in range(1, count):
        direct.append(direct[-1] / far - 1 / math.factorial(k))
    series = [_last_phi(near, count)]
    for k in reversed(range(2, count)):
        series.append(near * series[-1] + 1 / math.factorial(k))
    higher = [jnp.where(small, near * phi, value) for phi, value in zip(reversed(series), direct[2:], strict=False)]
    return (direct[0], *higher)


def _last_phi(z, k):
    # 18 terms are exact to float64 for |z| <= 1
    total = jnp.full_like(z, 1 / math.factorial(18 + k))
    for j in reversed(range(18)):
        total = total * z + 1 / math.factorial(j + k)
    return total


def ratio(a: Array, b: Array) -> Array:
    """a / b, and 0 where b is 0: a difference over no step says nothing, so it is left out."""
    return jnp.where(b == 0, jnp.zeros_like(a), a / jnp.where(b == 0, jnp.ones_like(b), b))


def earlier(h: Float[Array, " n"], count: int) -> Float[Array, " n"]:
    """The step size `count` steps before each step. The first `count` have none and repeat their own."""
    return jnp.concatenate([h[:count], h[: max(h.size - count, 0)]])


def step_orders(num_steps: int, order: int, final_order: int | None) -> np.ndarray:
    """int [num_steps] order of each step: 1, 2, .. up to `order`, and down to `final_order` at the end if given."""
    k = np.arange(num_steps)
    orders = np.minimum(k + 1, order)
    return orders if final_order is None else np.minimum(orders, final_order + num_steps - 1 - k)


def check_choice(name: str, what: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a value that is not among the choices, with the nearest one."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: {what} must be one of {', '.join(choices)}, got {value!r}{hint}")


def check_order(name: str, order: int, choices: tuple[int, ...] = (1, 2, 3)) -> None:
    """Refuses an order that is not implemented."""
    if order not in choices:
        raise ValueError(f"{name}: order must be one of {', '.join(map(str, choices))}, got {order}")


def check_final_order(name: str, final_order: int | None) -> None:
    """Refuses an order of the last step below 1."""
    if final_order is not None and final_order < 1:
        raise ValueError(f"{name}: final_order must be at least 1, got {final_order}; None keeps the full order")

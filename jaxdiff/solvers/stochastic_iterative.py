"""Multistep sampling of consistency models: jump to the data, go back to a lower level with fresh noise, jump again.

Algorithm 1 of Song et al. 2023, for any denoiser that reaches good data in one call (consistency models and the
other few-step generators), with the grid of evaluation times as the only choice: times = [t_max] is one step,
[t_max, t_mid] two. Which times are best is `time_search`'s question; editing along the way is `editing`'s.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.process import q_sample
from jaxdiff.schedules import Schedule
from jaxdiff.solvers.base import Solver, level_like, no_state
from jaxdiff.types import Level


def stochastic_iterative(schedule: Schedule, sigma_min: float | Float[Array, ""] = 0.0) -> Solver:
    """x_s = alpha_s (x0 + sqrt((sigma_s / alpha_s)^2 - sigma_min^2) z), x0 being the denoiser's answer at x_t.

    One network call a step. The step to clean data is the denoiser's x0.

    Args:
      schedule: gives the levels.
      sigma_min: sigma / alpha of the noise that the answer still holds: t_min for a consistency function, which maps
        to that level, and 0 for a prediction of clean data. No noise is added below it.

    Raises:
      ValueError: for a negative sigma_min (numbers only; a traced value is not checked).

    Source: Song et al. 2023 (arXiv:2303.01469) algorithm 1.
    """
    if isinstance(sigma_min, float | int) and sigma_min < 0:
        raise ValueError(f"stochastic_iterative: sigma_min must not be negative, got {sigma_min}; 0 is clean data")

    def step(noise, state, x, t, s, denoise):
        x0 = denoise(x, t).x0
        return q_sample(x0, noise, renoised(level_like(schedule, s, x), sigma_min)), state, x0

    return Solver(no_state, step)


def renoised(level: Level, sigma_min: float | Float[Array, ""] = 0.0) -> Level:
    """The level with only the noise that data at sigma_min lack: sigma^2 - alpha^2 sigma_min^2, at least 0."""
    known = level.alpha * jnp.asarray(sigma_min, level.alpha.dtype)
    return Level(level.alpha, jnp.sqrt(jnp.maximum((level.sigma - known) * (level.sigma + known), 0)))

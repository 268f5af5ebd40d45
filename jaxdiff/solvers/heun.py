"""Euler and Heun for the probability flow ODE, with EDM's churn, along sigma / alpha or along the schedule's own time.

In the variables x / alpha and sigma / alpha every schedule has dx = eps d(sigma), the ODE of Karras et al. 2022 with
s(t) = 1 and sigma(t) = t: `euler` and `heun` are their algorithm 2 there. `euler_in_time` and `heun_in_time` integrate
dx/dt = alpha'(t) x0 + sigma'(t) eps instead, which is their algorithm 1 for any sigma(t) and s(t). The step to clean
data is the denoiser's x0 everywhere.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.process import eps_from_x0, q_sample
from jaxdiff.schedules import Schedule
from jaxdiff.solvers.base import Solver, level_like, no_state
from jaxdiff.solvers.ddim import ddim, eps_weight
from jaxdiff.types import Level, expand

Scalar = float | Float[Array, ""]


def euler(
    schedule: Schedule,
    *,
    churn: Scalar = 0.0,
    churn_min: Scalar = 0.0,
    churn_max: Scalar = float("inf"),
    churn_noise: Scalar = 1.0,
) -> Solver:
    """Euler's method in sigma / alpha: DDIM with eta = 0, plus churn. Arguments as for `heun`."""
    return _churned(schedule, _euler_step, churn, churn_min, churn_max, churn_noise)


def heun(
    schedule: Schedule,
    *,
    churn: Scalar = 0.0,
    churn_min: Scalar = 0.0,
    churn_max: Scalar = float("inf"),
    churn_noise: Scalar = 1.0,
) -> Solver:
    """EDM's sampler: order 2, two network calls a step and one in the step to clean data (2 n - 1 for n times).

    Args:
      schedule: gives the levels; `ve` for EDM's own. From a level without signal (alpha = 0) the step is Euler's.
      churn: noise added before each step raises sigma / alpha by the factor 1 + min(churn / n, sqrt(2) - 1), n being
        the number of times in the grid. 0 is deterministic.
      churn_min, churn_max: range of sigma / alpha in which noise is added.
      churn_noise: standard deviation of the added noise relative to what the level asks for.

    Returns:
      A solver; with churn its state is the factor's excess over 1.

    Raises:
      ValueError: if churn is negative or churn_min exceeds churn_max (numbers only; traced values are not checked).

    Source: Karras et al. 2022 (arXiv:2206.00364) algorithm 2.
    """
    return _churned(schedule, _heun_step, churn, churn_min, churn_max, churn_noise)


def euler_ancestral(schedule: Schedule, eta: Scalar = 1.0) -> Solver:
    """Euler down to sigma_down, then fresh noise up to sigma_s, both in sigma / alpha, as in k-diffusion.

    sigma_up^2 = eta^2 sigma_s^2 (1 - sigma_s^2 / sigma_t^2) is the variance of q(x_s | x_t, x0), and sigma_down^2 =
    sigma_s^2 - sigma_up^2 what DDIM leaves to eps, so this is `ddim(schedule, eta)` under the name it is asked for.
    """
    return ddim(schedule, eta)


def euler_in_time(schedule: Schedule) -> Solver:
    """Euler's method in t. The step needs no level at s, so it may also end at a clean s that is not a level.

    Args:
      schedule: a continuous schedule. On `rectified_flow` without shift this is the same as `euler`.

    Raises:
      ValueError: if the schedule's level has no derivative in t, as in a discrete chain.

    Source: Karras et al. 2022 algorithm 1, without the correction.
    """
    _require_derivative(schedule, "euler_in_time")

    def step(noise, state, x, t, s, denoise):
        del noise
        x0, speed = _velocity(schedule, x, t, denoise)
        return x + expand((s - t).astype(x.dtype), x) * speed, state, x0

    return Solver(no_state, step)


def heun_in_time(schedule: Schedule) -> Solver:
    """Heun's method in t, order 2, finite also where alpha = 0.

    Args:
      schedule: a continuous schedule.

    Raises:
      ValueError: if the schedule's level has no derivative in t, as in a discrete chain.

    Source: Karras et al. 2022 algorithm 1.
    """
    _require_derivative(schedule, "heun_in_time")

    def step(noise, state, x, t, s, denoise):
        del noise
        x0, speed = _velocity(schedule, x, t, denoise)
        h = expand((s - t).astype(x.dtype), x)
        _, speed_s = _velocity(schedule, x + h * speed, s, denoise)
        return x + h * (speed + speed_s) / 2, state, x0

    return Solver(no_state, step)


def _euler_step(x, t, level, s, target, denoise):
    del s
    x0 = denoise(x, t).x0
    eps = eps_from_x0(x0, x, level)
    return q_sample(x0, eps, target), x0, eps


def _heun_step(x, t, level, s, target, denoise):
    x_s, x0, eps = _euler_step(x, t, level, s, target, denoise)
    change = eps_from_x0(denoise(x_s, s).x0, x_s, target) - eps
    return x_s + expand(eps_weight(level, target) / 2, x) * change, x0, eps


def _churned(schedule: Schedule, rule: Callable, churn, churn_min, churn_max, churn_noise) -> Solver:
    numbers = [isinstance(a, float | int) for a in (churn, churn_min, churn_max)]
    if numbers[0] and churn < 0:
        raise ValueError(f"churn must not be negative, got {churn}; 0 is deterministic")
    if numbers[1] and numbers[2] and churn_min > churn_max:
        raise ValueError(f"churn_min must not exceed churn_max, got {churn_min} and {churn_max}; swap them")
    deterministic = numbers[0] and churn == 0

    def init(x, times):
        if deterministic:
            return None
        return jnp.minimum(jnp.asarray(churn, x.dtype) / times.size, jnp.asarray(np.sqrt(2) - 1, x.dtype))

    def stir(noise, gamma, x, t):
        level = level_like(schedule, t, x)
        if deterministic:
            return x, t, level
        pure = level.alpha == 0
        alpha = jnp.where(pure, jnp.ones_like(level.alpha), level.alpha)
        ratio = level.sigma / alpha
        low, high = jnp.asarray(churn_min, x.dtype), jnp.asarray(churn_max, x.dtype)
        here = ~pure & (ratio >= low) & (ratio <= high) & (gamma > 0)
        t_hat = jnp.where(here, schedule.time(-jnp.log(ratio * (1 + gamma)).astype(t.dtype)), t)
        raised = level_like(schedule, t_hat, x)
        grown = raised.alpha / alpha
        added = jnp.sqrt(jnp.maximum(raised.sigma**2 - (grown * level.sigma) ** 2, 0))
        added = jnp.asarray(churn_noise, x.dtype) * added
        zero, one = jnp.zeros_like(ratio), jnp.ones_like(ratio)
        grown, added = jnp.where(here, grown, one), jnp.where(here, added, zero)
        return expand(grown, x) * x + expand(added, x) * noise, t_hat, raised

    def step(noise, state, x, t, s, denoise):
        x, t, level = stir(noise, state, x, t)
        x, x0, _ = rule(x, t, level, s, level_like(schedule, s, x), denoise)
        return x, state, x0

    def finish(noise, state, x, t, denoise):
        x, t, _ = stir(noise, state, x, t)
        return denoise(x, t).x0

    return Solver(init, step, finish)


def _velocity(schedule, x, t, denoise):
    level, slope = jax.jvp(schedule.level, (t,), (jnp.ones_like(t),))
    level, slope = (Level(a.alpha.astype(x.dtype), a.sigma.astype(x.dtype)) for a in (level, slope))
    x0 = denoise(x, t).x0
    return x0, q_sample(x0, eps_from_x0(x0, x, level), slope)


def _require_derivative(schedule: Schedule, name: str) -> None:
    with jax.ensure_compile_time_eval():
        # at a whole t, where a chain's level is looked up and has slope 0
        t = jnp.full([1], np.floor((schedule.t_min + schedule.t_max) / 2), float)
        _, slope = jax.jvp(schedule.level, (t,), (jnp.ones_like(t),))
        stays = bool(((slope.alpha == 0) & (slope.sigma == 0)).all())
    if stays:
        raise ValueError(
            f"{name}: the schedule's level has no slope in t, as a chain's; use {name.removesuffix('_in_time')}"
        )

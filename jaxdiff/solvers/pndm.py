"""Pseudo linear multistep solvers: an Adams-Bashforth combination of past eps, carried by the DDIM step.

PLMS as latent diffusion has it, and PNDM as diffusers has it, which spends one network call per step of an expanded
grid: `pndm` repeats the second time to start, `pndm_prk` starts with three Runge-Kutta steps of four calls. The
Adams-Bashforth weights are those of equal steps whatever the grid is, as in the releases. Deterministic; all in eps,
so the prediction must not be clipped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.process import eps_from_x0, q_sample
from jaxdiff.schedules import Schedule
from jaxdiff.solvers.base import Solver, level_like
from jaxdiff.solvers.ddim import eps_weight
from jaxdiff.types import Level, expand

# weights of the newest eps and of the three before it, for 1 to 4 values known
ADAMS_BASHFORTH = np.array([[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0], [55, -59, 37, -9]])
ADAMS_BASHFORTH[3] /= 24


class PlmsState(NamedTuple):
    """step: int32, steps done so far. past: [3, B, ...], earlier eps, the newest first."""

    step: Array
    past: Array


def plms(schedule: Schedule) -> Solver:
    """Latent diffusion's PLMS on an ordinary grid. One network call a step, two in the first.

    The first step is an improved Euler step; the next use two, three and then four values of eps.

    Source: Liu et al. 2022 (arXiv:2202.09778) eq. 9 and 12; the start as in the latent diffusion release.
    """

    def init(x, times):
        del times
        return PlmsState(jnp.zeros([], jnp.int32), jnp.zeros([3, *x.shape], x.dtype))

    def step(noise, state, x, t, s, denoise):
        del noise
        level, target = level_like(schedule, t, x), level_like(schedule, s, x)
        x0 = denoise(x, t).x0
        eps = eps_from_x0(x0, x, level)

        def first(x0, eps):
            x_s = q_sample(x0, eps, target)
            return (eps + eps_from_x0(denoise(x_s, s).x0, x_s, target)) / 2

        def later(x0, eps):
            del x0
            return _combine(jnp.asarray(ADAMS_BASHFORTH, x.dtype)[jnp.minimum(state.step, 3)], eps, state.past)

        combined = jax.lax.cond(state.step == 0, first, later, x0, eps)
        x_s, x0 = _transfer(x0, eps, combined, level, target)
        return x_s, PlmsState(state.step + 1, _push(eps, state.past)), x0

    return Solver(init, step)


class Stages(NamedTuple):
    """What each step of an expanded grid does; the last row holds for all later steps.

    Attributes:
      on_past: [n, 4] weights of the newest eps and of the three kept before it.
      on_sum: [n] weight of the running sum.
      keep_sum, add_sum: [n]; sum <- keep_sum sum + add_sum eps, after it was used.
      restart: [n] the step leaves from its own x; otherwise from where the last restart was.
      push: [n] eps joins the kept ones.
    """

    on_past: np.ndarray
    on_sum: np.ndarray
    keep_sum: np.ndarray
    add_sum: np.ndarray
    restart: np.ndarray
    push: np.ndarray


class StageState(NamedTuple):
    """step: int32. past: [3, B, ...]. total: [B, ...], the running sum. The rest: prediction and level left from."""

    step: Array
    past: Array
    total: Array
    x0: Array
    eps: Array
    level: Level


def pndm(schedule: Schedule) -> Solver:
    """PNDM without Runge-Kutta start, as Stable Diffusion uses it in diffusers. Run it on `pndm_times(times)`.

    The same numbers as `plms` on the plain grid; the start's two network calls are two steps.

    Source: Liu et al. 2022 (arXiv:2202.09778); diffusers' `PNDMScheduler` with skip_prk_steps.
    """
    n = 5
    on_past = ADAMS_BASHFORTH[[0, 0, 1, 2, 3]]
    on_past[1] = [1 / 2, 1 / 2, 0, 0]
    zeros, not_second = np.zeros(n), np.arange(n) != 1
    return _staged(schedule, Stages(on_past, zeros, zeros, zeros, not_second, not_second))


def pndm_prk(schedule: Schedule) -> Solver:
    """PNDM with its Runge-Kutta start: three steps of four network calls. Run it on `pndm_prk_times(times)`.

    Source: Liu et al. 2022 (arXiv:2202.09778) eq. 13 and algorithm 2; diffusers' `PNDMScheduler`.
    """
    cycle = np.arange(13) % 4
    runge_kutta = np.arange(13) < 12
    last = runge_kutta & (cycle == 3)
    on_past = np.where(last[:, None], np.eye(4)[0] / 6, np.eye(4)[0])
    on_past[12] = ADAMS_BASHFORTH[3]
    starts = cycle == 0
    weight = np.array([1 / 6, 1 / 3, 1 / 3, 0.0])[cycle] * runge_kutta
    return _staged(schedule, Stages(on_past, last * 1.0, (cycle != 0) * 1.0, weight, starts, starts))


def pndm_times(times: Float[Array, " n"] | Float[np.ndarray, " n"]) -> np.ndarray:
    """The grid of `pndm`: the second time twice. n times and n - 1 steps become n + 1 times and n calls.

    Raises:
      ValueError: for fewer than two times.
    """
    times = _grid("pndm_times", times, 2)
    return np.concatenate([times[:2], times[1:]])


def pndm_prk_times(times: Float[Array, " n"] | Float[np.ndarray, " n"]) -> np.ndarray:
    """The grid of `pndm_prk`: between each two of the first four times their middle, twice, and then the second, twice.

    Raises:
      ValueError: for fewer than four times.
    """
    times = _grid("pndm_prk_times", times, 4)
    grid = []
    for t, s in zip(times[:3], times[1:4], strict=True):
        grid += [t, (t + s) / 2, (t + s) / 2, s]
    return np.concatenate([grid, times[3:]])


def _grid(name: str, times: Float[Array, " n"] | Float[np.ndarray, " n"], least: int) -> np.ndarray:
    times = np.asarray(times, np.float64)
    if times.size < least:
        raise ValueError(f"{name}: needs at least {least} times, got {times.size}; use more steps or plms")
    return times


def _staged(schedule: Schedule, stages: Stages) -> Solver:
    last = len(stages.restart) - 1

    def init(x, times):
        ones = jnp.ones(x.shape[:1], x.dtype)
        zero = jnp.zeros_like(x)
        return StageState(
            jnp.zeros([], jnp.int32), jnp.zeros([3, *x.shape], x.dtype), zero, zero, zero, Level(ones, ones)
        )

    def step(noise, state, x, t, s, denoise):
        del noise
        row = jax.tree.map(lambda table: jnp.asarray(table)[jnp.minimum(state.step, last)], stages)
        on_past, on_sum, keep_sum, add_sum = (a.astype(x.dtype) for a in row[:4])
        level = level_like(schedule, t, x)
        x0 = denoise(x, t).x0
        eps = eps_from_x0(x0, x, level)
        combined = _combine(on_past, eps, state.past) + on_sum * state.total
        left = jax.tree.map(lambda new, old: jnp.where(row.restart, new, old), (x0, eps, level), state[3:])
        x_s, x0 = _transfer(left[0], left[1], combined, left[2], level_like(schedule, s, x))
        past = jnp.where(row.push, _push(eps, state.past), state.past)
        return x_s, StageState(state.step + 1, past, keep_sum * state.total + add_sum * eps, *left), x0

    return Solver(init, step)


def _combine(weights, eps, past):
    return weights[0] * eps + jnp.tensordot(weights[1:], past, 1)


def _push(eps, past):
    return jnp.concatenate([eps[None], past[:-1]])


def _transfer(x0, eps, combined, t, s):
    """The DDIM step from x_t = alpha x0 + sigma eps with `combined` in place of eps, and the x0 it stands for."""
    change = combined - eps
    pure = t.alpha == 0
    ratio = jnp.where(pure, jnp.zeros_like(t.alpha), t.sigma / jnp.where(pure, jnp.ones_like(t.alpha), t.alpha))
    return q_sample(x0, eps, s) + expand(eps_weight(t, s), x0) * change, x0 - expand(ratio, x0) * change

"""Where to put t: draws for training, grids for sampling, and importance sampling of a chain's steps.

A draw is a function (key, batch size) -> t float [B] in the schedule's own unit. A grid is NumPy float64, decreasing,
and holds only real noise levels, since the clean end is not a time: n points are n steps of a solver. Our own grids
(`evenly`, `trailing`, `time_uniform`, `karras`, ...) start at the noisiest level for every n, also for one step. The
grids named after a release (`leading`, `linspace`, `quadratic`, `ddim_uniform`) start near index 0 when asked for one
step; they refuse that unless told otherwise. Shifts of a flow's time belong to `schedules.rectified_flow`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int64

from jaxdiff.schedules import Schedule
from jaxdiff.types import Key

TimeSampler = Callable[[Key, int], Array]
Grid = Float64[np.ndarray, " n"]
Indices = Int64[np.ndarray, " n"]


def uniform_index(num_train_steps: int) -> TimeSampler:
    """t uniform over the indices 0 .. T-1 of a chain. Source: Ho et al. 2020 (arXiv:2006.11239) algorithm 1."""
    _at_least_one("uniform_index", "num_train_steps", num_train_steps)
    return lambda key, n: jax.random.randint(key, (n,), 0, num_train_steps).astype(float)


def stratified_index(num_train_steps: int) -> TimeSampler:
    """As `uniform_index`, with the batch spread over the chain: one shared offset, then equal spacing.

    Source: Kingma et al. 2021 (arXiv:2107.00630) appendix I.1.
    """
    _at_least_one("stratified_index", "num_train_steps", num_train_steps)

    def draw_t(key, n):
        return jnp.clip(jnp.floor(_low_discrepancy(key, n) * num_train_steps), 0, num_train_steps - 1)

    return draw_t


def uniform(start: float, end: float) -> TimeSampler:
    """t uniform in [start, end): for continuous schedules, usually t_min and t_max."""
    _increasing("uniform", "start", start, "end", end)
    return lambda key, n: jax.random.uniform(key, (n,), minval=start, maxval=end)


def stratified(start: float, end: float) -> TimeSampler:
    """As `uniform`, with one shared offset and equal spacing in the batch. Source: Kingma et al. 2021 appendix I.1."""
    _increasing("stratified", "start", start, "end", end)
    return lambda key, n: start + (end - start) * _low_discrepancy(key, n)


def log_normal(mean: float = -1.2, std: float = 1.2) -> TimeSampler:
    """t with ln t ~ N(mean, std^2): the noise level of `schedules.ve`. Source: Karras et al. 2022 table 1."""
    _positive("log_normal", "std", std)
    return lambda key, n: jnp.exp(mean + std * jax.random.normal(key, (n,)))


def logit_normal(mean: float = 0.0, std: float = 1.0) -> TimeSampler:
    """t in (0, 1) with logit t ~ N(mean, std^2): middle times more often. Source: Esser et al. 2024 eq. 19."""
    _positive("logit_normal", "std", std)
    return lambda key, n: jax.nn.sigmoid(mean + std * jax.random.normal(key, (n,)))


def _low_discrepancy(key, n):
    return (jax.random.uniform(key, ()) + jnp.arange(n).astype(float) / n) % 1.0


class LossHistory(NamedTuple):
    """The last losses seen at every step of a chain.

    Attributes:
      losses: [T, H]; a ring of the last H losses of each step.
      counts: int32 [T], how many losses each step has seen.
    """

    losses: Array
    counts: Array


def init_history(num_train_steps: int, length: int = 10, dtype=jnp.float32) -> LossHistory:
    """An empty history of `length` losses for each step."""
    _at_least_one("init_history", "num_train_steps", num_train_steps)
    _at_least_one("init_history", "length", length)
    return LossHistory(jnp.zeros([num_train_steps, length], dtype), jnp.zeros([num_train_steps], jnp.int32))


def update_history(state: LossHistory, t: Array, losses: Float[Array, " b"]) -> LossHistory:
    """Records a batch in order, the unweighted losses of indices t [B]. An index may occur many times in the batch.

    On several hosts t and losses are the whole, global batch.
    """
    num_train_steps, length = state.losses.shape
    t = t.astype(jnp.int32)
    same = t[:, None] == t[None, :]
    earlier = jnp.sum(jnp.tril(same, -1), axis=1, dtype=jnp.int32)
    later = jnp.sum(jnp.triu(same, 1), axis=1, dtype=jnp.int32)
    slot = (state.counts[t] + earlier) % length
    # what the same batch would overwrite is sent out of bounds, so that no slot is written twice
    row = jnp.where(later < length, t, num_train_steps)
    return LossHistory(
        state.losses.at[row, slot].set(losses.astype(state.losses.dtype), mode="drop"),
        state.counts.at[t].add(1),
    )


def probabilities(state: LossHistory, uniform_share: float = 0.001) -> Float[Array, " T"]:
    """p_t proportional to the root of the mean squared loss, mixed with a uniform share; uniform until all are full.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672) eq. 18.
    """
    num_train_steps, length = state.losses.shape
    weights = jnp.sqrt(jnp.mean(state.losses**2, axis=1))
    total = jnp.sum(weights)
    ready = jnp.all(state.counts >= length) & (total > 0)
    weights = (1 - uniform_share) * weights / jnp.where(ready, total, jnp.ones_like(total))
    return jnp.where(ready, weights + uniform_share / num_train_steps, 1 / num_train_steps)


def draw(key: Key, state: LossHistory, n: int) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Draws n indices by `probabilities`.

    Returns:
      t [n], and the importance weight 1 / (T p_t) [n] that keeps the loss unbiased.
    """
    p = probabilities(state)
    index = jax.random.choice(key, p.size, (n,), p=p)
    return index.astype(p.dtype), 1 / (p.size * p[index])


def respace(num_train_steps: int, sections: str) -> Indices:
    """The indices of a chain that a shorter chain keeps, in increasing order. A sampling grid is their reverse.

    Args:
      num_train_steps: T.
      sections: "a,b,c" cuts [0, T) into as many nearly equal parts and keeps that many evenly spaced indices of each,
        both ends included; "250" is one part. "ddim50" keeps every s-th index, s chosen so that 50 remain.

    Returns:
      int64 [n]. A section of one index keeps its first: "1" is index 0, which is no use for one-step sampling;
      `evenly` is.

    Raises:
      ValueError: for a string of another form, a section with more steps than indices, or a stride that does not exist.

    Source: Nichol & Dhariwal 2021, the released `space_timesteps`, with its rounding of halves to even.
    """
    _at_least_one("respace", "num_train_steps", num_train_steps)
    stride_only = sections.startswith("ddim")
    try:
        counts = [int(part) for part in sections.removeprefix("ddim").split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1 or (stride_only and len(counts) > 1):
        raise ValueError(
            f'respace: got sections "{sections}", expected positive counts such as "250", "10,15,20" or "ddim50"'
        )
    if stride_only:
        for stride in range(1, num_train_steps + 1):
            kept = np.arange(0, num_train_steps, stride)
            if kept.size == counts[0]:
                return kept
        raise ValueError(
            f"respace: no stride keeps exactly {counts[0]} of {num_train_steps} steps; "
            f'use "{counts[0]}" without "ddim", or a count that divides {num_train_steps}'
        )
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = num_train_steps // len(counts) + (i < num_train_steps % len(counts))
        if count > size:
            raise ValueError(
                f'respace: section {i + 1} of "{sections}" has {size} indices, got {count} steps; use at most {size}'
            )
        stride, place = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):
            kept.append(start + round(place))
            place += stride  # accumulated, not multiplied: the release's last digits decide some halves
        start += size
    return np.asarray(kept, np.int64)


def respace_betas(betas: Float64[np.ndarray, " T"], indices: Indices) -> Float64[np.ndarray, " n"]:
    """The betas of the shorter chain that keeps the levels of `indices`: one minus ratios of alphas_cumprod.

    A sampler does not need them, since `process.bridge` takes any two levels; likelihoods of a shorter chain do.
    """
    kept = np.cumprod(1 - betas)[indices]
    return 1 - kept / np.append(1.0, kept[:-1])


def evenly(num_train_steps: int, n: int) -> Grid:
    """n indices from T - 1 down to 0, evenly spaced: the reverse of `respace(T, str(n))`, and T - 1 alone for n = 1."""
    _steps("evenly", num_train_steps, n)
    if n == 1:
        return np.array([num_train_steps - 1.0])
    return respace(num_train_steps, str(n))[::-1].astype(np.float64)


def trailing(num_train_steps: int, n: int) -> Grid:
    """round(T - i T / n) - 1: from T - 1, ending a stride above the clean end. Source: Lin et al. 2023 table 2."""
    _steps("trailing", num_train_steps, n)
    return np.round(np.arange(num_train_steps, 0, -num_train_steps / n))[:n] - 1


def leading(num_train_steps: int, n: int, offset: int = 0, *, one_step_at_zero: bool = False) -> Grid:
    """Multiples of T // n, plus an offset: ends at the offset and stops short of T - 1. Stable Diffusion's, offset 1.

    Args:
      num_train_steps: T.
      n: number of steps.
      offset: added to every index.
      one_step_at_zero: allow n = 1, where the release starts at the clean end, index 0 + offset.

    Raises:
      ValueError: for n = 1 without `one_step_at_zero`, n outside 1 .. T, or an index above T - 1.
    """
    _steps("leading", num_train_steps, n)
    grid = np.arange(n)[::-1] * (num_train_steps // n) + offset
    return _released("leading", num_train_steps, grid, one_step_at_zero)


def linspace(num_train_steps: int, n: int, *, one_step_at_zero: bool = False) -> Grid:
    """round(linspace(0, T - 1, n)) reversed; index 0 alone for n = 1, allowed by `one_step_at_zero`."""
    _steps("linspace", num_train_steps, n)
    grid = np.round(np.linspace(0, num_train_steps - 1, n))[::-1]
    return _released("linspace", num_train_steps, grid, one_step_at_zero)


def ddim_uniform(num_train_steps: int, n: int, offset: int = 0, *, one_step_at_zero: bool = False) -> Grid:
    """range(0, T, T // n) reversed, plus an offset: more than n points if n does not divide T.

    The DDIM release has offset 0; latent diffusion has offset 1.

    Source: Song et al. 2020 (arXiv:2010.02502) appendix D.2.
    """
    _steps("ddim_uniform", num_train_steps, n)
    grid = np.arange(0, num_train_steps, num_train_steps // n)[::-1] + offset
    return _released("ddim_uniform", num_train_steps, grid, one_step_at_zero)


def quadratic(num_train_steps: int, n: int, offset: int = 0, *, one_step_at_zero: bool = False) -> Grid:
    """floor(linspace(0, sqrt(0.8 T), n)^2) reversed, plus an offset: dense near the data, starting at 0.8 T.

    Many steps repeat the lowest indices, as in the release; a step between equal times moves nothing.

    Source: Song et al. 2020 appendix D.2, "quad".
    """
    _steps("quadratic", num_train_steps, n)
    grid = np.floor(np.linspace(0, np.sqrt(0.8 * num_train_steps), n) ** 2)[::-1] + offset
    return _released("quadratic", num_train_steps, grid, one_step_at_zero)


def time_uniform(start: float, end: float, n: int) -> Grid:
    """n equally spaced times from start (noisy) down to end, both included; start alone for n = 1."""
    _span("time_uniform", start, end, n)
    return np.linspace(start, end, n)


def time_quadratic(start: float, end: float, n: int) -> Grid:
    """Squares of equally spaced roots from start down to end >= 0. Source: Lu et al. 2022 (arXiv:2206.00927), code."""
    _span("time_quadratic", start, end, n)
    if end < 0:
        raise ValueError(f"time_quadratic: end must not be negative, got {end}; use a schedule whose times start at 0")
    return _ends(np.linspace(start**0.5, end**0.5, n) ** 2, start, end)


def karras(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Grid:
    """n noise levels from sigma_max down to sigma_min, equally spaced in sigma^(1/rho). Times of `schedules.ve`.

    Source: Karras et al. 2022 (arXiv:2206.00364) eq. 5.
    """
    _span("karras", sigma_max, sigma_min, n)
    _positive("karras", "sigma_min", sigma_min)
    _positive("karras", "rho", rho)
    return _ends(np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n) ** rho, sigma_max, sigma_min)


def karras_time(
    index: Float[Array, " b"], n: Array | int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Float[Array, " b"]:
    """Points of `karras` by index, 0 (sigma_max) to n - 1 (sigma_min), in closed form. n >= 2 may be traced.

    Fractions of an index lie between the points.
    """
    _span("karras_time", sigma_max, sigma_min, 1)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    last = jnp.asarray(n, index.dtype) - 1
    return jnp.clip((high + index / last * (low - high)) ** rho, sigma_min, sigma_max)


def exponential(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Grid:
    """n noise levels from sigma_max down to sigma_min, equally spaced in log sigma. Times of `schedules.ve`."""
    _span("exponential", sigma_max, sigma_min, n)
    _positive("exponential", "sigma_min", sigma_min)
    return _ends(np.exp(np.linspace(np.log(sigma_max), np.log(sigma_min), n)), sigma_max, sigma_min)


def uniform_log_snr(schedule: Schedule, n: int, *, start: float | None = None, end: float | None = None) -> Grid:
    """n times equally spaced in log SNR. Source: Lu et al. 2022, "logSNR".

    Args:
      schedule: any schedule.
      n: number of times.
      start, end: noisiest and cleanest time; the schedule's t_max and t_min if None.

    Raises:
      ValueError: if start holds no signal, where log SNR is infinite.
    """
    start, end = schedule.t_max if start is None else start, schedule.t_min if end is None else end
    _span("uniform_log_snr", start, end, n)
    noisy, clean = _half_log_snr("uniform_log_snr", schedule, start, end)
    return _ends(_times(schedule, np.linspace(noisy, clean, n)), start, end)


def karras_times(
    schedule: Schedule, n: int, rho: float = 7.0, *, start: float | None = None, end: float | None = None
) -> Grid:
    """The Karras grid in sigma / alpha, as times of any schedule. Arguments as for `uniform_log_snr`."""
    start, end = schedule.t_max if start is None else start, schedule.t_min if end is None else end
    _span("karras_times", start, end, n)
    noisy, clean = _half_log_snr("karras_times", schedule, start, end)
    ratios = karras(n, float(np.exp(-clean)), float(np.exp(-noisy)), rho)
    return _ends(_times(schedule, -np.log(ratios)), start, end)


def _half_log_snr(name, schedule, start, end):
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        alpha, sigma = (np.asarray(a) for a in schedule.level(jnp.array([start, end], jnp.float64)))
    if alpha[0] <= 0:
        raise ValueError(f"{name}: at t = {start:g} the schedule holds no signal; give `start` a time below it")
    return np.log(alpha) - np.log(sigma)


def _times(schedule, half_log_snr):
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        return np.array(schedule.time(jnp.asarray(half_log_snr, jnp.float64)))


def _ends(grid, start, end):
    grid[-1] = end
    grid[0] = start
    return grid


def _released(name, num_train_steps, grid, one_step_at_zero):
    if grid.size == 1 and num_train_steps > 1 and not one_step_at_zero:
        raise ValueError(
            f"{name}: one step would start at index {grid[0]:g}, the clean end; use trailing or evenly "
            "(or one_step_at_zero=True to have what the release does)"
        )
    if grid[0] > num_train_steps - 1 or grid[-1] < 0:
        raise ValueError(
            f"{name}: indices {grid[-1]:g} to {grid[0]:g} leave 0 .. {num_train_steps - 1}; use fewer steps or offset 0"
        )
    return grid.astype(np.float64)


def _steps(name, num_train_steps, n):
    _at_least_one(name, "num_train_steps", num_train_steps)
    if not 1 <= n <= num_train_steps:
        raise ValueError(f"{name}: n must be 1 to {num_train_steps}, the length of the chain, got {n}")


def _span(name, start, end, n):
    _at_least_one(name, "n", n)
    if not start > end:
        raise ValueError(f"{name}: grids run from noisy to clean, got {start:g} to {end:g}; swap them")


def _increasing(name, low_name, low, high_name, high):
    if not low < high:
        raise ValueError(f"{name}: need {low_name} < {high_name}, got {low} and {high}; swap them")


def _positive(name, what, value):
    if not value > 0:
        raise ValueError(f"{name}: {what} must be positive, got {value}")


def _at_least_one(name, what, value):
    if value < 1:
        raise ValueError(f"{name}: {what} must be at least 1, got {value}")

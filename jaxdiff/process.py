"""The forward process and its posterior, in levels only: x_t = alpha x0 + sigma eps.

Nothing here knows a time, a parameter or a network. Two neighbouring steps of a chain, two steps of a respaced
chain and two levels of a continuous schedule are all just a pair of levels, so respacing needs no code of its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdiff.schedules import Tables
from jaxdiff.types import Gaussian, Level, expand


class Bridge(NamedTuple):
    """Coefficients, [B], of q(x_s | x_t, x0) between a level t and a less noisy level s.

    Attributes:
      on_x0, on_x_t: the mean is on_x0 x0 + on_x_t x_t.
      added: variance added from s to t, sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2. A chain's beta_t.
      log_added: its logarithm.
      variance: of the posterior. 0 when s is clean.
      log_variance: its logarithm, bounded below where the variance is 0.
    """

    on_x0: Array
    on_x_t: Array
    added: Array
    log_added: Array
    variance: Array
    log_variance: Array


class Variance(NamedTuple):
    """A variance and its logarithm, broadcastable to x. At a clean s only the logarithm is bounded."""

    value: Array
    log: Array


VarianceRule = Callable[[Bridge, Array, Array | None], Variance]


def q_sample(x0: Float[Array, "b ..."], eps: Float[Array, "b ..."], level: Level) -> Float[Array, "b ..."]:
    """x_t = alpha x0 + sigma eps. x0 and eps [B, ...], level [B]. Source: Ho et al. 2020 (arXiv:2006.11239) eq. 4."""
    chex.assert_equal_shape([x0, eps])
    return expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * eps


def transition(x_s: Float[Array, "b ..."], t: Level, s: Level) -> Gaussian:
    """Distribution of x_t given x_s for a noisier level t: mean r x_s, variance sigma_t^2 - r^2 sigma_s^2.

    Source: Kingma et al. 2021 (arXiv:2107.00630) appendix A.1.
    """
    ratio = t.alpha / s.alpha
    return Gaussian(expand(ratio, x_s) * x_s, expand(t.sigma**2 - ratio**2 * s.sigma**2, x_s))


def snr(level: Level) -> Float[Array, " b"]:
    """Signal to noise ratio alpha^2 / sigma^2."""
    return (level.alpha / level.sigma) ** 2


def half_log_snr(level: Level) -> Float[Array, " b"]:
    """log(alpha / sigma), DPM-Solver's lambda."""
    return jnp.log(level.alpha) - jnp.log(level.sigma)


def eps_from_x0(x0: Float[Array, "b ..."], x_t: Float[Array, "b ..."], level: Level) -> Float[Array, "b ..."]:
    """The noise that leads from x0 to x_t: (x_t - alpha x0) / sigma."""
    return (x_t - expand(level.alpha, x0) * x0) / expand(level.sigma, x0)


def clean_like(level: Level) -> Level:
    """The level without noise, in the shape and dtype of another."""
    return Level(jnp.ones_like(level.alpha), jnp.zeros_like(level.sigma))


def bridge(t: Level, s: Level, smallest: float | Float[Array, "..."] = 1e-20) -> Bridge:
    """The posterior's coefficients between any two levels.

    Args:
      t: current level, [B], sigma > 0.
      s: target level, [B], sigma_s <= sigma_t; may be clean.
      smallest: lower bound of the variance inside log_variance. A chain's releases use the variance of the step
        before the last there.

    Source: Ho et al. 2020 eq. 6-7; Kingma et al. 2021 for any two levels.
    """
    ratio = t.alpha / s.alpha
    added = t.sigma**2 - ratio**2 * s.sigma**2
    variance = added * s.sigma**2 / t.sigma**2
    return Bridge(
        on_x0=s.alpha * added / t.sigma**2,
        on_x_t=ratio * s.sigma**2 / t.sigma**2,
        added=added,
        log_added=jnp.log(added),
        variance=variance,
        log_variance=jnp.log(jnp.maximum(variance, smallest)),
    )


def chain_bridge(tables: Tables, t: Int[Array, " b"], dtype=jnp.float32) -> Bridge:
    """The coefficients from index t to t - 1 of a chain (to clean data from index 0), from its float64 tables.

    The same as `bridge` of the two levels, without the digits that float32 levels lose on chains of 4000 steps.
    """

    def at(table):
        return jnp.asarray(table, dtype)[t]

    return Bridge(
        on_x0=at(tables.posterior_mean_coef1),
        on_x_t=at(tables.posterior_mean_coef2),
        added=at(tables.betas),
        log_added=at(np.log(tables.betas)),
        variance=at(tables.posterior_variance),
        log_variance=at(tables.posterior_log_variance_clipped),
    )


def posterior_mean(x0: Float[Array, "b ..."], x_t: Float[Array, "b ..."], between: Bridge) -> Float[Array, "b ..."]:
    """Mean of q(x_s | x_t, x0)."""
    chex.assert_equal_shape([x0, x_t])
    return expand(between.on_x0, x0) * x0 + expand(between.on_x_t, x_t) * x_t


def posterior(x0: Float[Array, "b ..."], x_t: Float[Array, "b ..."], t: Level, s: Level) -> Gaussian:
    """Distribution of x_s given x_t and x0, for a less noisy level s.

    With r = alpha_t / alpha_s and w = sigma_t^2 - r^2 sigma_s^2, the variance added between them,
        mean = (r sigma_s^2 x_t + alpha_s w x0) / sigma_t^2,  variance = w sigma_s^2 / sigma_t^2.

    Args:
      x0: [B, ...] clean data or its prediction.
      x_t: [B, ...] noisy data at level t.
      t: current level, alpha and sigma [B], sigma > 0.
      s: target level, [B], sigma_s <= sigma_t.

    Returns:
      Gaussian with mean [B, ...] and variance [B, 1, ...] ready to broadcast.

    Raises:
      AssertionError: while tracing, if x0 and x_t differ in shape or a level is not [B].

    Source: Ho et al. 2020 (arXiv:2006.11239) eq. 6-7; Kingma et al. 2021 (arXiv:2107.00630) for any two levels.
    """
    chex.assert_rank([t.alpha, t.sigma, s.alpha, s.sigma], 1)
    between = bridge(t, s)
    return Gaussian(posterior_mean(x0, x_t, between), expand(between.variance, x_t))


def fixed_small(between: Bridge, like: Array, variance_out: Array | None = None) -> Variance:
    """The posterior's own variance, "beta tilde": optimal if x0 were known. Ignores `variance_out`."""
    del variance_out
    return Variance(expand(between.variance, like), expand(between.log_variance, like))


def fixed_large(between: Bridge, like: Array, variance_out: Array | None = None) -> Variance:
    """The added variance, beta: optimal for x0 ~ N(0, 1). The step to clean data has the bounded posterior's."""
    del variance_out
    to_clean = between.variance == 0
    log = jnp.where(to_clean, between.log_variance, between.log_added)
    value = jnp.where(to_clean, jnp.exp(between.log_variance), between.added)
    return Variance(expand(value, like), expand(log, like))


def learned(between: Bridge, like: Array, variance_out: Array | None) -> Variance:
    """The network's output is the log-variance itself."""
    del between, like
    log = _required(variance_out)
    return Variance(jnp.exp(log), log)


def learned_range(between: Bridge, like: Array, variance_out: Array | None) -> Variance:
    """The network's output, nominally in [-1, 1], interpolates between the logarithms of the two fixed variances.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672) eq. 15.
    """
    low, high = expand(between.log_variance, like), expand(between.log_added, like)
    fraction = (_required(variance_out) + 1) / 2
    log = fraction * high + (1 - fraction) * low
    return Variance(jnp.exp(log), log)


def _required(variance_out: Array | None) -> Array:
    if variance_out is None:
        raise ValueError(
            "a learned variance needs the network's variance channels, got none; pass learned_variance=True"
        )
    return variance_out

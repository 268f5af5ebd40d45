"""What the network's output f means. Every choice is affine: x0 = skip x_t + out f(in x_t).

The target of f is on_x0 x0 + on_eps eps. The five scalars are functions of one Level. `net_time` maps the schedule's t
to the number that the network is given. The table of coefficients is in docs/design.md; n = alpha^2 + sigma^2 and
m = alpha^2 sigma_data^2 + sigma^2 below.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.process import bridge, clean_like
from jaxdiff.schedules import Schedule
from jaxdiff.types import Level, expand


class Affine(NamedTuple):
    """x0 = skip x_t + out f(scale_in x_t); the network's target is on_x0 x0 + on_eps eps. Each [B]."""

    skip: Array
    out: Array
    scale_in: Array
    on_x0: Array
    on_eps: Array


class Parameterization(NamedTuple):
    """Meaning of the network's output.

    Attributes:
      coefficients: Level of [B] -> Affine of [B].
      net_time: t [B] in the schedule's unit -> [B], what the network sees.
    """

    coefficients: Callable[[Level], Affine]
    net_time: Callable[[Array], Array]


def same_time(t: Float[Array, " b"]) -> Float[Array, " b"]:
    """The network sees the schedule's own t."""
    return t


def scaled_time(scale: float) -> Callable[[Array], Array]:
    """The network sees t times `scale`: 1000 / T for chains trained with rescaled timesteps, 1000 for flows."""
    return lambda t: t * scale


def eps(net_time: Callable[[Array], Array] = same_time) -> Parameterization:
    """f predicts the noise. Undefined where alpha = 0. Source: Ho et al. 2020 (arXiv:2006.11239) eq. 14."""

    def coefficients(level):
        one, zero = jnp.ones_like(level.alpha), jnp.zeros_like(level.alpha)
        return Affine(1 / level.alpha, -level.sigma / level.alpha, one, zero, one)

    return Parameterization(coefficients, net_time)


def x0(net_time: Callable[[Array], Array] = same_time) -> Parameterization:
    """f predicts the clean data."""

    def coefficients(level):
        one, zero = jnp.ones_like(level.alpha), jnp.zeros_like(level.alpha)
        return Affine(zero, one, one, one, zero)

    return Parameterization(coefficients, net_time)


def previous_x(schedule: Schedule, net_time: Callable[[Array], Array] = same_time) -> Parameterization:
    """f predicts the posterior mean of the chain's previous step: x0 = (f - on_x_t x_t) / on_x0.

    `schedule` must be a discrete chain. The step before index 0 is the clean data.

    Source: Ho et al. 2020 section 3.2 (the "mu" target).
    """

    def coefficients(level):
        t = jnp.round(schedule.time(jnp.log(level.alpha / level.sigma)))
        first = t < 0.5
        s = jax.tree.map(lambda c, p: jnp.where(first, c, p), clean_like(level), schedule.level(jnp.maximum(t - 1, 0)))
        b = bridge(level, s)
        one = jnp.ones_like(level.alpha)
        return Affine(-b.on_x_t / b.on_x0, 1 / b.on_x0, one, b.on_x0 + b.on_x_t * level.alpha, b.on_x_t * level.sigma)

    return Parameterization(coefficients, net_time)


def v(net_time: Callable[[Array], Array] = same_time) -> Parameterization:
    """f predicts v = alpha eps - sigma x0. Source: Salimans & Ho 2022 (arXiv:2202.00512) appendix D."""

    def coefficients(level):
        norm = level.alpha**2 + level.sigma**2
        return Affine(level.alpha / norm, -level.sigma / norm, jnp.ones_like(norm), -level.sigma, level.alpha)

    return Parameterization(coefficients, net_time)


def flow(net_time: Callable[[Array], Array] = same_time) -> Parameterization:
    """f predicts eps - x0, the direction from data to noise. Source: Liu et al. 2022 (arXiv:2209.03003) eq. 1."""

    def coefficients(level):
        total, one = level.alpha + level.sigma, jnp.ones_like(level.alpha)
        return Affine(1 / total, -level.sigma / total, one, -one, one)

    return Parameterization(coefficients, net_time)


def edm(sigma_data: float = 0.5, net_time: Callable[[Array], Array] = lambda t: jnp.log(t) / 4) -> Parameterization:
    """EDM preconditioning: input and target have unit variance for data of deviation sigma_data.

    net_time defaults to ln(sigma) / 4 for a schedule whose t is sigma.

    Source: Karras et al. 2022 (arXiv:2206.00364) table 1.
    """
    if sigma_data <= 0:
        raise ValueError(f"edm: sigma_data must be positive, got {sigma_data}; it is the data's standard deviation")

    def coefficients(level):
        alpha, sigma = level
        m = alpha**2 * sigma_data**2 + sigma**2
        root = jnp.sqrt(m)
        # (1 - alpha skip) / out = sigma / (sigma_data root); -sigma skip / out = -alpha sigma_data / root
        return Affine(
            alpha * sigma_data**2 / m, sigma * sigma_data / root, 1 / root, sigma / (sigma_data * root),
            -alpha * sigma_data / root,
        )  # fmt: skip

    return Parameterization(coefficients, net_time)


def log_time(scale: float = 0.25) -> Callable[[Array], Array]:
    """The network sees scale * ln(t): 0.25 is EDM's, 250 that of OpenAI's image networks."""
    return lambda t: scale * jnp.log(t)


def consistency(
    sigma_data: float = 0.5, sigma_min: float = 0.002, net_time: Callable[[Array], Array] = lambda t: jnp.log(t) / 4
) -> Parameterization:
    """EDM's preconditioning moved so that the result at sigma_min is x_t itself: a consistency function.

    With s = sigma / alpha, skip x_t = sigma_data^2 / ((s - sigma_min)^2 + sigma_data^2) x_t / alpha and out = (s -
    sigma_min) sigma_data / sqrt(s^2 + sigma_data^2). sigma_min = 0 gives `edm`. The target of the output for a known x0
    is infinite at sigma_min, where nothing is left to predict.

    Args:
      sigma_data: standard deviation of the data.
      sigma_min: sigma / alpha of the level that is mapped to itself, the schedule's t_min.
      net_time: as for `edm`.

    Raises:
      ValueError: for a sigma_data that is not positive or a negative sigma_min.

    Source: Song et al. 2023 (arXiv:2303.01469) appendix C.
    """
    if sigma_data <= 0:
        raise ValueError(
            f"consistency: sigma_data must be positive, got {sigma_data}; it is the data's standard deviation"
        )
    if sigma_min < 0:
        raise ValueError(f"consistency: sigma_min must not be negative, got {sigma_min}; it is the schedule's t_min")

    def coefficients(level):
        alpha, sigma = level
        ratio = sigma / alpha
        above = ratio - sigma_min
        root, kept = jnp.sqrt(ratio**2 + sigma_data**2), above**2 + sigma_data**2
        # (1 - alpha skip) / out and -sigma skip / out; the second diverges at sigma_min
        return Affine(
            sigma_data**2 / kept / alpha, above * sigma_data / root, 1 / (alpha * root),
            above * root / (sigma_data * kept), -ratio * sigma_data * root / (kept * above),
        )  # fmt: skip

    return Parameterization(coefficients, net_time)


def vp_preconditioning(beta_d: float = 19.9, beta_min: float = 0.1, num_times: int = 1000) -> Parameterization:
    """EDM's wrapper of VP networks, for a schedule whose t is sigma: f predicts eps, time is (M - 1) t_VP(sigma).

    Source: Karras et al. 2022 table 1, column VP.
    """

    def net_time(sigma):
        t = (jnp.sqrt(beta_min**2 + 2 * beta_d * jnp.log1p(sigma**2)) - beta_min) / beta_d
        return (num_times - 1) * t

    return Parameterization(_scaled_eps, net_time)


def ve_preconditioning() -> Parameterization:
    """EDM's wrapper of VE networks: x0 = x_t + sigma f, time is ln(sigma / 2). Source: Karras et al. 2022 table 1."""

    def coefficients(level):
        one, zero = jnp.ones_like(level.alpha), jnp.zeros_like(level.alpha)
        return Affine(1 / level.alpha, level.sigma / level.alpha, one, zero, -one)

    return Parameterization(coefficients, lambda sigma: jnp.log(sigma / 2))


def iddpm_preconditioning(num_times: int = 1000, c1: float = 0.001, c2: float = 0.008) -> Parameterization:
    """EDM's wrapper of improved-DDPM and ADM networks: f predicts eps, time is the index of the nearest chain level.

    Source: Karras et al. 2022 table 1, column iDDPM, and appendix C.3.
    """
    levels = iddpm_sigmas(num_times, c1, c2)

    def net_time(sigma):
        nearest = jnp.argmin(jnp.abs(sigma[:, None] - jnp.asarray(levels, sigma.dtype)[None, :]), axis=1)
        return (num_times - 1 - nearest).astype(sigma.dtype)

    return Parameterization(_scaled_eps, net_time)


def iddpm_sigmas(num_times: int = 1000, c1: float = 0.001, c2: float = 0.008) -> np.ndarray:
    """[M + 1] float64 noise levels of the cosine chain in EDM's form, from the noisiest to 0."""
    signal = np.sin(0.5 * np.pi * np.arange(num_times + 1) / num_times / (c2 + 1)) ** 2
    sigmas = np.zeros(num_times + 1)
    for j in range(num_times, 0, -1):
        sigmas[j - 1] = np.sqrt((sigmas[j] ** 2 + 1) / max(signal[j - 1] / signal[j], c1) - 1)
    return sigmas


def _scaled_eps(level):
    one, zero = jnp.ones_like(level.alpha), jnp.zeros_like(level.alpha)
    norm = jnp.sqrt(level.alpha**2 + level.sigma**2)
    return Affine(1 / level.alpha, -level.sigma / level.alpha, 1 / norm, zero, one)


def target(parameterization: Parameterization, x0: Array, eps: Array, level: Level) -> Float[Array, "b ..."]:
    """What the network should have predicted: on_x0 x0 + on_eps eps. x0 and eps [B, ...], level [B]."""
    c = parameterization.coefficients(level)
    return expand(c.on_x0, x0) * x0 + expand(c.on_eps, eps) * eps


def to_x0(parameterization: Parameterization, f: Array, x_t: Array, level: Level) -> Float[Array, "b ..."]:
    """The clean data that the network's output f [B, ...] stands for at x_t."""
    c = parameterization.coefficients(level)
    return expand(c.skip, x_t) * x_t + expand(c.out, f) * f


def from_x0(parameterization: Parameterization, x0: Array, x_t: Array, level: Level) -> Float[Array, "b ..."]:
    """The output that stands for x0: the inverse of `to_x0`."""
    c = parameterization.coefficients(level)
    return (x0 - expand(c.skip, x_t) * x_t) / expand(c.out, x_t)


def require_defined(schedule: Schedule, parameterization: Parameterization) -> None:
    """Refuses a parameterisation that says nothing at the schedule's noisiest level.

    Raises:
      ValueError: if x0 does not follow from the output at t_max, as for eps at zero terminal SNR.
    """
    with jax.ensure_compile_time_eval():
        c = parameterization.coefficients(schedule.level(jnp.full([1], schedule.t_max, jnp.float32)))
        values = np.asarray(jnp.stack(c))
    if not np.isfinite(values).all():
        raise ValueError(
            f"this parameterization does not determine x0 at t = {schedule.t_max:g}, where alpha is 0; "
            "use v or x0 (not eps) with a zero-terminal-SNR or flow schedule"
        )

"""Noise schedules: t -> Level(alpha, sigma), with x_t = alpha x0 + sigma eps and t growing with noise.

A discrete chain of T steps uses t = 0 .. T-1, where index 0 already holds one step of noise; between indices
log(alpha) is linear, so that continuous-time solvers can use it. Continuous schedules use the unit of their paper:
[0, 1] for VP, cosine and rectified flow, sigma itself for VE/EDM, an angle for the trigonometric schedule.
Tables are NumPy float64 and are cast to the dtype of t when used. The clean end (alpha 1, sigma 0) is not a time.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from jaxdiff.types import Level

Betas = Float64[np.ndarray, " T"]


class Schedule(NamedTuple):
    """How noisy x_t is.

    Attributes:
      level: t [B] -> Level of [B].
      time: log(alpha / sigma) [B] -> t [B], the inverse of level.
      t_min: time of the least noisy real level.
      t_max: time of the noisiest level.
    """

    level: Callable[[Array], Level]
    time: Callable[[Array], Array]
    t_min: float
    t_max: float


class Tables(NamedTuple):
    """Every coefficient of a discrete chain, float64 [T], named as in the DDPM releases. Built by `tables`."""

    betas: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    alphas_cumprod_next: np.ndarray
    sqrt_alphas_cumprod: np.ndarray
    sqrt_one_minus_alphas_cumprod: np.ndarray
    log_one_minus_alphas_cumprod: np.ndarray
    sqrt_recip_alphas_cumprod: np.ndarray
    sqrt_recipm1_alphas_cumprod: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance_clipped: np.ndarray
    posterior_mean_coef1: np.ndarray
    posterior_mean_coef2: np.ndarray


def linear_betas(num_steps: int, start: float = 1e-4, end: float = 0.02, *, rescale: bool = True) -> Betas:
    """betas equally spaced between start and end, both multiplied by 1000 / num_steps if `rescale`.

    Raises:
      ValueError: if a beta leaves (0, 1], which the rescaling does for fewer than 20 steps.

    Source: Ho et al. 2020 (arXiv:2006.11239) section 4; the rescaling is Improved DDPM's.
    """
    scale = 1000 / num_steps if rescale else 1.0
    return checked(np.linspace(scale * start, scale * end, num_steps), "linear_betas")


def scaled_linear_betas(num_steps: int, start: float = 0.00085, end: float = 0.012) -> Betas:
    """Squares of equally spaced roots: "quad" in DDPM, "linear" in latent diffusion, "scaled_linear" elsewhere."""
    return checked(np.linspace(start**0.5, end**0.5, num_steps) ** 2, "scaled_linear_betas")


def sqrt_betas(num_steps: int, start: float = 1e-4, end: float = 0.02) -> Betas:
    """Square roots of equally spaced values. Latent diffusion's "sqrt"."""
    return checked(np.linspace(start, end, num_steps) ** 0.5, "sqrt_betas")


def constant_betas(num_steps: int, end: float = 0.02) -> Betas:
    """The same beta at every step. DDPM's "const"."""
    return checked(np.full(num_steps, end), "constant_betas")


def jsd_betas(num_steps: int) -> Betas:
    """1 / (T - t): 1/T, 1/(T-1), ..., 1. DDPM's "jsd"; its last level is pure noise."""
    return checked(1.0 / np.linspace(num_steps, 1, num_steps), "jsd_betas")


def warmup_betas(num_steps: int, fraction: float, start: float = 1e-4, end: float = 0.02) -> Betas:
    """A linear rise over the first `fraction` of the steps, then constant. DDPM's "warmup10" and "warmup50"."""
    betas = np.full(num_steps, end)
    rise = int(num_steps * fraction)
    betas[:rise] = np.linspace(start, end, rise)
    return checked(betas, "warmup_betas")


def sigmoid_betas(num_steps: int, start: float = 1e-4, end: float = 0.02) -> Betas:
    """A logistic curve over [-6, 6] between start and end. From the DDIM release."""
    return checked((end - start) / (1 + np.exp(-np.linspace(-6, 6, num_steps))) + start, "sigmoid_betas")


def cosine_betas(num_steps: int, offset: float = 0.008, max_beta: float = 0.999) -> Betas:
    """betas of alphas_cumprod(u) = cos^2((u + s) / (1 + s) pi / 2), each at most max_beta.

    alphas_cumprod is then the product of the clipped betas, not the cosine itself.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672) eq. 17.
    """
    u = np.arange(num_steps + 1, dtype=np.float64) / num_steps
    cumulative = np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2
    return checked(np.clip(1 - cumulative[1:] / cumulative[:-1], 0, max_beta), "cosine_betas")


def vp_betas(num_steps: int, beta_min: float = 0.1, beta_max: float = 20.0, *, t_min: float = 1e-3) -> Betas:
    """The chain of a few big steps along `vp_linear`: equal steps of its time from t_min to 1.

    The level at t_min counts as clean data: it is divided out, so that the first step adds all its noise to them.

    Args:
      num_steps: T.
      beta_min, beta_max: of `vp_linear`.
      t_min: where the data are.

    Source: Xiao et al. 2022 (arXiv:2112.07804) appendix B.
    """
    t = _coarse_times(num_steps, t_min)
    return _betas_between(np.exp(-0.5 * t**2 * (beta_max - beta_min) - t * beta_min), "vp_betas")


def geometric_betas(num_steps: int, start: float = 0.01, end: float = 0.98, *, t_min: float = 1e-3) -> Betas:
    """As `vp_betas`, along sigma^2 = start (end / start)^t. Source: an option of Xiao et al.'s release."""
    t = _coarse_times(num_steps, t_min)
    return _betas_between(1 - start * (end / start) ** t, "geometric_betas")


def zero_terminal_snr(betas: Betas) -> Betas:
    """Shifts and scales sqrt(alphas_cumprod) so that the last level holds no signal and the first stays.

    The result has alphas_cumprod[-1] = 0, where an eps-prediction says nothing about x0: use v.

    Source: Lin et al. 2023 (arXiv:2305.08891) algorithm 1.
    """
    root = np.sqrt(np.cumprod(1 - checked(betas, "zero_terminal_snr")))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    cumulative = root**2
    return 1 - np.append(cumulative[:1], cumulative[1:] / cumulative[:-1])


def truncate(betas: Betas, min_half_log_snr: float = -5.1) -> Float64[np.ndarray, " n"]:
    """Drops the noisiest steps, those with log(alpha / sigma) below the bound; DPM-Solver does so for cosine chains.

    The official DPM-Solver then also stretches the network's time by 1000 / len(result) (index 995 of 996 is given to
    the network as 999). Pass `net_time=lambda t: t` for the time the network was trained with, or
    `lambda t: t * (1000 / len(result))` for the official behaviour.
    """
    cumulative = np.cumprod(1 - betas)
    return betas[0.5 * (np.log(cumulative) - np.log1p(-cumulative)) >= min_half_log_snr]


def checked(betas: np.ndarray, name: str) -> Betas:
    """betas as float64 if they are a chain, all in (0, 1]."""
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size == 0:
        raise ValueError(f"{name}: betas must be a non-empty list, got shape {betas.shape}; use num_steps >= 1")
    if not ((betas > 0) & (betas <= 1)).all():
        raise ValueError(
            f"{name}: betas must lie in (0, 1], got {betas.min():.4g} to {betas.max():.4g} over {betas.size} steps; "
            "use more steps or a smaller range (a rescaled linear chain needs at least 20)"
        )
    return betas


def tables(betas: Betas) -> Tables:
    """All coefficients of the chain. The first posterior variance is 0; its clipped logarithm repeats the second."""
    betas = checked(betas, "tables")
    cumulative = np.cumprod(1 - betas)
    before = np.append(1.0, cumulative[:-1])
    with np.errstate(divide="ignore"):
        posterior_variance = betas * (1 - before) / (1 - cumulative)
        first = posterior_variance[1:2] if betas.size > 1 else betas
        return Tables(
            betas=betas,
            alphas_cumprod=cumulative,
            alphas_cumprod_prev=before,
            alphas_cumprod_next=np.append(cumulative[1:], 0.0),
            sqrt_alphas_cumprod=np.sqrt(cumulative),
            sqrt_one_minus_alphas_cumprod=np.sqrt(1 - cumulative),
            log_one_minus_alphas_cumprod=np.log(1 - cumulative),
            sqrt_recip_alphas_cumprod=np.sqrt(1 / cumulative),
            sqrt_recipm1_alphas_cumprod=np.sqrt(1 / cumulative - 1),
            posterior_variance=posterior_variance,
            posterior_log_variance_clipped=np.log(np.append(first, posterior_variance[1:])),
            posterior_mean_coef1=betas * np.sqrt(before) / (1 - cumulative),
            posterior_mean_coef2=(1 - before) * np.sqrt(1 - betas) / (1 - cumulative),
        )


def discrete(betas: Betas) -> Schedule:
    """The chain of these betas, t in [0, T-1]. log(alpha) is linear between indices and beyond the ends.

    Source: Ho et al. 2020 eq. 4 for the levels; Lu et al. 2022 (arXiv:2206.00927) appendix D.4 for the interpolation.
    """
    betas = checked(betas, "discrete")
    with np.errstate(divide="ignore"):
        log_alphas = 0.5 * np.cumsum(np.log1p(-betas))
    last = betas.size - 1

    def level(t):
        table = jnp.asarray(log_alphas, t.dtype)
        low = jnp.clip(jnp.floor(t), 0, max(last - 1, 0))
        index, w = low.astype(jnp.int32), t - low
        below, above = table[index], table[jnp.minimum(index + 1, last)]
        return from_log_alpha(jnp.where(w == 0, below, (1 - w) * below + w * above))

    def time(half_log_snr):
        table = jnp.asarray(log_alphas, half_log_snr.dtype)
        log_alpha = -0.5 * jax.nn.softplus(-2 * half_log_snr)
        index = jnp.clip(jnp.searchsorted(-table, -log_alpha) - 1, 0, max(last - 1, 0))
        below, above = table[index], table[jnp.minimum(index + 1, last)]
        t = index.astype(table.dtype) + (log_alpha - below) / (above - below)
        return jnp.where(jnp.isneginf(log_alpha), jnp.asarray(last, table.dtype), t)

    return Schedule(level, time, 0.0, float(last))


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> Schedule:
    """Variance preserving with beta(t) linear, t in [0, 1]: log(alpha) = -t^2 (b1 - b0) / 4 - t b0 / 2.

    Source: Song et al. 2021 (arXiv:2011.13456) eq. 33.
    """
    rise = beta_max - beta_min

    def time(half_log_snr):
        squared = 2 * rise * jax.nn.softplus(-2 * half_log_snr)
        return squared / ((jnp.sqrt(beta_min**2 + squared) + beta_min) * rise)

    return Schedule(lambda t: from_log_alpha(-(t**2) * rise / 4 - t * beta_min / 2), time, t_min, 1.0)


def cosine(log_snr_min: float = -20.0, log_snr_max: float = 20.0, shift: float = 0.0) -> Schedule:
    """Variance preserving with log SNR = -2 log tan(a t + b) + shift, t in [0, 1], bounded by log_snr_min and max.

    `shift` = 2 log(64 / resolution) moves a schedule made for 64 pixels to another resolution.

    Source: Salimans & Ho 2022 (arXiv:2202.00512) appendix; Hoogeboom et al. 2023 (arXiv:2301.11093) for the shift.
    """
    b = np.arctan(np.exp(-0.5 * log_snr_max))
    a = np.arctan(np.exp(-0.5 * log_snr_min)) - b

    def level(t):
        return from_half_log_snr(-jnp.log(jnp.tan(a * t + b)) + shift / 2)

    def time(half_log_snr):
        return (jnp.arctan(jnp.exp(shift / 2 - half_log_snr)) - b) / a

    return Schedule(level, time, 0.0, 1.0)


def squared_cosine(offset: float = 0.008) -> Schedule:
    """Variance preserving with alpha^2 = cos^2((t + offset) / (1 + offset) pi / 2), t in [0, 1]; alpha(1) = 0.

    The curve of `cosine_betas` at any time, neither clipped nor divided by its value at 0.

    Raises:
      ValueError: for an offset that is not positive: the level at 0 would hold no noise.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672) eq. 17; Xu et al. 2023 (arXiv:2306.12511), the release.
    """
    if not offset > 0:
        raise ValueError(f"squared_cosine: offset must be positive, got {offset}; 0.008 is usual")
    quarter = np.pi / 2 / (1 + offset)

    def level(t):
        # the angle from the noisy end: cos(pi / 2) is not 0 in float32
        return Level(jnp.sin((1 - t) * quarter), jnp.sin((t + offset) * quarter))

    return Schedule(level, lambda h: jnp.arctan(jnp.exp(-h)) / quarter - offset, 0.0, 1.0)


def ve(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Schedule:
    """Variance exploding: alpha = 1 and t is sigma itself. EDM's schedule.

    Source: Karras et al. 2022 (arXiv:2206.00364) table 1.
    """
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"ve: need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    return Schedule(lambda t: Level(jnp.ones_like(t), t), lambda h: jnp.exp(-h), sigma_min, sigma_max)


def rectified_flow(shift: float = 1.0, t_min: float = 1e-3) -> Schedule:
    """Straight lines: alpha = 1 - u, sigma = u with u = shift t / (1 + (shift - 1) t), t in [0, 1]. alpha(1) = 0.

    Source: Liu et al. 2022 (arXiv:2209.03003) eq. 1; Esser et al. 2024 (arXiv:2403.03206) eq. 23 for the shift.
    """
    if shift <= 0:
        raise ValueError(f"rectified_flow: shift must be positive, got {shift}; 1 is no shift")

    def level(t):
        u = shift * t / (1 + (shift - 1) * t)
        return Level((1 - t) / (1 + (shift - 1) * t), u)

    def time(half_log_snr):
        u = jax.nn.sigmoid(-half_log_snr)
        return u / (shift - (shift - 1) * u)

    return Schedule(level, time, t_min, 1.0)


def trigonometric(sigma_data: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Schedule:
    """alpha = cos t, sigma = sin t: t is an angle, arctan(sigma / sigma_data) of the EDM level of the same SNR.

    x_t is in units of the data deviation (x0 / sigma_data has unit variance).

    Source: Lu & Song 2024 (arXiv:2410.11081) section 3.
    """
    lowest, highest = np.arctan(sigma_min / sigma_data), np.arctan(sigma_max / sigma_data)
    return Schedule(lambda t: Level(jnp.cos(t), jnp.sin(t)), lambda h: jnp.arctan(jnp.exp(-h)), lowest, highest)


def from_log_alpha(log_alpha: Float[Array, " b"]) -> Level:
    """The variance-preserving level of this log(alpha) <= 0."""
    return Level(jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2 * log_alpha)))


def from_half_log_snr(half_log_snr: Float[Array, " b"]) -> Level:
    """The variance-preserving level of this log(alpha / sigma)."""
    return Level(jnp.sqrt(jax.nn.sigmoid(2 * half_log_snr)), jnp.sqrt(jax.nn.sigmoid(-2 * half_log_snr)))


def _coarse_times(num_steps, t_min):
    if num_steps < 1 or not 0 <= t_min < 1:
        raise ValueError(f"a chain needs num_steps >= 1 and t_min in [0, 1), got {num_steps} and {t_min}")
    return t_min + (1 - t_min) * np.arange(num_steps + 1) / num_steps


def _betas_between(alphas_cumprod, name):
    return checked(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], name)

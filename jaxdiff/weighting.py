"""How much each noise level counts in the loss: functions Level of [B] -> weight [B].

Squared errors of the same prediction in x0, eps or the network's own output differ by a factor that depends on the
level, so every docstring says which error its weight multiplies. `on_output` moves a weight from x0 to the output of
a parameterisation. The two tables at the end belong to the chains of latent diffusion. Nothing here draws a time:
`times` decides how often a level is seen.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from jaxdiff import process
from jaxdiff.parameterization import Parameterization
from jaxdiff.schedules import Betas, Schedule, tables
from jaxdiff.types import Level

Weighting = Callable[[Level], Array]


def uniform(level: Level) -> Float[Array, " b"]:
    """1: the error of the network's own output counts the same everywhere. DDPM's "simple" loss, for eps."""
    return jnp.ones_like(level.sigma)


def snr(level: Level) -> Float[Array, " b"]:
    """alpha^2 / sigma^2, on the x0 error: the same as the eps error unweighted."""
    return process.snr(level)


def snr_plus_one(level: Level) -> Float[Array, " b"]:
    """SNR + 1, on the x0 error: the same as the v error. Source: Salimans & Ho 2022 (arXiv:2202.00512) section 4."""
    return process.snr(level) + 1.0


def truncated_snr(level: Level) -> Float[Array, " b"]:
    """max(SNR, 1), on the x0 error. Source: Salimans & Ho 2022 (arXiv:2202.00512) section 4."""
    return jnp.maximum(process.snr(level), 1.0)


def min_snr(gamma: float = 5.0, parameterization: Parameterization | None = None) -> Weighting:
    """min(SNR, gamma) on the x0 error, expressed on the output of `parameterization`.

    That is min(SNR, gamma) for x0, min(SNR, gamma) / SNR for eps, and min(SNR, gamma) / (SNR + 1) for v on a
    variance-preserving schedule. Where SNR is 0 the weight is 1, as in the release.

    Args:
      gamma: bound, > 0.
      parameterization: what the loss is measured in, or None for x0.

    Source: Hang et al. 2023 (arXiv:2303.09556) section 3.4.
    """
    _positive("min_snr", "gamma", gamma)

    def clamped(level):
        return jnp.minimum(process.snr(level), gamma)

    def weight(level):
        value = (clamped if parameterization is None else on_output(clamped, parameterization))(level)
        return jnp.where(level.alpha == 0, jnp.ones_like(value), value)

    return weight


def p2(k: float = 1.0, gamma: float = 1.0) -> Weighting:
    """1 / (k + SNR)^gamma, on the eps error. Source: Choi et al. 2022 (arXiv:2204.00227) eq. 8."""
    _positive("p2", "k", k)
    return lambda level: (k + process.snr(level)) ** -gamma


def edm(sigma_data: float = 0.5) -> Weighting:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 of the ratio sigma / alpha, on the x0 error.

    On the output of `parameterization.edm` it is 1.

    Source: Karras et al. 2022 (arXiv:2206.00364) table 1.
    """
    _positive("edm", "sigma_data", sigma_data)
    return lambda level: process.snr(level) + sigma_data**-2


def sigmoid(bias: float) -> Weighting:
    """sigmoid(bias - log SNR), on the eps error: levels with log SNR above the bias count little.

    The papers weight an integral over log SNR. With another distribution of t, multiply by -d log SNR / dt and divide
    by the density of t. Kingma & Gao use 2; Hoogeboom et al. shift it with the resolution.

    Source: Kingma & Gao 2023 (arXiv:2303.00848) section 4.3; Hoogeboom et al. 2024 (arXiv:2410.19324).
    """
    return lambda level: jax.nn.sigmoid(bias - 2 * process.half_log_snr(level))


def inverse_gap(t: Level, s: Level) -> Float[Array, " b"]:
    """1 / (sigma_t / alpha_t - sigma_s / alpha_s): neighbouring levels count the more, the closer they are.

    On the distance between a consistency function's results at two levels of one path, t noisier than s.

    Source: Song & Dhariwal 2023 (arXiv:2310.14189) section 3.1.
    """
    return 1 / (t.sigma / t.alpha - s.sigma / s.alpha)


def on_output(weighting: Weighting, parameterization: Parameterization) -> Weighting:
    """The weight of the network's output error that equals `weighting` of the x0 error: weighting times out^2."""
    return lambda level: weighting(level) * parameterization.coefficients(level).out ** 2


def by_index(schedule: Schedule, table: Float64[np.ndarray, " T"]) -> Weighting:
    """A weight given as a table over the indices of a chain. `schedule` must be that chain's."""
    if schedule.t_max != table.size - 1:
        raise ValueError(
            f"by_index: the table has {table.size} entries, the chain {schedule.t_max + 1:g} steps; give one per step"
        )

    def weight(level):
        t = jnp.round(schedule.time(process.half_log_snr(level))).astype(jnp.int32)
        return jnp.asarray(table, level.alpha.dtype)[jnp.clip(t, 0, table.size - 1)]

    return weight


def posterior_variance(betas: Betas, beta_share: float = 0.0) -> Float64[np.ndarray, " T"]:
    """(1 - share) beta_tilde + share beta: a variance between the two fixed ones. Latent diffusion's `v_posterior`."""
    t = tables(betas)
    return (1 - beta_share) * t.posterior_variance + beta_share * t.betas


def elbo_eps(betas: Betas, beta_share: float = 0.0) -> Float64[np.ndarray, " T"]:
    """beta^2 / (2 variance alpha (1 - alphas_cumprod)): the weight that makes the eps error the likelihood bound.

    Entry 0, where the variance is 0, repeats entry 1. For `by_index`.

    Source: Ho et al. 2020 (arXiv:2006.11239) eq. 12; the first entry as in the latent diffusion release.
    """
    t = tables(betas)
    with np.errstate(divide="ignore"):
        weights = betas**2 / (2 * posterior_variance(betas, beta_share) * (1 - betas) * (1 - t.alphas_cumprod))
    return np.append(weights[1:2], weights[1:])


def release_elbo_x0(betas: Betas) -> Float64[np.ndarray, " T"]:
    """sqrt(alphas_cumprod) / 2 / (2 - alphas_cumprod), the latent diffusion release's bound weight for x0.

    Not the likelihood bound: "2 * 1 - a" in the release was probably meant as "2 * (1 - a)". For parity only.
    """
    cumulative = tables(betas).alphas_cumprod
    weights = 0.5 * np.sqrt(cumulative) / (2 - cumulative)
    return np.append(weights[1:2], weights[1:])


def _positive(name, what, value):
    if not value > 0:
        raise ValueError(f"{name}: {what} must be positive, got {value}")

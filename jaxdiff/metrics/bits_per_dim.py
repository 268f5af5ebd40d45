"""Bits per dimension: the variational bound of a discrete chain, term by term, for any denoiser and variance rule.

total = prior + sum over t of vb_t, with vb_t a Gaussian divergence for t > 0 and the decoder's likelihood at t = 0
(Ho et al. 2020 eq. 5). Each term is estimated with one noise draw per example, so average over many examples. The
bound counts uint8 images in [-1, 1]; for other data the term at t = 0 has no meaning. Probability-flow likelihoods
are not here.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from jaxdiff import losses, process, schedules
from jaxdiff.types import Denoiser, Key, Level, expand


class BitsPerDim(NamedTuple):
    """Terms of the bound in bits per dimension, and the errors seen on the way. Columns run from t = T - 1 down to 0.

    Attributes:
      total: [B], prior plus all of vb.
      prior: [B], divergence of the noisiest level from N(0, 1).
      vb: [B, T].
      x0_mse: [B, T], mean squared error of the predicted clean data.
      eps_mse: [B, T], mean squared error of the noise that follows from it.
    """

    total: Array
    prior: Array
    vb: Array
    x0_mse: Array
    eps_mse: Array


def bits_per_dim(
    denoise: Denoiser,
    betas: Float64[np.ndarray, " T"],
    variance: process.VarianceRule,
    key: Key,
    x0: Float[Array, "b ..."],
    *,
    noise: Array | None = None,
) -> BitsPerDim:
    """The bound on -log2 p(x0) per dimension.

    Args:
      denoise: takes t as float indices of the chain. Clip its x0 to [-1, 1], as the releases do in evaluation.
      betas: [T] of the chain, which may be a shorter one (`times.respace_betas`) if `denoise` maps its indices.
      variance: reverse variance, such as `process.fixed_large`; the learned ones need a denoiser with `variance_out`.
      key: for one noise draw per example and step.
      x0: [B, ...] in [-1, 1], multiples of 2/255 away from -1.
      noise: [T, B, ...] unit normal to use instead of drawing; noise[i] belongs to t = T - 1 - i.

    Returns:
      BitsPerDim.

    Raises:
      ValueError: if noise has another shape than [T, B, ...].

    Source: Ho et al. 2020 (arXiv:2006.11239) eq. 5; Nichol & Dhariwal 2021 (arXiv:2102.09672) section 3.
    """
    tables = schedules.tables(betas)
    num_steps, batch = betas.size, x0.shape[0]
    scales = (tables.sqrt_alphas_cumprod, tables.sqrt_one_minus_alphas_cumprod)
    if noise is not None and noise.shape != (num_steps, *x0.shape):
        raise ValueError(f"bits_per_dim: noise has shape {noise.shape}, expected {(num_steps, *x0.shape)}")

    def one(_, step):
        index, eps = step
        if noise is None:
            eps = jax.random.normal(jax.random.fold_in(key, index), x0.shape, x0.dtype)
        t = jnp.full([batch], index, jnp.int32)
        level = Level(*(jnp.asarray(a, x0.dtype)[t] for a in scales))
        x_t = process.q_sample(x0, eps, level)
        d = denoise(x_t, t.astype(x0.dtype))
        between = process.chain_bridge(tables, t, x0.dtype)
        vb = losses.vlb_term(x0, x_t, d.x0, between, variance(between, x0, d.variance_out), t == 0)
        return None, (vb, losses.mse(d.x0, x0), losses.mse(process.eps_from_x0(d.x0, x_t, level), eps))

    indices = jnp.arange(num_steps - 1, -1, -1, dtype=jnp.int32)
    _, (vb, x0_mse, eps_mse) = jax.lax.scan(one, None, (indices, noise))
    prior = prior_bits(tables, x0)
    return BitsPerDim(prior + vb.sum(axis=0), prior, vb.T, x0_mse.T, eps_mse.T)


def prior_bits(tables: schedules.Tables, x0: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """KL(q(x_T | x0) || N(0, 1)) in bits per dimension, [B]: what the noisiest level still says about x0."""
    mean = tables.sqrt_alphas_cumprod[-1].item() * x0
    log_variance = jnp.full([x0.shape[0]], tables.log_one_minus_alphas_cumprod[-1], x0.dtype)
    divergence = losses.gaussian_kl(mean, expand(log_variance, x0), jnp.zeros_like(x0), jnp.zeros_like(x0))
    return losses.mean_flat(divergence) / math.log(2.0)

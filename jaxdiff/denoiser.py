"""Network + parameters + conditioning -> Denoiser, and the wrappers that act on its x0.

A Denoiser answers (x_t, t) with x0, so clipping, thresholding and guidance are functions Denoiser -> Denoiser, and a
solver derives its own eps from the x0 that they leave.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.parameterization import Parameterization
from jaxdiff.schedules import Schedule
from jaxdiff.types import Cond, Denoised, Denoiser, Key, Network, Params, expand


def denoiser(
    network: Network,
    params: Params,
    schedule: Schedule,
    parameterization: Parameterization,
    cond: Cond | None = None,
    *,
    learned_variance: bool = False,
    train: bool = False,
    key: Key | None = None,
) -> Denoiser:
    """The denoiser of a network.

    Args:
      network: (params, x_t, t, cond) -> [B, ...].
      params: its parameters.
      schedule: gives the level of t.
      parameterization: what the network's output means.
      cond: conditioning arrays, leading axis B.
      learned_variance: the network has twice the channels; the second half becomes `variance_out`.
      train, key: for dropout.
    """

    def denoise(x_t, t):
        c = parameterization.coefficients(schedule.level(t))
        scaled = expand(c.scale_in, x_t) * x_t
        f = network(params, scaled, parameterization.net_time(t), cond or {}, train=train, key=key)
        f, variance_out = jnp.split(f, 2, axis=-1) if learned_variance else (f, None)
        return Denoised(expand(c.skip, x_t) * x_t + expand(c.out, f) * f, variance_out)

    return denoise


def map_x0(denoise: Denoiser, function: Callable[[Array], Array]) -> Denoiser:
    """Applies a function [B, ...] -> [B, ...] to every prediction of x0."""

    def mapped(x_t, t):
        d = denoise(x_t, t)
        return d._replace(x0=function(d.x0))

    return mapped


def clip_x0(denoise: Denoiser, bound: float = 1.0) -> Denoiser:
    """Clips x0 to [-bound, bound]: for images, never for latents. Source: the DDPM release's `clip_denoised`."""
    return map_x0(denoise, lambda x0: jnp.clip(x0, -bound, bound))


def threshold(x0: Float[Array, "b ..."], quantile: float = 0.995, max_value: float | None = None) -> Array:
    """Clips x0 to its own quantile s of |x0| (at least 1) and divides by s, example by example.

    Args:
      x0: [B, ...], nominally in [-1, 1].
      quantile: share of the values that stay unclipped.
      max_value: upper bound of s, or None for none.

    Source: Saharia et al. 2022 (arXiv:2205.11487) section 2.3.
    """
    s = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), jnp.asarray(quantile, x0.dtype), axis=1)
    s = expand(jnp.clip(s, 1.0, max_value), x0)
    return jnp.clip(x0, -s, s) / s


def dynamic_threshold(denoise: Denoiser, quantile: float = 0.995, max_value: float | None = None) -> Denoiser:
    """`threshold` on every prediction. Keeps high guidance from saturating images; not for latents."""
    return map_x0(denoise, lambda x0: threshold(x0, quantile, max_value))

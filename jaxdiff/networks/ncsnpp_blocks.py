"""The parts of NCSN++: residual block with FIR resampling, norm modulated by a latent, latent mapping, combiner.

The sum of two branches is divided by sqrt(2) where a network asks for it. Attention is `unet_blocks.AttentionBlock`,
resampling `fir`. Which part stands where is decided in `ncsnpp`.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxdiff.networks.fir import Taps, resize
from jaxdiff.networks.initializers import ZEROS, Normal, Rule, Uniform, fan_average, fan_average_tiny
from jaxdiff.networks.layers import Conv, Dense, GroupNorm, dropout
from jaxdiff.types import Key

EPS = 1e-6


def norm_groups(channels: int) -> int:
    """Groups of a norm: one for every four channels, at most 32."""
    return min(channels // 4, 32)


def fan_average_tenth(fan_in: int, fan_out: int) -> tuple[Rule, Rule]:
    """`fan_average` with a tenth of the variance: queries, keys and values."""
    return Uniform(math.sqrt(0.6 / (fan_in + fan_out))), ZEROS


@dataclasses.dataclass(frozen=True)
class OnesThenZeros(Rule):
    """The first half of a vector 1 (scales), the second 0 (offsets)."""

    def host(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        del generator
        return np.repeat(np.asarray([1, 0], np.float32), shape[0] // 2)

    def device(self, key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        del key
        return jnp.concatenate([jnp.ones(shape[0] // 2, dtype), jnp.zeros(shape[0] // 2, dtype)])


def modulation(fan_in: int, fan_out: int) -> tuple[Rule, Rule]:
    """Rule of a layer that gives scales and offsets: at a latent of zero it changes nothing."""
    return fan_average(fan_in, fan_out)[0], OnesThenZeros()


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and offset are a linear map of a latent, [scale | offset] = style(latent).

    Statistics are float32.

    Source: Xiao et al. 2022 (arXiv:2112.07804) appendix C.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], latent: Float[Array, "b z"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        groups = norm_groups(c)
        style = Dense(2 * c, modulation, name="style")(latent.astype(jnp.float32))
        scale, offset = jnp.split(style[:, None, None, :], 2, axis=-1)
        grouped = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(b, h, w, groups, c // groups)
        grouped = grouped - grouped.mean((1, 2, 4), keepdims=True)
        grouped = grouped * lax.rsqrt(jnp.square(grouped).mean((1, 2, 4), keepdims=True) + EPS)
        return (grouped.reshape(b, h, w, c) * scale + offset).astype(self.dtype)


class ResBlock(nn.Module):
    """conv(silu(norm(conv(resize(silu(norm(x)))) + time))) beside x, resized and projected if it has to be.

    Attributes:
      features: output channels.
      resample: "up" or "down" doubles or halves the image on both branches; "" keeps it.
      taps: filter of the resampling; None repeats pixels and takes 2x2 means.
      adaptive: how many of the two norms the latent modulates: 0, 1 (the first) or 2.
      rescale: divide the sum by sqrt(2).
      dropout: probability.
      dtype: compute dtype.

    Source: Song et al. 2021 (arXiv:2011.13456) appendix H; Xiao et al. 2022 (arXiv:2112.07804) appendix C for the
    latent.
    """

    features: int
    resample: str = ""
    taps: Taps | None = None
    adaptive: int = 0
    rescale: bool = True
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        emb: Float[Array, "b e"],
        latent: Float[Array, "b z"] | None,
        train: bool,
    ) -> Float[Array, "b h2 w2 o"]:
        def norm(name: str, a: Array, adaptive: bool) -> Array:
            if adaptive and latent is not None:
                return AdaptiveGroupNorm(self.dtype, name=name)(a, latent)
            return GroupNorm(norm_groups(a.shape[-1]), EPS, self.dtype, name=name)(a)

        h = resize(jax.nn.silu(norm("norm_in", x, self.adaptive > 0)), self.resample, self.taps)
        h = Conv(self.features, rule=fan_average, dtype=self.dtype, name="conv_in")(h)
        time = Dense(self.features, fan_average, dtype=self.dtype, name="time")(jax.nn.silu(emb.astype(self.dtype)))
        h = jax.nn.silu(norm("norm_out", h + time[:, None, None, :], self.adaptive > 1))
        h = dropout(self, h, self.dropout, train)
        h = Conv(self.features, rule=fan_average_tiny, dtype=self.dtype, name="conv_out")(h)
        x = resize(x, self.resample, self.taps)
        if self.resample or x.shape[-1] != self.features:
            x = Conv(self.features, 1, rule=fan_average, dtype=self.dtype, name="skip")(x)
        return scaled(x + h, self.rescale)


def scaled(total: Float[Array, "b h w c"], rescale: bool) -> Float[Array, "b h w c"]:
    """A sum of two branches, divided by sqrt(2) if asked: independent branches then keep their variance."""
    return total * jnp.asarray(math.sqrt(0.5), total.dtype) if rescale else total


class Combine(nn.Module):
    """Brings a small image into the features: added after a 1x1 convolution, or (concatenate) put before them."""

    concatenate: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "b h w i"], h: Float[Array, "b h w c"]) -> Float[Array, "b h w o"]:
        mapped = Conv(h.shape[-1], 1, rule=fan_average, dtype=self.dtype, name="conv")(image)
        return jnp.concatenate([mapped, h], axis=-1) if self.concatenate else mapped + h


class LatentMapping(nn.Module):
    """Scales a latent to unit mean square, then `layers` dense layers, each followed by SiLU.

    Source: Karras et al. 2019 (arXiv:1812.04948) section 2; Xiao et al. 2022 (arXiv:2112.07804) appendix C.
    """

    features: int
    layers: int

    @nn.compact
    def __call__(self, z: Float[Array, "b n"]) -> Float[Array, "b z"]:
        h = z * lax.rsqrt(jnp.square(z).mean(-1, keepdims=True) + 1e-8)
        for i in range(self.layers):
            h = jax.nn.silu(Dense(self.features, fan_average, name=f"dense_{i}")(h))
        return h


class FourierFeatures(nn.Module):
    """Sines, then cosines, of t at fixed random frequencies; the frequencies are kept with the parameters, untrained.

    Source: Tancik et al. 2020 (arXiv:2006.10739) eq. 5.
    """

    frequencies: int
    scale: float = 16.0

    @nn.compact
    def __call__(self, t: Float[Array, " b"]) -> Float[Array, "b f"]:
        drawn = self.param("frequencies", Normal(self.scale), (self.frequencies,), jnp.float32)
        angles = t.astype(jnp.float32)[:, None] * lax.stop_gradient(drawn)[None, :] * (2 * math.pi)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

"""Layers that several networks share: convolution, dense, norms, features of time, resampling.

Images are [B, H, W, C]. Every layer computes in its `dtype`; statistics of the norms and the features of time are
float32 whatever that is. Layers declare how their parameters start through `initializers`. Attention is in
`attention`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxdiff.networks.convolution import convolve, convolve_doubled
from jaxdiff.networks.initializers import ONES, ZEROS, LayerRule, Normal, torch_default

TimeFeatures = Callable[..., Array]


def _at_least_float32(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def sinusoidal_embedding(
    t: Float[Array, " b"],
    features: int,
    *,
    max_period: float = 10_000.0,
    sin_first: bool = False,
    frequency_shift: int = 0,
) -> Float[Array, "b features"]:
    """Cos and sin of t at geometrically spaced frequencies, exp(-ln(max_period) i / (half - frequency_shift)).

    Args:
      t: [B] times, meant to range over hundreds (0 to 999).
      features: width; an odd width ends with a zero.
      max_period: the slowest period over 2 pi.
      sin_first: whether the sines come first (DDPM) or the cosines (all later releases).
      frequency_shift: 1 makes the last frequency exactly 1/max_period (DDPM), 0 stops one short of it.

    Returns:
      [B, features] float32 in [-1, 1].

    Source: Vaswani et al. 2017 (arXiv:1706.03762) section 3.5, as used by Ho et al. 2020 (arXiv:2006.11239).
    """
    half = features // 2
    if half <= frequency_shift:
        raise ValueError(
            f"an embedding of {features} features with frequency_shift {frequency_shift} has no frequencies"
        )
    # In float32 as in the releases: at t near 1000 the last bit of a frequency shows in the fifth digit of the angle.
    decay = np.float32(-math.log(max_period) / (half - frequency_shift))
    frequencies = np.exp(np.arange(half, dtype=np.float32) * decay)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    parts = (jnp.sin(angles), jnp.cos(angles)) if sin_first else (jnp.cos(angles), jnp.sin(angles))
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, features % 2)))


def fourier_embedding(
    t: Float[Array, " b"], features: int, *, slowest: float = 0.25, fastest: float = 64.0
) -> Float[Array, "b features"]:
    """Cos and sin of t at `features // 2` angular frequencies spaced geometrically from `slowest` to `fastest`.

    For times of order 1: t in [0, 1], or ln(sigma)/4.

    Args:
      t: [B] times.
      features: width; an odd width ends with a zero.
      slowest: lowest angular frequency, radians per unit of t.
      fastest: highest angular frequency.

    Returns:
      [B, features] float32 in [-1, 1].
    """
    frequencies = np.geomspace(slowest, fastest, features // 2).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.pad(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1), ((0, 0), (0, features % 2)))


class Dense(nn.Module):
    """y = x kernel + bias over the last axis.

    Attributes:
      features: width of y.
      rule: how kernel and bias start.
      parts: number of equal maps fused along the output; each starts as a layer of its own.
      use_bias: whether there is a bias.
      dtype: compute dtype.
    """

    features: int
    rule: LayerRule = torch_default
    parts: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        width = x.shape[-1]
        kernel_rule, bias_rule = self.rule(width, self.features // self.parts)
        kernel = self.param("kernel", kernel_rule, (width, self.features), jnp.float32)
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if not self.use_bias:
            return y
        bias = self.param("bias", bias_rule, (self.features,), jnp.float32).astype(self.dtype)
        return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


class Conv(nn.Module):
    """Square convolution, kernel [K, K, I, O].

    Attributes:
      features: output channels.
      kernel_size: K, odd.
      stride: step of the output grid.
      asymmetric: pad only after the last row and column (a stride-2 convolution with "SAME" padding on even sizes)
        instead of K // 2 on each side.
      rule: how kernel and bias start.
      dtype: compute dtype.
      doubled: the image is doubled before, as by `upsample_nearest`; for K = 3 and stride 1 alone.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    asymmetric: bool = False
    rule: LayerRule = torch_default
    dtype: Any = jnp.float32
    doubled: bool = False

    def __post_init__(self):
        if self.doubled and (self.kernel_size != 3 or self.stride != 1 or self.asymmetric):
            raise ValueError(
                f"a convolution of doubled images has kernel_size 3, stride 1 and no asymmetric padding, got "
                f"{self.kernel_size}, {self.stride} and {self.asymmetric}; double the image before it"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        size, width = self.kernel_size, x.shape[-1]
        kernel_rule, bias_rule = self.rule(size * size * width, size * size * self.features)
        kernel = self.param("kernel", kernel_rule, (size, size, width, self.features), jnp.float32)
        bias = self.param("bias", bias_rule, (self.features,), jnp.float32)
        pad = (0, size - self.stride) if self.asymmetric else None
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        y = convolve_doubled(x, kernel) if self.doubled else convolve(x, kernel, self.stride, pad)
        return y + bias.astype(self.dtype).reshape(1, 1, 1, -1)


class GroupNorm(nn.Module):
    """Normalises groups of channels over the image, in float32, then scales and shifts each channel.

    One pass gathers sums of x and x^2 per channel. Both are taken of x minus the value at the first position (averaged
    over the group), which changes nothing in exact arithmetic and keeps the digits when the mean is large against the
    spread.

    Attributes:
      groups: number of groups; divides the channels.
      eps: added to the variance.
      dtype: dtype of the result.

    Source: Wu and He 2018 (arXiv:1803.08494) eq. 1-2 and section 3.1.
    """

    groups: int = 32
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        c = x.shape[-1]
        if c % self.groups:
            raise ValueError(
                f"{c} channels do not split into {self.groups} groups; change the width or the group count"
            )
        scale = self.param("scale", ONES, (c,), jnp.float32)
        bias = self.param("bias", ZEROS, (c,), jnp.float32)
        return _group_norm(x, scale, bias, self.groups, self.eps, self.dtype)


# A network has dozens of these in few shapes: under jit each shape is traced, differentiated and lowered once.
@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _group_norm(x: Array, scale: Array, bias: Array, groups: int, eps: float, dtype: Any) -> Array:
    b, _, _, c = x.shape
    x = x.astype(_at_least_float32(x.dtype))

    def over_group(a: Array) -> Array:
        mean = a.reshape(b, groups, c // groups).mean(-1, keepdims=True)
        return jnp.broadcast_to(mean, (b, groups, c // groups)).reshape(b, c)

    # The shift is a constant for the gradient: mean and variance of x do not depend on it.
    shift = over_group(lax.stop_gradient(x[:, 0, 0, :]))
    x = x - shift[:, None, None, :]
    mean = over_group(x.mean((1, 2)))
    variance = jnp.maximum(over_group(jnp.square(x).mean((1, 2))) - jnp.square(mean), 0.0)
    factor = lax.rsqrt(variance + eps) * scale.astype(x.dtype)[None]
    offset = bias.astype(x.dtype)[None] - mean * factor
    return (x * factor[:, None, None, :] + offset[:, None, None, :]).astype(dtype)


class LayerNorm(nn.Module):
    """Normalises the last axis, in float32, then scales and shifts it.

    Source: Ba et al. 2016 (arXiv:1607.06450) eq. 3-4.
    """

    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        broadcast = (1,) * (x.ndim - 1) + (-1,)
        scale = self.param("scale", ONES, (x.shape[-1],), jnp.float32).reshape(broadcast)
        bias = self.param("bias", ZEROS, (x.shape[-1],), jnp.float32).reshape(broadcast)
        x = x.astype(_at_least_float32(x.dtype))
        x = x - x.mean(-1, keepdims=True)
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return (x * scale.astype(x.dtype) + bias.astype(x.dtype)).astype(self.dtype)


class LabelEmbedding(nn.Module):
    """A table of `num_labels` rows, standard normal at the start. A label outside it gives NaN, not a neighbour."""

    num_labels: int
    features: int

    @nn.compact
    def __call__(self, label: Int[Array, " b"]) -> Float[Array, "b features"]:
        table = self.param("embedding", Normal(1.0), (self.num_labels, self.features), jnp.float32)
        # Negative labels would wrap around like NumPy indices.
        index = jnp.where(label < 0, self.num_labels, label)
        return jnp.take(table, index, axis=0, mode="fill", fill_value=jnp.nan)


def dropout(module: nn.Module, x: Float[Array, "..."], rate: float, train: bool) -> Float[Array, "..."]:
    """Drops entries of x with probability `rate` while training, with the module's "dropout" key."""
    if not train or rate == 0.0:
        return x
    if not module.has_rng("dropout"):
        raise ValueError(f"train=True with dropout {rate} needs a random key; pass key=...")
    kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def upsample_nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Doubles height and width by repeating each pixel."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def downsample_mean(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Halves height and width by the mean of 2x2 pixels."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))

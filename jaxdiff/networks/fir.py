"""Resampling of images with a small separable filter: insert zeros, pad, filter, keep every n-th pixel.

`upfirdn` is the operation; the rest says with which filter and padding images are doubled, halved, and convolved
while halving or doubling. A filter is given by its taps along one axis and is applied along height, then width.
Nearest and mean resampling are in `layers`.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxdiff.networks.convolution import convolve
from jaxdiff.networks.initializers import LayerRule, fan_average
from jaxdiff.networks.layers import Conv, downsample_mean, upsample_nearest

Taps = Sequence[float]


def upfirdn(
    x: Float[Array, "b h w c"], taps: Taps, *, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)
) -> Float[Array, "b h2 w2 c"]:
    """Puts `up - 1` zeros after each pixel, pads, convolves with the taps, and keeps every `down`-th pixel.

    Args:
      x: [B, H, W, C].
      taps: K weights, used along both axes as they are; the 2-D kernel is their outer product.
      up: factor of the zero insertion, at least 1.
      down: step of the output grid, at least 1.
      pad: zeros before and after each row and column, counted after the insertion; negative numbers crop.

    Returns:
      [B, H2, W2, C] in the dtype of x; H2 = (up H + pad[0] + pad[1] - K) // down + 1.

    Raises:
      ValueError: a factor below 1, no taps, or an image that padding leaves smaller than the filter.

    Source: Karras et al. 2020 (arXiv:1912.04958) appendix B, the operation of its released code.
    """
    if up < 1 or down < 1 or not len(taps):
        raise ValueError(f"upfirdn needs factors of at least 1 and at least one tap, got up {up}, down {down}, {taps}")
    for axis in (1, 2):
        config = [(0, 0, 0)] * 4
        config[axis] = (pad[0], pad[1] + up - 1, up - 1)
        padded = lax.pad(x, jnp.zeros((), x.dtype), config)
        size = (padded.shape[axis] - len(taps)) // down + 1
        if size < 1:
            raise ValueError(
                f"axis {axis} of {x.shape} has {padded.shape[axis]} pixels after padding, fewer than the {len(taps)} "
                "taps; use a larger image"
            )
        # A convolution turns the filter around; sums of slices are fast where a grouped convolution is not.
        slices = (lax.slice_in_dim(padded, i, i + (size - 1) * down + 1, down, axis) for i in range(len(taps)))
        weights = (jnp.asarray(tap, x.dtype) for tap in reversed(taps))
        x = functools.reduce(operator.add, (part * weight for part, weight in zip(slices, weights, strict=True)))
    return x


def normalized(taps: Taps, gain: float = 1.0) -> tuple[float, ...]:
    """The taps scaled so that they sum to `gain`."""
    total = float(np.sum(taps))
    if total == 0:
        raise ValueError(f"filter taps must not sum to zero, got {tuple(taps)}")
    return tuple(float(tap) * gain / total for tap in taps)


def upsample_fir(
    x: Float[Array, "b h w c"], taps: Taps, *, factor: int = 2, gain: float = 1.0
) -> Float[Array, "b h2 w2 c"]:
    """Enlarges an image by `factor`, keeping constants (times `gain`) inside it."""
    pad = len(taps) - factor
    out = upfirdn(x, normalized(taps, float(factor)), up=factor, pad=((pad + 1) // 2 + factor - 1, pad // 2))
    return out if gain == 1.0 else out * jnp.asarray(gain, out.dtype)


def downsample_fir(x: Float[Array, "b h w c"], taps: Taps, *, factor: int = 2) -> Float[Array, "b h2 w2 c"]:
    """Shrinks an image by `factor`, keeping constants inside it."""
    pad = len(taps) - factor
    return upfirdn(x, normalized(taps), down=factor, pad=((pad + 1) // 2, pad // 2))


def downsample_conv(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"], taps: Taps
) -> Float[Array, "b h2 w2 o"]:
    """Filters an image and convolves it with stride 2; both share one padding with zeros."""
    pad = len(taps) - 2 + kernel.shape[0] - 1
    return convolve(upfirdn(x, normalized(taps), pad=((pad + 1) // 2, pad // 2)), kernel, 2, (0, 0))


def upsample_conv(x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"], taps: Taps) -> Float[Array, "b h2 w2 o"]:
    """Convolves the image with zeros between its pixels and filters the result, which is twice as large."""
    size = kernel.shape[0]
    spread = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 1), (0, 0, 1), (0, 0, 0)])
    wide = convolve(spread, kernel, 1, (size - 1, size - 1))
    pad = len(taps) - 2 - (size - 1)
    return upfirdn(wide, normalized(taps, 2.0), pad=((pad + 1) // 2 + 1, pad // 2 + 1))


def resize(x: Float[Array, "b h w c"], direction: str, taps: Taps | None) -> Float[Array, "b h2 w2 c"]:
    """Doubles ("up"), halves ("down") or keeps ("") an image; without taps by repeating pixels and 2x2 means."""
    if not direction:
        return x
    if taps is None:
        return upsample_nearest(x) if direction == "up" else downsample_mean(x)
    return upsample_fir(x, taps) if direction == "up" else downsample_fir(x, taps)


class Resample(nn.Module):
    """Doubles or halves an image with a 3x3 convolution in the same step.

    Without taps: a stride-2 convolution padded after the last row and column, or one after repeating pixels.

    Attributes:
      features: output channels.
      direction: "up" or "down".
      taps: the filter, or None.
      rule: how the convolution starts.
      dtype: compute dtype.
    """

    features: int
    direction: str
    taps: Taps | None = None
    rule: LayerRule = fan_average
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        if self.taps is None:
            down = self.direction == "down"
            x = x if down else upsample_nearest(x)
            stride = 2 if down else 1
            return Conv(self.features, 3, stride, down, self.rule, self.dtype, name="conv")(x)
        conv = _FilteredConv(self.features, self.direction, tuple(self.taps), self.rule, self.dtype, name="conv")
        return conv(x)


class _FilteredConv(nn.Module):
    features: int
    direction: str
    taps: Taps
    rule: LayerRule
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        kernel_rule, bias_rule = self.rule(9 * width, 9 * self.features)
        kernel = self.param("kernel", kernel_rule, (3, 3, width, self.features), jnp.float32).astype(self.dtype)
        bias = self.param("bias", bias_rule, (self.features,), jnp.float32).astype(self.dtype)
        apply = upsample_conv if self.direction == "up" else downsample_conv
        return apply(x.astype(self.dtype), kernel, self.taps) + bias.reshape(1, 1, 1, -1)

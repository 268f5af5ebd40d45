"""The patch discriminator of pix2pix, VQGAN and latent diffusion: one logit for each overlapping patch of an image.

Its batch norms keep running statistics, which are neither parameters nor hidden: they go in and come out, and whoever
trains keeps them. In training each call normalises by its own batch, so real and reconstructed images are two calls,
one after the other. Losses on the logits are not here.
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

from jaxdiff.networks.initializers import ZEROS, Normal, Rule, Uniform
from jaxdiff.types import Key, Params

SLOPE = 0.2
EPS = 1e-5
MOMENTUM = 0.1
"""Share of the new batch in a running statistic."""


@dataclasses.dataclass(frozen=True)
class NearOne(Rule):
    """Normal with mean 1 and standard deviation 0.02: scales of the norms."""

    def host(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return np.float32(1) + np.float32(0.02) * generator.standard_normal(shape, np.float32)

    def device(self, key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return (1 + 0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


class PatchDiscriminator(nn.Module):
    """4x4 convolutions with batch norms and leaky ReLUs; `num_layers` of the num_layers + 2 halve the image.

    Kernels start normal with deviation 0.02, scales of norms normal around 1 with the same deviation.

    Attributes:
      in_channels: channels of the images.
      base_channels: width after the first convolution; it doubles with each, up to eight times.
      num_layers: convolutions of stride 2; 3 sees patches of 70 pixels.
      dtype: compute dtype. Norms and the last layer are float32.

    Source: Isola et al. 2017 (arXiv:1611.07004) section 3.2.2 and appendix 6.1.2; Esser et al. 2021
    (arXiv:2012.09841) section 3.1.
    """

    in_channels: int = 3
    base_channels: int = 64
    num_layers: int = 3
    dtype: Any = jnp.float32

    def __post_init__(self):
        if self.num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {self.num_layers}")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], statistics: Params, *, train: bool = False
    ) -> tuple[Float[Array, "b h2 w2 1"], Params]:
        """Judges images.

        Args:
          x: [B, H, W, in_channels] in [-1, 1].
          statistics: running statistics, at first `initial_statistics(module)`.
          train: normalise by this batch and update the statistics; otherwise normalise by the statistics.

        Returns:
          Logits [B, h, w, 1] float32, positive for "real", and the statistics after this call.

        Raises:
          ValueError: images are too small or have other channels.
        """
        smallest = 2 ** (self.num_layers + 1) + 2**self.num_layers
        if x.ndim != 4 or x.shape[-1] != self.in_channels or min(x.shape[1:3]) < smallest:
            raise ValueError(
                f"this discriminator takes images [B, H, W, {self.in_channels}] of at least {smallest} pixels a side, "
                f"got {list(x.shape)}; pass larger images or a smaller num_layers"
            )
        updated = {}
        h = _conv(self, "conv_0", x, self.base_channels, 2, bias=True)
        for i in range(1, self.num_layers + 1):
            h = jax.nn.leaky_relu(h, SLOPE)
            width = layer_channels(self, i)
            h = _conv(self, f"conv_{i}", h, width, 2 if i < self.num_layers else 1, bias=False)
            norm = f"norm_{i}"
            h, updated[norm] = BatchNorm(self.dtype, name=norm)(h, statistics[norm], train)
        h = jax.nn.leaky_relu(h, SLOPE).astype(jnp.float32)
        return _conv(self, "conv_out", h, 1, 1, bias=True), updated


class BatchNorm(nn.Module):
    """Normalises channels over batch and positions in float32, then scales and shifts them.

    The running variance is the unbiased one, the variance of the batch that normalises it the biased one.

    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167) algorithms 1 and 2.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], statistics: dict[str, Array], train: bool
    ) -> tuple[Float[Array, "b h w c"], dict[str, Array]]:
        c = x.shape[-1]
        scale = self.param("scale", NearOne(), (c,), jnp.float32)
        bias = self.param("bias", ZEROS, (c,), jnp.float32)
        x = x.astype(jnp.float32)
        mean, variance = statistics["mean"], statistics["variance"]
        if train:
            mean = x.mean((0, 1, 2))
            variance = jnp.square(x - mean.reshape(1, 1, 1, c)).mean((0, 1, 2))
            statistics = _move(statistics, mean, variance, math.prod(x.shape[:3]))
        factor = scale * lax.rsqrt(variance + EPS)
        y = (x - mean.reshape(1, 1, 1, c)) * factor.reshape(1, 1, 1, c) + bias.reshape(1, 1, 1, c)
        return y.astype(self.dtype), statistics


def initial_statistics(discriminator: PatchDiscriminator) -> Params:
    """Mean 0, variance 1 and count 0 of every norm: {norm_i: {mean, variance, count}}."""

    def start(width: int) -> dict[str, Array]:
        zero = jnp.zeros((), jnp.int32)
        return {"mean": jnp.zeros(width, jnp.float32), "variance": jnp.ones(width, jnp.float32), "count": zero}

    return {f"norm_{i}": start(layer_channels(discriminator, i)) for i in range(1, discriminator.num_layers + 1)}


def layer_channels(discriminator: PatchDiscriminator, layer: int) -> int:
    """Width after convolution `layer`, 0 to num_layers."""
    return discriminator.base_channels * min(2**layer, 8)


def example_inputs(discriminator: PatchDiscriminator, batch: int = 1) -> tuple[Any, Params]:
    """Images and statistics of a discriminator for `init_params`; parameters do not depend on H and W."""
    size = 2 ** (discriminator.num_layers + 2)
    image = jax.ShapeDtypeStruct((batch, size, size, discriminator.in_channels), jnp.float32)
    return image, initial_statistics(discriminator)


def _move(statistics: dict[str, Array], mean: Array, variance: Array, count: int) -> dict[str, Array]:
    if count < 2:
        raise ValueError("a batch norm in training needs more than one value a channel; pass more or larger images")
    batch = lax.stop_gradient({"mean": mean, "variance": variance * (count / (count - 1))})
    moved = {name: (1 - MOMENTUM) * statistics[name] + MOMENTUM * value for name, value in batch.items()}
    return moved | {"count": statistics["count"] + 1}


class _Conv(nn.Module):
    """4x4 convolution padded by 1 on all sides."""

    features: int
    stride: int
    bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        width = x.shape[-1]
        kernel = self.param("kernel", Normal(0.02), (4, 4, width, self.features), jnp.float32)
        y = lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if not self.bias:
            return y
        bias = self.param("bias", Uniform(1 / math.sqrt(16 * width)), (self.features,), jnp.float32)
        return y + bias.astype(self.dtype).reshape(1, 1, 1, -1)


def _conv(module: PatchDiscriminator, name: str, x: Array, features: int, stride: int, *, bias: bool) -> Array:
    return _Conv(features, stride, bias, jnp.float32 if name == "conv_out" else module.dtype, name=name)(x)

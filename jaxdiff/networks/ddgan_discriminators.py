"""The discriminators of DDGAN: is x_s, seen beside the noisier x_t it is said to come from, real?

Residual blocks with leaky ReLUs that halve the image by a FIR filter, a channel with the deviation within the batch,
and one logit. The published networks are the presets `ddgan_small_discriminator` (32 pixels) and
`ddgan_large_discriminator` (256 pixels). Losses and the R1 penalty are not here; second derivatives work.

Source: Xiao et al. 2022 (arXiv:2112.07804) appendix C; Karras et al. 2018 (arXiv:1710.10196) section 3 for the
deviation within the batch.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.networks.base import check_cond
from jaxdiff.networks.fir import downsample_fir
from jaxdiff.networks.initializers import LayerRule, fan_average, fan_average_tiny
from jaxdiff.networks.layers import Conv, Dense, sinusoidal_embedding
from jaxdiff.types import Cond

SLOPE = 0.2
FIR = (1.0, 3.0, 3.0, 1.0)
GROUP = 4
EPS = 1e-8


class DDGANDiscriminator(nn.Module):
    """One logit for each pair (x_s, x_t).

    Attributes:
      in_channels: channels of x_s and of x_t.
      base_channels: unit of width.
      channel_mult: width of each block over base_channels; before the first it is 2 base_channels.
      halves: whether each block halves the image.
      time_features: width of the time embedding.
      final_rule: how the last convolution starts.
      dtype: compute dtype. The time embedding, the deviation within the batch and the logit are float32.

    Raises:
      ValueError: when built, if fields contradict each other; when first called, if the inputs do not fit them.
    """

    in_channels: int = 3
    base_channels: int = 64
    channel_mult: Sequence[int] = (2, 4, 8, 8)
    halves: Sequence[bool] = (False, True, True, True)
    time_features: int = 256
    final_rule: LayerRule = fan_average_tiny
    dtype: Any = jnp.float32

    def __post_init__(self):
        if not self.channel_mult or len(self.channel_mult) != len(self.halves):
            raise ValueError(
                f"channel_mult {tuple(self.channel_mult)} and halves {tuple(self.halves)} need one entry for each block"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x_s: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        cond: Cond,
        *,
        train: bool = False,
        return_features: bool = False,
    ) -> Float[Array, " b"] | tuple[Float[Array, " b"], dict[str, Array]]:
        """Judges pairs.

        Args:
          x_s: [B, H, W, in_channels], the less noisy one; B at most 4 or a multiple of 4, H and W divisible by 2
            for each block that halves.
          t: [B] index of the step, 0 for the one that ends at clean data.
          cond: "x_t", the noisier one, in the shape of x_s.
          train: no effect: nothing is dropped.
          return_features: also return "time" and the output of each block and of the last convolution, by name.

        Returns:
          [B] float32 logits, positive for "real", or these and the features.
        """
        del train
        _check_inputs(self, x_s, cond)
        emb = sinusoidal_embedding(t, self.time_features, sin_first=True, frequency_shift=1)
        emb = _lrelu(Dense(self.time_features, fan_average, name="time_in")(emb))
        emb = Dense(self.time_features, fan_average, name="time_out")(emb)
        features = {"time": emb}
        emb = _lrelu(emb)

        h = jnp.concatenate([x_s, cond["x_t"].astype(x_s.dtype)], axis=-1)
        h = Conv(2 * self.base_channels, 1, rule=fan_average, dtype=self.dtype, name="conv_in")(h)
        for i, (mult, halve) in enumerate(zip(self.channel_mult, self.halves, strict=True)):
            h = PairBlock(mult * self.base_channels, halve, self.dtype, name=f"block_{i}")(h, emb)
            features[f"block_{i}"] = h
        h = append_batch_deviation(h)
        h = Conv(h.shape[-1] - 1, rule=self.final_rule, dtype=self.dtype, name="conv_out")(h)
        features["conv_out"] = h
        h = _lrelu(h.astype(jnp.float32)).sum((1, 2))
        logit = Dense(1, fan_average, name="logit")(h)[:, 0]
        return (logit, features) if return_features else logit


class PairBlock(nn.Module):
    """(conv(lrelu(conv(lrelu(x)) + time)) + skip(x)) / sqrt(2), perhaps at half the size.

    The 1x1 convolution of x stands in every block, also where the widths are equal, and has no bias.
    """

    features: int
    halve: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"]) -> Float[Array, "b h2 w2 o"]:
        h = Conv(self.features, rule=fan_average, dtype=self.dtype, name="conv_in")(_lrelu(x))
        h = h + Dense(self.features, fan_average, dtype=self.dtype, name="time")(emb)[:, None, None, :]
        h = _lrelu(h)
        if self.halve:
            h, x = downsample_fir(h, FIR), downsample_fir(x, FIR)
        h = Conv(self.features, rule=fan_average_tiny, dtype=self.dtype, name="conv_out")(h)
        skip = Dense(self.features, fan_average, use_bias=False, dtype=self.dtype, name="skip")(x)
        return (h + skip) * jnp.asarray(1 / math.sqrt(2), h.dtype)


def append_batch_deviation(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c1"]:
    """One more channel: the standard deviation over the examples of a group, averaged over positions and channels.

    A batch makes B/4 groups of four; example i belongs to group i mod (B/4). A batch of up to four is one group.

    Raises:
      ValueError: a larger batch is not a multiple of four.
    """
    b, height, width, c = x.shape
    size = min(b, GROUP)
    if b % size:
        raise ValueError(
            f"the deviation within a batch is taken over groups of {GROUP}, got {b} examples; pad or crop, and with "
            f"accumulate make batch_size / accumulate, the micro-batch seen here, a multiple of {GROUP}"
        )
    groups = x.astype(jnp.float32).reshape(size, b // size, height, width, c)
    deviation = jnp.sqrt(jnp.square(groups - groups.mean(0, keepdims=True)).mean(0) + EPS).mean((1, 2, 3))
    channel = jnp.broadcast_to(deviation[None], (size, b // size)).reshape(b, 1, 1, 1)
    return jnp.concatenate([x, jnp.broadcast_to(channel, (b, height, width, 1)).astype(x.dtype)], axis=-1)


def ddgan_small_discriminator() -> DDGANDiscriminator:
    """The network for CIFAR-10 at 32 pixels, 12.742 M parameters."""
    return DDGANDiscriminator()


def ddgan_large_discriminator() -> DDGANDiscriminator:
    """The network for CelebA-HQ and LSUN at 256 pixels, 27.737 M parameters."""
    return DDGANDiscriminator(channel_mult=(4, 8, 8, 8, 8, 8), halves=(True,) * 6, final_rule=fan_average)


def example_inputs(discriminator: DDGANDiscriminator, batch: int = 1) -> tuple[Any, Any, dict[str, Any]]:
    """The smallest inputs as shapes, for `init_params`; parameters do not depend on H and W."""
    size = 2 ** sum(discriminator.halves)
    image = jax.ShapeDtypeStruct((batch, size, size, discriminator.in_channels), jnp.float32)
    return image, jax.ShapeDtypeStruct((batch,), jnp.float32), {"x_t": image}


def _lrelu(x: Array) -> Array:
    return jax.nn.leaky_relu(x, SLOPE)


def _check_inputs(discriminator: DDGANDiscriminator, x_s: Array, cond: Cond) -> None:
    check_cond(cond, {"x_t"}, {"x_t"}, "DDGANDiscriminator")
    factor = 2 ** sum(discriminator.halves)
    fits = x_s.ndim == 4 and x_s.shape[-1] == discriminator.in_channels
    if not fits or x_s.shape[1] % factor or x_s.shape[2] % factor:
        raise ValueError(
            f"x_s must be [B, H, W, {discriminator.in_channels}] with H and W divisible by {factor} for this "
            f"discriminator, got {x_s.shape}"
        )
    if cond["x_t"].shape != x_s.shape:
        raise ValueError(f"cond['x_t'] must have the shape of x_s, {x_s.shape}, got {cond['x_t'].shape}")

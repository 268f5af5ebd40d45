"""What the first stages of latent diffusion share: residual block, encoder, decoder, and the fields of both.

An encoder halves the image between levels, a decoder doubles it; each level has residual blocks, some have attention,
and a middle of block, attention, block stands at the coarsest. `level_plan` lists the steps of either in order: the
modules walk that list and so do the importers of published weights. What happens to the latent between the two is in
`autoencoder_kl` and `autoencoder_vq`; how to train them is not here.

Source: Esser et al. 2021 (arXiv:2012.09841) appendix A.2; Rombach et al. 2022 (arXiv:2112.10752) appendix E.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.networks.initializers import LayerRule, torch_default
from jaxdiff.networks.layers import Conv, GroupNorm, dropout
from jaxdiff.networks.unet_blocks import AttentionBlock, Downsample, Upsample

NORM_EPS = 1e-6


class Step(NamedTuple):
    """One step of an encoder or decoder.

    Attributes:
      name: of its module, or for a block the part before `_res` and `_attention`.
      channels: width after it.
      attention: whether a block is followed by attention.
      resample: "down" or "up" if it changes the resolution instead of being a block.
    """

    name: str
    channels: int
    attention: bool = False
    resample: str = ""


class Levels(nn.Module):
    """The fields that an encoder, a decoder and an autoencoder of both have in common.

    Attributes:
      base_channels: unit of width.
      channel_mult: width of each level over base_channels, finest level first; each level halves the image.
      num_res_blocks: residual blocks a level in the encoder; one more in the decoder.
      attention_factors: downsampling factors (1, 2, 4, ...) that have attention, of one head.
      mid_attention: whether the middle has attention.
      norm_groups: groups of the group norms.
      dropout: probability in residual blocks.
      layer_rule: how layers start.
      dtype: compute dtype of the blocks. Norms, softmax, the last layers and the latent are float32.
      remat: recompute each block in the backward pass instead of storing it.
    """

    base_channels: int = 128
    channel_mult: Sequence[int] = (1, 2, 4)
    num_res_blocks: int = 2
    attention_factors: Sequence[int] = ()
    mid_attention: bool = True
    norm_groups: int = 32
    dropout: float = 0.0
    layer_rule: LayerRule = torch_default
    dtype: Any = jnp.float32
    remat: bool = False

    def __post_init__(self):
        _check_levels(self)
        super().__post_init__()

    def shared(self) -> dict[str, Any]:
        """The common fields by name, to hand on to a part."""
        names = {field.name for field in dataclasses.fields(Levels)} - {"parent", "name"}
        return {name: getattr(self, name) for name in names}


class Trunk(Levels):
    """What an encoder and a decoder build by: a walk along the steps of a plan, and the middle."""

    def walk(self, steps: Sequence[Step], h: Array, train: bool) -> Array:
        """Applies the steps in order."""
        for step in steps:
            if step.resample == "down":
                h = Downsample(True, self.layer_rule, self.dtype, name=step.name)(h)
            elif step.resample == "up":
                h = Upsample(self.layer_rule, self.dtype, name=step.name)(h)
            else:
                h = self._res_block(f"{step.name}_res", step.channels)(h, train)
                h = self._attention(f"{step.name}_attention")(h) if step.attention else h
        return h

    def middle(self, h: Array, train: bool) -> Array:
        """Block, attention, block at the coarsest level."""
        channels = level_channels(self, len(self.channel_mult) - 1)
        h = self.walk([Step("mid", channels, self.mid_attention)], h, train)
        return self._res_block("mid_res_out", channels)(h, train)

    def _res_block(self, name: str, channels: int) -> nn.Module:
        block = nn.remat(AutoencoderResBlock, static_argnums=(2,)) if self.remat else AutoencoderResBlock
        return block(channels, self.norm_groups, self.dropout, self.layer_rule, self.dtype, name=name)

    def _attention(self, name: str) -> nn.Module:
        block = nn.remat(AttentionBlock) if self.remat else AttentionBlock
        rule = self.layer_rule
        return block(1, self.norm_groups, NORM_EPS, rule, output_rule=rule, dtype=self.dtype, name=name)


class AutoencoderResBlock(nn.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))))))): a residual block that knows no time.

    Attributes:
      features: output channels; where they differ from the input, x goes through a 1x1 convolution.
      groups: groups of the norms, whose eps is 1e-6.
      dropout: probability.
      rule: how layers start, the last one too.
      dtype: compute dtype.
    """

    features: int
    groups: int = 32
    dropout: float = 0.0
    rule: LayerRule = torch_default
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool = False) -> Float[Array, "b h w o"]:
        h = jax.nn.silu(GroupNorm(self.groups, NORM_EPS, self.dtype, name="norm_in")(x))
        h = Conv(self.features, rule=self.rule, dtype=self.dtype, name="conv_in")(h)
        h = jax.nn.silu(GroupNorm(self.groups, NORM_EPS, self.dtype, name="norm_out")(h))
        h = dropout(self, h, self.dropout, train)
        h = Conv(self.features, rule=self.rule, dtype=self.dtype, name="conv_out")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, kernel_size=1, rule=self.rule, dtype=self.dtype, name="skip")(x)
        return x + h


class Encoder(Trunk):
    """Image [B, H, W, C] to features [B, H / f, W / f, features], f = 2^(levels - 1).

    Attributes:
      features: output channels: the channels of the latent, or twice as many where each comes with a variance.
    """

    features: int = 3

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool = False) -> Float[Array, "b h2 w2 o"]:
        h = Conv(level_channels(self, 0), rule=self.layer_rule, dtype=self.dtype, name="conv_in")(x)
        h = self.walk(level_plan(self).encoder, h, train)
        h = self.middle(h, train)
        h = jax.nn.silu(GroupNorm(self.norm_groups, NORM_EPS, name="norm_out")(h))
        return Conv(self.features, rule=self.layer_rule, name="conv_out")(h)


class Decoder(Trunk):
    """Features [B, h, w, z] to an image [B, h f, w f, features], f = 2^(levels - 1).

    Attributes:
      features: output channels.
    """

    features: int = 3

    @nn.compact
    def __call__(self, z: Float[Array, "b h w z"], train: bool = False) -> Float[Array, "b h2 w2 o"]:
        width = level_channels(self, len(self.channel_mult) - 1)
        h = Conv(width, rule=self.layer_rule, dtype=self.dtype, name="conv_in")(z)
        h = self.middle(h, train)
        h = self.walk(level_plan(self).decoder, h, train)
        h = jax.nn.silu(GroupNorm(self.norm_groups, NORM_EPS, name="norm_out")(h))
        return Conv(self.features, rule=self.layer_rule, name="conv_out")(h)


class FirstStage(Levels):
    """Fields and parts of a whole autoencoder: encoder, 1x1 convolution, latent, 1x1 convolution, decoder.

    Attributes:
      in_channels: channels of the images.
      out_channels: channels of the reconstructions.
      z_channels: channels that the encoder gives and the decoder takes.
      embed_dim: channels of the latent between the two convolutions.
    """

    in_channels: int = 3
    out_channels: int = 3
    z_channels: int = 3
    embed_dim: int = 3

    def parts(self, features: int, embedded: int) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        """Encoder with `features` outputs, quant_conv with `embedded`, post_quant_conv, decoder; only in `setup`."""
        return (
            Encoder(**self.shared(), features=features),
            Conv(embedded, kernel_size=1, rule=self.layer_rule),
            Conv(self.z_channels, kernel_size=1, rule=self.layer_rule),
            Decoder(**self.shared(), features=self.out_channels),
        )


class LevelPlan(NamedTuple):
    """The steps between `conv_in` and the middle of an encoder, and between the middle and `norm_out` of a decoder."""

    encoder: tuple[Step, ...]
    decoder: tuple[Step, ...]


def level_plan(levels: Levels) -> LevelPlan:
    """The steps of a configuration, in order: what the modules build and what importers rename."""
    encoder: list[Step] = []
    decoder: list[Step] = []
    last = len(levels.channel_mult) - 1
    for level in range(last + 1):
        width, attends = level_channels(levels, level), 2**level in levels.attention_factors
        encoder += [Step(f"down_{level}_{i}", width, attends) for i in range(levels.num_res_blocks)]
        if level < last:
            encoder.append(Step(f"down_{level}_downsample", width, resample="down"))
    for level in range(last, -1, -1):
        width, attends = level_channels(levels, level), 2**level in levels.attention_factors
        decoder += [Step(f"up_{level}_{i}", width, attends) for i in range(levels.num_res_blocks + 1)]
        if level > 0:
            decoder.append(Step(f"up_{level}_upsample", width, resample="up"))
    return LevelPlan(tuple(encoder), tuple(decoder))


def level_channels(levels: Levels, level: int) -> int:
    """Width of a level."""
    return levels.channel_mult[level] * levels.base_channels


def downsampling_factor(levels: Levels) -> int:
    """Side of an image over the side of its latent."""
    return 2 ** (len(levels.channel_mult) - 1)


def example_input(autoencoder: FirstStage, batch: int = 1) -> jax.ShapeDtypeStruct:
    """The smallest images of an autoencoder as a shape, for `init_params`; parameters do not depend on H and W."""
    size = downsampling_factor(autoencoder)
    return jax.ShapeDtypeStruct((batch, size, size, autoencoder.in_channels), jnp.float32)


def check_images(autoencoder: FirstStage, x: Array) -> None:
    """Refuses images that an autoencoder was not built for.

    Raises:
      ValueError: wrong number of axes or channels, or sides that the downsampling factor does not divide.
    """
    factor, channels = downsampling_factor(autoencoder), autoencoder.in_channels
    if x.ndim != 4 or x.shape[-1] != channels or x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(
            f"this autoencoder takes images [B, H, W, {channels}] with H and W divisible by {factor}, got "
            f"{list(x.shape)}; resize or crop them"
        )


def check_latent(autoencoder: FirstStage, z: Array) -> None:
    """Refuses latents of another autoencoder.

    Raises:
      ValueError: wrong number of axes or channels.
    """
    if z.ndim != 4 or z.shape[-1] != autoencoder.embed_dim:
        raise ValueError(
            f"this autoencoder decodes latents [B, h, w, {autoencoder.embed_dim}], got {list(z.shape)}; "
            "decode with the autoencoder that encoded them"
        )


def _check_levels(levels: Levels) -> None:
    if not levels.channel_mult or levels.num_res_blocks < 1:
        raise ValueError(
            f"an autoencoder needs at least one level and one residual block a level, got channel_mult "
            f"{levels.channel_mult} and num_res_blocks {levels.num_res_blocks}"
        )
    factors = [2**level for level in range(len(levels.channel_mult))]
    if absent := sorted(set(levels.attention_factors) - set(factors)):
        raise ValueError(f"attention_factors {absent} do not occur in this autoencoder; its levels have {factors}")
    if not 0 <= levels.dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {levels.dropout}")

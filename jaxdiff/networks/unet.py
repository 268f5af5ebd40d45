"""One UNet family: DDPM, Improved DDPM, ADM and its super-resolution model, latent diffusion, Stable Diffusion.

The releases differ in switches (order of the time features, where the time enters a block, how images are resampled,
which attention stands where), not in structure, so they are fields of one module. `unet_plan` lists the steps of a
configuration; the module walks that list and so do the importers of published weights. The UNet knows times only as
numbers to embed: no schedule, no noise. Published settings are in `unet_presets`.
"""

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.networks.base import check_cond
from jaxdiff.networks.initializers import LayerRule, torch_default, zeros
from jaxdiff.networks.layers import (
    Conv,
    Dense,
    GroupNorm,
    LabelEmbedding,
    downsample_mean,
    sinusoidal_embedding,
    upsample_nearest,
)
from jaxdiff.networks.unet_blocks import AttentionBlock, Downsample, ResBlock, SpatialTransformer, Upsample
from jaxdiff.types import Cond

RESAMPLE = ("conv", "plain", "resblock")
COND_KEYS = {"label", "context", "low_res", "concat", "vector", "guidance"}


class Block(NamedTuple):
    """A residual block and perhaps attention after it (heads 0: none; depth 0: an attention block)."""

    name: str
    channels: int
    heads: int
    depth: int


class Resample(NamedTuple):
    """A step between two resolutions."""

    name: str
    channels: int


class Plan(NamedTuple):
    """The steps of a UNet in order. Every down step, and the first convolution before them, leaves a skip."""

    down: tuple[Block | Resample, ...]
    mid: Block
    up: tuple[Block | Resample, ...]


class UNet(nn.Module):
    """The UNet of DDPM and its successors.

    Attributes:
      in_channels: channels of x_t.
      out_channels: channels of the result; twice in_channels where a variance is learned.
      base_channels: unit of width; times are embedded in as many features, and then in four times as many.
      channel_mult: width of each level over base_channels, finest level first; each level halves the image.
      num_res_blocks: residual blocks a level on the way down; one more on the way up.
      attention_factors: downsampling factors (1, 2, 4, ...) that have attention.
      num_heads: heads of attention, one number or one a level. None with head_channels None means 1.
      head_channels: channels of a head, instead of num_heads.
      num_heads_up: heads on the way up, if different.
      mid_attention: whether the middle has attention.
      transformer_depth: 0 for attention blocks, else the depth of spatial transformers, one number or one a level.
      context_dim: width of cond["context"] [B, N, D], which transformers attend to; None if there is none.
      num_classes: number of classes for cond["label"] [B] int; None if there is none.
      null_label: one more row in the table, label num_classes, meaning "no class".
      vector_dim: width of cond["vector"] [B, D], embedded and added to the time; None if there is none.
      guidance_dim: features of cond["guidance"] [B], a scale that distillation built in; None if there is none.
      low_res_channels: channels of cond["low_res"] [B, h, w, C], resized bilinearly and concatenated; 0 for none.
      concat_channels: channels of cond["concat"] [B, H, W, C], concatenated as it is; 0 for none.
      scale_shift_norm: time scales and shifts the second norm of a block instead of being added before it.
      resample: "conv" (convolution), "plain" (2x2 mean and nearest, without parameters) or "resblock".
      asymmetric_padding: stride-2 convolutions pad only after the last row and column.
      norm_groups: groups of the group norms.
      norm_eps: eps of the group norms, those of transformers excepted.
      sin_first: see `layers.sinusoidal_embedding`.
      frequency_shift: see `layers.sinusoidal_embedding`.
      dropout: probability in residual blocks.
      layer_rule: how layers start.
      output_rule: how the last layer of each branch and of the network starts.
      dtype: compute dtype of the blocks. Embeddings, norms, softmax and the last layer are float32.
      remat: recompute each block in the backward pass instead of storing it.

    Raises:
      ValueError: when built, if fields contradict each other; when first called, if x_t or cond do not fit them.

    Source: Ho et al. 2020 (arXiv:2006.11239) appendix B; Nichol and Dhariwal 2021 (arXiv:2102.09672); Dhariwal and
    Nichol 2021 (arXiv:2105.05233) section 3; Rombach et al. 2022 (arXiv:2112.10752) section 3.3.
    """

    in_channels: int = 3
    out_channels: int = 3
    base_channels: int = 128
    channel_mult: Sequence[int | float] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_factors: Sequence[int] = ()
    num_heads: int | Sequence[int] | None = None
    head_channels: int | None = None
    num_heads_up: int | None = None
    mid_attention: bool = True
    transformer_depth: int | Sequence[int] = 0
    context_dim: int | None = None
    num_classes: int | None = None
    null_label: bool = False
    vector_dim: int | None = None
    guidance_dim: int | None = None
    low_res_channels: int = 0
    concat_channels: int = 0
    scale_shift_norm: bool = False
    resample: str = "conv"
    asymmetric_padding: bool = False
    norm_groups: int = 32
    norm_eps: float = 1e-5
    sin_first: bool = False
    frequency_shift: int = 0
    dropout: float = 0.0
    layer_rule: LayerRule = torch_default
    output_rule: LayerRule = zeros
    dtype: Any = jnp.float32
    remat: bool = False

    def __post_init__(self):
        _check_fields(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x_t: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        cond: Cond,
        *,
        train: bool = False,
        control: Sequence[Array] | None = None,
        return_features: bool = False,
    ) -> Float[Array, "b h w o"] | tuple[Float[Array, "b h w o"], dict[str, Array]]:
        """Applies the network.

        Args:
          x_t: [B, H, W, in_channels]; H and W divisible by 2^(levels - 1).
          t: [B] times, as the network is to embed them.
          cond: exactly the arrays the fields ask for.
          train: whether dropout is on; then a "dropout" key is needed.
          control: residuals added to the skips in the order they were made, and last to the middle.
          return_features: also return the activation after each step, by the step's name in `unet_plan`, and
            "conv_in".

        Returns:
          [B, H, W, out_channels] float32, or that and the features.
        """
        check_inputs(self, x_t, cond)
        plan = unet_plan(self)
        if control is not None and len(control) != len(plan.down) + 2:
            raise ValueError(f"control needs {len(plan.down) + 2} residuals for this UNet, got {len(control)}")
        emb = self._embed(t, cond)
        features = {}

        h = x_t
        if self.low_res_channels:
            low_res = cond["low_res"].astype(x_t.dtype)
            h = jnp.concatenate([h, jax.image.resize(low_res, (*h.shape[:3], low_res.shape[-1]), "bilinear")], axis=-1)
        if self.concat_channels:
            h = jnp.concatenate([h, cond["concat"].astype(x_t.dtype)], axis=-1)
        width = level_channels(self, 0)
        h = Conv(width, rule=self.layer_rule, dtype=self.dtype, name="conv_in")(h)
        skips = [h]
        features["conv_in"] = h
        for step in plan.down:
            if isinstance(step, Resample):
                h = self._resample(step, "down", h, emb, train)
            else:
                h = self._block(step, h, emb, cond, train)
            skips.append(h)
            features[step.name] = h

        h = self._block(plan.mid, h, emb, cond, train)
        h = self._res_block("mid_res_out", plan.mid.channels)(h, emb, train)
        features["mid"] = h
        if control is not None:
            skips = [skip + c.astype(skip.dtype) for skip, c in zip(skips, control[:-1], strict=True)]
            h = h + control[-1].astype(h.dtype)

        for step in plan.up:
            if isinstance(step, Resample):
                h = self._resample(step, "up", h, emb, train)
            else:
                h = self._block(step, jnp.concatenate([h, skips.pop()], axis=-1), emb, cond, train)
            features[step.name] = h

        h = jax.nn.silu(GroupNorm(self.norm_groups, self.norm_eps, name="norm_out")(h))
        out = Conv(self.out_channels, rule=self.output_rule, name="conv_out")(h)
        return (out, features) if return_features else out

    def _embed(self, t: Array, cond: Cond) -> Array:
        width = 4 * self.base_channels
        emb = sinusoidal_embedding(
            t, self.base_channels, sin_first=self.sin_first, frequency_shift=self.frequency_shift
        )
        if self.guidance_dim is not None:
            w = sinusoidal_embedding(1000 * cond["guidance"], self.guidance_dim, sin_first=True, frequency_shift=1)
            emb = emb + Dense(self.base_channels, zeros, use_bias=False, name="guidance")(w)
        emb = Dense(width, self.layer_rule, name="time_in")(emb)
        emb = Dense(width, self.layer_rule, name="time_out")(jax.nn.silu(emb))
        if self.num_classes is not None:
            emb = emb + LabelEmbedding(self.num_classes + self.null_label, width, name="label")(cond["label"])
        if self.vector_dim is not None:
            vector = Dense(width, self.layer_rule, name="vector_in")(cond["vector"].astype(jnp.float32))
            emb = emb + Dense(width, self.layer_rule, name="vector_out")(jax.nn.silu(vector))
        return emb

    def _res_block(self, name: str, channels: int, resample: str = "") -> nn.Module:
        block = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock
        return block(
            features=channels,
            scale_shift_norm=self.scale_shift_norm,
            resample=resample,
            groups=self.norm_groups,
            eps=self.norm_eps,
            dropout=self.dropout,
            rule=self.layer_rule,
            output_rule=self.output_rule,
            dtype=self.dtype,
            name=name,
        )

    def _block(self, step: Block, h: Array, emb: Array, cond: Cond, train: bool) -> Array:
        h = self._res_block(f"{step.name}_res", step.channels)(h, emb, train)
        if not step.heads:
            return h
        shared = {
            "groups": self.norm_groups,
            "rule": self.layer_rule,
            "output_rule": self.output_rule,
            "dtype": self.dtype,
        }
        if step.depth:
            block = nn.remat(SpatialTransformer) if self.remat else SpatialTransformer
            return block(step.heads, step.depth, **shared, name=f"{step.name}_attention")(h, cond.get("context"))
        block = nn.remat(AttentionBlock) if self.remat else AttentionBlock
        return block(step.heads, eps=self.norm_eps, **shared, name=f"{step.name}_attention")(h)

    def _resample(self, step: Resample, direction: str, h: Array, emb: Array, train: bool) -> Array:
        if self.resample == "resblock":
            return self._res_block(step.name, step.channels, direction)(h, emb, train)
        if self.resample == "plain":
            return downsample_mean(h) if direction == "down" else upsample_nearest(h)
        if direction == "down":
            return Downsample(self.asymmetric_padding, self.layer_rule, self.dtype, name=step.name)(h)
        return Upsample(self.layer_rule, self.dtype, name=step.name)(h)


def level_channels(unet: UNet, level: int) -> int:
    """Width of a level; rounded down, as the published networks with fractional multipliers do."""
    return int(unet.channel_mult[level] * unet.base_channels)


def unet_plan(unet: UNet) -> Plan:
    """The steps of a configuration, in order: what the module builds and what importers rename."""

    def block(name: str, level: int, attends: bool, heads: int | Sequence[int] | None) -> Block:
        channels = level_channels(unet, level)
        if not attends:
            return Block(name, channels, 0, 0)
        if unet.head_channels is not None:
            count, rest = divmod(channels, unet.head_channels)
        else:
            count = heads[level] if isinstance(heads, Sequence) else heads or 1
            rest = channels % count
        if rest or count < 1:
            asked = f"heads of {unet.head_channels} channels" if unet.head_channels is not None else f"{count} heads"
            raise ValueError(f"{name} has {channels} channels, which do not split into {asked}; change either")
        depth = unet.transformer_depth
        return Block(name, channels, count, depth[level] if isinstance(depth, Sequence) else depth)

    down: list[Block | Resample] = []
    up: list[Block | Resample] = []
    last = len(unet.channel_mult) - 1
    heads_up = unet.num_heads if unet.num_heads_up is None else unet.num_heads_up
    for level in range(last + 1):
        attends = 2**level in unet.attention_factors
        down += [block(f"down_{level}_{i}", level, attends, unet.num_heads) for i in range(unet.num_res_blocks)]
        if level < last:
            down.append(Resample(f"down_{level}_downsample", level_channels(unet, level)))
    for level in range(last, -1, -1):
        attends = 2**level in unet.attention_factors
        up += [block(f"up_{level}_{i}", level, attends, heads_up) for i in range(unet.num_res_blocks + 1)]
        if level > 0:
            up.append(Resample(f"up_{level}_upsample", level_channels(unet, level)))
    return Plan(tuple(down), block("mid", last, unet.mid_attention, unet.num_heads), tuple(up))


def example_inputs(unet: UNet, batch: int = 1) -> tuple[Any, Any, dict[str, Any]]:
    """The smallest inputs of a UNet as shapes, for `init_params`; parameters do not depend on H and W."""
    size = 2 ** (len(unet.channel_mult) - 1)

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *shape), jnp.float32)

    cond = {}
    if unet.num_classes is not None:
        cond["label"] = jax.ShapeDtypeStruct((batch,), jnp.int32)
    if unet.context_dim is not None:
        cond["context"] = floats(1, unet.context_dim)
    if unet.vector_dim is not None:
        cond["vector"] = floats(unet.vector_dim)
    if unet.guidance_dim is not None:
        cond["guidance"] = floats()
    if unet.low_res_channels:
        cond["low_res"] = floats(size, size, unet.low_res_channels)
    if unet.concat_channels:
        cond["concat"] = floats(size, size, unet.concat_channels)
    return floats(size, size, unet.in_channels), floats(), cond


def _check_fields(unet: UNet) -> None:
    if not unet.channel_mult or unet.num_res_blocks < 1:
        raise ValueError(
            f"a UNet needs at least one level and one residual block a level, got channel_mult {unet.channel_mult} and "
            f"num_res_blocks {unet.num_res_blocks}"
        )
    if unet.resample not in RESAMPLE:
        close = difflib.get_close_matches(unet.resample, RESAMPLE, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"resample must be one of {RESAMPLE}, got {unet.resample!r}{hint}")
    if not 0 <= unet.dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {unet.dropout}")
    if unet.num_heads is not None and unet.head_channels is not None:
        raise ValueError(f"give num_heads or head_channels, not both (got {unet.num_heads} and {unet.head_channels})")
    if unet.num_heads_up is not None and unet.head_channels is not None:
        raise ValueError("num_heads_up has no effect with head_channels; drop one of them")
    levels = len(unet.channel_mult)
    for name in ("num_heads", "transformer_depth"):
        value = getattr(unet, name)
        if isinstance(value, Sequence) and len(value) != levels:
            raise ValueError(f"{name} {tuple(value)} needs one entry for each of the {levels} levels")
    depths = unet.transformer_depth if isinstance(unet.transformer_depth, Sequence) else [unet.transformer_depth]
    if unet.context_dim is not None and 0 in depths:
        raise ValueError(
            f"context_dim {unet.context_dim} needs a transformer_depth of at least 1, got {unet.transformer_depth}"
        )
    if unet.null_label and unet.num_classes is None:
        raise ValueError("null_label needs num_classes")
    factors = [2**level for level in range(levels)]
    for factor in unet.attention_factors:
        if factor not in factors:
            raise ValueError(f"attention factor {factor} never occurs: {levels} levels have factors {factors}")
    for level in range(levels):
        channels = level_channels(unet, level)
        if channels < 1 or channels % unet.norm_groups:
            raise ValueError(
                f"level {level} has {channels} channels, which do not split into {unet.norm_groups} norm groups; "
                "change base_channels, channel_mult or norm_groups"
            )
    unet_plan(unet)


def check_inputs(unet: UNet, x_t: Array, cond: Cond) -> None:
    """Refuses images and conditioning that a UNet is not built for."""
    needed = {
        "label": unet.num_classes is not None,
        "context": unet.context_dim is not None,
        "vector": unet.vector_dim is not None,
        "guidance": unet.guidance_dim is not None,
        "low_res": unet.low_res_channels > 0,
        "concat": unet.concat_channels > 0,
    }
    check_cond(cond, {name for name, used in needed.items() if used}, COND_KEYS, "UNet")
    if x_t.ndim != 4 or x_t.shape[-1] != unet.in_channels:
        raise ValueError(f"x_t must be [B, H, W, {unet.in_channels}] for this UNet, got {x_t.shape}")
    factor = 2 ** (len(unet.channel_mult) - 1)
    if x_t.shape[1] % factor or x_t.shape[2] % factor:
        raise ValueError(
            f"height and width must be divisible by {factor} for {len(unet.channel_mult)} levels, got "
            f"{x_t.shape[1]} x {x_t.shape[2]}; resize the images or use fewer levels"
        )
    widths = {
        "context": unet.context_dim,
        "vector": unet.vector_dim,
        "low_res": unet.low_res_channels,
        "concat": unet.concat_channels,
    }
    for name, width in widths.items():
        if name in cond and cond[name].shape[-1] != width:
            raise ValueError(f"cond[{name!r}] must have {width} channels for this UNet, got shape {cond[name].shape}")
    if "concat" in cond and cond["concat"].shape[:3] != x_t.shape[:3]:
        raise ValueError(f"cond['concat'] {cond['concat'].shape} must have the batch, height and width of {x_t.shape}")

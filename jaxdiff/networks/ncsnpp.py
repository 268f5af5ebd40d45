"""NCSN++ and DDPM++: the UNet of score-based models, of consistency models on CIFAR-10, of EDM and of DDGAN.

The releases differ in switches (features of time, filter of the resampling, what carries the image past the blocks,
whether a latent modulates the norms), so they are fields of one module. `ncsnpp_parts` lists the parts of a
configuration in the order in which they run; the module walks that list and so do the importers of published weights.
The network knows times only as numbers to embed. Published settings are in `ncsnpp_presets`. Networks without time,
and images that are not in [-1, 1], are not here.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.networks.base import check_cond
from jaxdiff.networks.fir import Resample, Taps, resize
from jaxdiff.networks.initializers import fan_average, fan_average_tiny
from jaxdiff.networks.layers import Conv, Dense, GroupNorm, sinusoidal_embedding
from jaxdiff.networks.ncsnpp_blocks import (
    EPS,
    Combine,
    FourierFeatures,
    LatentMapping,
    ResBlock,
    fan_average_tenth,
    norm_groups,
    scaled,
)
from jaxdiff.networks.unet_blocks import AttentionBlock
from jaxdiff.types import Cond

COND_KEYS = {"label", "augment", "z"}
CHOICES = {
    "time_features": ("positional", "fourier"),
    "resample": ("block", "conv", "plain"),
    "input_pyramid": ("none", "skip", "residual"),
    "output_pyramid": ("none", "skip", "residual"),
    "combine": ("sum", "cat"),
}


class Part(NamedTuple):
    """One part of the network.

    Attributes:
      kind: "fourier", "time", "conv_in", "block", "attention", "resample", "shrink" and "combine" (image pyramid of
        the input), "grow", "norm" and "conv" (image pyramid of the output, or the end).
      name: of the submodule, and of the feature.
      inputs: channels that come in.
      features: channels that go out.
      direction: "up" or "down" where the size changes.
      push: the result is kept for the way up.
      pop: what was kept last is put beside the input.
      source: the feature a "conv" reads, a norm's.
    """

    kind: str
    name: str
    inputs: int
    features: int
    direction: str = ""
    push: bool = False
    pop: bool = False
    source: str = ""


class NCSNpp(nn.Module):
    """NCSN++ and DDPM++.

    Attributes:
      in_channels: channels of x_t.
      out_channels: channels of the result.
      base_channels: unit of width.
      channel_mult: width of each level over base_channels, finest level first; each level halves the image.
      num_res_blocks: residual blocks a level on the way down; one more on the way up.
      attention_factors: downsampling factors (1, 2, 4, ...) that have attention: after each block on the way down,
        after the last block of a level on the way up. The middle always has it.
      time_features: "positional" (base_channels sines and cosines, t in hundreds) or "fourier" (twice as many at
        random frequencies, t of order 1).
      fourier_scale: standard deviation of the random frequencies.
      resample: how levels are linked: "block" (residual blocks that resize), "conv" or "plain" (without parameters).
      taps: filter of every change of size; None repeats pixels and takes 2x2 means (or stride-2 convolutions).
      input_pyramid: the input, made smaller, is joined to each level: "skip" (resized and combined), "residual"
        (by convolutions, added), or "none".
      output_pyramid: "skip" (every level adds to an image that is enlarged), "residual" (by convolutions, added to
        the features), or "none".
      combine: "sum" or "cat", for input_pyramid "skip".
      rescale: sums of two branches are divided by sqrt(2).
      num_classes: number of classes for cond["label"] [B] int, where num_classes means "no class"; None: no label.
      augment_dim: width of cond["augment"] [B, D], which may be left out (zeros); None if there is none.
      z_dim: width of cond["z"] [B, D], the latent of a generator; None if there is none.
      z_features: width of the mapped latent.
      z_layers: dense layers of its mapping.
      adaptive_norms: norms in a block that z modulates, 2 or 1.
      tanh: the result goes through tanh.
      dropout: probability in residual blocks.
      dtype: compute dtype of the blocks. Embeddings, norms, softmax and the last layer are float32.
      remat: recompute each block in the backward pass instead of storing it.

    Raises:
      ValueError: when built, if fields contradict each other; when first called, if x_t or cond do not fit them.

    Source: Song et al. 2021 (arXiv:2011.13456) section 4.3 and appendix H; Karras et al. 2022 (arXiv:2206.00364)
    appendix F; Song et al. 2023 (arXiv:2303.01469) appendix C; Xiao et al. 2022 (arXiv:2112.07804) appendix C.
    """

    in_channels: int = 3
    out_channels: int = 3
    base_channels: int = 128
    channel_mult: Sequence[int] = (2, 2, 2)
    num_res_blocks: int = 4
    attention_factors: Sequence[int] = (2,)
    time_features: str = "positional"
    fourier_scale: float = 16.0
    resample: str = "block"
    taps: Taps | None = None
    input_pyramid: str = "none"
    output_pyramid: str = "none"
    combine: str = "sum"
    rescale: bool = True
    num_classes: int | None = None
    augment_dim: int | None = None
    z_dim: int | None = None
    z_features: int = 256
    z_layers: int = 1
    adaptive_norms: int = 2
    tanh: bool = False
    dropout: float = 0.0
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
        return_features: bool = False,
    ) -> Float[Array, "b h w o"] | tuple[Float[Array, "b h w o"], dict[str, Array]]:
        """Applies the network.

        Args:
          x_t: [B, H, W, in_channels]; H and W divisible by 2^(levels - 1).
          t: [B] times, as the network is to embed them.
          cond: the arrays the fields ask for.
          train: whether dropout is on; then a "dropout" key is needed.
          return_features: also return what each part gave, by its name in `ncsnpp_parts`, and the mapped "z".

        Returns:
          [B, H, W, out_channels] float32, or that and the features.
        """
        _check_inputs(self, x_t, cond)
        features: dict[str, Array] = {}
        emb = self._embed(t, cond, features)
        latent = None
        if self.z_dim is not None:
            latent = LatentMapping(self.z_features, self.z_layers, name="mapping")(cond["z"].astype(jnp.float32))
            features["z"] = latent

        h = image = x_t
        out = jnp.zeros(())
        skips: list[Array] = []
        for part in ncsnpp_parts(self):
            name = part.name
            if part.kind in ("fourier", "time"):
                continue
            if part.kind == "shrink":
                image = features[name] = self._resize(part, image, self.input_pyramid == "residual")
                if self.input_pyramid == "residual":
                    h = image = scaled(image + h, self.rescale)
            elif part.kind == "grow":
                out = features[name] = self._resize(part, out, self.output_pyramid == "residual")
                if self.output_pyramid == "residual":
                    h = out = scaled(out.astype(h.dtype) + h, self.rescale)
            elif part.kind == "norm":
                features[name] = GroupNorm(norm_groups(part.features), EPS, name=name)(h)
            elif part.kind == "conv":
                rule = fan_average if part.features != self.out_channels else fan_average_tiny
                drawn = Conv(part.features, rule=rule, name=name)(jax.nn.silu(features[part.source]))
                features[name] = drawn
                out = out + drawn if self.output_pyramid == "skip" else drawn
            else:
                h = features[name] = self._apply(part, h, skips, image, emb, latent, train)
            if part.push:
                skips.append(h)
        if self.tanh:
            out = jnp.tanh(out)
        return (out, features) if return_features else out

    def _apply(
        self,
        part: Part,
        h: Array,
        skips: list[Array],
        image: Array,
        emb: Array,
        latent: Array | None,
        train: bool,
    ) -> Array:
        if part.kind == "conv_in":
            return Conv(part.features, rule=fan_average, dtype=self.dtype, name=part.name)(h)
        if part.kind == "resample":
            return self._resize(part, h, self.resample == "conv")
        if part.kind == "combine":
            return Combine(self.combine == "cat", self.dtype, name=part.name)(image, h)
        if part.kind == "attention":
            groups = norm_groups(part.features)
            rules = (fan_average_tenth, fan_average_tiny)
            attend = nn.remat(AttentionBlock) if self.remat else AttentionBlock
            return scaled(attend(1, groups, EPS, *rules, self.dtype, name=part.name)(h), self.rescale)
        block = (nn.remat(ResBlock, static_argnums=(4,)) if self.remat else ResBlock)(
            features=part.features,
            resample=part.direction,
            taps=self.taps,
            adaptive=self.adaptive_norms,
            rescale=self.rescale,
            dropout=self.dropout,
            dtype=self.dtype,
            name=part.name,
        )
        return block(jnp.concatenate([h, skips.pop()], axis=-1) if part.pop else h, emb, latent, train)

    def _resize(self, part: Part, h: Array, by_convolution: bool) -> Array:
        if not by_convolution:
            return resize(h, part.direction, self.taps)
        return Resample(part.features, part.direction, self.taps, dtype=self.dtype, name=part.name)(h)

    def _embed(self, t: Array, cond: Cond, features: dict[str, Array]) -> Array:
        if self.time_features == "fourier":
            emb = FourierFeatures(self.base_channels, self.fourier_scale, name="fourier")(t)
        else:
            emb = sinusoidal_embedding(t, self.base_channels, sin_first=True, frequency_shift=1)
        features["time_features"] = emb
        if self.num_classes is not None:
            label, count = cond["label"], self.num_classes
            # The scale gives a one-hot vector unit mean square; the row of "no class" is zero.
            one_hot = jax.nn.one_hot(label, count) * math.sqrt(count)
            known = ((label >= 0) & (label <= count))[:, None]
            emb = emb + Dense(emb.shape[-1], fan_average, name="label")(jnp.where(known, one_hot, jnp.nan))
        if self.augment_dim is not None and "augment" in cond:
            augment = cond["augment"].astype(jnp.float32)
            emb = emb + Dense(emb.shape[-1], fan_average, use_bias=False, name="augment")(augment)
        width = 4 * self.base_channels
        emb = features["time_in"] = Dense(width, fan_average, name="time_in")(emb)
        emb = features["time_out"] = Dense(width, fan_average, name="time_out")(jax.nn.silu(emb))
        return emb


def ncsnpp_parts(net: NCSNpp) -> list[Part]:
    """The parts of a configuration in the order in which they run."""
    base, last = net.base_channels, len(net.channel_mult) - 1
    fourier = net.time_features == "fourier"
    parts = [Part("fourier", "fourier", 1, 2 * base)] if fourier else []
    parts += [
        Part("time", "time_in", (1 + fourier) * base, 4 * base),
        Part("time", "time_out", 4 * base, 4 * base),
        Part("conv_in", "conv_in", net.in_channels, base, push=True),
    ]
    width, image, skips = base, net.in_channels, [base]

    def add(kind: str, name: str, features: int, **more: Any) -> None:
        nonlocal width
        parts.append(Part(kind, name, width + (skips.pop() if more.get("pop") else 0), features, **more))
        width = features

    def link(direction: str, level: int) -> None:
        kind = "block" if net.resample == "block" else "resample"
        add(kind, f"{direction}_{level}_{direction}sample", width, direction=direction)

    def keep() -> None:
        parts[-1] = parts[-1]._replace(push=True)
        skips.append(width)

    for level, mult in enumerate(net.channel_mult):
        for i in range(net.num_res_blocks):
            add("block", f"down_{level}_{i}", mult * base)
            if 2**level in net.attention_factors:
                add("attention", f"down_{level}_{i}_attention", width)
            keep()
        if level == last:
            break
        link("down", level)
        if net.input_pyramid != "none":
            features = width if net.input_pyramid == "residual" else image
            parts.append(Part("shrink", f"image_{level + 1}_downsample", image, features, "down"))
            image = features
        if net.input_pyramid == "skip":
            parts.append(Part("combine", f"image_{level + 1}_combine", image, width))
            width *= 2 if net.combine == "cat" else 1
        keep()

    add("block", "mid_0", width)
    add("attention", "mid_0_attention", width)
    add("block", "mid_1", width)

    def show(level: int, features: int) -> None:
        name = "" if level < 0 else f"_{level}"
        parts.append(Part("norm", f"norm_out{name}", width, width))
        parts.append(Part("conv", f"conv_out{name}", width, features, source=f"norm_out{name}"))

    grown = 0
    for level in range(last, -1, -1):
        for i in range(net.num_res_blocks + 1):
            add("block", f"up_{level}_{i}", net.channel_mult[level] * base, pop=True)
        if 2**level in net.attention_factors:
            add("attention", f"up_{level}_attention", width)
        if net.output_pyramid != "none" and level < last:
            features = width if net.output_pyramid == "residual" else net.out_channels
            parts.append(Part("grow", f"out_{level}_upsample", grown, features, "up"))
            grown = features
        if net.output_pyramid == "skip" or (net.output_pyramid == "residual" and level == last):
            grown = width if net.output_pyramid == "residual" else net.out_channels
            show(level, grown)
        if level > 0:
            link("up", level)
    if net.output_pyramid != "skip":
        show(-1, net.out_channels)
    return parts


def example_inputs(net: NCSNpp, batch: int = 1) -> tuple[Any, Any, dict[str, Any]]:
    """The smallest inputs of a network as shapes, for `init_params`; parameters do not depend on H and W."""
    size = 2 ** (len(net.channel_mult) - 1)

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *shape), jnp.float32)

    cond = {}
    if net.num_classes is not None:
        cond["label"] = jax.ShapeDtypeStruct((batch,), jnp.int32)
    if net.augment_dim is not None:
        cond["augment"] = floats(net.augment_dim)
    if net.z_dim is not None:
        cond["z"] = floats(net.z_dim)
    return floats(size, size, net.in_channels), floats(), cond


def _check_fields(net: NCSNpp) -> None:
    for name, known in CHOICES.items():
        if (value := getattr(net, name)) not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
    if not net.channel_mult or net.num_res_blocks < 1:
        raise ValueError(
            f"NCSN++ needs at least one level and one residual block a level, got channel_mult {net.channel_mult} and "
            f"num_res_blocks {net.num_res_blocks}"
        )
    if not 0 <= net.dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {net.dropout}")
    if net.base_channels < 4 or net.base_channels % 2:
        raise ValueError(f"base_channels must be even and at least 4, got {net.base_channels}")
    if net.adaptive_norms not in (1, 2) or net.z_layers < 1:
        raise ValueError(
            f"adaptive_norms must be 1 or 2 and z_layers at least 1, got {net.adaptive_norms} and {net.z_layers}"
        )
    factors = [2**level for level in range(len(net.channel_mult))]
    for factor in net.attention_factors:
        if factor not in factors:
            raise ValueError(f"attention factor {factor} never occurs: {len(factors)} levels have factors {factors}")
    for part in ncsnpp_parts(net):
        if part.kind in ("block", "attention", "norm") and part.inputs % norm_groups(part.inputs):
            raise ValueError(
                f"{part.name} has {part.inputs} channels, which do not split into {norm_groups(part.inputs)} norm "
                "groups; change base_channels or channel_mult"
            )


def _check_inputs(net: NCSNpp, x_t: Array, cond: Cond) -> None:
    widths = {"label": net.num_classes, "augment": net.augment_dim, "z": net.z_dim}
    needed = {name for name, width in widths.items() if width is not None and (name != "augment" or name in cond)}
    check_cond(cond, needed, COND_KEYS, "NCSN++")
    if x_t.ndim != 4 or x_t.shape[-1] != net.in_channels:
        raise ValueError(f"x_t must be [B, H, W, {net.in_channels}] for this NCSN++, got {x_t.shape}")
    factor = 2 ** (len(net.channel_mult) - 1)
    if x_t.shape[1] % factor or x_t.shape[2] % factor:
        raise ValueError(
            f"height and width must be divisible by {factor} for {len(net.channel_mult)} levels, got "
            f"{x_t.shape[1]} x {x_t.shape[2]}; resize the images or use fewer levels"
        )
    for name in needed - {"label"}:
        if cond[name].shape != (x_t.shape[0], widths[name]):
            raise ValueError(f"cond[{name!r}] must be [B, {widths[name]}] for this NCSN++, got {cond[name].shape}")

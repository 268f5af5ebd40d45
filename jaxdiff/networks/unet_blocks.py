"""The parts a UNet is made of: residual block, self-attention block, spatial transformer, resampling by convolution.

Each takes and returns [B, H, W, C]. The last layer of a branch that is added to its input starts by `output_rule`
(zero, in most releases). Which part stands where is decided in `unet`.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxdiff.networks.attention import attention
from jaxdiff.networks.initializers import LayerRule, torch_default, zeros
from jaxdiff.networks.layers import (
    Conv,
    Dense,
    GroupNorm,
    LayerNorm,
    downsample_mean,
    dropout,
    upsample_nearest,
)


class ResBlock(nn.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))) + time)))).

    Attributes:
      features: output channels; where they differ from the input, x goes through a 1x1 convolution.
      scale_shift_norm: the time enters as norm(h) * (1 + scale) + shift instead of being added before the norm.
      resample: "up" or "down" also doubles (nearest) or halves (mean) the image, on both branches; "" keeps it.
      groups: groups of the norms.
      eps: of the norms.
      dropout: probability.
      rule: how layers start.
      output_rule: how the second convolution starts.
      dtype: compute dtype.

    Source: Ho et al. 2020 (arXiv:2006.11239) appendix B; Dhariwal and Nichol 2021 (arXiv:2105.05233) section 3.1
    ("AdaGN") for the scale and shift; Brock et al. 2018 (arXiv:1809.11096) for resampling inside the block.
    """

    features: int
    scale_shift_norm: bool = False
    resample: str = ""
    groups: int = 32
    eps: float = 1e-5
    dropout: float = 0.0
    rule: LayerRule = torch_default
    output_rule: LayerRule = zeros
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"], train: bool) -> Float[Array, "b h2 w2 o"]:
        resize = {"": lambda a: a, "up": upsample_nearest, "down": downsample_mean}[self.resample]
        h = jax.nn.silu(GroupNorm(self.groups, self.eps, self.dtype, name="norm_in")(x))
        up = self.resample == "up"
        conv_in = Conv(self.features, rule=self.rule, dtype=self.dtype, doubled=up, name="conv_in")
        h = conv_in(h if up else resize(h))
        x = resize(x)

        width = self.features * (2 if self.scale_shift_norm else 1)
        emb = Dense(width, self.rule, dtype=self.dtype, name="time")(jax.nn.silu(emb.astype(self.dtype)))
        emb = emb[:, None, None, :]
        norm = GroupNorm(self.groups, self.eps, self.dtype, name="norm_out")
        if self.scale_shift_norm:
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + emb)
        h = dropout(self, jax.nn.silu(h), self.dropout, train)
        h = Conv(self.features, rule=self.output_rule, dtype=self.dtype, name="conv_out")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, kernel_size=1, rule=self.rule, dtype=self.dtype, name="skip")(x)
        return x + h


class AttentionBlock(nn.Module):
    """x + out(attention(qkv(norm(x)))) over the positions of the image.

    The columns of `qkv` are ordered (q, k, v), then head, then channel of the head.

    Attributes:
      heads: number of heads; divides the channels.
      groups: groups of the norm.
      eps: of the norm.
      rule: how qkv starts.
      output_rule: how out starts.
      dtype: compute dtype.
    """

    heads: int = 1
    groups: int = 32
    eps: float = 1e-5
    rule: LayerRule = torch_default
    output_rule: LayerRule = zeros
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        h = GroupNorm(self.groups, self.eps, self.dtype, name="norm")(x).reshape(b, height * width, c)
        qkv = Dense(3 * c, self.rule, parts=3, dtype=self.dtype, name="qkv")(h)
        qkv = qkv.reshape(b, height * width, 3, self.heads, c // self.heads)
        h = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(b, height * width, c)
        h = Dense(c, self.output_rule, dtype=self.dtype, name="out")(h)
        return x + h.reshape(x.shape)


class ContextAttention(nn.Module):
    """Attention of tokens to a context (or to themselves); q, k, v without bias."""

    heads: int
    rule: LayerRule = torch_default
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], context: Float[Array, "b m d"]) -> Float[Array, "b n c"]:
        width = x.shape[-1]

        def project(name: str, tokens: Array) -> Array:
            y = Dense(width, self.rule, use_bias=False, dtype=self.dtype, name=name)(tokens)
            return y.reshape(*y.shape[:2], self.heads, width // self.heads)

        h = attention(project("q", x), project("k", context), project("v", context))
        return Dense(width, self.rule, dtype=self.dtype, name="out")(h.reshape(x.shape))


def _gelu(x: Array) -> Array:
    if jax.default_backend() == "cpu" and x.dtype == jnp.float32:
        # The library's form computes erfc, which takes longer and matters in half precision alone.
        return x * (0.5 + 0.5 * lax.erf(x * math.sqrt(0.5)))
    return jax.nn.gelu(x, approximate=False)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, and a gated feed-forward layer, each on normed tokens and added.

    Source: Rombach et al. 2022 (arXiv:2112.10752) appendix E.2.1; Shazeer 2020 (arXiv:2002.05202) for the gate.
    """

    heads: int
    rule: LayerRule = torch_default
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], context: Float[Array, "b m d"] | None) -> Float[Array, "b n c"]:
        width = x.shape[-1]
        h = LayerNorm(dtype=self.dtype, name="norm_self")(x)
        x = x + ContextAttention(self.heads, self.rule, self.dtype, name="self_attention")(h, h)
        h = LayerNorm(dtype=self.dtype, name="norm_context")(x)
        tokens = h if context is None else context
        x = x + ContextAttention(self.heads, self.rule, self.dtype, name="context_attention")(h, tokens)
        h = LayerNorm(dtype=self.dtype, name="norm_feed_forward")(x)
        h = Dense(8 * width, self.rule, dtype=self.dtype, name="feed_forward_in")(h)
        value, gate = jnp.split(h, 2, axis=-1)
        h = value * _gelu(gate)
        return x + Dense(width, self.rule, dtype=self.dtype, name="feed_forward_out")(h)


class SpatialTransformer(nn.Module):
    """x + out(blocks(in(norm(x)))) with the positions of the image as tokens.

    Attributes:
      heads: number of heads; divides the channels.
      depth: number of transformer blocks.
      groups: groups of the norm, whose eps is 1e-6.
      rule: how layers start.
      output_rule: how out starts.
      dtype: compute dtype.

    Source: Rombach et al. 2022 (arXiv:2112.10752) section 3.3 and appendix E.2.1.
    """

    heads: int = 1
    depth: int = 1
    groups: int = 32
    rule: LayerRule = torch_default
    output_rule: LayerRule = zeros
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], context: Float[Array, "b m d"] | None) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        h = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x).reshape(b, height * width, c)
        h = Dense(c, self.rule, dtype=self.dtype, name="project_in")(h)
        for i in range(self.depth):
            h = TransformerBlock(self.heads, self.rule, self.dtype, name=f"block_{i}")(h, context)
        h = Dense(c, self.output_rule, dtype=self.dtype, name="project_out")(h)
        return x + h.reshape(x.shape)


class Downsample(nn.Module):
    """Halves the image by a stride-2 convolution, padded on all sides or (asymmetric) after the last row and column."""

    asymmetric: bool = False
    rule: LayerRule = torch_default
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        conv = Conv(x.shape[-1], 3, 2, self.asymmetric, self.rule, self.dtype, name="conv")
        return conv(x)


class Upsample(nn.Module):
    """Doubles the image by repeating pixels, then convolves it."""

    rule: LayerRule = torch_default
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return Conv(x.shape[-1], rule=self.rule, dtype=self.dtype, doubled=True, name="conv")(x)

"""The text encoder of CLIP, which conditions Stable Diffusion: token ids to one vector a token, and to one a text.

A transformer with norms before its layers, learned positions and causal attention. Stable Diffusion 1 takes the normed
output of the last layer, Stable Diffusion 2 that of the layer before it (`skip=1`, or a network with one layer less).
Text to ids is `data.clip_tokenizer`; padding is attended to as in the releases, so the encoder takes no mask.

Source: Radford et al. 2021 (arXiv:2103.00020) section 2.4.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff.networks.attention import attention
from jaxdiff.networks.initializers import ZEROS, LayerRule, Normal, Rule
from jaxdiff.networks.layers import Dense, LayerNorm


class TextFeatures(NamedTuple):
    """What the encoder knows of a batch of texts.

    Attributes:
      tokens: [B, N, width] after the final norm: the context of a diffusion model.
      pooled: [B, width], the last layer's normed output at the end of the text.
      projected: [B, projection_dim], pooled in the space shared with images; None without a projection.
      hidden: num_layers + 1 arrays [B, N, width] without final norm: the embedded tokens, then after each layer.
    """

    tokens: Array
    pooled: Array
    projected: Array | None
    hidden: tuple[Array, ...]


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x sigmoid(1.702 x), the activation of OpenAI's CLIP.

    Source: Hendrycks and Gimpel 2016 (arXiv:1606.08415) section 2.
    """
    return x * jax.nn.sigmoid(1.702 * x)


def exact_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x Phi(x) without approximation, the activation of OpenCLIP."""
    return jax.nn.gelu(x, approximate=False)


class ClipTextLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    The columns of `qkv` are ordered (q, k, v), then head, then channel of the head.
    """

    heads: int
    mlp_width: int
    num_layers: int
    activation: Callable[[Array], Array]
    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        b, n, c = x.shape
        narrow = c**-0.5 * (2 * self.num_layers) ** -0.5
        h = LayerNorm(self.eps, self.dtype, name="norm_attention")(x)
        qkv = Dense(3 * c, _normal(c**-0.5), dtype=self.dtype, name="qkv")(h)
        qkv = qkv.astype(jnp.float32).reshape(b, n, 3, self.heads, c // self.heads)
        h = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], causal=True)
        x = x + Dense(c, _normal(narrow), dtype=self.dtype, name="out")(h.reshape(b, n, c))
        h = LayerNorm(self.eps, self.dtype, name="norm_mlp")(x)
        h = Dense(self.mlp_width, _normal((2 * c) ** -0.5), dtype=self.dtype, name="mlp_in")(h)
        return x + Dense(c, _normal(narrow), dtype=self.dtype, name="mlp_out")(self.activation(h))


class ClipText(nn.Module):
    """The text encoder.

    Attributes:
      vocab_size: rows of the token table.
      max_length: rows of the position table; the longest text.
      width: of a token.
      num_layers: transformer layers.
      heads: of the attention; divides the width.
      mlp_width: inner width of the MLPs; None for four times the width.
      activation: `quick_gelu` or `exact_gelu`.
      end_token: id that ends a text, at whose first occurrence `pooled` is read; None for the largest id of a text,
        which is the same for the published vocabulary.
      projection_dim: width of `projected`; None for no projection.
      eps: of the norms.
      dtype: compute dtype; norms and softmax are float32.

    Raises:
      ValueError: when built, if heads do not divide the width; when called, if a text is too long or skip too large.

    Source: Radford et al. 2021 (arXiv:2103.00020) section 2.4; starting values as in the released code.
    """

    vocab_size: int = 49408
    max_length: int = 77
    width: int = 768
    num_layers: int = 12
    heads: int = 12
    mlp_width: int | None = None
    activation: Callable[[Array], Array] = quick_gelu
    end_token: int | None = None
    projection_dim: int | None = None
    eps: float = 1e-5
    dtype: Any = jnp.float32

    def __post_init__(self):
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"width {self.width} does not split into {self.heads} heads; change either")
        super().__post_init__()

    @nn.compact
    def __call__(self, ids: Int[Array, "b n"], *, skip: int = 0) -> TextFeatures:
        """Encodes texts.

        Args:
          ids: [B, N] token ids, N at most max_length. An id outside the table gives NaN, not a neighbour.
          skip: how many of the last layers `tokens` leaves out; 1 for Stable Diffusion 2.

        Returns:
          The features. `pooled` and `projected` always see all layers.
        """
        n = ids.shape[1]
        if n > self.max_length:
            raise ValueError(f"a text of {n} tokens is longer than this encoder's {self.max_length}; cut it")
        if not 0 <= skip <= self.num_layers:
            raise ValueError(f"skip must be at least 0 and at most {self.num_layers} layers, got {skip}")
        table = self.param("token_embedding", Normal(0.02), (self.vocab_size, self.width), jnp.float32)
        positions = self.param("position_embedding", Normal(0.01), (self.max_length, self.width), jnp.float32)
        # Negative ids would wrap around like NumPy indices.
        index = jnp.where(ids < 0, self.vocab_size, ids)
        h = jnp.take(table, index, axis=0, mode="fill", fill_value=jnp.nan) + positions[None, :n]
        hidden = [h.astype(self.dtype)]
        for i in range(self.num_layers):
            layer = ClipTextLayer(
                heads=self.heads,
                mlp_width=4 * self.width if self.mlp_width is None else self.mlp_width,
                num_layers=self.num_layers,
                activation=self.activation,
                eps=self.eps,
                dtype=self.dtype,
                name=f"layer_{i}",
            )
            hidden.append(layer(hidden[-1]))
        norm = LayerNorm(self.eps, name="norm_out")
        last = norm(hidden[-1])
        tokens = norm(hidden[self.num_layers - skip]) if skip else last
        ends = ids if self.end_token is None else (ids == self.end_token).astype(jnp.int32)
        pooled = jnp.take_along_axis(last, jnp.argmax(ends, axis=1)[:, None, None], axis=1)[:, 0]
        projected = None
        if self.projection_dim is not None:
            rule = _normal(self.width**-0.5)
            projected = Dense(self.projection_dim, rule, use_bias=False, name="projection")(pooled)
        return TextFeatures(tokens, pooled, projected, tuple(hidden))


def example_ids(encoder: ClipText, batch: int = 1) -> jax.ShapeDtypeStruct:
    """The shortest input of an encoder as a shape, for `init_params`."""
    del encoder
    return jax.ShapeDtypeStruct((batch, 1), jnp.int32)


def clip_l() -> ClipText:
    """The text encoder of CLIP ViT-L/14, which Stable Diffusion 1 uses: 123.060 M parameters."""
    return ClipText(end_token=49407)


def open_clip_h(num_layers: int = 23) -> ClipText:
    """The text encoder of OpenCLIP ViT-H/14, which Stable Diffusion 2 uses: 340.388 M parameters.

    Args:
      num_layers: 23 as Stable Diffusion 2 uses it, with `skip=0`; 24 as it was trained, then `skip=1`.
    """
    return ClipText(width=1024, num_layers=num_layers, heads=16, activation=exact_gelu, end_token=49407)


def _normal(std: float) -> LayerRule:
    def rule(fan_in: int, fan_out: int) -> tuple[Rule, Rule]:
        del fan_in, fan_out
        return Normal(std), ZEROS

    return rule

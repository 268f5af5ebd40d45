"""A small residual network for points [B, D], for toy densities and for tests that need a real network quickly.

Each block adds the embedded time (and class) to a hidden layer, as a UNet's residual block does. There is no
normalisation and no attention.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.networks.base import check_cond
from jaxdiff.networks.initializers import LayerRule, torch_default
from jaxdiff.networks.layers import Dense, LabelEmbedding, TimeFeatures, dropout, sinusoidal_embedding
from jaxdiff.types import Cond


class MLP(nn.Module):
    """Residual blocks h + out(dropout(silu(in(h) + time))) between two linear layers.

    Attributes:
      out_features: width of the result, None for that of x_t.
      features: hidden width; times are embedded in as many features.
      num_blocks: number of residual blocks.
      time_features: (t [B], features) -> [B, features]; `layers.sinusoidal_embedding` for times up to 1000,
        `layers.fourier_embedding` for times of order 1.
      num_classes: number of classes for cond["label"] [B] int; None if there is none.
      null_label: one more row in the table, label num_classes, meaning "no class".
      dropout: probability in the blocks.
      output_rule: how the last layer starts.
      dtype: compute dtype of the blocks; embeddings and the last layer are float32.

    Raises:
      ValueError: when built, if fields contradict each other; when first called, if x_t or cond do not fit them.
    """

    out_features: int | None = None
    features: int = 128
    num_blocks: int = 3
    time_features: TimeFeatures = sinusoidal_embedding
    num_classes: int | None = None
    null_label: bool = False
    dropout: float = 0.0
    output_rule: LayerRule = torch_default
    dtype: Any = jnp.float32

    def __post_init__(self):
        if self.features < 4 or self.num_blocks < 1:
            raise ValueError(
                f"an MLP needs at least 4 features and 1 block, got features {self.features} and num_blocks "
                f"{self.num_blocks}"
            )
        if self.null_label and self.num_classes is None:
            raise ValueError("null_label needs num_classes")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x_t: Float[Array, "b d"], t: Float[Array, " b"], cond: Cond, *, train: bool = False
    ) -> Float[Array, "b o"]:
        """Applies the network to x_t [B, D] at times t [B]; returns [B, out_features] float32."""
        check_cond(cond, set() if self.num_classes is None else {"label"}, {"label"}, "MLP")
        emb = Dense(self.features, name="time")(self.time_features(t, self.features))
        if self.num_classes is not None:
            emb = emb + LabelEmbedding(self.num_classes + self.null_label, self.features, name="label")(cond["label"])
        emb = jax.nn.silu(emb)
        h = Dense(self.features, dtype=self.dtype, name="in")(x_t)
        for i in range(self.num_blocks):
            inner = Dense(self.features, dtype=self.dtype, name=f"block_{i}_in")(h)
            inner = inner + Dense(self.features, dtype=self.dtype, name=f"block_{i}_time")(emb)
            inner = dropout(self, jax.nn.silu(inner), self.dropout, train)
            h = h + Dense(self.features, dtype=self.dtype, name=f"block_{i}_out")(inner)
        width = x_t.shape[-1] if self.out_features is None else self.out_features
        return Dense(width, self.output_rule, name="out")(jax.nn.silu(h.astype(jnp.float32)))

"""DiT: a transformer on patches, with time and class entering through adaptive layer norms that start as zero.

Positions are a fixed table of sines and cosines, not parameters. Dropping labels while training is done by whoever
makes the batch, which asks for `null_label`. The blocks are equal, so they can run as one scanned block. The network
knows times only as numbers to embed. Patches of video and a second stream of tokens are not here.

Source: Peebles and Xie 2023 (arXiv:2212.09748).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxdiff.networks.attention import attention
from jaxdiff.networks.base import check_cond
from jaxdiff.networks.initializers import ZEROS, Normal, Rule, fan_average, zeros
from jaxdiff.networks.layers import Dense, sinusoidal_embedding
from jaxdiff.types import Cond

TIME_FEATURES = 256
EPS = 1e-6
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
"""Width, depth and heads of the published networks."""


class DiT(nn.Module):
    """Diffusion transformer with adaLN-Zero blocks.

    Attributes:
      in_channels: channels of x_t.
      out_channels: channels of the result; twice in_channels where a variance is learned.
      input_size: height and width it is built for. Others work: the table of positions is made for what comes.
      patch_size: height and width of a patch; divides the image.
      width: of the tokens; divisible by 4 and by num_heads.
      depth: number of blocks.
      num_heads: heads of attention.
      mlp_ratio: hidden width of the MLPs over width.
      num_classes: number of classes for cond["label"] [B] int; None if there is none.
      null_label: one more row in the table, label num_classes, meaning "no class".
      dtype: compute dtype of the blocks. Embeddings, norms, softmax and the last layer are float32.
      remat: recompute each block in the backward pass instead of storing it.
      scan: run one block over stacked parameters [depth, ...], named "blocks", instead of "block_0" and so on: a
        program of one block, compiled in a fraction of the time.

    Raises:
      ValueError: when built, if fields contradict each other; when first called, if x_t or cond do not fit them.
    """

    in_channels: int = 4
    out_channels: int = 8
    input_size: int = 32
    patch_size: int = 2
    width: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: int = 4
    num_classes: int | None = 1000
    null_label: bool = True
    dtype: Any = jnp.float32
    remat: bool = False
    scan: bool = False

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}")
        if self.width % 4 or self.width % self.num_heads:
            raise ValueError(f"width must be divisible by 4 and by the {self.num_heads} heads, got {self.width}")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not divisible by patch_size {self.patch_size}")
        if self.null_label and self.num_classes is None:
            raise ValueError("null_label needs num_classes; pass null_label=False for a network without classes")
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
          x_t: [B, H, W, in_channels]; H and W divisible by patch_size.
          t: [B] times, as the network is to embed them; 0 to 999 in the published networks.
          cond: "label" if there are classes.
          train: no effect: nothing is dropped.
          return_features: also return "condition" [B, width] and the tokens [B, N, width] before the blocks ("tokens")
            and after each ("block_0", ...), in rows of patches.

        Returns:
          [B, H, W, out_channels] float32, or that and the features.
        """
        del train
        _check_inputs(self, x_t, cond)
        b, height, width, _ = x_t.shape
        rows, columns, p = height // self.patch_size, width // self.patch_size, self.patch_size

        emb = sinusoidal_embedding(t, TIME_FEATURES)
        emb = Dense(self.width, _normal, name="time_in")(emb)
        emb = Dense(self.width, _normal, name="time_out")(jax.nn.silu(emb))
        if self.num_classes is not None:
            emb = emb + ClassTable(self.num_classes + self.null_label, self.width, name="label")(cond["label"])

        patches = x_t.reshape(b, rows, p, columns, p, -1).transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * columns, -1)
        h = Dense(self.width, fan_average, name="patch")(patches)
        h = (h + grid_positions(rows, columns, self.width)[None]).astype(self.dtype)
        features = {"condition": emb, "tokens": h}
        h, after = self._blocks(h, emb, return_features)
        features |= after

        shift, scale = _modulation(emb, 2, jnp.float32)
        h = modulate(h, shift, scale, jnp.float32)
        h = Dense(p * p * self.out_channels, zeros, name="out")(h)
        h = h.reshape(b, rows, columns, p, p, -1).transpose(0, 1, 3, 2, 4, 5).reshape(b, height, width, -1)
        return (h, features) if return_features else h

    def _blocks(self, h: Array, emb: Array, return_features: bool) -> tuple[Array, dict[str, Array]]:
        make = nn.remat(DiTBlock) if self.remat else DiTBlock
        features = {}
        if not self.scan:
            for i in range(self.depth):
                h = make(self.num_heads, self.mlp_ratio, self.dtype, name=f"block_{i}")(h, emb)
                features[f"block_{i}"] = h
            return h, features

        def step(block: nn.Module, h: Array, emb: Array) -> tuple[Array, Array | None]:
            h = block(h, emb)
            return h, h if return_features else None

        shared: Any = nn.broadcast
        scanned = nn.scan(
            step, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=shared, length=self.depth
        )
        h, after = scanned(make(self.num_heads, self.mlp_ratio, self.dtype, name="blocks"), h, emb)
        return h, {} if after is None else {f"block_{i}": after[i] for i in range(self.depth)}


class DiTBlock(nn.Module):
    """x + gate attention(norm(x)), then x + gate mlp(norm(x)); shift and scale of the norms and gates from emb.

    The columns of `qkv` are ordered (q, k, v), then head, then channel of the head.
    """

    num_heads: int
    mlp_ratio: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], emb: Float[Array, "b d"]) -> Float[Array, "b n d"]:
        b, n, width = x.shape
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = _modulation(emb, 6, self.dtype)
        h = modulate(x, shift_1, scale_1, self.dtype)
        qkv = Dense(3 * width, fan_average, dtype=self.dtype, name="qkv")(h)
        qkv = qkv.reshape(b, n, 3, self.num_heads, width // self.num_heads)
        h = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(b, n, width)
        x = x + gate_1 * Dense(width, fan_average, dtype=self.dtype, name="attention_out")(h)
        h = modulate(x, shift_2, scale_2, self.dtype)
        h = Dense(self.mlp_ratio * width, fan_average, dtype=self.dtype, name="mlp_in")(h)
        return x + gate_2 * Dense(width, fan_average, dtype=self.dtype, name="mlp_out")(jax.nn.gelu(h))


class ClassTable(nn.Module):
    """A table of `num_labels` rows, normal with deviation 0.02. A label outside it gives NaN, not a neighbour."""

    num_labels: int
    features: int

    @nn.compact
    def __call__(self, label: Int[Array, " b"]) -> Float[Array, "b features"]:
        table = self.param("embedding", Normal(0.02), (self.num_labels, self.features), jnp.float32)
        # Negative labels would wrap around like NumPy indices.
        index = jnp.where(label < 0, self.num_labels, label)
        return jnp.take(table, index, axis=0, mode="fill", fill_value=jnp.nan)


def modulate(
    x: Float[Array, "b n d"], shift: Float[Array, "b 1 d"], scale: Float[Array, "b 1 d"], dtype: Any
) -> Float[Array, "b n d"]:
    """norm(x) (1 + scale) + shift, with a layer norm in float32 that has no parameters of its own."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPS)
    return (x * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)).astype(dtype)


def grid_positions(rows: int, columns: int, features: int) -> Float[np.ndarray, "n features"]:
    """The fixed embedding of a grid of patches, row by row.

    The first half of the features encodes the column, the second the row; each half is sines, then cosines, of the
    index times 10000^(-4i / features).

    Returns:
      [rows * columns, features] float32.
    """
    frequencies = 1.0 / 10000.0 ** (np.arange(features // 4, dtype=np.float64) / (features / 4))
    row, column = np.meshgrid(np.arange(rows, dtype=np.float64), np.arange(columns, dtype=np.float64), indexing="ij")
    angles = [np.outer(index.reshape(-1), frequencies) for index in (column, row)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def dit_preset(name: str, *, input_size: int = 32, num_classes: int | None = 1000) -> DiT:
    """A published DiT by its name in the paper, such as "XL/2" (width XL, patches of 2).

    With 1000 classes and a null label, for latents of 32 x 32 x 4 and learned variances: XL/2 has 674.835 M
    parameters, L/2 457.841 M, B/4 130.426 M, S/8 33.142 M; the paper also counts the table of positions.

    Args:
      name: S, B, L or XL, a slash, and 2, 4 or 8.
      input_size: height and width of the latent; 32 for images of 256 pixels, 64 for 512.
      num_classes: None for a network without classes.

    Raises:
      ValueError: there is no such network.
    """
    size, _, patch = name.partition("/")
    if size not in SIZES or patch not in ("2", "4", "8"):
        raise ValueError(f"there is no DiT {name!r}; give one of {', '.join(SIZES)} with /2, /4 or /8, such as 'XL/2'")
    width, depth, heads = SIZES[size]
    return DiT(
        input_size=input_size,
        patch_size=int(patch),
        width=width,
        depth=depth,
        num_heads=heads,
        num_classes=num_classes,
        null_label=num_classes is not None,
    )


def example_inputs(dit: DiT, batch: int = 1) -> tuple[Any, Any, dict[str, Any]]:
    """The smallest inputs as shapes, for `init_params`; parameters do not depend on H and W."""
    x_t = jax.ShapeDtypeStruct((batch, dit.patch_size, dit.patch_size, dit.in_channels), jnp.float32)
    cond = {} if dit.num_classes is None else {"label": jax.ShapeDtypeStruct((batch,), jnp.int32)}
    return x_t, jax.ShapeDtypeStruct((batch,), jnp.float32), cond


def _normal(fan_in: int, fan_out: int) -> tuple[Rule, Rule]:
    del fan_in, fan_out
    return Normal(0.02), ZEROS


def _modulation(emb: Array, parts: int, dtype: Any) -> list[Array]:
    emb = Dense(parts * emb.shape[-1], zeros, dtype=dtype, name="modulation")(jax.nn.silu(emb))
    return jnp.split(emb[:, None, :], parts, axis=-1)


def _check_inputs(dit: DiT, x_t: Array, cond: Cond) -> None:
    check_cond(cond, set() if dit.num_classes is None else {"label"}, {"label"}, "DiT")
    fits = x_t.ndim == 4 and x_t.shape[-1] == dit.in_channels
    if not fits or x_t.shape[1] % dit.patch_size or x_t.shape[2] % dit.patch_size:
        raise ValueError(
            f"x_t must be [B, H, W, {dit.in_channels}] with H and W divisible by {dit.patch_size} for this DiT, got "
            f"{x_t.shape}; resize it or use smaller patches"
        )

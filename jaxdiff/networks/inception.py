"""Inception-v3 as Frechet distances use it: the 2015 TensorFlow network under its PyTorch conversion.

It differs from the paper's network in its pooling: average pools do not count the padding, and the last block takes a
maximum. Batch norms are frozen, their statistics are parameters: the network is never trained here, weights come from
a file (`pretrained.perceptual`). Resizing and the range of images are the business of `metrics.inception`; the
auxiliary classifier is not here.

Source: Szegedy et al. 2015 (arXiv:1512.00567) section 6 and table 1; Heusel et al. 2017 (arXiv:1706.08500) for its
use.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxdiff.networks.initializers import ONES, ZEROS, Normal, Rule
from jaxdiff.networks.layers import Dense

EPS = 1e-3
NUM_FEATURES, NUM_LOGITS = 2048, 1008
SMALLEST = 75


class InceptionOutput(NamedTuple):
    """What the network says.

    Attributes:
      features: [B, 2048], the mean of the last feature map ("pool3").
      logits: [B, 1008], the classifier on them, bias included.
    """

    features: Array
    logits: Array


class Unit(NamedTuple):
    """Convolution, frozen batch norm, ReLU.

    Attributes:
      name: of its module.
      features: output channels.
      kernel: height and width.
      stride: 1 keeps the size, padded; 2 is not padded.
    """

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


class Fork(NamedTuple):
    """Units applied to one input side by side; ends a branch."""

    units: tuple[Unit, ...]


Branch = tuple[Unit | Fork | str, ...]
"""Steps in order; "average" and "max" keep the size, "max/2" halves it."""


def _a(pool: int) -> tuple[Branch, ...]:
    return (
        (Unit("branch1x1", 64),),
        (Unit("branch5x5_1", 48), Unit("branch5x5_2", 64, (5, 5))),
        (
            Unit("branch3x3dbl_1", 64),
            Unit("branch3x3dbl_2", 96, (3, 3)),
            Unit("branch3x3dbl_3", 96, (3, 3)),
        ),
        ("average", Unit("branch_pool", pool)),
    )


def _b() -> tuple[Branch, ...]:
    return (
        (Unit("branch3x3", 384, (3, 3), 2),),
        (
            Unit("branch3x3dbl_1", 64),
            Unit("branch3x3dbl_2", 96, (3, 3)),
            Unit("branch3x3dbl_3", 96, (3, 3), 2),
        ),
        ("max/2",),
    )


def _c(width: int) -> tuple[Branch, ...]:
    return (
        (Unit("branch1x1", 192),),
        (Unit("branch7x7_1", width), Unit("branch7x7_2", width, (1, 7)), Unit("branch7x7_3", 192, (7, 1))),
        (
            Unit("branch7x7dbl_1", width),
            Unit("branch7x7dbl_2", width, (7, 1)),
            Unit("branch7x7dbl_3", width, (1, 7)),
            Unit("branch7x7dbl_4", width, (7, 1)),
            Unit("branch7x7dbl_5", 192, (1, 7)),
        ),
        ("average", Unit("branch_pool", 192)),
    )


def _d() -> tuple[Branch, ...]:
    return (
        (Unit("branch3x3_1", 192), Unit("branch3x3_2", 320, (3, 3), 2)),
        (
            Unit("branch7x7x3_1", 192),
            Unit("branch7x7x3_2", 192, (1, 7)),
            Unit("branch7x7x3_3", 192, (7, 1)),
            Unit("branch7x7x3_4", 192, (3, 3), 2),
        ),
        ("max/2",),
    )


def _e(pool: str) -> tuple[Branch, ...]:
    return (
        (Unit("branch1x1", 320),),
        (
            Unit("branch3x3_1", 384),
            Fork((Unit("branch3x3_2a", 384, (1, 3)), Unit("branch3x3_2b", 384, (3, 1)))),
        ),
        (
            Unit("branch3x3dbl_1", 448),
            Unit("branch3x3dbl_2", 384, (3, 3)),
            Fork((Unit("branch3x3dbl_3a", 384, (1, 3)), Unit("branch3x3dbl_3b", 384, (3, 1)))),
        ),
        (pool, Unit("branch_pool", 192)),
    )


BLOCKS: dict[str, tuple[Branch, ...]] = {
    "mixed_5b": _a(32),
    "mixed_5c": _a(64),
    "mixed_5d": _a(64),
    "mixed_6a": _b(),
    "mixed_6b": _c(128),
    "mixed_6c": _c(160),
    "mixed_6d": _c(160),
    "mixed_6e": _c(192),
    "mixed_7a": _d(),
    "mixed_7b": _e("average"),
    "mixed_7c": _e("max"),
}


class Inception(nn.Module):
    """Images [B, H, W, 3] in [-1, 1], 299 pixels a side where numbers are to be compared, to features and logits.

    Attributes:
      num_logits: classes of the classifier.
      dtype: compute dtype of the convolutions.
    """

    num_logits: int = NUM_LOGITS
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> InceptionOutput:
        """Applies the network.

        Raises:
          ValueError: images are too small or have no three channels.
        """
        if x.ndim != 4 or x.shape[-1] != 3 or min(x.shape[1:3]) < SMALLEST:
            raise ValueError(
                f"Inception takes images [B, H, W, 3] of at least {SMALLEST} pixels a side, got {list(x.shape)}; "
                "resize them to 299"
            )

        def unit(h: Array, name: str, features: int, size: int, stride: int = 1, pad: bool = False) -> Array:
            return ConvUnit(features, (size, size), stride, pad, self.dtype, name=name)(h)

        h = unit(x, "conv_1a_3x3", 32, 3, 2)
        h = unit(h, "conv_2a_3x3", 32, 3)
        h = unit(h, "conv_2b_3x3", 64, 3, pad=True)
        h = _POOLS["max/2"](h)
        h = unit(h, "conv_3b_1x1", 80, 1)
        h = unit(h, "conv_4a_3x3", 192, 3)
        h = _POOLS["max/2"](h)
        for name, branches in BLOCKS.items():
            h = Mixed(branches, self.dtype, name=name)(h)
        features = h.astype(jnp.float32).mean((1, 2))
        return InceptionOutput(features, Dense(self.num_logits, name="logits")(features))


class Mixed(nn.Module):
    """Branches applied to one input, joined along channels."""

    branches: Sequence[Branch]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        return jnp.concatenate([self._branch(branch, x) for branch in self.branches], axis=-1)

    def _branch(self, branch: Branch, h: Array) -> Array:
        for step in branch:
            if isinstance(step, Fork):
                h = jnp.concatenate([self._unit(unit, h) for unit in step.units], axis=-1)
            else:
                h = _POOLS[step](h) if isinstance(step, str) else self._unit(step, h)
        return h

    def _unit(self, unit: Unit, h: Array) -> Array:
        return ConvUnit(unit.features, unit.kernel, unit.stride, unit.stride == 1, self.dtype, name=unit.name)(h)


class ConvUnit(nn.Module):
    """relu(norm(convolution)), the norm by stored statistics.

    Attributes:
      features: output channels.
      size: height and width of the kernel.
      stride: of the output grid.
      pad: half the kernel on every side, or nothing.
      dtype: compute dtype.
    """

    features: int
    size: tuple[int, int]
    stride: int = 1
    pad: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        shape = (*self.size, x.shape[-1], self.features)
        # The release has no start of its own. This one passes the input of a random network on.
        kernel = self.param("kernel", Normal(math.sqrt(2 / math.prod(shape[:3]))), shape, jnp.float32)
        starts: dict[str, Rule] = {"scale": ONES, "bias": ZEROS, "mean": ZEROS, "variance": ONES}
        p = {name: self.param(name, rule, (self.features,), jnp.float32) for name, rule in starts.items()}
        padding = [(size // 2, size // 2) if self.pad else (0, 0) for size in self.size]
        y = lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        factor = p["scale"] * lax.rsqrt(p["variance"] + EPS)
        y = (y.astype(jnp.float32) - p["mean"].reshape(1, 1, 1, -1)) * factor.reshape(1, 1, 1, -1)
        return jax.nn.relu(y + p["bias"].reshape(1, 1, 1, -1)).astype(self.dtype)


# The network as published pads average pools with zeros and counts them; this one does not.
_POOLS = {
    "average": lambda x: nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False),
    "max": lambda x: nn.max_pool(x, (3, 3), padding="SAME"),
    "max/2": lambda x: nn.max_pool(x, (3, 3), (2, 2)),
}

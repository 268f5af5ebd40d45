"""LPIPS, the perceptual distance on features of VGG16.

Both images pass through VGG16's convolutions; at five depths the features are normalised to unit length at every
position, and the squared difference is weighted by a non-negative number a channel. Weights come from files
(`pretrained.perceptual`); the random start here serves tests. The classifier of VGG16 and the networks AlexNet and
SqueezeNet are not here.

Source: Zhang et al. 2018 (arXiv:1801.03924) eq. 1; Simonyan and Zisserman 2014 (arXiv:1409.1556) table 1, D.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.networks.initializers import ZEROS, Constant, Normal, Rule
from jaxdiff.networks.layers import Conv

# Widths over the first, and the number of 3x3 convolutions, of the five stages.
STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
FEATURES = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")
# ImageNet's mean and deviation as the release has them, for images in [-1, 1].
SHIFT = np.asarray((-0.030, -0.088, -0.188), np.float32)
SCALE = np.asarray((0.458, 0.448, 0.450), np.float32)
EPS = 1e-10


def he_normal(fan_in: int, fan_out: int) -> tuple[Rule, Rule]:
    """Kernel normal with variance 2 / fan_out, bias 0: how the released VGG16 started.

    Source: He et al. 2015 (arXiv:1502.01852) eq. 14.
    """
    del fan_in
    return Normal(math.sqrt(2 / fan_out)), ZEROS


class VGG16(nn.Module):
    """The convolutions of VGG16, with features after the last one of each stage.

    Attributes:
      width: channels of the first stage; 64 in the paper.
      dtype: compute dtype.
    """

    width: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> dict[str, Array]:
        features = {}
        for stage, (multiple, convolutions) in enumerate(STAGES, 1):
            if stage > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for i in range(1, convolutions + 1):
                conv = Conv(multiple * self.width, rule=he_normal, dtype=self.dtype, name=f"conv{stage}_{i}")
                x = jax.nn.relu(conv(x))
            features[FEATURES[stage - 1]] = x
        return features


class Heads(nn.Module):
    """The weight of every channel at every depth, at first their mean."""

    width: int = 64

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        weights = {}
        for name, (multiple, _) in zip(FEATURES, STAGES, strict=True):
            channels = multiple * self.width
            weights[name] = self.param(name, Constant(1 / channels), (channels,), jnp.float32)
        return weights


class LPIPS(nn.Module):
    """The distance of pairs of images.

    Attributes:
      width: channels of VGG16's first stage.
      dtype: compute dtype of the convolutions. Distances are float32.
    """

    width: int = 64
    dtype: Any = jnp.float32

    def setup(self):
        self.vgg = VGG16(self.width, self.dtype)
        self.heads = Heads(self.width)

    def features(self, x: Float[Array, "b h w 3"]) -> dict[str, Array]:
        """Features of images [B, H, W, 3] in [-1, 1] by name, relu1_2 to relu5_3.

        Raises:
          ValueError: images are too small or have no three channels.
        """
        if x.ndim != 4 or x.shape[-1] != 3 or min(x.shape[1:3]) < 16:
            raise ValueError(
                f"LPIPS takes images [B, H, W, 3] of at least 16 pixels a side, got {list(x.shape)}; resize them, and "
                "repeat the channel of grey images"
            )
        return self.vgg((x - SHIFT.reshape(1, 1, 1, 3)) / SCALE.reshape(1, 1, 1, 3))

    def __call__(self, x: Float[Array, "b h w 3"], y: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
        """The distance of each pair, at least 0 if the weights are.

        Args:
          x: [B, H, W, 3] in [-1, 1], at least 16 pixels a side.
          y: the same shape.
        """
        theirs, total = self.features(y), jnp.zeros(x.shape[0], jnp.float32)
        weights = self.heads()
        for name, feature in self.features(x).items():
            squared = jnp.square(unit_length(feature) - unit_length(theirs[name]))
            total = total + (squared * weights[name].reshape(1, 1, 1, -1)).sum(-1).mean((1, 2))
        return total


def unit_length(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """x / (|x| + 1e-10) along channels in float32; 0 where x is 0, with gradient 0 instead of a division by 0."""
    x = x.astype(jnp.float32)
    squared = jnp.square(x).sum(-1, keepdims=True)
    some = squared > 0
    length = jnp.where(some, jnp.sqrt(jnp.where(some, squared, 1.0)), 0.0)
    return x / (length + EPS)

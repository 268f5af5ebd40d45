"""The UNet of progressive distillation: `unet.UNet` with the widths, norms and start of the Flax release.

The release feeds it a log signal-to-noise ratio; here, as everywhere, a network takes the number that is embedded, and
`pretrained.progdist.time_input` is the map between the two. Distillation itself is not here.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff.networks.initializers import ZEROS, LayerRule, Normal, Rule
from jaxdiff.networks.layers import Dense, sinusoidal_embedding
from jaxdiff.networks.unet import UNet
from jaxdiff.networks.unet_presets import attention_factors
from jaxdiff.types import Cond


def lecun_normal(fan_in: int, fan_out: int) -> tuple[Rule, Rule]:
    """Kernel normal with variance 1 / fan_in, bias 0: Flax's default, here without its cut at two deviations.

    Source: LeCun et al. 1998, "Efficient BackProp", section 4.6.
    """
    del fan_out
    return Normal(1 / math.sqrt(fan_in)), ZEROS


class ProgDistUNet(UNet):
    """The UNet of progressive distillation. The fields are those of `UNet`, with other defaults, and

    Attributes:
      emb_channels: width of the embedding of times and classes.

    Source: Salimans and Ho 2022 (arXiv:2202.00512); the released network.
    """

    scale_shift_norm: bool = True
    resample: str = "resblock"
    asymmetric_padding: bool = True
    norm_eps: float = 1e-6
    sin_first: bool = True
    frequency_shift: int = 1
    layer_rule: LayerRule = lecun_normal
    emb_channels: int = 1024

    def __post_init__(self):
        for name in ("vector_dim", "guidance_dim", "null_label"):
            if getattr(self, name):
                raise ValueError(f"{name} is not part of the progressive distillation UNet, got {getattr(self, name)}")
        super().__post_init__()

    def _embed(self, t: Array, cond: Cond) -> Array:
        emb = sinusoidal_embedding(
            t, self.base_channels, sin_first=self.sin_first, frequency_shift=self.frequency_shift
        )
        emb = Dense(self.emb_channels, self.layer_rule, name="time_in")(emb)
        emb = Dense(self.emb_channels, self.layer_rule, name="time_out")(jax.nn.silu(emb))
        if self.num_classes is None:
            return emb
        label = cond["label"]
        known = (label >= 0) & (label < self.num_classes)
        # A label outside the classes gives NaN, as LabelEmbedding does, and not the bias alone.
        one_hot = jnp.where(known[:, None], jax.nn.one_hot(label, self.num_classes), jnp.nan)
        return emb + Dense(self.emb_channels, self.layer_rule, name="label")(one_hot)


def progdist_cifar10_unet() -> ProgDistUNet:
    """The CIFAR-10 network, which predicts x0.

    Source: Salimans and Ho 2022 (arXiv:2202.00512); the released configuration.
    """
    return ProgDistUNet(
        base_channels=256,
        channel_mult=(1, 1, 1),
        num_res_blocks=3,
        attention_factors=attention_factors(32, (16, 8)),
        dropout=0.2,
    )


def progdist_imagenet64_unet(*, num_classes: int | None = 1000) -> ProgDistUNet:
    """The ImageNet 64 x 64 network, which predicts x0 and eps side by side.

    Source: Salimans and Ho 2022 (arXiv:2202.00512); the released configuration.
    """
    return ProgDistUNet(
        out_channels=6,
        base_channels=192,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=3,
        attention_factors=attention_factors(64, (32, 16, 8)),
        head_channels=64,
        num_classes=num_classes,
        dropout=0.1,
        emb_channels=768,
    )

"""The downward half of ADM's UNet with a pooled output: the classifiers that guide ADM.

`EncoderUNet` has the steps of `unet` down to the middle, under the same names, and then one of four heads: attention
pooling (Radford et al. 2021, the published classifiers), the mean, or means of every step through two layers. It knows
times only as numbers to embed. Guidance by its gradient is in `guidance`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.networks import unet as unet_module
from jaxdiff.networks.attention import attention
from jaxdiff.networks.initializers import LayerRule, Normal, torch_default
from jaxdiff.networks.layers import Conv, Dense, GroupNorm
from jaxdiff.networks.unet import Resample, UNet, check_inputs, level_channels, unet_plan
from jaxdiff.networks.unet_presets import adm_unet
from jaxdiff.types import Cond

POOLS = ("attention", "adaptive", "spatial", "spatial_v2")
HIDDEN = 2048
UP_ONLY = {"num_heads_up": None, "low_res_channels": 0, "concat_channels": 0, "context_dim": None}


class AttentionPool(nn.Module):
    """The mean token, with learned positions, attends to itself and to every position of the image.

    Attributes:
      features: output channels.
      heads: number of heads; divides the channels.
      rule: how layers start.

    Source: Radford et al. 2021 (arXiv:2103.00020) section 2.4.
    """

    features: int
    heads: int
    rule: LayerRule = torch_default

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b o"]:
        b, height, width, c = x.shape
        count = height * width + 1
        tokens = x.reshape(b, count - 1, c)
        tokens = jnp.concatenate([tokens.mean(1, keepdims=True), tokens], axis=1)
        tokens = tokens + self.param("positions", Normal(c**-0.5), (count, c), jnp.float32)[None]
        qkv = Dense(3 * c, self.rule, parts=3, name="qkv")(tokens).reshape(b, count, 3, self.heads, c // self.heads)
        # Only the first token is returned, so it alone asks.
        h = attention(qkv[:, :1, 0], qkv[:, :, 1], qkv[:, :, 2])
        return Dense(self.features, self.rule, name="out")(h.reshape(b, c))


class EncoderUNet(UNet):
    """A UNet without its way up, as a classifier of noisy images.

    The fields are those of `UNet`, where out_channels is the number of logits, and

    Attributes:
      image_size: height and width of the images; the positions of attention pooling depend on it.
      pool: "attention" (needs head_channels), "adaptive" (mean over the image), "spatial" or "spatial_v2" (means of
        every step through two layers, the latter with a norm between them).

    Raises:
      ValueError: when built, if fields contradict each other or only concern the way up; when first called, if x_t or
        cond do not fit them.

    Source: Dhariwal and Nichol 2021 (arXiv:2105.05233) section 4.
    """

    image_size: int = 64
    pool: str = "attention"

    def __post_init__(self):
        _check_fields(self)
        super().__post_init__()

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x_t: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Cond, *, train: bool = False
    ) -> Float[Array, "b o"]:
        """Applies the network.

        Args:
          x_t: [B, H, W, in_channels]; with attention pooling H = W = image_size, else both divisible by
            2^(levels - 1).
          t: [B] times, as the network is to embed them.
          cond: exactly the arrays the fields ask for; empty for the published classifiers.
          train: whether dropout is on; then a "dropout" key is needed.

        Returns:
          [B, out_channels] logits, float32.
        """
        check_inputs(self, x_t, cond)
        if self.pool == "attention" and x_t.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"this classifier pools images of {self.image_size} x {self.image_size} by attention, got "
                f"{x_t.shape[1]} x {x_t.shape[2]}; resize the images"
            )
        emb = self._embed(t, cond)
        plan = unet_plan(self)
        h = Conv(level_channels(self, 0), rule=self.layer_rule, dtype=self.dtype, name="conv_in")(x_t)
        steps = [h]
        for step in plan.down:
            if isinstance(step, Resample):
                h = self._resample(step, "down", h, emb, train)
            else:
                h = self._block(step, h, emb, cond, train)
            steps.append(h)
        h = self._block(plan.mid, h, emb, cond, train)
        h = self._res_block("mid_res_out", plan.mid.channels)(h, emb, train)
        return self._pool([*steps, h])

    def _pool(self, steps: list[Array]) -> Array:
        if self.pool in ("spatial", "spatial_v2"):
            h = jnp.concatenate([step.astype(jnp.float32).mean((1, 2)) for step in steps], axis=-1)
            h = Dense(HIDDEN, self.layer_rule, name="hidden")(h)
            if self.pool == "spatial":
                h = jax.nn.relu(h)
            else:
                h = jax.nn.silu(
                    GroupNorm(self.norm_groups, self.norm_eps, name="norm_out")(h[:, None, None, :])[:, 0, 0]
                )
            return Dense(self.out_channels, self.layer_rule, name="out")(h)
        h = steps[-1].astype(jnp.float32)
        h = jax.nn.silu(GroupNorm(self.norm_groups, self.norm_eps, name="norm_out")(h))
        if self.pool == "adaptive":
            return Dense(self.out_channels, self.output_rule, name="out")(h.mean((1, 2)))
        heads = h.shape[-1] // (self.head_channels or 1)
        return AttentionPool(self.out_channels, heads, self.layer_rule, name="pool")(h)


def example_inputs(encoder: EncoderUNet, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, dict]:
    """Inputs of an encoder as shapes, for `init_params`."""
    _, t, cond = unet_module.example_inputs(encoder, batch)
    size = encoder.image_size
    return jax.ShapeDtypeStruct((batch, size, size, encoder.in_channels), jnp.float32), t, cond


def adm_classifier(image_size: int, *, num_classes: int = 1000) -> EncoderUNet:
    """The ImageNet classifiers of ADM: 64 pixels 65.439 M parameters, 128 42.568 M, 256 54.096 M, 512 54.448 M.

    Source: Dhariwal and Nichol 2021 (arXiv:2105.05233) section 4; the released configurations.
    """
    generator = adm_unet(image_size)
    return EncoderUNet(
        image_size=image_size,
        out_channels=num_classes,
        base_channels=128,
        channel_mult=generator.channel_mult,
        num_res_blocks=4 if image_size == 64 else 2,
        attention_factors=generator.attention_factors,
        head_channels=64,
        scale_shift_norm=True,
        resample="resblock",
        pool="attention",
    )


def _check_fields(encoder: EncoderUNet) -> None:
    if encoder.pool not in POOLS:
        raise ValueError(f"pool must be one of {POOLS}, got {encoder.pool!r}")
    if encoder.pool == "attention" and encoder.head_channels is None:
        raise ValueError("pool 'attention' needs head_channels, got None; set it or choose another pool")
    for name, unused in UP_ONLY.items():
        if getattr(encoder, name) != unused:
            raise ValueError(f"{name} {getattr(encoder, name)} has no effect in an EncoderUNet; leave it at {unused}")
    factor = 2 ** (len(encoder.channel_mult) - 1)
    if encoder.image_size < 1 or encoder.image_size % factor:
        raise ValueError(
            f"image_size must be divisible by {factor} for {len(encoder.channel_mult)} levels, got {encoder.image_size}"
        )

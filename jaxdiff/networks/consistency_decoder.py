"""The consistency decoder: a UNet that turns latents of Stable Diffusion into images, in place of its VAE's decoder.

`ConsistencyDecoder` is a `unet.UNet` of residual blocks alone, with a learned table in place of the features of time
and the latent, enlarged to the size of the image, beside x_t. How it is called with noise, its 1024 times and their
rounding are the business of a method: nothing here knows a schedule.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.networks.base import check_cond
from jaxdiff.networks.layers import Dense, LabelEmbedding
from jaxdiff.networks.unet import COND_KEYS, UNet
from jaxdiff.types import Cond

# Of the four channels of Stable Diffusion's scaled latents.
LATENT_MEAN = (0.38862467, 0.02253063, 0.07381133, -0.0171294)
LATENT_STD = (0.9654121, 1.0440036, 0.76147926, 0.77022034)


class ConsistencyDecoder(UNet):
    """The network of the consistency decoder; the defaults are the released one, 621.278 M parameters.

    The fields are those of `UNet` (concat_channels are the channels of cond["latent"]) and

    Attributes:
      emb_channels: width of the embedding of times.
      num_times: rows of the table of times.
      upscale: pixels of the image a pixel of the latent, along each side.

    Source: Betker et al. 2023, "Improving image generation with better captions"; the released network.
    """

    out_channels: int = 6
    base_channels: int = 320
    channel_mult: Sequence[int | float] = (1, 2, 3.2, 3.2)
    num_res_blocks: int = 3
    mid_attention: bool = False
    concat_channels: int = 4
    scale_shift_norm: bool = True
    resample: str = "resblock"
    emb_channels: int = 1280
    num_times: int = 1024
    upscale: int = 8

    def __post_init__(self):
        for name in ("num_classes", "vector_dim", "guidance_dim", "context_dim", "low_res_channels"):
            if getattr(self, name):
                raise ValueError(f"{name} is not part of the consistency decoder, got {getattr(self, name)}")
        super().__post_init__()

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
          x_t: [B, H, W, 3], scaled as a method says; H and W divisible by 2^(levels - 1) and by upscale.
          t: [B] times, whole numbers from 0 to num_times - 1; others are rounded, and outside give NaN.
          cond: {"latent": [B, H / upscale, W / upscale, concat_channels]}, see `normalize_latent`.
          train: whether dropout is on; then a "dropout" key is needed.
          control: as in `UNet`.
          return_features: as in `UNet`.

        Returns:
          [B, H, W, out_channels] float32, of which the release uses the first three; or that and the features.
        """
        check_cond(cond, {"latent"}, COND_KEYS | {"latent"}, "consistency decoder")
        latent, n = cond["latent"], self.upscale
        expected = (x_t.shape[0], x_t.shape[1] // n, x_t.shape[2] // n, self.concat_channels)
        if latent.shape != expected or x_t.shape[1] % n or x_t.shape[2] % n:
            raise ValueError(
                f"cond['latent'] must be {expected}, {n} times smaller than the image {x_t.shape}, got {latent.shape}"
            )
        b, h, w, c = latent.shape
        latent = jnp.broadcast_to(latent[:, :, None, :, None, :], (b, h, n, w, n, c)).reshape(b, h * n, w * n, c)
        return super().__call__(
            x_t, t, {"concat": latent}, train=train, control=control, return_features=return_features
        )

    def _embed(self, t: Array, cond: Cond) -> Array:
        del cond
        table = LabelEmbedding(self.num_times, self.base_channels, name="time_table")
        emb = Dense(self.emb_channels, self.layer_rule, name="time_in")(table(jnp.rint(t).astype(jnp.int32)))
        return Dense(self.emb_channels, self.layer_rule, name="time_out")(jax.nn.silu(emb))


def normalize_latent(latent: Float[Array, "b h w 4"]) -> Float[Array, "b h w 4"]:
    """Stable Diffusion's latents (times their scale factor 0.18215), with mean 0 and deviation 1 in each channel."""
    mean, std = (np.asarray(a, np.float32).reshape(1, 1, 1, 4) for a in (LATENT_MEAN, LATENT_STD))
    return (latent - mean) / std


def example_inputs(
    decoder: ConsistencyDecoder, batch: int = 1
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, dict]:
    """The smallest inputs of a decoder as shapes, for `init_params`; parameters do not depend on H and W."""
    latent = -(-(2 ** (len(decoder.channel_mult) - 1)) // decoder.upscale)
    size = latent * decoder.upscale

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *shape), jnp.float32)

    return (
        floats(size, size, decoder.in_channels),
        floats(),
        {"latent": floats(latent, latent, decoder.concat_channels)},
    )

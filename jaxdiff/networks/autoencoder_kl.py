"""The KL-regularised autoencoder of latent diffusion, which is Stable Diffusion's VAE, and its published sizes.

Images [B, H, W, C] in [-1, 1] to a diagonal Gaussian over latents [B, H / f, W / f, embed_dim], and back. The
posterior is a pair of arrays; drawing from it, its KL and its likelihood are functions of that pair. Latents are as
the network gives them: diffusion models multiply them by a scale factor that belongs to the diffusion model, 0.18215
for Stable Diffusion 1 and 2 and the text-to-image model of latent diffusion, 1 / std of the first batch for its KL-f8
churches. The perceptual and adversarial losses these networks were trained with are not here.

Source: Rombach et al. 2022 (arXiv:2112.10752) section 3.1 and appendix G; Kingma and Welling 2013 (arXiv:1312.6114).
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.networks.autoencoder_blocks import FirstStage, check_images, check_latent
from jaxdiff.networks.unet_presets import attention_factors

LOG_VARIANCE_RANGE = (-30.0, 20.0)


class Posterior(NamedTuple):
    """q(z | x), a normal distribution with diagonal covariance.

    Attributes:
      mean: [B, h, w, embed_dim].
      log_variance: the same shape, in [-30, 20].
    """

    mean: Array
    log_variance: Array


class AutoencoderKL(FirstStage):
    """Encoder to a Gaussian over latents, and decoder.

    Apply `encode` and `decode` with `module.apply({"params": params}, x, method="encode")`.

    Attributes:
      z_channels: half the channels that the encoder gives.
      embed_dim: channels of the latent.

    Raises:
      ValueError: when built, if fields contradict each other; when applied, if images or latents do not fit.

    Source: Rombach et al. 2022 (arXiv:2112.10752) section 3.1.
    """

    def setup(self):
        self.encoder, self.quant_conv, self.post_quant_conv, self.decoder = self.parts(
            2 * self.z_channels, 2 * self.embed_dim
        )

    def encode(self, x: Float[Array, "b h w c"], *, train: bool = False) -> Posterior:
        """Images [B, H, W, in_channels] in [-1, 1] to the distribution of their latents.

        Args:
          x: H and W divisible by 2^(levels - 1).
          train: whether dropout is on; then a "dropout" key is needed.
        """
        check_images(self, x)
        return posterior_from_moments(self.quant_conv(self.encoder(x, train)))

    def decode(self, z: Float[Array, "b h w e"], *, train: bool = False) -> Float[Array, "b h2 w2 o"]:
        """Latents [B, h, w, embed_dim], without scale factor, to images [B, h f, w f, out_channels]."""
        check_latent(self, z)
        return self.decoder(self.post_quant_conv(z), train)

    def __call__(
        self, x: Float[Array, "b h w c"], noise: Float[Array, "b h2 w2 e"] | None = None, *, train: bool = False
    ) -> tuple[Float[Array, "b h w o"], Posterior]:
        """Reconstructs images from a latent drawn with unit `noise`, or from the mean without it."""
        posterior = self.encode(x, train=train)
        z = posterior.mean if noise is None else sample_posterior(posterior, noise)
        return self.decode(z, train=train), posterior


def posterior_from_moments(moments: Float[Array, "b h w e2"]) -> Posterior:
    """Splits channels into mean and log-variance, and clips the latter to [-30, 20]."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return Posterior(mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE))


def sample_posterior(posterior: Posterior, noise: Float[Array, "b h w e"]) -> Float[Array, "b h w e"]:
    """The latent mean + std noise.

    Args:
      posterior: the distribution.
      noise: [B, h, w, embed_dim] unit normal.
    """
    return posterior.mean + jnp.exp(0.5 * posterior.log_variance) * noise


def posterior_kl(posterior: Posterior) -> Float[Array, " b"]:
    """KL(q || N(0, I)) of each example in nats, summed (not averaged) over positions and channels.

    Source: Kingma and Welling 2013 (arXiv:1312.6114) appendix B.
    """
    mean, log_variance = posterior
    return 0.5 * jnp.sum(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance, axis=(1, 2, 3))


def posterior_nll(posterior: Posterior, z: Float[Array, "b h w e"]) -> Float[Array, " b"]:
    """-log q(z) of each example in nats, summed over positions and channels."""
    mean, log_variance = posterior
    terms = math.log(2 * math.pi) + log_variance + (z - mean) ** 2 * jnp.exp(-log_variance)
    return 0.5 * jnp.sum(terms, axis=(1, 2, 3))


def kl_f4() -> AutoencoderKL:
    """KL-f4: latents of 3 channels at a quarter of the side, 55.312 M parameters."""
    return AutoencoderKL(channel_mult=(1, 2, 4), z_channels=3, embed_dim=3)


def kl_f8() -> AutoencoderKL:
    """KL-f8: latents of 4 channels at an eighth of the side, 83.654 M parameters."""
    return AutoencoderKL(channel_mult=(1, 2, 4, 4), z_channels=4, embed_dim=4)


def kl_f16() -> AutoencoderKL:
    """KL-f16: latents of 16 channels at a sixteenth of the side, 69.611 M parameters; attention at 16 of 256 pixels."""
    return AutoencoderKL(
        channel_mult=(1, 1, 2, 2, 4), attention_factors=attention_factors(256, (16,)), z_channels=16, embed_dim=16
    )


def kl_f32() -> AutoencoderKL:
    """KL-f32: latents of 64 channels at a thirty-second of the side, 103.880 M parameters; attention at 16 and 8."""
    return AutoencoderKL(
        channel_mult=(1, 1, 2, 2, 4, 4), attention_factors=attention_factors(256, (16, 8)), z_channels=64, embed_dim=64
    )


def stable_diffusion_vae() -> AutoencoderKL:
    """The autoencoder of Stable Diffusion 1 and 2: the shape of KL-f8 with other weights; scale factor 0.18215."""
    return kl_f8()

"""The vector-quantised autoencoder of VQGAN and latent diffusion, its codebook functions and its published sizes.

Images [B, H, W, C] in [-1, 1] to latents [B, H / f, W / f, embed_dim], each position replaced by the nearest row of a
codebook, and back. Latent diffusion models live on the latents before quantisation (`encode`), scale factor 1, and
quantise what they drew when they decode it (`decode_latent`). Codes are learned by gradient: there is no moving
average of codes. The perceptual and adversarial losses these networks were trained with are not here.

Source: van den Oord et al. 2017 (arXiv:1711.00937) section 3; Esser et al. 2021 (arXiv:2012.09841) section 3.1;
Rombach et al. 2022 (arXiv:2112.10752) section 3.1.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxdiff.networks.autoencoder_blocks import FirstStage, check_images, check_latent
from jaxdiff.networks.initializers import Uniform
from jaxdiff.networks.unet_presets import attention_factors


class Quantized(NamedTuple):
    """Latents and their codes.

    Attributes:
      latent: [B, h, w, embed_dim] before quantisation.
      codes: the same shape, the nearest rows of the codebook; their gradient reaches the codebook.
      indices: [B, h, w] int32, which rows.
    """

    latent: Array
    codes: Array
    indices: Array


class CodeUsage(NamedTuple):
    """How evenly codes are used: exp of the entropy of their frequencies, and how many occur at all. Both [].

    With `num_codes` codes, the perplexity lies between 1 and num_codes.
    """

    perplexity: Array
    num_used: Array


class AutoencoderVQ(FirstStage):
    """Encoder, codebook and decoder.

    Apply methods with `module.apply({"params": params}, x, method="encode")`.

    Attributes:
      embed_dim: channels of the latent and width of the codebook.
      num_codes: rows of the codebook.

    Raises:
      ValueError: when built, if fields contradict each other; when applied, if images or latents do not fit.

    Source: Esser et al. 2021 (arXiv:2012.09841) section 3.1.
    """

    num_codes: int = 8192

    def setup(self):
        self.encoder, self.quant_conv, self.post_quant_conv, self.decoder = self.parts(self.z_channels, self.embed_dim)
        start = Uniform(1 / self.num_codes)
        self.codebook = self.param("codebook", start, (self.num_codes, self.embed_dim), jnp.float32)

    def encode(self, x: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b h2 w2 e"]:
        """Images [B, H, W, in_channels] in [-1, 1] to latents before quantisation.

        Args:
          x: H and W divisible by 2^(levels - 1).
          train: whether dropout is on; then a "dropout" key is needed.
        """
        check_images(self, x)
        return self.quant_conv(self.encoder(x, train))

    def quantize(self, latent: Float[Array, "b h w e"]) -> Quantized:
        """The nearest code of every position."""
        check_latent(self, latent)
        indices = nearest_codes(latent, self.codebook)
        return Quantized(latent, self.codebook[indices], indices)

    def decode(self, codes: Float[Array, "b h w e"], *, train: bool = False) -> Float[Array, "b h2 w2 o"]:
        """Codes [B, h, w, embed_dim] to images [B, h f, w f, out_channels]. Quantises nothing."""
        check_latent(self, codes)
        return self.decoder(self.post_quant_conv(codes), train)

    def decode_latent(self, latent: Float[Array, "b h w e"], *, train: bool = False) -> Float[Array, "b h2 w2 o"]:
        """Quantises latents, then decodes them: the decoder of a latent diffusion model."""
        quantized = self.quantize(latent)
        return self.decode(straight_through(quantized), train=train)

    def decode_indices(self, indices: Int[Array, "b h w"]) -> Float[Array, "b h2 w2 o"]:
        """Images of given rows of the codebook. An index outside it gives NaN, not a neighbour."""
        index = jnp.where(indices < 0, self.num_codes, indices)
        return self.decode(jnp.take(self.codebook, index, axis=0, mode="fill", fill_value=jnp.nan))

    def __call__(self, x: Float[Array, "b h w c"], *, train: bool = False) -> tuple[Float[Array, "b h w o"], Quantized]:
        """Reconstructs images through the codebook."""
        quantized = self.quantize(self.encode(x, train=train))
        return self.decode(straight_through(quantized), train=train), quantized


def nearest_codes(latent: Float[Array, "b h w e"], codebook: Float[Array, "n e"]) -> Int[Array, "b h w"]:
    """Row of the codebook with the smallest squared distance |z|^2 + |e|^2 - 2 z.e; the lowest index wins a tie.

    Written as the releases do, so that float32 rounding picks the codes that they pick.
    """
    z = latent.reshape(-1, latent.shape[-1])
    # Half precision products, the default on some devices, would choose other codes.
    products = jnp.matmul(z, codebook.T, precision=lax.Precision.HIGHEST)
    distances = jnp.sum(z**2, axis=1)[:, None] + jnp.sum(codebook**2, axis=1)[None, :] - 2 * products
    return jnp.argmin(distances, axis=1).astype(jnp.int32).reshape(latent.shape[:-1])


def straight_through(quantized: Quantized) -> Float[Array, "b h w e"]:
    """The codes in value, the latent in gradient: latent + stop_gradient(codes - latent).

    Source: van den Oord et al. 2017 (arXiv:1711.00937) section 3.2.
    """
    return quantized.latent + lax.stop_gradient(quantized.codes - quantized.latent)


def codebook_loss(quantized: Quantized, *, beta: float = 0.25, legacy: bool = True) -> Float[Array, " b"]:
    """Moves codes to latents and latents to codes: mean squared differences of each example.

    With sg the stopped gradient and means over positions and channels: the commitment mean((sg(codes) - latent)^2)
    moves latents, mean((codes - sg(latent))^2) moves codes.

    Args:
      quantized: as `AutoencoderVQ.quantize` gives it.
      beta: weight of one of the two.
      legacy: True multiplies the term that moves codes, as the released models were trained with; False multiplies
        the commitment, as the paper says.

    Returns:
      [B], to be averaged.

    Source: van den Oord et al. 2017 (arXiv:1711.00937) eq. 3.
    """
    latent, codes, _ = quantized
    commitment = jnp.mean((lax.stop_gradient(codes) - latent) ** 2, axis=(1, 2, 3))
    moves_codes = jnp.mean((codes - lax.stop_gradient(latent)) ** 2, axis=(1, 2, 3))
    return commitment + beta * moves_codes if legacy else beta * commitment + moves_codes


def code_usage(indices: Int[Array, "..."], num_codes: int) -> CodeUsage:
    """Perplexity and number of the codes among `indices`."""
    counts = jnp.zeros(num_codes, jnp.float32).at[indices.reshape(-1)].add(1.0)
    frequencies = counts / indices.size
    entropy = -jnp.sum(frequencies * jnp.log(frequencies + 1e-10))
    return CodeUsage(jnp.exp(entropy), jnp.sum(counts > 0))


def vq_f4() -> AutoencoderVQ:
    """VQ-f4: 8192 codes of 3 channels at a quarter of the side, 55.323 M parameters."""
    return AutoencoderVQ(channel_mult=(1, 2, 4), z_channels=3, embed_dim=3, num_codes=8192)


def vq_f4_noattn() -> AutoencoderVQ:
    """VQ-f4 without any attention, 53.219 M parameters: it sees no farther than its convolutions."""
    return vq_f4().clone(mid_attention=False)


def vq_f8(num_codes: int = 16384) -> AutoencoderVQ:
    """VQ-f8: 16384 codes of 4 channels at an eighth, 67.717 M parameters; attention at 32 of 256 pixels."""
    return AutoencoderVQ(
        channel_mult=(1, 2, 2, 4),
        attention_factors=attention_factors(256, (32,)),
        z_channels=4,
        embed_dim=4,
        num_codes=num_codes,
    )


def vq_f8_n256() -> AutoencoderVQ:
    """VQ-f8 with 256 codes, 67.653 M parameters."""
    return vq_f8(256)


def vq_f16() -> AutoencoderVQ:
    """VQ-f16: 16384 codes of 8 channels at a sixteenth, 69.593 M parameters; attention at 16 of 256 pixels."""
    return AutoencoderVQ(
        channel_mult=(1, 1, 2, 2, 4),
        attention_factors=attention_factors(256, (16,)),
        z_channels=8,
        embed_dim=8,
        num_codes=16384,
    )


def vqgan_f16(num_codes: int = 1024) -> AutoencoderVQ:
    """VQGAN at f = 16 on ImageNet: 1024 codes of 256 channels (72.142 M parameters), or 16384 (76.074 M).

    Source: Esser et al. 2021 (arXiv:2012.09841) section 4.3.
    """
    return vq_f16().clone(z_channels=256, embed_dim=256, num_codes=num_codes)

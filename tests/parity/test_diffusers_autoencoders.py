"""First stages of diffusers: saved there, imported, the same outputs; exported, read there, the same again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ConsistencyDecoderVAE, VQModel
from exchange import assert_close, assert_same_state, drawn, first, run, there_and_back

from jaxdiff.networks.consistency_decoder import normalize_latent
from jaxdiff.pretrained import folders

KL = {
    "sd": dict(
        block_out_channels=(16, 32, 32), layers_per_block=2, norm_num_groups=8, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    ),
    "attention": dict(
        block_out_channels=(16, 48), layers_per_block=1, norm_num_groups=16, latent_channels=3, in_channels=1,
        out_channels=1, down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    ),
    "no_middle": dict(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ),
}  # fmt: skip
VQ = {
    "narrow_codes": dict(
        block_out_channels=(16, 32), layers_per_block=2, norm_num_groups=8, latent_channels=4, num_vq_embeddings=24,
        vq_embed_dim=3, down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    ),
    "no_middle": dict(
        block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=4, latent_channels=3,
        num_vq_embeddings=32, mid_block_add_attention=False, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    ),
}  # fmt: skip
DECODER = dict(
    encoder_block_out_channels=(16, 32), encoder_layers_per_block=1, encoder_norm_num_groups=8,
    encoder_down_block_types=("DownEncoderBlock2D",) * 2, decoder_block_out_channels=(32, 48),
    decoder_norm_num_groups=16, decoder_num_train_timesteps=1024,
    decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2, decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
)  # fmt: skip


def picture(*shape):
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def apply(network, method):
    return jax.jit(lambda params, x: network.apply({"params": params}, x, method=method))


@pytest.mark.parametrize("name", KL)
def test_autoencoder_kl(name, tmp_path):
    ours, back = there_and_back("diffusers-autoencoder", model := drawn(AutoencoderKL(**KL[name])), tmp_path)
    x = picture(2, 16, 16, ours.spec.network.in_channels)
    posterior = apply(ours.spec.network, "encode")(ours.params, x)
    z = picture(*posterior.mean.shape)
    decoded = apply(ours.spec.network, "decode")(ours.params, z)
    for peer in (model, back):
        with torch.inference_mode():
            found = peer.encode(first(x)).latent_dist
            assert_close(posterior.mean, found.mean)
            assert_close(posterior.log_variance, found.logvar)
            assert_close(decoded, peer.decode(first(z)).sample)


@pytest.mark.parametrize("name", VQ)
def test_vq_model(name, tmp_path):
    ours, back = there_and_back("diffusers-autoencoder", model := drawn(VQModel(**VQ[name])), tmp_path)
    x = picture(2, 16, 16, 3)
    latent = apply(ours.spec.network, "encode")(ours.params, x)
    quantized = apply(ours.spec.network, "quantize")(ours.params, latent)
    decoded = apply(ours.spec.network, "decode_latent")(ours.params, latent)
    for peer in (model, back):
        with torch.inference_mode():
            found = peer.encode(first(x)).latents
            assert_close(latent, found)
            codes, _, (_, _, indices) = peer.quantize(found)
            np.testing.assert_array_equal(quantized.indices.reshape(-1), indices.numpy().reshape(-1))
            assert_close(quantized.codes, codes)
            assert_close(decoded, peer.decode(found).sample)
    assert len(np.unique(quantized.indices)) > 3


def test_consistency_decoder_vae(tmp_path):
    model = drawn(ConsistencyDecoderVAE(**DECODER))
    model.save_pretrained(tmp_path / "theirs")
    run("import", "diffusers-consistency-decoder-vae", tmp_path / "theirs", tmp_path / "ours")
    decoder, encoder = (folders.load(tmp_path / "ours" / part) for part in ("decoder", "encoder"))
    run("export", "diffusers-consistency-decoder-vae", tmp_path / "ours", tmp_path / "back")
    back = ConsistencyDecoderVAE.from_pretrained(tmp_path / "back", local_files_only=True).eval()
    assert_same_state(back.state_dict(), model.state_dict())

    pixels, z, t = picture(2, 16, 16, 3), picture(2, 8, 8, 4), np.array([0, 1008])
    posterior = apply(encoder.spec.network, "encode")(encoder.params, pixels)
    latent = normalize_latent(jnp.asarray(z * model.config.scaling_factor))
    made = jax.jit(decoder.spec.network.apply)(
        {"params": decoder.params}, pixels, t.astype(np.float32), {"latent": latent}
    )
    for peer in (model, back):
        with torch.inference_mode():
            found = peer.encode(first(pixels)).latent_dist
            assert_close(posterior.mean, found.mean)
            assert_close(posterior.log_variance, found.logvar)
            normed = (first(z) * peer.config.scaling_factor - peer.means) / peer.stds
            spread = torch.nn.functional.interpolate(normed, mode="nearest", scale_factor=2)
            assert_close(made, peer.decoder_unet(torch.cat([first(pixels), spread], 1), torch.from_numpy(t)).sample)

"""Folders of diffusers: which file is read, settings of the middle's norm, the consistency decoder with its encoder."""

import json

import numpy as np
import pytest

from jaxdiff.networks.autoencoder_kl import AutoencoderKL
from jaxdiff.networks.consistency_decoder import ConsistencyDecoder
from jaxdiff.pretrained import diffusers_config, forms, plans
from jaxdiff.pretrained.diffusers_write import consistency_decoder_config, unet_config

PLAIN = dict(block_out_channels=[32], down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"])
ENCODER = AutoencoderKL(
    base_channels=8, channel_mult=(1, 2), num_res_blocks=3, z_channels=4, embed_dim=4, norm_groups=4
)
DECODER = ConsistencyDecoder(base_channels=8, channel_mult=(1, 1.5), emb_channels=32, upscale=2, norm_groups=4)


def test_the_only_weight_file_of_a_folder_is_read(tmp_path):
    only = tmp_path / "diffusion_pytorch_model.fp16.safetensors"
    only.touch()
    assert plans.weights_in(tmp_path) == only
    (tmp_path / "other.ckpt").touch()
    with pytest.raises(ValueError, match=r"it has diffusion_pytorch_model.fp16.safetensors, other.ckpt; name one"):
        plans.weights_in(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin.index.json").touch()
    assert plans.weights_in(tmp_path).name == "diffusion_pytorch_model.bin.index.json"


@pytest.mark.parametrize(("shift", "groups"), [("default", None), ("default", 32), ("scale_shift", 32)])
def test_the_norm_of_the_middles_attention(shift, groups):
    config = PLAIN | {"resnet_time_scale_shift": shift, "attn_norm_num_groups": groups}
    unet = diffusers_config.unet_from_config(config)
    assert unet.scale_shift_norm == (shift == "scale_shift")
    assert unet_config(unet)["attn_norm_num_groups"] == 32


@pytest.mark.parametrize(("shift", "groups"), [("scale_shift", None), ("default", 8)])
def test_another_norm_of_the_middles_attention_is_refused(shift, groups):
    config = PLAIN | {"resnet_time_scale_shift": shift, "attn_norm_num_groups": groups}
    with pytest.raises(ValueError, match=f"attn_norm_num_groups {groups} of this UNet2DModel is not supported"):
        diffusers_config.unet_from_config(config)
    assert diffusers_config.unet_from_config(config | {"add_attention": False}).mid_attention is False


def test_the_consistency_decoder_has_one_configuration_with_its_encoder():
    config = json.loads(json.dumps(consistency_decoder_config({"decoder": DECODER, "encoder": ENCODER})))
    assert forms.diffusers_decoder_config(config).network == DECODER
    assert forms.encoder_config(config).network == ENCODER


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"decoder": DECODER}, "a ConsistencyDecoderVAE needs a decoder and an encoder, got decoder"),
        ({"decoder": DECODER.clone(upscale=4), "encoder": ENCODER}, "upscale 4 of this network has no place in a Cons"),
        ({"decoder": DECODER, "encoder": ENCODER.clone(mid_attention=False)}, "mid_attention False of this network"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        consistency_decoder_config(parts)


def test_the_published_decoder_has_the_published_configuration():
    config = consistency_decoder_config({"decoder": ConsistencyDecoder(), "encoder": forms.encoder_config({}).network})
    assert config["decoder_block_out_channels"] == [320, 640, 1024, 1024] and config["decoder_in_channels"] == 7
    assert np.prod([2 for _ in config["encoder_block_out_channels"][1:]]) == ConsistencyDecoder().upscale

"""Configurations and names of diffusers: published sizes, exact round trips, old names, refusals."""

import jax
import numpy as np
import pytest

from jaxdiff.networks import controlnet as controlnets
from jaxdiff.networks.autoencoder_blocks import example_input
from jaxdiff.networks.autoencoder_kl import AutoencoderKL, stable_diffusion_vae
from jaxdiff.networks.autoencoder_vq import AutoencoderVQ
from jaxdiff.networks.base import num_params, param_shapes
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.networks.unet_presets import adm_unet, stable_diffusion_unet
from jaxdiff.pretrained import diffusers_layout as layout
from jaxdiff.pretrained.diffusers_config import autoencoder_from_config, controlnet_from_config, unet_from_config

SD1 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SD2 = SD1 | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
SD2 |= {"dual_cross_attention": False, "only_cross_attention": False, "upcast_attention": True}
LCM = SD1 | {"time_cond_proj_dim": 256}
DDPM = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def shapes_of(network):
    if isinstance(network, controlnets.ControlNet):
        return param_shapes(network, *controlnets.example_inputs(network))
    if isinstance(network, UNet):
        return param_shapes(network, *example_inputs(network))
    return param_shapes(network, example_input(network))


def drawn(network):
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape, np.float32), shapes_of(network))


@pytest.mark.parametrize(("config", "millions"), [(SD1, 859.521), (SD2, 865.911), (LCM, 859.603), (DDPM, 35.746)])
def test_published_configurations_have_the_published_size(config, millions):
    assert round(num_params(shapes_of(unet_from_config(config))) / 1e6, 3) == millions


def test_inpainting_takes_its_other_channels_from_cond():
    unet = unet_from_config(SD1 | {"in_channels": 9}, concat_channels=5)
    assert unet == unet_from_config(SD1).clone(concat_channels=5)
    assert round(num_params(shapes_of(unet)) / 1e6, 3) == 859.535


def test_stable_diffusion_is_the_preset():
    assert jax.tree.map(lambda a: a.shape, shapes_of(unet_from_config(SD2))) == jax.tree.map(
        lambda a: a.shape, shapes_of(stable_diffusion_unet(2))
    )
    assert unet_from_config(SD1) == stable_diffusion_unet(1)
    assert autoencoder_from_config(VAE) == stable_diffusion_vae()


def test_stable_diffusion_has_the_names_of_its_files():
    names = [name for e in layout.unet_entries(stable_diffusion_unet(1)) for name in e.names]
    assert len(names) == len(set(names)) == 686
    assert {
        "time_embedding.linear_1.weight",
        "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight",
        "down_blocks.2.downsamplers.0.conv.bias",
        "mid_block.resnets.1.time_emb_proj.weight",
        "up_blocks.0.upsamplers.0.conv.weight",
        "up_blocks.3.resnets.2.conv_shortcut.weight",
        "conv_norm_out.weight",
    } <= set(names)


TINY = UNet(
    base_channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_factors=(2,),
    num_heads=2,
    transformer_depth=1,
    context_dim=6,
    guidance_dim=10,
    vector_dim=5,
    norm_groups=4,
)
TINY_VAE = AutoencoderKL(base_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4, attention_factors=(2,))
CASES = {
    "unet": (TINY, layout.import_unet, layout.export_unet, {}),
    "linear projections": (TINY, layout.import_unet, layout.export_unet, {"linear_projection": True}),
    "attention blocks": (
        TINY.clone(transformer_depth=0, context_dim=None, vector_dim=None, num_classes=3, resample="resblock"),
        layout.import_unet,
        layout.export_unet,
        {},
    ),
    "controlnet": (controlnets.controlnet_for(TINY), layout.import_controlnet, layout.export_controlnet, {}),
    "kl": (TINY_VAE, layout.import_autoencoder, layout.export_autoencoder, {}),
    "vq": (
        AutoencoderVQ(base_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4, num_codes=7),
        layout.import_autoencoder,
        layout.export_autoencoder,
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_exact(name):
    network, read, write, options = CASES[name]
    params = drawn(network)
    state = write(params, network, **options)
    jax.tree.map(np.testing.assert_array_equal, read(state, network, **options), params)
    again = write(read(state, network, **options), network, **options)
    assert again.keys() == state.keys()
    for key, tensor in state.items():
        np.testing.assert_array_equal(again[key], tensor)


def test_projections_are_convolutions_or_matrices():
    params, name = drawn(TINY), "mid_block.attentions.0.proj_in.weight"
    assert layout.export_unet(params, TINY)[name].shape == (16, 16, 1, 1)
    assert layout.export_unet(params, TINY, linear_projection=True)[name].shape == (16, 16)


@pytest.mark.parametrize("name", ["attention blocks", "kl"])
def test_old_names_of_attention_are_understood(name):
    network, read, write, _ = CASES[name]
    params = drawn(network)
    state = write(params, network)
    for old, new in layout.OLD_ATTENTION.items():
        state = {name.replace(new, old) if ".attentions." in name else name: a for name, a in state.items()}
    assert any(key.endswith("mid_block.attentions.0.proj_attn.weight") for key in state)
    jax.tree.map(np.testing.assert_array_equal, read(state, network), params)


def test_tensors_that_do_not_fit_are_named():
    state = layout.export_unet(drawn(TINY), TINY)
    state["extra"] = state.pop("conv_in.weight")
    with pytest.raises(ValueError, match=r"1 missing \(conv_in.weight\); 1 unexpected \(extra\)"):
        layout.import_unet(state, TINY)
    with pytest.raises(ValueError, match="a class table or a vector embedding under one name, not both"):
        layout.unet_entries(TINY.clone(num_classes=2))


def test_controlnet_settings():
    config = {key: value for key, value in SD1.items() if key not in ("out_channels", "up_block_types")}
    config |= {"_class_name": "ControlNetModel", "conditioning_embedding_out_channels": [16, 32, 96, 256]}
    config |= {"controlnet_conditioning_channel_order": "rgb", "global_pool_conditions": False}
    controlnet = controlnet_from_config(config)
    assert controlnet == controlnets.controlnet_for(stable_diffusion_unet(1))
    assert round(num_params(shapes_of(controlnet)) / 1e6, 3) == 361.279


def test_other_settings():
    adm = DDPM | {"attention_head_dim": 64, "resnet_time_scale_shift": "scale_shift", "num_class_embeds": 1000}
    adm |= {"attn_norm_num_groups": 32}
    adm |= {"block_out_channels": [192, 384, 576, 768], "layers_per_block": 3, "out_channels": 6, "norm_eps": 1e-5}
    adm |= {"flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1}
    adm |= {"down_block_types": ["ResnetDownsampleBlock2D"] + ["AttnDownBlock2D"] * 3, "downsample_type": "resnet"}
    adm |= {"up_block_types": ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"], "upsample_type": "resnet"}
    assert num_params(shapes_of(unet_from_config(adm))) == num_params(shapes_of(adm_unet(64)))
    assert unet_from_config(adm).resample == "resblock"
    vq = {**VAE, "_class_name": "VQModel", "num_vq_embeddings": 16, "vq_embed_dim": 2}
    vq["down_block_types"] = ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]
    vq["up_block_types"] = ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3
    autoencoder = autoencoder_from_config(vq)
    assert isinstance(autoencoder, AutoencoderVQ)
    assert (autoencoder.embed_dim, autoencoder.num_codes, autoencoder.attention_factors) == (2, 16, (8,))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: unet_from_config(SD1 | {"norm_epsilon": 1}), "'norm_epsilon' is not a known .*'norm_eps'"),
        (lambda: unet_from_config(SD1 | {"conv_in_kernel": 5}), "conv_in_kernel 5 .* is not supported, expected 3"),
        (lambda: unet_from_config(SD1 | {"act_fn": "gelu"}), "act_fn 'gelu' .* expected 'silu'"),
        (lambda: unet_from_config(SD1 | {"_class_name": "UNet1DModel"}), "'UNet1DModel' is no UNet that is supported"),
        (lambda: unet_from_config(SD1 | {"up_block_types": ["UpBlock2D"] * 4}), "must mirror down_block_types"),
        (lambda: unet_from_config(DDPM | {"down_block_types": ["SkipDownBlock2D"] * 4}), "'SkipDownBlock2D' is not"),
        (lambda: unet_from_config(DDPM | {"downsample_type": "resnet"}), "one kind of resampling for all levels"),
        (lambda: unet_from_config({"_class_name": "UNet2DModel"}), r"lacks \['block_out_channels', 'down_block_types'"),
        (lambda: unet_from_config(SD1 | {"class_embed_type": "timestep"}), "class_embed_type 'timestep' with"),
        (lambda: unet_from_config(SD1 | {"layers_per_block": [1, 2, 2, 2]}), "the same layers_per_block on every"),
        (lambda: autoencoder_from_config(VAE | {"use_quant_conv": False}), "use_quant_conv False .* expected True"),
        (lambda: autoencoder_from_config({**VAE, "_class_name": "AutoencoderTiny"}), "is no autoencoder that is"),
    ],
)
def test_settings_that_are_unknown_or_unsupported_are_refused(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)

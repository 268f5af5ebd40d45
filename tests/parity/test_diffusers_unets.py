"""UNets and ControlNets of diffusers: saved there, imported, the same outputs; exported, read there, the same again."""

import shutil

import jax
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, LatentConsistencyModelPipeline, UNet2DConditionModel, UNet2DModel
from exchange import assert_close, drawn, first, imported, run, there_and_back

from jaxdiff.networks.unet_presets import stable_diffusion_unet

PLAIN = {
    # Like DDPM's: the classic embedding of times, padding after the last row only, one head.
    "ddpm": dict(
        block_out_channels=(32, 32, 64), layers_per_block=2, norm_num_groups=8, flip_sin_to_cos=False, freq_shift=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"), downsample_padding=0, norm_eps=1e-6,
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), attention_head_dim=None, dropout=0.1,
    ),
    "classes": dict(
        block_out_channels=(16, 24), layers_per_block=1, norm_num_groups=8, num_class_embeds=7, out_channels=6,
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        attention_head_dim=4,
    ),
    "adm": dict(
        block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=16, resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"), downsample_type="resnet",
        upsample_type="resnet", num_class_embeds=3, attention_head_dim=16, attn_norm_num_groups=16,
    ),
    "no_attention": dict(
        block_out_channels=(16, 32), layers_per_block=3, norm_num_groups=16, in_channels=2, out_channels=2,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    ),
}  # fmt: skip
DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
SD1 = dict(
    block_out_channels=(32, 64, 64), layers_per_block=2, norm_num_groups=16, attention_head_dim=8,
    cross_attention_dim=24, down_block_types=DOWN, up_block_types=UP,
)  # fmt: skip
SD2 = SD1 | dict(use_linear_projection=True, attention_head_dim=(2, 4, 8), upcast_attention=True)
CONDITIONAL = {
    "sd1": SD1,
    "sd2": SD2,
    "sd1_inpainting": SD1 | dict(in_channels=9),
    "lcm": SD1 | dict(time_cond_proj_dim=32),
    "depths": SD2 | dict(
        transformer_layers_per_block=(1, 2, 2), layers_per_block=1,
        down_block_types=("DownBlock2D", *DOWN[:2]), up_block_types=(*UP[1:], "UpBlock2D"),
    ),
    "vector": SD2 | dict(class_embed_type="projection", projection_class_embeddings_input_dim=12, layers_per_block=1),
    "classes": SD1 | dict(num_class_embeds=5, layers_per_block=1),
}  # fmt: skip
CONTROL = {
    "sd1": SD1 | dict(conditioning_embedding_out_channels=(8, 16, 24, 32)),
    "sd2": SD2 | dict(conditioning_embedding_out_channels=(16, 32), conditioning_channels=1, layers_per_block=1),
}
CONTROL = {name: {key: config[key] for key in config if key != "up_block_types"} for name, config in CONTROL.items()}


def draw(*shape):
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def inputs(net, size):
    """Latents, times and conditioning that a UNet asks for, channels last."""
    cond = {}
    if net.context_dim is not None:
        cond["context"] = draw(2, 7, net.context_dim)
    if net.concat_channels:
        cond["concat"] = draw(2, size, size, net.concat_channels)
    if net.num_classes is not None:
        cond["label"] = np.array([0, 2], np.int32)
    if net.vector_dim is not None:
        cond["vector"] = draw(2, net.vector_dim)
    if net.guidance_dim is not None:
        cond["guidance"] = np.array([0.5, 6.5], np.float32)
    return draw(2, size, size, net.in_channels), np.array([3.0, 981.0], np.float32), cond


def theirs(model, x_t, t, cond, **more):
    """The output of a UNet or ControlNet of diffusers, in its own order of axes."""
    sample = first(x_t if "concat" not in cond else np.concatenate([x_t, cond["concat"]], -1))
    arguments = dict(more)
    if "context" in cond:
        arguments["encoder_hidden_states"] = torch.from_numpy(cond["context"])
    if "label" in cond or "vector" in cond:
        arguments["class_labels"] = torch.from_numpy(cond["vector"] if "vector" in cond else cond["label"])
    if "guidance" in cond:
        embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
        width = model.config.time_cond_proj_dim
        arguments["timestep_cond"] = embed(None, torch.from_numpy(cond["guidance"]), embedding_dim=width)
    with torch.inference_mode():
        return model(sample, torch.from_numpy(t), **arguments)


def check_unet(model, tmp_path, size=8):
    ours, back = there_and_back("diffusers-unet", drawn(model), tmp_path)
    x_t, t, cond = inputs(ours.spec.network, size)
    output = jax.jit(ours.spec.network.apply)({"params": ours.params}, x_t, t, cond)
    assert_close(output, theirs(model, x_t, t, cond).sample)
    assert_close(output, theirs(back, x_t, t, cond).sample)


@pytest.mark.parametrize("name", PLAIN)
def test_unet_2d_model(name, tmp_path):
    check_unet(UNet2DModel(**PLAIN[name]), tmp_path)


@pytest.mark.parametrize("name", CONDITIONAL)
def test_unet_2d_condition_model(name, tmp_path):
    check_unet(UNet2DConditionModel(**CONDITIONAL[name]), tmp_path)


@pytest.mark.parametrize("name", CONTROL)
def test_controlnet_model(name, tmp_path):
    model = drawn(ControlNetModel(**CONTROL[name]))
    ours, back = there_and_back("diffusers-controlnet", model, tmp_path)
    x_t, t, cond = inputs(ours.spec.network, 8)
    size, channels = 8 * 2 ** (len(ours.spec.network.hint_widths) - 1), ours.spec.network.hint_channels
    hint = draw(2, size, size, channels)
    control = jax.jit(ours.spec.network.apply)({"params": ours.params}, x_t, t, {**cond, "hint": hint})
    for peer in (model, back):
        found = theirs(peer, x_t, t, cond, controlnet_cond=first(hint))
        residuals = (*found.down_block_res_samples, found.mid_block_res_sample)
        assert len(control) == len(residuals) > 6
        for one, other in zip(control, residuals, strict=True):
            assert_close(one, other)


@pytest.mark.slow
def test_stable_diffusion_at_full_width(tmp_path):
    """859.5 M parameters, one copy in memory at a time; 10 GB of files that are gone afterwards."""
    model = drawn(UNet2DConditionModel(cross_attention_dim=768))
    assert sum(parameter.numel() for parameter in model.parameters()) == 859_520_964
    x_t, t, cond = draw(1, 8, 8, 4), np.array([481.0], np.float32), {"context": draw(1, 77, 768)}
    expected = theirs(model, x_t, t, cond).sample
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20GB")
    del model

    ours = imported("diffusers-unet", tmp_path / "theirs", tmp_path / "ours")
    assert ours.spec.network == stable_diffusion_unet(1)
    assert_close(jax.jit(ours.spec.network.apply)({"params": ours.params}, x_t, t, cond), expected)
    run("export", "diffusers-unet", tmp_path / "ours", tmp_path / "back")
    del ours
    back = UNet2DConditionModel.from_pretrained(tmp_path / "back", local_files_only=True).eval()
    torch.testing.assert_close(theirs(back, x_t, t, cond).sample, expected, rtol=1e-6, atol=1e-6)
    for place in ("theirs", "ours", "back"):
        shutil.rmtree(tmp_path / place)

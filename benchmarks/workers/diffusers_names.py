"""The tensor names of diffusers' UNet2DModel for the leaves of our UNet; q, k and v are three layers there."""

from collections.abc import Mapping
from typing import Any

from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.unet import Block, Resample, UNet, example_inputs, unet_plan
from jaxdiff.pretrained.torch_layout import CONV, LINEAR, SAME, Entry, fused, import_params, layer, norm
from jaxdiff.types import Params


def params_from_diffusers(state: Mapping[str, Any], unet: UNet) -> Params:
    """Parameters of `unet` from a state dict of UNet2DModel, as NumPy arrays."""
    return import_params(entries(unet), state, param_shapes(unet, *example_inputs(unet)))


def entries(unet: UNet) -> list[Entry]:
    """Every leaf with its name."""
    plan, last = unet_plan(unet), len(unet.channel_mult) - 1
    found = [
        *layer("time_in", "time_embedding.linear_1", LINEAR),
        *layer("time_out", "time_embedding.linear_2", LINEAR),
        *layer("conv_in", "conv_in", CONV),
        *norm("norm_out", "conv_norm_out"),
        *layer("conv_out", "conv_out", CONV),
        *_res_block("mid_res", "mid_block.resnets.0", False),
        *_attention("mid_attention", "mid_block.attentions.0"),
        *_res_block("mid_res_out", "mid_block.resnets.1", False),
    ]
    width = plan.down[0].channels
    skips = [width]
    for step in plan.down:
        found += _step(step, last, width)
        width = step.channels
        skips.append(width)
    for step in plan.up:
        found += _step(step, last, width if isinstance(step, Resample) else width + skips.pop())
        width = step.channels
    return found


def _step(step: Block | Resample, last: int, incoming: int) -> list[Entry]:
    way, level, which = step.name.split("_")
    folder = f"{way}_blocks.{level if way == 'down' else last - int(level)}"
    if isinstance(step, Resample):
        return layer(f"{step.name}/conv", f"{folder}.{way}samplers.0.conv", CONV)
    found = _res_block(f"{step.name}_res", f"{folder}.resnets.{which}", incoming != step.channels)
    return found + (_attention(f"{step.name}_attention", f"{folder}.attentions.{which}") if step.heads else [])


def _res_block(path: str, name: str, skip: bool) -> list[Entry]:
    found = [
        *norm(f"{path}/norm_in", f"{name}.norm1"),
        *layer(f"{path}/conv_in", f"{name}.conv1", CONV),
        *layer(f"{path}/time", f"{name}.time_emb_proj", LINEAR),
        *norm(f"{path}/norm_out", f"{name}.norm2"),
        *layer(f"{path}/conv_out", f"{name}.conv2", CONV),
    ]
    return found + (layer(f"{path}/skip", f"{name}.conv_shortcut", CONV) if skip else [])


def _attention(path: str, name: str) -> list[Entry]:
    parts = [f"{name}.to_{part}" for part in "qkv"]
    return [
        *norm(f"{path}/norm", f"{name}.group_norm"),
        Entry(f"{path}/qkv/kernel", tuple(f"{part}.weight" for part in parts), fused(LINEAR, 3)),
        Entry(f"{path}/qkv/bias", tuple(f"{part}.bias" for part in parts), fused(SAME, 3)),
        *layer(f"{path}/out", f"{name}.to_out.0", LINEAR),
    ]

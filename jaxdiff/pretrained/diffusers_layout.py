"""Networks of the diffusers library: names and layout of their weights, both ways.

UNet2DModel, UNet2DConditionModel, ControlNetModel, AutoencoderKL and VQModel are the networks of this library under
other names: blocks are counted per level, q, k and v are apart, the way up is counted from the coarsest level. Their
config.json is read in `diffusers_config`. The names that attention blocks had before diffusers 0.18 ("query",
"proj_attn") are understood; export writes the present ones. Files are not read here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.networks import controlnet as controlnets
from jaxdiff.networks.autoencoder_blocks import example_input, level_channels, level_plan
from jaxdiff.networks.autoencoder_kl import AutoencoderKL
from jaxdiff.networks.autoencoder_vq import AutoencoderVQ
from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.controlnet import ControlNet
from jaxdiff.networks.unet import Block, Resample, UNet, example_inputs, unet_plan
from jaxdiff.pretrained import compvis
from jaxdiff.pretrained.controlnet import WAY_UP
from jaxdiff.pretrained.torch_layout import (
    CONV,
    LINEAR,
    SAME,
    Entry,
    export_params,
    fused,
    import_params,
    layer,
    norm,
)
from jaxdiff.types import Params

# Names of attention blocks before diffusers 0.18, which published files still have.
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def import_unet(state: Mapping[str, Any], unet: UNet, *, linear_projection: bool = False) -> Params:
    """Parameters of `unet` from the state dict of a UNet2DModel or UNet2DConditionModel.

    Args:
      state: arrays by name.
      unet: the network, e.g. from `diffusers_config.unet_from_config` or a preset.
      linear_projection: `use_linear_projection` of the configuration (Stable Diffusion 2).

    Returns:
      The parameter tree, NumPy float32.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped; all of them are named.
    """
    entries = unet_entries(unet, linear_projection)
    return import_params(entries, with_new_names(state), param_shapes(unet, *example_inputs(unet)))


def export_unet(params: Params, unet: UNet, *, linear_projection: bool = False) -> dict[str, np.ndarray]:
    """The state dict of a parameter tree: the exact inverse of `import_unet`."""
    return export_params(unet_entries(unet, linear_projection), params)


def import_controlnet(state: Mapping[str, Any], controlnet: ControlNet, *, linear_projection: bool = False) -> Params:
    """Parameters of `controlnet` from the state dict of a ControlNetModel; see `import_unet`."""
    entries = controlnet_entries(controlnet, linear_projection)
    return import_params(entries, state, param_shapes(controlnet, *controlnets.example_inputs(controlnet)))


def export_controlnet(
    params: Params, controlnet: ControlNet, *, linear_projection: bool = False
) -> dict[str, np.ndarray]:
    """The state dict of a parameter tree: the exact inverse of `import_controlnet`."""
    return export_params(controlnet_entries(controlnet, linear_projection), params)


def import_autoencoder(state: Mapping[str, Any], autoencoder: AutoencoderKL | AutoencoderVQ) -> Params:
    """Parameters of an autoencoder from the state dict of an AutoencoderKL or VQModel.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped; all of them are named.
    """
    shapes = param_shapes(autoencoder, example_input(autoencoder))
    return import_params(autoencoder_entries(autoencoder), with_new_names(state), shapes)


def export_autoencoder(params: Params, autoencoder: AutoencoderKL | AutoencoderVQ) -> dict[str, np.ndarray]:
    """The state dict of a parameter tree: the exact inverse of `import_autoencoder`."""
    return export_params(autoencoder_entries(autoencoder), params)


def unet_entries(unet: UNet, linear_projection: bool = False) -> list[Entry]:
    """Every leaf of a UNet with its diffusers name."""
    plan, last = unet_plan(unet), len(unet.channel_mult) - 1
    if unet.num_classes is not None and unet.vector_dim is not None:
        raise ValueError("diffusers has a class table or a vector embedding under one name, not both")
    entries = [
        *layer("time_in", "time_embedding.linear_1", LINEAR),
        *layer("time_out", "time_embedding.linear_2", LINEAR),
        *layer("conv_in", "conv_in", CONV),
        *norm("norm_out", "conv_norm_out"),
        *layer("conv_out", "conv_out", CONV),
    ]
    if unet.guidance_dim is not None:
        entries.append(Entry("guidance/kernel", ("time_embedding.cond_proj.weight",), LINEAR))
    if unet.num_classes is not None:
        entries.append(Entry("label/embedding", ("class_embedding.weight",), SAME))
    if unet.vector_dim is not None:
        entries += layer("vector_in", "class_embedding.linear_1", LINEAR)
        entries += layer("vector_out", "class_embedding.linear_2", LINEAR)

    def step_entries(step: Block | Resample, incoming: int) -> list[Entry]:
        way, level, which = step.name.split("_")
        module = f"{way}_blocks.{level if way == 'down' else last - int(level)}"
        if isinstance(step, Block):
            found = _res_block(f"{step.name}_res", f"{module}.resnets.{which}", incoming != step.channels)
            return found + _attention(step, f"{step.name}_attention", f"{module}.attentions.{which}", linear_projection)
        if unet.resample == "resblock":
            return _res_block(step.name, f"{module}.{which}rs.0", False)
        return layer(f"{step.name}/conv", f"{module}.{which}rs.0.conv", CONV) if unet.resample == "conv" else []

    width = plan.down[0].channels
    skips = [width]
    for step in plan.down:
        entries += step_entries(step, width)
        width = step.channels
        skips.append(width)
    entries += _res_block("mid_res", "mid_block.resnets.0", False)
    entries += _attention(plan.mid, "mid_attention", "mid_block.attentions.0", linear_projection)
    entries += _res_block("mid_res_out", "mid_block.resnets.1", False)
    for step in plan.up:
        entries += step_entries(step, width if isinstance(step, Resample) else width + skips.pop())
        width = step.channels
    return entries


def controlnet_entries(controlnet: ControlNet, linear_projection: bool = False) -> list[Entry]:
    """Every leaf of a ControlNet with its diffusers name."""
    entries = [e for e in unet_entries(controlnet, linear_projection) if not e.path.startswith(WAY_UP)]
    hint = "controlnet_cond_embedding"
    entries += [*layer("hint/conv_0", f"{hint}.conv_in", CONV), *layer("hint/conv_out", f"{hint}.conv_out", CONV)]
    for i in range(2 * (len(controlnet.hint_widths) - 1)):
        entries += layer(f"hint/conv_{i + 1}", f"{hint}.blocks.{i}", CONV)
    for i, name in enumerate(("conv_in", *(step.name for step in unet_plan(controlnet).down))):
        entries += layer(f"{name}_zero", f"controlnet_down_blocks.{i}", CONV)
    return entries + layer("mid_zero", "controlnet_mid_block", CONV)


def autoencoder_entries(autoencoder: AutoencoderKL | AutoencoderVQ) -> list[Entry]:
    """Every leaf of an autoencoder with its diffusers name."""
    plan, last = level_plan(autoencoder), len(autoencoder.channel_mult) - 1
    first, coarsest = level_channels(autoencoder, 0), level_channels(autoencoder, last)
    entries = [*layer("quant_conv", "quant_conv", CONV), *layer("post_quant_conv", "post_quant_conv", CONV)]
    if isinstance(autoencoder, AutoencoderVQ):
        entries.append(Entry("codebook", ("quantize.embedding.weight",), SAME))
    for part, steps, width in (("encoder", plan.encoder, first), ("decoder", plan.decoder, coarsest)):
        entries += layer(f"{part}/conv_in", f"{part}.conv_in", CONV)
        entries += _autoencoder_res_block(f"{part}/mid_res", f"{part}.mid_block.resnets.0", False)
        if autoencoder.mid_attention:
            entries += _attention_block(f"{part}/mid_attention", f"{part}.mid_block.attentions.0")
        entries += _autoencoder_res_block(f"{part}/mid_res_out", f"{part}.mid_block.resnets.1", False)
        for step in steps:
            way, level, which = step.name.split("_")
            path = f"{part}/{step.name}"
            name = f"{part}.{way}_blocks.{level if way == 'down' else last - int(level)}"
            if step.resample:
                entries += layer(f"{path}/conv", f"{name}.{which}rs.0.conv", CONV)
                continue
            entries += _autoencoder_res_block(f"{path}_res", f"{name}.resnets.{which}", step.channels != width)
            if step.attention:
                entries += _attention_block(f"{path}_attention", f"{name}.attentions.{which}")
            width = step.channels
        entries += norm(f"{part}/norm_out", f"{part}.conv_norm_out")
        entries += layer(f"{part}/conv_out", f"{part}.conv_out", CONV)
    return entries


def _res_block(path: str, name: str, skip: bool) -> list[Entry]:
    return _autoencoder_res_block(path, name, skip) + layer(f"{path}/time", f"{name}.time_emb_proj", LINEAR)


def _autoencoder_res_block(path: str, name: str, skip: bool) -> list[Entry]:
    entries = [
        *norm(f"{path}/norm_in", f"{name}.norm1"),
        *layer(f"{path}/conv_in", f"{name}.conv1", CONV),
        *norm(f"{path}/norm_out", f"{name}.norm2"),
        *layer(f"{path}/conv_out", f"{name}.conv2", CONV),
    ]
    return entries + (layer(f"{path}/skip", f"{name}.conv_shortcut", CONV) if skip else [])


def _attention(block: Block, path: str, name: str, linear_projection: bool) -> list[Entry]:
    if not block.heads:
        return []
    # A transformer has the names that CompVis gave it.
    return (
        compvis.transformer_entries(block, path, name, linear_projection)
        if block.depth
        else _attention_block(path, name)
    )


def _attention_block(path: str, name: str) -> list[Entry]:
    parts = [f"{name}.to_{part}" for part in "qkv"]
    return [
        *norm(f"{path}/norm", f"{name}.group_norm"),
        Entry(f"{path}/qkv/kernel", tuple(f"{part}.weight" for part in parts), fused(LINEAR, 3)),
        Entry(f"{path}/qkv/bias", tuple(f"{part}.bias" for part in parts), fused(SAME, 3)),
        *layer(f"{path}/out", f"{name}.to_out.0", LINEAR),
    ]


def with_new_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with the attention names of diffusers 0.18 and later."""
    renamed = {}
    for name, array in state.items():
        if ".attentions." in name:
            for old, new in OLD_ATTENTION.items():
                name = name.replace(old, new)
        renamed[name] = array
    return renamed

"""The UNet of DDPM under the names of its PyTorch conversions (ermongroup/ddim, CompVis `Model`).

These keep q, k and v of the attention as three 1x1 convolutions; ours is one product, so three tensors make one
leaf. Files are not read here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.initializers import fan_average, fan_average_tiny
from jaxdiff.networks.unet import Block, Resample, UNet, example_inputs, unet_plan
from jaxdiff.networks.unet_presets import attention_factors
from jaxdiff.pretrained.torch_layout import (
    CONV,
    LINEAR,
    SAME,
    Entry,
    check_config,
    export_params,
    fused,
    import_params,
    layer,
    norm,
    pointwise,
)
from jaxdiff.types import Params

# The second line says how to train and sample, not what the network is.
CONFIG_KEYS = frozenset(
    "ch out_ch in_channels ch_mult num_res_blocks attn_resolutions dropout resamp_with_conv resolution "
    "type var_type ema ema_rate".split()
)


def unet_from_config(config: Mapping[str, Any], *, resolution: int) -> UNet:
    """The UNet of an ermongroup/ddim `model` configuration.

    Attention sizes that do not occur have no effect there and are dropped.

    Args:
      config: the `model` section.
      resolution: height and width of the images.

    Raises:
      ValueError: an unknown or missing setting.
    """
    check_config(config, CONFIG_KEYS, "DDPM")
    if missing := sorted({"ch", "ch_mult", "num_res_blocks", "attn_resolutions"} - set(config)):
        raise ValueError(f"the UNet configuration lacks {missing}")
    mult = tuple(config["ch_mult"])
    sizes = {resolution // 2**level for level in range(len(mult))}
    return UNet(
        in_channels=config.get("in_channels", 3),
        out_channels=config.get("out_ch", 3),
        base_channels=config["ch"],
        channel_mult=mult,
        num_res_blocks=config["num_res_blocks"],
        attention_factors=attention_factors(resolution, tuple(sizes & set(config["attn_resolutions"]))),
        resample="conv" if config.get("resamp_with_conv", True) else "plain",
        asymmetric_padding=True,
        norm_eps=1e-6,
        sin_first=True,
        frequency_shift=1,
        dropout=float(config.get("dropout", 0.0)),
        layer_rule=fan_average,
        output_rule=fan_average_tiny,
    )


def import_unet(state: Mapping[str, Any], unet: UNet) -> Params:
    """Parameters of `unet` from a state dict of ermongroup/ddim.

    Args:
      state: arrays by name.
      unet: the network, e.g. from `unet_from_config` or `unet_presets.ddpm_unet`.

    Returns:
      The parameter tree, NumPy float32.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped; all of them are named.
    """
    return import_params(unet_entries(unet), state, param_shapes(unet, *example_inputs(unet)))


def export_unet(params: Params, unet: UNet) -> dict[str, np.ndarray]:
    """The state dict of a parameter tree: the exact inverse of `import_unet`."""
    return export_params(unet_entries(unet), params)


def unet_entries(unet: UNet) -> list[Entry]:
    """Every leaf of a UNet with its DDPM name."""
    plan = unet_plan(unet)
    if unet.resample == "resblock" or any(isinstance(s, Block) and s.depth for s in (*plan.down, plan.mid, *plan.up)):
        raise ValueError(
            "DDPM's UNet has neither resampling residual blocks nor transformers; change the configuration"
        )
    entries = [
        *layer("time_in", "temb.dense.0", LINEAR),
        *layer("time_out", "temb.dense.1", LINEAR),
        *layer("conv_in", "conv_in", CONV),
    ]

    def step_entries(step: Block | Resample, incoming: int) -> list[Entry]:
        way, level, which = step.name.split("_")
        if isinstance(step, Resample):
            return layer(f"{step.name}/conv", f"{way}.{level}.{which}.conv", CONV) if unet.resample == "conv" else []
        found = _res_block(f"{step.name}_res", f"{way}.{level}.block.{which}", incoming != step.channels)
        return found + (_attention(f"{step.name}_attention", f"{way}.{level}.attn.{which}") if step.heads else [])

    width = plan.down[0].channels
    skips = [width]
    for step in plan.down:
        entries += step_entries(step, width)
        width = step.channels
        skips.append(width)
    entries += _res_block("mid_res", "mid.block_1", False)
    entries += _attention("mid_attention", "mid.attn_1") if plan.mid.heads else []
    entries += _res_block("mid_res_out", "mid.block_2", False)
    for step in plan.up:
        entries += step_entries(step, width if isinstance(step, Resample) else width + skips.pop())
        width = step.channels
    return entries + norm("norm_out", "norm_out") + layer("conv_out", "conv_out", CONV)


def _res_block(path: str, name: str, skip: bool) -> list[Entry]:
    entries = [
        *norm(f"{path}/norm_in", f"{name}.norm1"),
        *layer(f"{path}/conv_in", f"{name}.conv1", CONV),
        *layer(f"{path}/time", f"{name}.temb_proj", LINEAR),
        *norm(f"{path}/norm_out", f"{name}.norm2"),
        *layer(f"{path}/conv_out", f"{name}.conv2", CONV),
    ]
    return entries + (layer(f"{path}/skip", f"{name}.nin_shortcut", CONV) if skip else [])


def _attention(path: str, name: str) -> list[Entry]:
    return [
        *norm(f"{path}/norm", f"{name}.norm"),
        Entry(f"{path}/qkv/kernel", tuple(f"{name}.{part}.weight" for part in "qkv"), fused(pointwise(2), 3)),
        Entry(f"{path}/qkv/bias", tuple(f"{name}.{part}.bias" for part in "qkv"), fused(SAME, 3)),
        *layer(f"{path}/out", f"{name}.proj_out", pointwise(2)),
    ]

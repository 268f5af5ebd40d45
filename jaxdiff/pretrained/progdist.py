"""The Flax release of progressive distillation: configurations, names and layout of its weights, its time input.

Names are paths of the release's parameter tree joined by "/" ("down_0.block_0/norm1/scale": the dots belong to the
names). Convolutions lie as ours do. q, k and v of the attention are three layers of shape [C, heads, width] there and
one product here. Files are not read here.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.progdist_unet import ProgDistUNet
from jaxdiff.networks.unet import Block, Resample, example_inputs, unet_plan
from jaxdiff.networks.unet_presets import attention_factors
from jaxdiff.pretrained.torch_layout import SAME, Entry, Layout, check_config, export_params, fused, import_params
from jaxdiff.types import Params

NEEDED = frozenset("ch emb_ch out_ch ch_mult num_res_blocks attn_resolutions".split())
# The last two say what number is embedded, not what the network is: see `time_input`.
CONFIG_KEYS = NEEDED | frozenset(
    "num_classes num_heads head_dim dropout resblock_resample logsnr_input_type logsnr_scale_range".split()
)


def unet_from_config(config: Mapping[str, Any], *, resolution: int) -> ProgDistUNet:
    """The UNet of a configuration of the release.

    Attention sizes that do not occur have no effect there and are dropped. One class means no labels.

    Args:
      config: the fields of the release's `UNet`.
      resolution: height and width of the images.

    Raises:
      ValueError: an unknown or missing setting.
    """
    check_config(config, CONFIG_KEYS, "progressive distillation")
    if missing := sorted(NEEDED - set(config)):
        raise ValueError(f"the UNet configuration lacks {missing}")
    num_heads, head_dim = config.get("num_heads"), config.get("head_dim")
    if (num_heads is None) == (head_dim is None):
        raise ValueError(f"give either num_heads or head_dim, got {num_heads} and {head_dim}")
    mult = tuple(config["ch_mult"])
    sizes = {resolution // 2**level for level in range(len(mult))}
    num_classes = config.get("num_classes", 1)
    return ProgDistUNet(
        out_channels=config["out_ch"],
        base_channels=config["ch"],
        channel_mult=mult,
        num_res_blocks=config["num_res_blocks"],
        attention_factors=attention_factors(resolution, tuple(sizes & set(config["attn_resolutions"]))),
        num_heads=num_heads,
        head_channels=head_dim,
        num_classes=num_classes if num_classes > 1 else None,
        resample="resblock" if config.get("resblock_resample", False) else "conv",
        dropout=float(config.get("dropout", 0.0)),
        emb_channels=config["emb_ch"],
    )


def time_input(
    logsnr_input_type: str = "inv_cos", logsnr_scale_range: tuple[float, float] = (-10.0, 10.0)
) -> Callable[[Float[Array, " b"]], Float[Array, " b"]]:
    """The number that the release embeds for a log signal-to-noise ratio, as our network takes it.

    Args:
      logsnr_input_type: "inv_cos" (1000 u where the cosine schedule has this ratio at u), "sigmoid" or "linear".
      logsnr_scale_range: ratios that "linear" sends to 0 and 1000.

    Returns:
      A function from log(alpha^2 / sigma^2) [B] to t [B].

    Raises:
      ValueError: another type.

    Source: Salimans and Ho 2022 (arXiv:2202.00512); the released network.
    """
    low, high = logsnr_scale_range
    maps = {
        "inv_cos": lambda log_snr: jnp.arctan(jnp.exp(-0.5 * jnp.clip(log_snr, -20.0, 20.0))) / (0.5 * math.pi),
        "sigmoid": jax.nn.sigmoid,
        "linear": lambda log_snr: (log_snr - low) / (high - low),
    }
    if logsnr_input_type not in maps:
        raise ValueError(f"logsnr_input_type must be one of {sorted(maps)}, got {logsnr_input_type!r}")
    unit = maps[logsnr_input_type]
    return lambda log_snr: 1000.0 * unit(log_snr)


def import_unet(state: Mapping[str, Any], unet: ProgDistUNet) -> Params:
    """Parameters of `unet` from the parameters of the release, flattened to names with "/".

    Args:
      state: arrays by name, without the prefix of the tree they come from ("params/", "ema_params/").
      unet: the network, e.g. from `unet_from_config` or a preset.

    Returns:
      The parameter tree, NumPy float32.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped; all of them are named.
    """
    return import_params(unet_entries(unet), state, param_shapes(unet, *example_inputs(unet)))


def export_unet(params: Params, unet: ProgDistUNet) -> dict[str, np.ndarray]:
    """The flat parameters of the release: the exact inverse of `import_unet`."""
    return export_params(unet_entries(unet), params)


def unet_entries(unet: ProgDistUNet) -> list[Entry]:
    """Every leaf of a UNet with its name in the release."""
    plan = unet_plan(unet)
    if unet.resample == "plain" or not plan.mid.heads:
        raise ValueError(
            "the progressive distillation UNet resamples by convolutions or residual blocks and attends in the middle; "
            f"got resample {unet.resample!r} and mid_attention {unet.mid_attention}"
        )
    entries = [*_layer("time_in", "dense0"), *_layer("time_out", "dense1"), *_layer("conv_in", "conv_in")]
    entries += _layer("label", "class_emb") if unet.num_classes is not None else []

    def step_entries(step: Block | Resample, incoming: int) -> list[Entry]:
        way, level, which = step.name.split("_")
        prefix = f"{way}_{level}"
        if isinstance(step, Resample):
            if unet.resample == "resblock":
                return _res_block(step.name, f"{prefix}.{which}", False)
            return _layer(f"{step.name}/conv", f"{prefix}.{which}")
        found = _res_block(f"{step.name}_res", f"{prefix}.block_{which}", incoming != step.channels)
        return found + (_attention(step, f"{prefix}.attn_{which}") if step.heads else [])

    width = plan.down[0].channels
    skips = [width]
    for step in plan.down:
        entries += step_entries(step, width)
        width = step.channels
        skips.append(width)
    entries += _res_block("mid_res", "mid.block_1", False)
    entries += _attention(plan.mid, "mid.attn_1")
    entries += _res_block("mid_res_out", "mid.block_2", False)
    for step in plan.up:
        entries += step_entries(step, width if isinstance(step, Resample) else width + skips.pop())
        width = step.channels
    return entries + _norm("norm_out", "norm_out") + _layer("conv_out", "conv_out")


def _res_block(path: str, name: str, skip: bool) -> list[Entry]:
    entries = [
        *_norm(f"{path}/norm_in", f"{name}/norm1"),
        *_layer(f"{path}/conv_in", f"{name}/conv1"),
        *_layer(f"{path}/time", f"{name}/temb_proj"),
        *_norm(f"{path}/norm_out", f"{name}/norm2"),
        *_layer(f"{path}/conv_out", f"{name}/conv2"),
    ]
    return entries + (_layer(f"{path}/skip", f"{name}/nin_shortcut", DENSE_AS_CONV) if skip else [])


def _attention(block: Block, name: str) -> list[Entry]:
    path = f"{block.name}_attention"
    into, width = _reshaped((block.channels, -1), (block.channels, block.heads, -1)), block.channels // block.heads
    flat = _reshaped((-1,), (block.heads, width))
    out_of = _reshaped((-1, block.channels), (block.heads, width, block.channels))
    return [
        *_norm(f"{path}/norm", f"{name}/norm"),
        Entry(f"{path}/qkv/kernel", tuple(f"{name}/{part}/kernel" for part in "qkv"), fused(into, 3)),
        Entry(f"{path}/qkv/bias", tuple(f"{name}/{part}/bias" for part in "qkv"), fused(flat, 3)),
        *_layer(f"{path}/out", f"{name}/proj_out", out_of),
    ]


def _reshaped(ours: tuple[int, ...], theirs: tuple[int, ...]) -> Layout:
    return Layout(lambda a: a[0].reshape(ours), lambda a: [a.reshape(theirs)])


DENSE_AS_CONV = Layout(lambda a: a[0][None, None], lambda a: [a[0, 0]])


def _layer(path: str, name: str, layout: Layout = SAME) -> list[Entry]:
    return [Entry(f"{path}/kernel", (f"{name}/kernel",), layout), Entry(f"{path}/bias", (f"{name}/bias",), SAME)]


def _norm(path: str, name: str) -> list[Entry]:
    return [Entry(f"{path}/scale", (f"{name}/scale",), SAME), Entry(f"{path}/bias", (f"{name}/bias",), SAME)]

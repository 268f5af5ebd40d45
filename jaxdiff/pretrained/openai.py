"""Networks of OpenAI's improved-diffusion, guided-diffusion and consistency models: configurations, names and layout.

Names are those of the released state dicts (input_blocks, middle_block, output_blocks, out), for UNets and for the
classifiers that are half a UNet. Fused attention weights were released in two orders: by head first (most checkpoints)
and by q, k, v first ("new attention order", ADM's ImageNet 64 checkpoint); the caller says which. Consistency models
have the second order alone, and two-dimensional convolutions there. Files are not read here.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdiff.networks import encoder_unet
from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.encoder_unet import EncoderUNet
from jaxdiff.networks.unet import Block, Resample, UNet, example_inputs, unet_plan
from jaxdiff.pretrained.torch_layout import (
    CONV,
    LINEAR,
    SAME,
    Entry,
    check_config,
    export_params,
    heads_first,
    import_params,
    layer,
    norm,
    pointwise,
)
from jaxdiff.types import Params

CONFIG_KEYS = frozenset(
    "image_size in_channels model_channels out_channels num_res_blocks attention_resolutions dropout channel_mult "
    "conv_resample dims num_classes use_checkpoint use_fp16 num_heads num_head_channels num_heads_upsample "
    "use_scale_shift_norm resblock_updown use_new_attention_order".split()
)

AttentionEntries = Callable[[Block, str, str], list[Entry]]


def unet_from_config(config: Mapping[str, Any], *, super_resolution: bool = False) -> UNet:
    """The UNet of a guided-diffusion `UNetModel` (or `SuperResModel`) configuration.

    `attention_resolutions` are downsampling factors, as that class takes them; factors that do not occur have no
    effect there and are dropped. `image_size` and `use_new_attention_order` do not change the network: the order is
    a matter of the weights (`import_unet`).

    Args:
      config: the keyword arguments of the class.
      super_resolution: whether the class is `SuperResModel`, which concatenates cond["low_res"].

    Raises:
      ValueError: an unknown setting, or one this UNet does not have.
    """
    check_config(config, CONFIG_KEYS, "guided-diffusion")
    get = {"in_channels": 3, "num_heads": 1, "num_head_channels": -1, "num_heads_upsample": -1, **config}
    by_channels = get["num_head_channels"] != -1
    upsample = get["num_heads_upsample"]
    return common_unet(config).clone(
        num_heads=None if by_channels else get["num_heads"],
        head_channels=get["num_head_channels"] if by_channels else None,
        num_heads_up=None if by_channels or upsample == -1 else upsample,
        low_res_channels=get["in_channels"] if super_resolution else 0,
        num_classes=get.get("num_classes"),
    )


def common_unet(config: Mapping[str, Any]) -> UNet:
    """The settings that mean the same in guided-diffusion and in the releases built on it; heads are left at 1."""
    if config.get("dims", 2) != 2:
        raise ValueError(f"only two-dimensional UNets are supported, got dims {config['dims']}")
    if missing := sorted({"model_channels", "out_channels", "num_res_blocks", "attention_resolutions"} - set(config)):
        raise ValueError(f"the UNet configuration lacks {missing}")
    mult = tuple(config.get("channel_mult", (1, 2, 4, 8)))
    factors = sorted(set(config["attention_resolutions"]) & {2**level for level in range(len(mult))})
    resample = "conv" if config.get("conv_resample", True) else "plain"
    return UNet(
        in_channels=config.get("in_channels", 3),
        out_channels=config["out_channels"],
        base_channels=config["model_channels"],
        channel_mult=mult,
        num_res_blocks=config["num_res_blocks"],
        attention_factors=tuple(factors),
        scale_shift_norm=config.get("use_scale_shift_norm", False),
        resample="resblock" if config.get("resblock_updown", False) else resample,
        dropout=float(config.get("dropout", 0.0)),
        dtype=jnp.float16 if config.get("use_fp16", False) else jnp.float32,
        remat=config.get("use_checkpoint", False),
    )


def classifier_from_config(config: Mapping[str, Any]) -> EncoderUNet:
    """The classifier of a guided-diffusion `EncoderUNetModel` configuration.

    The settings mean what they mean for `unet_from_config`; `num_heads_upsample` has no effect there and is dropped.

    Args:
      config: the keyword arguments of the class; image_size in pixels, pool "adaptive" if it is not given.

    Raises:
      ValueError: an unknown or missing setting, or one this classifier does not have.
    """
    check_config(config, (CONFIG_KEYS | {"pool"}) - {"num_classes"}, "guided-diffusion classifier")
    if "image_size" not in config:
        raise ValueError("the classifier configuration lacks ['image_size']")
    unet = unet_from_config({key: value for key, value in config.items() if key not in ("pool", "num_heads_upsample")})
    names = {field.name for field in dataclasses.fields(unet) if field.init} - {"name", "parent"}
    fields: dict[str, Any] = {name: getattr(unet, name) for name in names}
    return EncoderUNet(**fields, image_size=config["image_size"], pool=config.get("pool", "adaptive"))


def import_unet(state: Mapping[str, Any], unet: UNet, *, new_attention_order: bool = False) -> Params:
    """Parameters of `unet` from a guided-diffusion or improved-diffusion state dict.

    Args:
      state: arrays by name.
      unet: the network, e.g. from `unet_from_config` or a preset.
      new_attention_order: `use_new_attention_order` of the release.

    Returns:
      The parameter tree, NumPy float32.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped; all of them are named.
    """
    entries = unet_entries(unet, attention_entries(new_attention_order))
    return import_params(entries, state, param_shapes(unet, *example_inputs(unet)))


def export_unet(params: Params, unet: UNet, *, new_attention_order: bool = False) -> dict[str, np.ndarray]:
    """The state dict of a parameter tree: the exact inverse of `import_unet`."""
    return export_params(unet_entries(unet, attention_entries(new_attention_order)), params)


def import_consistency_unet(state: Mapping[str, Any], unet: UNet) -> Params:
    """Parameters of `unet` from a state dict of consistency models or their EDM teachers.

    Args:
      state: arrays by name.
      unet: the network, e.g. `unet_presets.consistency_unet` or from `unet_from_config`; `use_new_attention_order`
        had no effect in that release.

    Returns:
      The parameter tree, NumPy float32.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped; all of them are named.
    """
    entries = unet_entries(unet, attention_entries(True, 2))
    return import_params(entries, state, param_shapes(unet, *example_inputs(unet)))


def export_consistency_unet(params: Params, unet: UNet) -> dict[str, np.ndarray]:
    """The state dict of a parameter tree: the exact inverse of `import_consistency_unet`."""
    return export_params(unet_entries(unet, attention_entries(True, 2)), params)


def import_classifier(
    state: Mapping[str, Any], classifier: EncoderUNet, *, new_attention_order: bool = False
) -> Params:
    """Parameters of a classifier from a guided-diffusion state dict.

    Args:
      state: arrays by name.
      classifier: the network, e.g. from `classifier_from_config` or `encoder_unet.adm_classifier`.
      new_attention_order: `use_new_attention_order` of the release.

    Returns:
      The parameter tree, NumPy float32.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped; all of them are named.
    """
    entries = classifier_entries(classifier, attention_entries(new_attention_order))
    return import_params(entries, state, param_shapes(classifier, *encoder_unet.example_inputs(classifier)))


def export_classifier(
    params: Params, classifier: EncoderUNet, *, new_attention_order: bool = False
) -> dict[str, np.ndarray]:
    """The state dict of a parameter tree: the exact inverse of `import_classifier`."""
    return export_params(classifier_entries(classifier, attention_entries(new_attention_order)), params)


def attention_entries(new_attention_order: bool, axes: int = 1) -> AttentionEntries:
    """Names of an attention block, for either order of its fused weights, kept as convolutions over `axes` axes."""

    def entries(block: Block, path: str, name: str) -> list[Entry]:
        if block.depth:
            raise ValueError(
                f"{block.name} is a transformer, which guided-diffusion does not have; use pretrained.compvis"
            )
        kernel, bias = pointwise(axes), SAME
        if not new_attention_order:
            kernel, bias = heads_first(kernel, block.heads), heads_first(bias, block.heads)
        return [
            *norm(f"{path}/norm", f"{name}.norm"),
            Entry(f"{path}/qkv/kernel", (f"{name}.qkv.weight",), kernel),
            Entry(f"{path}/qkv/bias", (f"{name}.qkv.bias",), bias),
            *layer(f"{path}/out", f"{name}.proj_out", pointwise(axes)),
        ]

    return entries


def unet_entries(unet: UNet, attention: AttentionEntries) -> list[Entry]:
    """Every leaf of a UNet with its name in guided-diffusion and its descendants."""
    entries, skips = _trunk(unet, attention)
    width, i, inside = skips[-1], -1, 0
    for step in unet_plan(unet).up:
        if isinstance(step, Resample):
            entries += _resample(unet, step, f"output_blocks.{i}.{inside}", "conv")
            continue
        i, inside = i + 1, 2 if step.heads else 1
        entries += _block(step, f"output_blocks.{i}", width + skips.pop(), attention)
        width = step.channels
    return entries + norm("norm_out", "out.0") + layer("conv_out", "out.2", CONV)


def classifier_entries(classifier: EncoderUNet, attention: AttentionEntries) -> list[Entry]:
    """Every leaf of a classifier with its name in guided-diffusion."""
    entries, _ = _trunk(classifier, attention)
    if classifier.pool == "spatial":
        return entries + layer("hidden", "out.0", LINEAR) + layer("out", "out.2", LINEAR)
    if classifier.pool == "spatial_v2":
        return [
            *entries,
            *layer("hidden", "out.0", LINEAR),
            *norm("norm_out", "out.1"),
            *layer("out", "out.3", LINEAR),
        ]
    entries += norm("norm_out", "out.0")
    if classifier.pool == "adaptive":
        return entries + layer("out", "out.3", pointwise(2))
    return [
        *entries,
        Entry("pool/positions", ("out.2.positional_embedding",), LINEAR),
        *layer("pool/qkv", "out.2.qkv_proj", pointwise(1)),
        *layer("pool/out", "out.2.c_proj", pointwise(1)),
    ]


def _trunk(unet: UNet, attention: AttentionEntries) -> tuple[list[Entry], list[int]]:
    """The entries up to the end of the middle, and the width of each skip in the order they are made."""
    plan = unet_plan(unet)
    if unet.num_classes is not None and unet.vector_dim is not None:
        raise ValueError("these releases have a class table or a vector embedding under one name, not both")
    entries = [*layer("time_in", "time_embed.0", LINEAR), *layer("time_out", "time_embed.2", LINEAR)]
    if unet.num_classes is not None:
        entries.append(Entry("label/embedding", ("label_emb.weight",), SAME))
    if unet.vector_dim is not None:
        entries += [*layer("vector_in", "label_emb.0.0", LINEAR), *layer("vector_out", "label_emb.0.2", LINEAR)]
    entries += layer("conv_in", "input_blocks.0.0", CONV)
    width = plan.down[0].channels
    skips = [width]
    for i, step in enumerate(plan.down, 1):
        name = f"input_blocks.{i}"
        if isinstance(step, Resample):
            entries += _resample(unet, step, f"{name}.0", "op")
        else:
            entries += _block(step, name, width, attention)
        width = step.channels
        skips.append(width)
    entries += _block(plan.mid, "middle_block", width, attention)
    return entries + _res_block("mid_res_out", f"middle_block.{2 if plan.mid.heads else 1}", False), skips


def _block(step: Block, name: str, incoming: int, attention: AttentionEntries) -> list[Entry]:
    found = _res_block(f"{step.name}_res", f"{name}.0", incoming != step.channels)
    return found + (attention(step, f"{step.name}_attention", f"{name}.1") if step.heads else [])


def _resample(unet: UNet, step: Resample, name: str, conv: str) -> list[Entry]:
    if unet.resample == "resblock":
        return _res_block(step.name, name, False)
    return layer(f"{step.name}/conv", f"{name}.{conv}", CONV) if unet.resample == "conv" else []


def _res_block(path: str, name: str, skip: bool) -> list[Entry]:
    entries = [
        *norm(f"{path}/norm_in", f"{name}.in_layers.0"),
        *layer(f"{path}/conv_in", f"{name}.in_layers.2", CONV),
        *layer(f"{path}/time", f"{name}.emb_layers.1", LINEAR),
        *norm(f"{path}/norm_out", f"{name}.out_layers.0"),
        *layer(f"{path}/conv_out", f"{name}.out_layers.3", CONV),
    ]
    return entries + (layer(f"{path}/skip", f"{name}.skip_connection", CONV) if skip else [])


def feature_names(unet: UNet) -> dict[str, str]:
    """The released name of each block ("input_blocks.1") and the feature of ours that is its output."""
    plan = unet_plan(unet)
    names = {"input_blocks.0": "conv_in", "middle_block": "mid"}
    names |= {f"input_blocks.{i}": step.name for i, step in enumerate(plan.down, 1)}
    i = -1
    for step in plan.up:
        # A resampling step of ours is the end of the block before it in the releases.
        i += isinstance(step, Block)
        names[f"output_blocks.{i}"] = step.name
    return names

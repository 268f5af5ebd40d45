"""The config.json of a diffusers model as one of our networks.

Takes the dict (`json.load` is the caller's) of UNet2DModel, UNet2DConditionModel, ControlNetModel, AutoencoderKL or
VQModel. A setting that would change the network and that ours does not have is refused by name; one that only says how
the library runs or trains the network is passed over. Weights are in `diffusers_layout`.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdiff.networks.autoencoder_kl import AutoencoderKL
from jaxdiff.networks.autoencoder_vq import AutoencoderVQ
from jaxdiff.networks.controlnet import ControlNet, controlnet_for
from jaxdiff.networks.unet import UNet

# Settings with their default, where the network here is the one of that value and of no other.
COMMON_FIXED = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "mid_block_scale_factor": 1,
}
PLAIN_FIXED = COMMON_FIXED | {"mid_block_type": "UNetMidBlock2D"}
CONDITIONAL_FIXED = COMMON_FIXED | {
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "addition_embed_type": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}
CONTROLNET_FIXED = {"controlnet_conditioning_channel_order": "rgb", "global_pool_conditions": False}
AUTOENCODER_FIXED = {"norm_type": "group", "lookup_from_codebook": False, "shift_factor": None}
AUTOENCODER_FIXED |= {"use_quant_conv": True, "use_post_quant_conv": True}

UNET_KEYS = frozenset(
    "in_channels out_channels freq_shift flip_sin_to_cos down_block_types up_block_types block_out_channels "
    "layers_per_block downsample_padding dropout act_fn attention_head_dim norm_num_groups norm_eps "
    "resnet_time_scale_shift class_embed_type num_class_embeds".split()
)
PLAIN_KEYS = UNET_KEYS | {"downsample_type", "upsample_type", "add_attention", "attn_norm_num_groups"}
CONDITIONAL_KEYS = UNET_KEYS | frozenset(
    "cross_attention_dim transformer_layers_per_block use_linear_projection time_cond_proj_dim "
    "projection_class_embeddings_input_dim".split()
)
AUTOENCODER_KEYS = frozenset(
    "in_channels out_channels down_block_types up_block_types block_out_channels layers_per_block act_fn "
    "latent_channels norm_num_groups num_vq_embeddings vq_embed_dim mid_block_add_attention".split()
)
SD_BLOCKS = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
SD_BLOCKS_UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
# These say how the library runs a network, not what it is.
IGNORED = frozenset(
    "sample_size num_train_timesteps upcast_attention addition_time_embed_dim addition_embed_type_num_heads "
    "scaling_factor force_upcast latents_mean latents_std".split()
)


def unet_from_config(config: Mapping[str, Any], *, concat_channels: int = 0) -> UNet:
    """The UNet of a UNet2DModel or a UNet2DConditionModel.

    In the first `attention_head_dim` is the channels of a head, in the second it is the number of heads, as there.
    `use_linear_projection` changes only the layout of the weights; hand it to `diffusers_layout.import_unet`.

    Args:
      config: the dict of config.json; `_class_name` tells the two apart, else the presence of `cross_attention_dim`.
      concat_channels: how many of `in_channels` come as cond["concat"]: 5 for Stable Diffusion's inpainting networks.

    Raises:
      ValueError: a setting is unknown, missing or not supported.
    """
    name = config.get("_class_name", "UNet2DConditionModel" if "cross_attention_dim" in config else "UNet2DModel")
    if name == "UNet2DConditionModel":
        return _conditional(config, CONDITIONAL_KEYS, CONDITIONAL_FIXED, concat_channels)
    if name == "UNet2DModel":
        return _plain(config, concat_channels)
    raise ValueError(f"_class_name {name!r} is no UNet that is supported; UNet2DModel and UNet2DConditionModel are")


def controlnet_from_config(config: Mapping[str, Any]) -> ControlNet:
    """The ControlNet of a ControlNetModel.

    Raises:
      ValueError: a setting is unknown, missing or not supported.
    """
    widths = tuple(config.get("conditioning_embedding_out_channels", (16, 32, 96, 256)))
    hint_channels = config.get("conditioning_channels", 3)
    own = {"conditioning_embedding_out_channels", "conditioning_channels"}
    # ControlNetModel has no way up: that of its UNet mirrors the way down.
    mirrored = [kind.replace("Down", "Up") for kind in reversed(config.get("down_block_types", SD_BLOCKS))]
    rest = {key: value for key, value in config.items() if key not in own}
    rest = {"up_block_types": mirrored, "out_channels": config.get("in_channels", 4), **rest}
    unet = _conditional(rest, CONDITIONAL_KEYS, CONDITIONAL_FIXED | CONTROLNET_FIXED, 0)
    return controlnet_for(unet, hint_channels=hint_channels, hint_widths=widths)


def autoencoder_from_config(config: Mapping[str, Any]) -> AutoencoderKL | AutoencoderVQ:
    """The autoencoder of an AutoencoderKL or a VQModel. `scaling_factor` belongs to the diffusion model.

    Raises:
      ValueError: a setting is unknown, missing or not supported.
    """
    name = config.get("_class_name", "VQModel" if "num_vq_embeddings" in config else "AutoencoderKL")
    if name not in ("AutoencoderKL", "VQModel"):
        raise ValueError(f"_class_name {name!r} is no autoencoder that is supported; AutoencoderKL and VQModel are")
    _check(config, AUTOENCODER_KEYS, AUTOENCODER_FIXED, name)
    _require(config, ("block_out_channels", "down_block_types", "up_block_types"), name)
    widths = tuple(config["block_out_channels"])
    kinds = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
    attends = _mirrored(config, *kinds)
    if any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels {list(widths)} must be multiples of the first")
    latent = config.get("latent_channels", 4 if name == "AutoencoderKL" else 3)
    fields: dict[str, Any] = {
        "in_channels": config.get("in_channels", 3),
        "out_channels": config.get("out_channels", 3),
        "base_channels": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "num_res_blocks": config.get("layers_per_block", 1),
        "attention_factors": tuple(2**i for i, attention in enumerate(attends) if attention),
        "mid_attention": config.get("mid_block_add_attention", True),
        "norm_groups": config.get("norm_num_groups", 32),
        "z_channels": latent,
    }
    if name == "AutoencoderKL":
        return AutoencoderKL(**fields, embed_dim=latent)
    embed_dim = config.get("vq_embed_dim")
    num_codes = config.get("num_vq_embeddings", 256)
    return AutoencoderVQ(**fields, embed_dim=latent if embed_dim is None else embed_dim, num_codes=num_codes)


def _plain(config: Mapping[str, Any], concat_channels: int) -> UNet:
    _check(config, PLAIN_KEYS, PLAIN_FIXED, "UNet2DModel")
    _require(config, ("block_out_channels", "down_block_types", "up_block_types"), "UNet2DModel")
    down = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
    attends = _mirrored(config, down, ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"), attention="Attn")
    resamples = [_resample(kind, config) for kind in (*config["down_block_types"][:-1], *config["up_block_types"][:-1])]
    if len(set(resamples)) > 1:
        raise ValueError(f"one kind of resampling for all levels is supported, got {resamples}")
    if config.get("class_embed_type") is not None:
        raise ValueError(f"class_embed_type {config['class_embed_type']!r} is not supported, expected None")
    common, mid_attention = _common(config, attends, concat_channels, in_channels=3), config.get("add_attention", True)
    groups = config.get("attn_norm_num_groups")
    if groups is None:  # then the attention in the middle of a UNet with scale and shift has no norm
        groups = 0 if common["scale_shift_norm"] else common["norm_groups"]
    if mid_attention and groups != common["norm_groups"]:
        raise ValueError(
            f"attn_norm_num_groups {config.get('attn_norm_num_groups')} of this UNet2DModel is not supported, expected "
            f"norm_num_groups {common['norm_groups']} for the attention in the middle as well"
        )
    return UNet(
        **common,
        head_channels=config.get("attention_head_dim", 8),
        mid_attention=mid_attention,
        resample=resamples[0] if resamples else "conv",
    )


def _conditional(
    config: Mapping[str, Any], keys: frozenset[str], fixed: Mapping[str, Any], concat_channels: int
) -> UNet:
    _check(config, keys, fixed, config.get("_class_name", "UNet2DConditionModel"))
    config = {
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": SD_BLOCKS,
        "up_block_types": SD_BLOCKS_UP,
        **config,
    }
    attends = _mirrored(config, ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D"))
    heads, depth = config.get("attention_head_dim", 8), config.get("transformer_layers_per_block", 1)
    kind, vector = config.get("class_embed_type"), config.get("projection_class_embeddings_input_dim")
    if kind not in (None, "projection") or (kind == "projection") != (vector is not None):
        raise ValueError(
            f"class_embed_type {kind!r} with projection_class_embeddings_input_dim {vector} is not supported, expected "
            "'projection' with a width, or neither"
        )
    return UNet(
        **_common(config, attends, concat_channels, in_channels=4),
        num_heads=tuple(heads) if isinstance(heads, Sequence) else heads,
        transformer_depth=tuple(depth) if isinstance(depth, Sequence) else depth,
        context_dim=config.get("cross_attention_dim", 1280),
        vector_dim=vector,
        guidance_dim=config.get("time_cond_proj_dim"),
    )


def _common(
    config: Mapping[str, Any], attends: Sequence[bool], concat_channels: int, *, in_channels: int
) -> dict[str, Any]:
    """The fields that the two UNets set by the same names."""
    widths = tuple(config["block_out_channels"])
    shift = config.get("resnet_time_scale_shift", "default")
    if shift not in ("default", "scale_shift"):
        raise ValueError(f"resnet_time_scale_shift {shift!r} is not supported, expected 'default' or 'scale_shift'")
    padding = config.get("downsample_padding", 1)
    if padding not in (0, 1):
        raise ValueError(f"downsample_padding {padding} is not supported, expected 0 or 1")
    return {
        "in_channels": config.get("in_channels", in_channels) - concat_channels,
        "concat_channels": concat_channels,
        "out_channels": config.get("out_channels", in_channels),
        "base_channels": widths[0],
        "channel_mult": tuple(width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths),
        "num_res_blocks": _uniform(config.get("layers_per_block", 2)),
        "attention_factors": tuple(2**i for i, attention in enumerate(attends) if attention),
        "num_classes": config.get("num_class_embeds"),
        "scale_shift_norm": shift == "scale_shift",
        "asymmetric_padding": padding == 0,
        "norm_groups": config.get("norm_num_groups", 32),
        "norm_eps": config.get("norm_eps", 1e-5),
        "sin_first": not config.get("flip_sin_to_cos", True),
        "frequency_shift": config.get("freq_shift", 0),
        "dropout": float(config.get("dropout", 0.0)),
    }


def _check(config: Mapping[str, Any], keys: frozenset[str], fixed: Mapping[str, Any], name: str) -> None:
    known = keys | fixed.keys()
    for key, value in config.items():
        if key.startswith("_") or key in IGNORED:
            continue
        if key not in known:
            close = difflib.get_close_matches(key, sorted(known), 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{key!r} is not a known setting of {name}{hint}")
        if key in fixed and value != fixed[key]:
            raise ValueError(f"{key} {value!r} of this {name} is not supported, expected {fixed[key]!r}")
    if config.get("act_fn", "silu") not in ("silu", "swish"):
        raise ValueError(f"act_fn {config['act_fn']!r} of this {name} is not supported, expected 'silu'")


def _require(config: Mapping[str, Any], needed: Sequence[str], name: str) -> None:
    if missing := [key for key in needed if key not in config]:
        raise ValueError(f"the {name} configuration lacks {missing}")


def _mirrored(config: Mapping[str, Any], down: Sequence[str], up: Sequence[str], attention: str = "Attn") -> list[bool]:
    """Whether each level attends, finest first, once both ways agree."""
    for key, allowed in (("down_block_types", down), ("up_block_types", up)):
        if unknown := sorted(set(config[key]) - set(allowed)):
            raise ValueError(f"{key} {unknown[0]!r} is not supported, expected some of {list(allowed)}")
    attends = [attention in kind for kind in config["down_block_types"]]
    above = [attention in kind for kind in reversed(config["up_block_types"])]
    if attends != above or len(attends) != len(config["block_out_channels"]):
        raise ValueError(
            f"up_block_types {list(config['up_block_types'])} must mirror "
            f"down_block_types {list(config['down_block_types'])}, one for each of "
            f"block_out_channels {list(config['block_out_channels'])}"
        )
    return attends


def _resample(kind: str, config: Mapping[str, Any]) -> str:
    """How a block of UNet2DModel changes the resolution; only those with attention listen to the setting."""
    setting = config.get("downsample_type" if "Down" in kind else "upsample_type", "conv")
    return "resblock" if kind.startswith("Resnet") or (kind.startswith("Attn") and setting == "resnet") else "conv"


def _uniform(layers: int | Sequence[int]) -> int:
    if isinstance(layers, Sequence):
        if len(set(layers)) != 1:
            raise ValueError(f"the same layers_per_block on every level is supported, got {list(layers)}")
        return layers[0]
    return layers

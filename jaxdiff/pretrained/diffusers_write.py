"""Our networks as config.json of diffusers and transformers, so that what was trained here runs there.

Each function undoes its counterpart in `diffusers_config` or `clip`, and refuses a network that has none: what it wrote
is read again and compared. Training settings (dropout, starting values, compute dtype) are not part of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen as nn

from jaxdiff.networks.autoencoder_blocks import level_channels, level_plan
from jaxdiff.networks.autoencoder_kl import AutoencoderKL
from jaxdiff.networks.autoencoder_vq import AutoencoderVQ
from jaxdiff.networks.clip_text import ClipText
from jaxdiff.networks.controlnet import ControlNet
from jaxdiff.networks.unet import Block, UNet, unet_plan
from jaxdiff.networks.unet import level_channels as unet_channels
from jaxdiff.pretrained import clip, diffusers_config, forms

SAME_UNET = (
    "out_channels mid_attention context_dim vector_dim guidance_dim low_res_channels scale_shift_norm resample "
    "asymmetric_padding norm_groups norm_eps sin_first frequency_shift"
).split()
SAME_AUTOENCODER = "in_channels out_channels mid_attention norm_groups z_channels embed_dim".split()
SAME_DECODER = "concat_channels upscale emb_channels mid_attention scale_shift_norm norm_groups".split()
SAME_TEXT = "vocab_size max_length width num_layers heads activation projection_dim eps".split()


def unet_config(unet: UNet, linear_projection: bool = False) -> dict[str, Any]:
    """The config.json of a UNet2DModel or, with transformers, of a UNet2DConditionModel.

    Args:
      unet: the network.
      linear_projection: `use_linear_projection`; changes the layout of the weights and nothing else.

    Raises:
      ValueError: diffusers has no such UNet.
    """
    levels, conditional = range(len(unet.channel_mult)), bool(unet.context_dim)
    attends = [2**level in unet.attention_factors for level in levels]
    config = _common(unet)
    if conditional:
        config |= {
            "_class_name": "UNet2DConditionModel",
            "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
            "attention_head_dim": _heads(unet),
            "transformer_layers_per_block": _depths(unet),
            "cross_attention_dim": unet.context_dim,
            "use_linear_projection": linear_projection,
            "time_cond_proj_dim": unet.guidance_dim,
        }
        if unet.vector_dim:
            config |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": unet.vector_dim}
    else:
        resamples = unet.resample == "resblock"
        plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resamples else ("DownBlock2D", "UpBlock2D")
        config |= {
            "_class_name": "UNet2DModel",
            "down_block_types": ["AttnDownBlock2D" if a else plain[0] for a in attends],
            "up_block_types": ["AttnUpBlock2D" if a else plain[1] for a in reversed(attends)],
            "downsample_type": "resnet" if resamples else "conv",
            "upsample_type": "resnet" if resamples else "conv",
            "attention_head_dim": _head_width(unet),
            "add_attention": unet.mid_attention,
            "attn_norm_num_groups": unet.norm_groups,
        }
    read = diffusers_config.unet_from_config(config, concat_channels=unet.concat_channels)
    _check(unet, read, SAME_UNET, str(config["_class_name"]), unet_plan(unet) == unet_plan(read))
    return config


def controlnet_config(controlnet: ControlNet, linear_projection: bool = False) -> dict[str, Any]:
    """The config.json of a ControlNetModel; see `unet_config`."""
    fields = {name: getattr(controlnet, name) for name in UNet.__dataclass_fields__ if name not in ("parent", "name")}
    config = unet_config(UNet(**fields), linear_projection)
    for name in ("up_block_types", "out_channels", "time_cond_proj_dim"):
        config.pop(name)
    config |= {
        "_class_name": "ControlNetModel",
        "conditioning_channels": controlnet.hint_channels,
        "conditioning_embedding_out_channels": list(controlnet.hint_widths),
    }
    read = diffusers_config.controlnet_from_config(config)
    _check(controlnet, read, ["hint_channels"], "ControlNetModel", unet_plan(controlnet) == unet_plan(read))
    return config


def autoencoder_config(autoencoder: AutoencoderKL | AutoencoderVQ) -> dict[str, Any]:
    """The config.json of an AutoencoderKL or a VQModel.

    Raises:
      ValueError: diffusers has no such autoencoder.
    """
    levels = range(len(autoencoder.channel_mult))
    attends = [2**level in autoencoder.attention_factors for level in levels]
    config = {
        "in_channels": autoencoder.in_channels,
        "out_channels": autoencoder.out_channels,
        "block_out_channels": [level_channels(autoencoder, level) for level in levels],
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)],
        "layers_per_block": autoencoder.num_res_blocks,
        "latent_channels": autoencoder.z_channels,
        "norm_num_groups": autoencoder.norm_groups,
        "mid_block_add_attention": autoencoder.mid_attention,
        "act_fn": "silu",
    }
    if isinstance(autoencoder, AutoencoderVQ):
        config |= {"_class_name": "VQModel", "num_vq_embeddings": autoencoder.num_codes}
        config["vq_embed_dim"] = autoencoder.embed_dim
    else:
        config["_class_name"] = "AutoencoderKL"
    read = diffusers_config.autoencoder_from_config(config)
    same = level_plan(autoencoder) == level_plan(read)
    _check(autoencoder, read, SAME_AUTOENCODER, str(config["_class_name"]), same)
    return config


def consistency_decoder_config(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a ConsistencyDecoderVAE.

    Args:
      parts: its "decoder", a ConsistencyDecoder, and its "encoder", an AutoencoderKL of which only the encoder is used.

    Raises:
      ValueError: a part is missing, or diffusers has no such network.
    """
    if sorted(parts) != ["decoder", "encoder"]:
        raise ValueError(f"a ConsistencyDecoderVAE needs a decoder and an encoder, got {', '.join(sorted(parts))}")
    decoder, encoder = parts["decoder"], parts["encoder"]
    levels = range(len(decoder.channel_mult))
    theirs = autoencoder_config(encoder)
    shared = ("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "norm_num_groups")
    config = {f"encoder_{name}": theirs[name] for name in shared} | {
        "_class_name": "ConsistencyDecoderVAE",
        "latent_channels": encoder.z_channels,
        "encoder_out_channels": encoder.z_channels,
        "decoder_in_channels": decoder.in_channels + decoder.concat_channels,
        "decoder_out_channels": decoder.out_channels,
        "decoder_block_out_channels": [unet_channels(decoder, level) for level in levels],
        "decoder_down_block_types": ["ResnetDownsampleBlock2D" for _ in levels],
        "decoder_up_block_types": ["ResnetUpsampleBlock2D" for _ in levels],
        "decoder_norm_num_groups": decoder.norm_groups,
        "decoder_norm_eps": decoder.norm_eps,
        "decoder_num_train_timesteps": decoder.num_times,
    }
    read = forms.diffusers_decoder_config(config).network
    _check(decoder, read, SAME_DECODER, "ConsistencyDecoderVAE", unet_plan(decoder) == unet_plan(read))
    first_stage = forms.encoder_config(config).network
    same = level_plan(encoder).encoder == level_plan(first_stage).encoder
    _check(encoder, first_stage, ["mid_attention", "embed_dim"], "ConsistencyDecoderVAE", same)
    return config


def clip_text_config(encoder: ClipText) -> dict[str, Any]:
    """The config.json of a transformers CLIPTextModel, or CLIPTextModelWithProjection.

    Raises:
      ValueError: transformers has no such encoder.
    """
    named = [name for name, function in clip.ACTIVATIONS.items() if function is encoder.activation]
    projection = encoder.projection_dim is not None
    config = {
        "model_type": "clip_text_model",
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "vocab_size": encoder.vocab_size,
        "max_position_embeddings": encoder.max_length,
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.num_layers,
        "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.mlp_width or 4 * encoder.width,
        "hidden_act": named[0] if named else "unknown",
        "layer_norm_eps": encoder.eps,
        "eos_token_id": 2 if encoder.end_token is None else encoder.end_token,
    }
    if projection:
        config["projection_dim"] = encoder.projection_dim
    _check(encoder, clip.text_encoder_from_config(config, projection=projection), SAME_TEXT, "CLIPTextModel")
    return config


def _common(unet: UNet) -> dict[str, Any]:
    widths = [unet_channels(unet, level) for level in range(len(unet.channel_mult))]
    rows = None if unet.num_classes is None else unet.num_classes + unet.null_label
    return {
        "in_channels": unet.in_channels + unet.concat_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": widths,
        "layers_per_block": unet.num_res_blocks,
        "downsample_padding": 0 if unet.asymmetric_padding else 1,
        "norm_num_groups": unet.norm_groups,
        "norm_eps": unet.norm_eps,
        "flip_sin_to_cos": not unet.sin_first,
        "freq_shift": unet.frequency_shift,
        "num_class_embeds": rows,
        "resnet_time_scale_shift": "scale_shift" if unet.scale_shift_norm else "default",
        "act_fn": "silu",
    }


def _blocks(unet: UNet) -> list[Block]:
    """A block with attention for each level, or the block in the middle; None cannot occur in a UNet that attends."""
    plan = unet_plan(unet)
    found = {}
    for step in plan.down:
        if isinstance(step, Block):
            found[int(step.name.split("_")[1])] = step
    return [found[level] if found[level].heads else plan.mid for level in range(len(unet.channel_mult))]


def _heads(unet: UNet) -> list[int]:
    return [block.heads for block in _blocks(unet)]


def _depths(unet: UNet) -> list[int]:
    return [block.depth for block in _blocks(unet)]


def _head_width(unet: UNet) -> int | None:
    """Channels of a head, where they are the same everywhere; None where there is one head everywhere."""
    plan = unet_plan(unet)
    blocks = [s for s in (*plan.down, plan.mid, *plan.up) if isinstance(s, Block) and s.heads]
    widths = {block.channels // block.heads for block in blocks}
    if all(block.heads == 1 for block in blocks):
        return None
    if len(widths) > 1:
        raise ValueError(
            f"UNet2DModel has heads of one width, this UNet has widths {sorted(widths)}; set head_channels"
        )
    return widths.pop()


def _check(ours: nn.Module, read: nn.Module, fields: Sequence[str], name: str, same: bool = True) -> None:
    for field in fields:
        if getattr(ours, field) != getattr(read, field):
            raise ValueError(
                f"{field} {getattr(ours, field)!r} of this network has no place in a {name}, "
                f"which has {getattr(read, field)!r}; export it in another form"
            )
    if not same:
        raise ValueError(f"the blocks of this network cannot be arranged as those of a {name}; export another form")

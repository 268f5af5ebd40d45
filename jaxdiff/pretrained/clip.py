"""CLIP's text encoder under the names of transformers and of OpenCLIP, both ways.

transformers keeps q, k and v apart and OpenCLIP fuses them, as ours does; OpenCLIP keeps some weights as bare matrices.
The two libraries' checkpoints come with prefixes and with constants that are no weights; `strip` removes both. The
image half of CLIP is not here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.clip_text import ClipText, exact_gelu, example_ids, quick_gelu
from jaxdiff.pretrained.torch_layout import (
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

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": exact_gelu}
# Settings of transformers that say something about training, loading or the tokenizer and nothing about the network.
IGNORED = frozenset(
    "model_type architectures attention_dropout dropout initializer_factor initializer_range torch_dtype dtype "
    "transformers_version pad_token_id bos_token_id _name_or_path use_cache return_dict output_hidden_states".split()
)
NEEDED = frozenset("vocab_size hidden_size num_hidden_layers num_attention_heads max_position_embeddings".split())
OPTIONAL = frozenset("intermediate_size hidden_act eos_token_id projection_dim layer_norm_eps".split())


def text_encoder_from_config(config: Mapping[str, Any], *, projection: bool = False) -> ClipText:
    """The encoder of a transformers `CLIPTextConfig`.

    An `eos_token_id` of 2 is a mistake of old configurations, which transformers reads as the largest id; so does this.

    Args:
      config: the configuration, e.g. text_encoder/config.json of a diffusers repository.
      projection: whether the class is `CLIPTextModelWithProjection`.

    Raises:
      ValueError: a setting is unknown, missing or not supported.
    """
    if unknown := sorted(set(config) - NEEDED - OPTIONAL - IGNORED):
        raise ValueError(
            f"{unknown[0]!r} is not a setting of a CLIP text encoder; known are {sorted(NEEDED | OPTIONAL)}"
        )
    if missing := sorted(NEEDED - set(config)):
        raise ValueError(f"the CLIP text configuration lacks {missing}")
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"hidden_act {activation!r} is not supported, expected one of {sorted(ACTIVATIONS)}")
    end = config.get("eos_token_id", 49407)
    return ClipText(
        vocab_size=config["vocab_size"],
        max_length=config["max_position_embeddings"],
        width=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_width=config.get("intermediate_size", 4 * config["hidden_size"]),
        activation=ACTIVATIONS[activation],
        end_token=None if end in (2, None) else end,
        projection_dim=config.get("projection_dim", 512) if projection else None,
        eps=config.get("layer_norm_eps", 1e-5),
    )


def import_text_encoder(state: Mapping[str, Any], encoder: ClipText, *, prefix: str = "text_model.") -> Params:
    """Parameters of `encoder` from a state dict of transformers.

    Args:
      state: arrays by name.
      encoder: the network, e.g. `clip_text.clip_l()` or from `text_encoder_from_config`.
      prefix: before every name but that of the projection: "text_model." in files, "" in newer memory.

    Returns:
      The parameter tree, NumPy float32.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped; all of them are named.
    """
    return import_params(text_encoder_entries(encoder, prefix), state, _shapes(encoder))


def export_text_encoder(params: Params, encoder: ClipText, *, prefix: str = "text_model.") -> dict[str, np.ndarray]:
    """The state dict of a parameter tree: the exact inverse of `import_text_encoder`."""
    return export_params(text_encoder_entries(encoder, prefix), params)


def import_open_clip(state: Mapping[str, Any], encoder: ClipText) -> Params:
    """Parameters of `encoder` from a state dict of OpenCLIP's text tower, as `strip` leaves it.

    Stable Diffusion 2 uses 23 of the 24 layers; drop the last one by `drop_layers` or build 24 and call with `skip=1`.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped; all of them are named.
    """
    return import_params(open_clip_entries(encoder), state, _shapes(encoder))


def export_open_clip(params: Params, encoder: ClipText) -> dict[str, np.ndarray]:
    """The state dict of a parameter tree: the exact inverse of `import_open_clip`."""
    return export_params(open_clip_entries(encoder), params)


def strip(state: Mapping[str, Any], encoder: ClipText, *, prefix: str = "") -> dict[str, Any]:
    """The part of a whole checkpoint that is the text encoder.

    Takes the names below `prefix` and drops what is no parameter of this encoder and known not to be: position ids
    and attention masks, the image tower, the temperature, and projections that this encoder does not have.

    Args:
      state: arrays by name.
      encoder: the network they are meant for.
      prefix: e.g. "cond_stage_model.transformer." (Stable Diffusion 1) or "cond_stage_model.model." (2).

    Raises:
      ValueError: no name starts with the prefix.
    """
    found = {name.removeprefix(prefix): a for name, a in state.items() if name.startswith(prefix)}
    if not found:
        raise ValueError(f"no tensor starts with {prefix!r}, got names such as {sorted(state)[:2]}; give its prefix")
    ends = ("embeddings.position_ids", "attn_mask", "logit_scale", "logit_bias")
    starts = ("visual.", "vision_model.", "visual_projection.")
    projections = () if encoder.projection_dim is not None else ("text_projection", "text_projection.weight")
    return {
        name: a
        for name, a in found.items()
        if not name.endswith(ends) and not name.startswith(starts) and name not in projections
    }


def drop_layers(state: Mapping[str, Any], encoder: ClipText) -> dict[str, Any]:
    """An OpenCLIP state dict without the layers after those that `encoder` has."""
    start = "transformer.resblocks."

    def kept(name: str) -> bool:
        return not name.startswith(start) or int(name.removeprefix(start).split(".")[0]) < encoder.num_layers

    return {name: a for name, a in state.items() if kept(name)}


def text_encoder_entries(encoder: ClipText, prefix: str = "text_model.") -> list[Entry]:
    """Every leaf of an encoder with its transformers name."""
    entries = [
        Entry("token_embedding", (f"{prefix}embeddings.token_embedding.weight",), SAME),
        Entry("position_embedding", (f"{prefix}embeddings.position_embedding.weight",), SAME),
        *norm("norm_out", f"{prefix}final_layer_norm"),
    ]
    for i in range(encoder.num_layers):
        ours, theirs = f"layer_{i}", f"{prefix}encoder.layers.{i}"
        parts = [f"{theirs}.self_attn.{part}_proj" for part in "qkv"]
        entries += [
            Entry(f"{ours}/qkv/kernel", tuple(f"{part}.weight" for part in parts), fused(LINEAR, 3)),
            Entry(f"{ours}/qkv/bias", tuple(f"{part}.bias" for part in parts), fused(SAME, 3)),
            *layer(f"{ours}/out", f"{theirs}.self_attn.out_proj", LINEAR),
            *norm(f"{ours}/norm_attention", f"{theirs}.layer_norm1"),
            *norm(f"{ours}/norm_mlp", f"{theirs}.layer_norm2"),
            *layer(f"{ours}/mlp_in", f"{theirs}.mlp.fc1", LINEAR),
            *layer(f"{ours}/mlp_out", f"{theirs}.mlp.fc2", LINEAR),
        ]
    if encoder.projection_dim is not None:
        entries.append(Entry("projection/kernel", ("text_projection.weight",), LINEAR))
    return entries


def open_clip_entries(encoder: ClipText) -> list[Entry]:
    """Every leaf of an encoder with its OpenCLIP name."""
    entries = [
        Entry("token_embedding", ("token_embedding.weight",), SAME),
        Entry("position_embedding", ("positional_embedding",), SAME),
        *norm("norm_out", "ln_final"),
    ]
    for i in range(encoder.num_layers):
        ours, theirs = f"layer_{i}", f"transformer.resblocks.{i}"
        entries += [
            Entry(f"{ours}/qkv/kernel", (f"{theirs}.attn.in_proj_weight",), LINEAR),
            Entry(f"{ours}/qkv/bias", (f"{theirs}.attn.in_proj_bias",), SAME),
            *layer(f"{ours}/out", f"{theirs}.attn.out_proj", LINEAR),
            *norm(f"{ours}/norm_attention", f"{theirs}.ln_1"),
            *norm(f"{ours}/norm_mlp", f"{theirs}.ln_2"),
            *layer(f"{ours}/mlp_in", f"{theirs}.mlp.c_fc", LINEAR),
            *layer(f"{ours}/mlp_out", f"{theirs}.mlp.c_proj", LINEAR),
        ]
    if encoder.projection_dim is not None:
        entries.append(Entry("projection/kernel", ("text_projection",), SAME))
    return entries


def _shapes(encoder: ClipText) -> Params:
    return param_shapes(encoder, example_ids(encoder))

"""UNets of CompVis latent diffusion and of Stable Diffusion: configurations, names and layout of their weights.

The names are guided-diffusion's (`openai`) with spatial transformers where a network attends to a context. Their
projections were released as 1x1 convolutions (latent diffusion, Stable Diffusion 1) or as linear layers (Stable
Diffusion 2), which is the same map. Prefixes inside checkpoint files are the business of whoever reads the file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.unet import Block, UNet, example_inputs
from jaxdiff.pretrained import openai
from jaxdiff.pretrained.torch_layout import (
    LINEAR,
    Entry,
    check_config,
    export_params,
    import_params,
    layer,
    norm,
    pointwise,
)
from jaxdiff.types import Params

CONFIG_KEYS = openai.CONFIG_KEYS | frozenset(
    "use_spatial_transformer transformer_depth context_dim n_embed legacy use_linear_in_transformer adm_in_channels "
    "use_bf16".split()
)


def unet_from_config(config: Mapping[str, Any]) -> UNet:
    """The UNet of a CompVis `UNetModel` configuration.

    `image_size`, `use_linear_in_transformer` and `use_new_attention_order` do not change the network, only the layout
    of its weights. With `legacy` off, or with transformers, the release ignores `num_heads_upsample`; so does this.

    Raises:
      ValueError: an unknown setting, or one this UNet does not have.
    """
    check_config(config, CONFIG_KEYS, "CompVis")
    get = {"num_heads": -1, "num_head_channels": -1, "num_heads_upsample": -1, "legacy": True, **config}
    transformer = get.get("use_spatial_transformer", False)
    context_dim = get.get("context_dim")
    if isinstance(context_dim, Sequence):
        if len(set(context_dim)) != 1:
            raise ValueError(f"one context_dim for all transformer blocks is supported, got {list(context_dim)}")
        context_dim = context_dim[0]
    if context_dim is not None and not transformer:
        raise ValueError("context_dim needs use_spatial_transformer")
    if get.get("n_embed") is not None:
        raise ValueError("n_embed (a head that predicts codebook indices) is not supported; leave it out")
    by_channels = get["num_head_channels"] != -1
    if not by_channels and get["num_heads"] == -1:
        raise ValueError("give num_heads or num_head_channels")
    upsample = get["num_heads_upsample"]
    separate = not by_channels and not transformer and get["legacy"] and upsample != -1
    num_classes, vector = get.get("num_classes"), None
    if isinstance(num_classes, str):
        if num_classes != "sequential" or "adm_in_channels" not in config:
            raise ValueError(
                f"num_classes {num_classes!r} is not supported; a number, or 'sequential' with adm_in_channels"
            )
        num_classes, vector = None, config["adm_in_channels"]
    blocks = config.get("num_res_blocks")
    if isinstance(blocks, Sequence):
        if len(set(blocks)) != 1:
            raise ValueError(f"the same num_res_blocks on every level is supported, got {list(blocks)}")
        config = {**config, "num_res_blocks": blocks[0]}
    if config.get("use_bf16", False):
        raise ValueError("use_bf16 is the dtype field of the UNet; leave it out and use .clone(dtype=jnp.bfloat16)")
    return openai.common_unet(config).clone(
        num_heads=None if by_channels else get["num_heads"],
        head_channels=get["num_head_channels"] if by_channels else None,
        num_heads_up=upsample if separate else None,
        transformer_depth=get.get("transformer_depth", 1) if transformer else 0,
        context_dim=context_dim,
        num_classes=num_classes,
        vector_dim=vector,
    )


def import_unet(
    state: Mapping[str, Any], unet: UNet, *, linear_projection: bool = False, new_attention_order: bool = False
) -> Params:
    """Parameters of `unet` from a CompVis or Stable Diffusion state dict, without prefix.

    Args:
      state: arrays by name.
      unet: the network, e.g. from `unet_from_config` or a preset.
      linear_projection: `use_linear_in_transformer` of the release (Stable Diffusion 2).
      new_attention_order: `use_new_attention_order` of the release.

    Returns:
      The parameter tree, NumPy float32.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped; all of them are named.
    """
    entries = unet_entries(unet, linear_projection, new_attention_order)
    return import_params(entries, state, param_shapes(unet, *example_inputs(unet)))


def export_unet(
    params: Params, unet: UNet, *, linear_projection: bool = False, new_attention_order: bool = False
) -> dict[str, np.ndarray]:
    """The state dict of a parameter tree: the exact inverse of `import_unet`."""
    return export_params(unet_entries(unet, linear_projection, new_attention_order), params)


def unet_entries(unet: UNet, linear_projection: bool, new_attention_order: bool) -> list[Entry]:
    """Every leaf of a UNet with its CompVis name."""
    plain = openai.attention_entries(new_attention_order)

    def attention(block: Block, path: str, name: str) -> list[Entry]:
        return transformer_entries(block, path, name, linear_projection) if block.depth else plain(block, path, name)

    return openai.unet_entries(unet, attention)


def transformer_entries(block: Block, path: str, name: str, linear_projection: bool) -> list[Entry]:
    """The entries of a spatial transformer, by the names of latent diffusion."""
    projection = LINEAR if linear_projection else pointwise(2)
    entries = [
        *norm(f"{path}/norm", f"{name}.norm"),
        *layer(f"{path}/project_in", f"{name}.proj_in", projection),
        *layer(f"{path}/project_out", f"{name}.proj_out", projection),
    ]
    for i in range(block.depth):
        ours, theirs = f"{path}/block_{i}", f"{name}.transformer_blocks.{i}"
        for attends, attn in (("self_attention", "attn1"), ("context_attention", "attn2")):
            for part in "qkv":
                kernel = Entry(f"{ours}/{attends}/{part}/kernel", (f"{theirs}.{attn}.to_{part}.weight",), LINEAR)
                entries.append(kernel)
            entries += layer(f"{ours}/{attends}/out", f"{theirs}.{attn}.to_out.0", LINEAR)
        entries += norm(f"{ours}/norm_self", f"{theirs}.norm1")
        entries += norm(f"{ours}/norm_context", f"{theirs}.norm2")
        entries += norm(f"{ours}/norm_feed_forward", f"{theirs}.norm3")
        entries += layer(f"{ours}/feed_forward_in", f"{theirs}.ff.net.0.proj", LINEAR)
        entries += layer(f"{ours}/feed_forward_out", f"{theirs}.ff.net.2", LINEAR)
    return entries

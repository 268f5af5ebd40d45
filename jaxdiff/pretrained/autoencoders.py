"""First stages of CompVis latent diffusion, taming and Stable Diffusion, and the discriminator they are trained with.

Configurations (`ddconfig`), names and layout of weights, both ways. q, k and v of the attention were released as three
1x1 convolutions; ours is one product, so three tensors make one leaf. Prefixes inside checkpoint files
(`first_stage_model.`, `loss.discriminator.`) are the business of whoever reads the file.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.networks import patch_discriminator
from jaxdiff.networks.autoencoder_blocks import Step, example_input, level_channels, level_plan
from jaxdiff.networks.autoencoder_kl import AutoencoderKL
from jaxdiff.networks.autoencoder_vq import AutoencoderVQ
from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.patch_discriminator import PatchDiscriminator
from jaxdiff.pretrained.torch_layout import (
    CONV,
    SAME,
    Entry,
    Layout,
    check_config,
    export_params,
    fused,
    import_params,
    layer,
    norm,
    pointwise,
)
from jaxdiff.types import Params

NEEDED = frozenset("ch ch_mult num_res_blocks attn_resolutions resolution z_channels double_z".split())
# Settings that never differ in a published configuration, with their only supported value.
FIXED = {"resamp_with_conv": True, "tanh_out": False, "give_pre_end": False, "use_linear_attn": False}
CONFIG_KEYS = NEEDED | set(FIXED) | {"in_channels", "out_ch", "dropout", "attn_type"}
COUNT = Layout(lambda a: a[0].astype(np.int32), lambda a: [a.astype(np.int64)])


def autoencoder_kl_from_config(ddconfig: Mapping[str, Any], *, embed_dim: int) -> AutoencoderKL:
    """The autoencoder of a CompVis `AutoencoderKL` configuration.

    Args:
      ddconfig: the section of that name. Attention sizes that do not occur have no effect there and are dropped.
      embed_dim: channels of the latent.

    Raises:
      ValueError: a setting is unknown, missing or not supported.
    """
    fields = _fields(ddconfig, double_z=True)
    return AutoencoderKL(**fields, embed_dim=embed_dim)


def autoencoder_vq_from_config(ddconfig: Mapping[str, Any], *, embed_dim: int, n_embed: int) -> AutoencoderVQ:
    """The autoencoder of a CompVis `VQModel` or `VQModelInterface`, or a taming `VQModel`, configuration.

    Args:
      ddconfig: as for `autoencoder_kl_from_config`.
      embed_dim: channels of the latent.
      n_embed: number of codes.

    Raises:
      ValueError: a setting is unknown, missing or not supported.
    """
    fields = _fields(ddconfig, double_z=False)
    return AutoencoderVQ(**fields, embed_dim=embed_dim, num_codes=n_embed)


def import_autoencoder(state: Mapping[str, Any], autoencoder: AutoencoderKL | AutoencoderVQ) -> Params:
    """Parameters of an autoencoder from a state dict without prefix (and without the `loss.` of a training run).

    Args:
      state: arrays by name.
      autoencoder: the network, e.g. `autoencoder_kl.kl_f8()` or from a configuration.

    Returns:
      The parameter tree, NumPy float32.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped; all of them are named.
    """
    shapes = param_shapes(autoencoder, example_input(autoencoder))
    return import_params(autoencoder_entries(autoencoder), state, shapes)


def export_autoencoder(params: Params, autoencoder: AutoencoderKL | AutoencoderVQ) -> dict[str, np.ndarray]:
    """The state dict of a parameter tree: the exact inverse of `import_autoencoder`."""
    return export_params(autoencoder_entries(autoencoder), params)


def import_patch_discriminator(state: Mapping[str, Any], discriminator: PatchDiscriminator) -> tuple[Params, Params]:
    """Parameters and running statistics of a discriminator from the state dict of a taming `NLayerDiscriminator`.

    Args:
      state: arrays by name, without prefix ("main.0.weight").
      discriminator: the network.

    Returns:
      The parameter tree (NumPy float32) and the statistics, as the module takes them.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped; all of them are named.
    """
    image, statistics = patch_discriminator.example_inputs(discriminator)
    shapes = {"params": param_shapes(discriminator, image, statistics), "statistics": statistics}
    tree = import_params(discriminator_entries(discriminator), state, shapes)
    return tree["params"], tree["statistics"]


def export_patch_discriminator(
    params: Params, statistics: Params, discriminator: PatchDiscriminator
) -> dict[str, np.ndarray]:
    """The state dict of a discriminator: the exact inverse of `import_patch_discriminator`."""
    return export_params(discriminator_entries(discriminator), {"params": params, "statistics": statistics})


def autoencoder_entries(autoencoder: AutoencoderKL | AutoencoderVQ) -> list[Entry]:
    """Every leaf of an autoencoder with its CompVis name."""
    plan, last = level_plan(autoencoder), len(autoencoder.channel_mult) - 1
    first, coarsest = level_channels(autoencoder, 0), level_channels(autoencoder, last)
    entries = [*layer("quant_conv", "quant_conv", CONV), *layer("post_quant_conv", "post_quant_conv", CONV)]
    if isinstance(autoencoder, AutoencoderVQ):
        entries.append(Entry("codebook", ("quantize.embedding.weight",), SAME))
    for part, steps, width in (("encoder", plan.encoder, first), ("decoder", plan.decoder, coarsest)):
        entries += layer(f"{part}/conv_in", f"{part}.conv_in", CONV)
        entries += _res_block(f"{part}/mid_res", f"{part}.mid.block_1", False)
        if autoencoder.mid_attention:
            entries += _attention(f"{part}/mid_attention", f"{part}.mid.attn_1")
        entries += _res_block(f"{part}/mid_res_out", f"{part}.mid.block_2", False)
        for step in steps:
            entries += _step(part, step, step.channels != width)
            width = step.channels
        entries += norm(f"{part}/norm_out", f"{part}.norm_out") + layer(f"{part}/conv_out", f"{part}.conv_out", CONV)
    return entries


def discriminator_entries(discriminator: PatchDiscriminator) -> list[Entry]:
    """Every leaf of {"params": ..., "statistics": ...} of a discriminator with its taming name."""
    entries = layer("params/conv_0", "main.0", CONV)
    for i in range(1, discriminator.num_layers + 1):
        conv, name = f"main.{3 * i - 1}", f"main.{3 * i}"
        entries.append(Entry(f"params/conv_{i}/kernel", (f"{conv}.weight",), CONV))
        entries += norm(f"params/norm_{i}", name)
        entries.append(Entry(f"statistics/norm_{i}/mean", (f"{name}.running_mean",), SAME))
        entries.append(Entry(f"statistics/norm_{i}/variance", (f"{name}.running_var",), SAME))
        entries.append(Entry(f"statistics/norm_{i}/count", (f"{name}.num_batches_tracked",), COUNT))
    return entries + layer("params/conv_out", f"main.{3 * discriminator.num_layers + 2}", CONV)


def _fields(ddconfig: Mapping[str, Any], *, double_z: bool) -> dict[str, Any]:
    """The fields of our autoencoders that a `ddconfig` sets."""
    check_config(ddconfig, CONFIG_KEYS, "CompVis autoencoder")
    if missing := sorted(NEEDED - set(ddconfig)):
        raise ValueError(f"the autoencoder configuration lacks {missing}")
    for key, value in (FIXED | {"double_z": double_z}).items():
        if ddconfig.get(key, value) != value:
            raise ValueError(f"{key} {ddconfig[key]} is not supported in this kind of autoencoder, expected {value}")
    attention = ddconfig.get("attn_type", "vanilla")
    if attention not in ("vanilla", "none"):
        raise ValueError(f"attn_type {attention!r} is not supported, expected 'vanilla' or 'none'")
    mult, resolution = tuple(ddconfig["ch_mult"]), ddconfig["resolution"]
    factors = [2**level for level in range(len(mult))]
    if resolution % factors[-1]:
        raise ValueError(f"resolution {resolution} must be divisible by {factors[-1]} for ch_mult {list(mult)}")
    attends = [factor for factor in factors if resolution // factor in ddconfig["attn_resolutions"]]
    return {
        "in_channels": ddconfig.get("in_channels", 3),
        "out_channels": ddconfig.get("out_ch", 3),
        "base_channels": ddconfig["ch"],
        "channel_mult": mult,
        "num_res_blocks": ddconfig["num_res_blocks"],
        "attention_factors": tuple(attends) if attention == "vanilla" else (),
        "mid_attention": attention == "vanilla",
        "z_channels": ddconfig["z_channels"],
        "dropout": float(ddconfig.get("dropout", 0.0)),
    }


def _step(part: str, step: Step, widens: bool) -> list[Entry]:
    way, level, which = step.name.split("_")
    path, name = f"{part}/{step.name}", f"{part}.{way}.{level}"
    if step.resample:
        return layer(f"{path}/conv", f"{name}.{which}.conv", CONV)
    found = _res_block(f"{path}_res", f"{name}.block.{which}", widens)
    return found + (_attention(f"{path}_attention", f"{name}.attn.{which}") if step.attention else [])


def _res_block(path: str, name: str, skip: bool) -> list[Entry]:
    entries = [
        *norm(f"{path}/norm_in", f"{name}.norm1"),
        *layer(f"{path}/conv_in", f"{name}.conv1", CONV),
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

"""OpenAI's consistency decoder: names and layout of its weights, in the three forms they are passed on in.

`OPENAI` is the released TorchScript archive, whose table of times comes in a file of its own and is expected here as
"embed_time.emb.weight"; `DIFFUSERS` is the converted checkpoint; `CONV_UNET` the class of the conversion script. Files
are not read here.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.consistency_decoder import ConsistencyDecoder, example_inputs
from jaxdiff.networks.unet import Block, Resample, unet_plan
from jaxdiff.pretrained.torch_layout import CONV, LINEAR, SAME, Entry, Layout, export_params, import_params
from jaxdiff.types import Params

# Our layers of a residual block, in the order in which each form below names them.
BLOCK = ("time", "norm_in", "conv_in", "norm_out", "conv_out", "skip")
# Our other layers, likewise.
ENDS = ("conv_in", "time_table", "time_in", "time_out", "norm_out", "conv_out")


class Names(NamedTuple):
    """How a form of the checkpoint names things.

    Attributes:
      block: prefix of a residual block from (way "down" or "up", level, index, levels); index None resamples.
      mid: prefix of the middle's blocks, without their number.
      layers: a name for each of BLOCK.
      ends: a name for each of ENDS.
      weight: last part of the name of a kernel.
      scale: last part of the name of a norm's scale.
      bias: last part of the name of a bias.
    """

    block: Callable[[str, int, int | None, int], str]
    mid: str
    layers: tuple[str, ...]
    ends: tuple[str, ...]
    weight: str
    scale: str
    bias: str


def _openai_block(way: str, level: int, index: int | None, levels: int) -> str:
    del levels
    return f"blocks.{way}_{level}_{way}samp" if index is None else f"blocks.{way}_{level}_conv_{index}"


def _diffusers_block(way: str, level: int, index: int | None, levels: int) -> str:
    place = level if way == "down" else levels - 1 - level
    return f"{way}_blocks.{place}." + (f"{way}samplers.0" if index is None else f"resnets.{index}")


def _conv_unet_block(way: str, level: int, index: int | None, levels: int) -> str:
    del levels
    # Resampling comes last in a level: after three blocks on the way down, after four on the way up.
    return f"{way}.{level}.{(3 if way == 'down' else 4) if index is None else index}"


_PARTS = ("f_t", "gn_1", "f_1", "gn_2", "f_2", "f_s")
_ENDS = ("embed_image.f", "embed_time.emb", "embed_time.f_1", "embed_time.f_2", "output.gn", "output.f")
OPENAI = Names(_openai_block, "blocks.mid_", _PARTS, _ENDS, "w", "g", "b")
CONV_UNET = Names(_conv_unet_block, "mid.", _PARTS, _ENDS, "weight", "weight", "bias")
DIFFUSERS = Names(
    _diffusers_block,
    "mid_block.resnets.",
    ("time_emb_proj", "norm1", "conv1", "norm2", "conv2", "conv_shortcut"),
    ("conv_in", "time_proj", "time_embedding.linear_1", "time_embedding.linear_2", "conv_norm_out", "conv_out"),
    "weight",
    "weight",
    "bias",
)


def import_decoder(state: Mapping[str, Any], decoder: ConsistencyDecoder, *, names: Names = OPENAI) -> Params:
    """Parameters of a consistency decoder from a state dict.

    Args:
      state: arrays by name.
      decoder: the network; `ConsistencyDecoder()` is the released one.
      names: the form of the checkpoint.

    Returns:
      The parameter tree, NumPy float32.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped; all of them are named.
    """
    return import_params(decoder_entries(decoder, names), state, param_shapes(decoder, *example_inputs(decoder)))


def export_decoder(params: Params, decoder: ConsistencyDecoder, *, names: Names = OPENAI) -> dict[str, np.ndarray]:
    """The state dict of a parameter tree: the exact inverse of `import_decoder`."""
    return export_params(decoder_entries(decoder, names), params)


def decoder_entries(decoder: ConsistencyDecoder, names: Names = OPENAI) -> list[Entry]:
    """Every leaf of a consistency decoder with its name.

    Raises:
      ValueError: the decoder has a part that the checkpoint has not.
    """
    plan, levels = unet_plan(decoder), len(decoder.channel_mult)
    steps = (*plan.down, plan.mid, *plan.up)
    if (
        decoder.resample != "resblock"
        or decoder.num_res_blocks != 3
        or any(isinstance(s, Block) and s.heads for s in steps)
    ):
        raise ValueError(
            "the consistency decoder has three residual blocks a level, resamples in residual blocks and attends "
            f"nowhere; got num_res_blocks {decoder.num_res_blocks}, resample {decoder.resample!r}, attention_factors "
            f"{tuple(decoder.attention_factors)} and mid_attention {decoder.mid_attention}"
        )
    ends = dict(zip(ENDS, names.ends, strict=True))
    entries = [
        *_layer("conv_in", ends["conv_in"], CONV, names),
        # The table is an embedding in every form, so its name always ends alike.
        Entry("time_table/embedding", (f"{ends['time_table']}.weight",), SAME),
        *_layer("time_in", ends["time_in"], LINEAR, names),
        *_layer("time_out", ends["time_out"], LINEAR, names),
    ]
    width = plan.down[0].channels
    skips = [width]
    for step in plan.down:
        entries += _step(step, width, levels, names)
        width = step.channels
        skips.append(width)
    entries += _res_block("mid_res", f"{names.mid}0", False, names)
    entries += _res_block("mid_res_out", f"{names.mid}1", False, names)
    for step in plan.up:
        entries += _step(step, width if isinstance(step, Resample) else width + skips.pop(), levels, names)
        width = step.channels
    entries += _norm("norm_out", ends["norm_out"], names)
    return entries + _layer("conv_out", ends["conv_out"], CONV, names)


def _step(step: Block | Resample, incoming: int, levels: int, names: Names) -> list[Entry]:
    way, level, which = step.name.split("_")
    if isinstance(step, Resample):
        return _res_block(step.name, names.block(way, int(level), None, levels), False, names)
    prefix = names.block(way, int(level), int(which), levels)
    return _res_block(f"{step.name}_res", prefix, incoming != step.channels, names)


def _res_block(path: str, prefix: str, skip: bool, names: Names) -> list[Entry]:
    entries = []
    for ours, theirs in zip(BLOCK, names.layers, strict=True):
        if ours.startswith("norm"):
            entries += _norm(f"{path}/{ours}", f"{prefix}.{theirs}", names)
        elif ours != "skip" or skip:
            layout = LINEAR if ours == "time" else CONV
            entries += _layer(f"{path}/{ours}", f"{prefix}.{theirs}", layout, names)
    return entries


def _layer(path: str, name: str, layout: Layout, names: Names) -> list[Entry]:
    return [
        Entry(f"{path}/kernel", (f"{name}.{names.weight}",), layout),
        Entry(f"{path}/bias", (f"{name}.{names.bias}",), SAME),
    ]


def _norm(path: str, name: str, names: Names) -> list[Entry]:
    return [
        Entry(f"{path}/scale", (f"{name}.{names.scale}",), SAME),
        Entry(f"{path}/bias", (f"{name}.{names.bias}",), SAME),
    ]

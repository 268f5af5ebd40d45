"""SongUNet, the DDPM++ and NCSN++ of NVlabs/edm, under the names of its state dicts.

Modules are named by resolution (`enc.16x16_block0`), so the names depend on the image size. Filters are kept there as
buffers (`resample_filter`), one in each module that changes the size; ours is a field of the network, so they are
checked on the way in and written on the way out. A release wraps the network (`prefix` "model."). Files are not read
here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.ncsnpp import NCSNpp, Part, example_inputs, ncsnpp_parts
from jaxdiff.pretrained.torch_layout import (
    CONV,
    LINEAR,
    SAME,
    Entry,
    Layout,
    check_config,
    export_params,
    import_params,
    layer,
    norm,
    pointwise,
)
from jaxdiff.types import Params

CONFIG_KEYS = frozenset(
    "img_resolution in_channels out_channels label_dim augment_dim model_channels channel_mult channel_mult_emb "
    "num_blocks attn_resolutions dropout label_dropout embedding_type channel_mult_noise encoder_type decoder_type "
    "resample_filter".split()
)
PYRAMIDS = {"standard": "none", "skip": "skip", "residual": "residual"}
FILTER = "resample_filter"


def _channel_first(inner: Layout) -> Layout:
    """Rows ordered channel, (q, k, v) in the state dict; (q, k, v), channel in ours."""

    def swap(a: np.ndarray, first: int, second: int) -> np.ndarray:
        return a.reshape(*a.shape[:-1], first, second).swapaxes(-1, -2).reshape(a.shape)

    return Layout(
        lambda a: swap(inner.to_ours(a), inner.to_ours(a).shape[-1] // 3, 3),
        lambda a: inner.to_torch(swap(a, 3, a.shape[-1] // 3)),
    )


def song_unet_from_config(config: Mapping[str, Any]) -> NCSNpp:
    """The network of the keyword arguments of `SongUNet`.

    `label_dropout` is a matter of training and does not change the network.

    Args:
      config: the keyword arguments.

    Raises:
      ValueError: an unknown or missing setting, or one this network does not have.
    """
    check_config(config, CONFIG_KEYS, "SongUNet")
    if missing := sorted({"img_resolution", "in_channels", "out_channels"} - set(config)):
        raise ValueError(f"the SongUNet configuration lacks {missing}")
    embedding = config.get("embedding_type", "positional")
    # Every release pairs Fourier features with twice the width; the network here knows no other pair.
    fixed = {"channel_mult_noise": (2 if embedding == "fourier" else 1, 1), "channel_mult_emb": (4, 4)}
    for name, (value, default) in fixed.items():
        if (found := config.get(name, default)) != value:
            raise ValueError(f"{name} must be {value} with embedding_type {embedding!r}, got {found}")
    encoder, decoder = config.get("encoder_type", "standard"), config.get("decoder_type", "standard")
    if encoder not in PYRAMIDS or decoder not in ("standard", "skip"):
        raise ValueError(
            f"encoder_type must be one of {sorted(PYRAMIDS)} and decoder_type 'standard' or 'skip', got {encoder!r} "
            f"and {decoder!r}"
        )
    mult = tuple(config.get("channel_mult", (1, 2, 2, 2)))
    sizes = {config["img_resolution"] >> level: 2**level for level in range(len(mult))}
    taps = tuple(float(tap) for tap in config.get("resample_filter", (1, 1)))
    return NCSNpp(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        base_channels=config.get("model_channels", 128),
        channel_mult=mult,
        num_res_blocks=config.get("num_blocks", 4),
        attention_factors=tuple(sorted(sizes[s] for s in set(config.get("attn_resolutions", (16,))) & set(sizes))),
        time_features=embedding,
        taps=None if taps == (1.0, 1.0) else taps,
        input_pyramid=PYRAMIDS[encoder],
        output_pyramid=PYRAMIDS[decoder],
        num_classes=config.get("label_dim") or None,
        augment_dim=config.get("augment_dim") or None,
        dropout=float(config.get("dropout", 0.1)),
    )


def import_song_unet(state: Mapping[str, Any], net: NCSNpp, *, image_size: int, prefix: str = "model.") -> Params:
    """Parameters of `net` from a state dict of SongUNet.

    Args:
      state: arrays by name.
      net: the network, from `song_unet_from_config` or `ncsnpp_presets.edm_ddpmpp`.
      image_size: height and width it was built for, which its names hold.
      prefix: what all names begin with; "" for a bare SongUNet.

    Returns:
      The parameter tree, NumPy float32.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped, or a filter is not that of `net`; all are named.
    """
    entries = song_unet_entries(net, image_size=image_size, prefix=prefix)
    rest = without_filters(state, net, image_size=image_size, prefix=prefix)
    return import_params(entries, rest, param_shapes(net, *example_inputs(net)))


def without_filters(
    state: Mapping[str, Any], net: NCSNpp, *, image_size: int, prefix: str = "model."
) -> dict[str, Any]:
    """The state dict without the filters of the resampling, once they are those of this network.

    Raises:
      ValueError: one is missing or another one.
    """
    expected = filters(net, image_size, prefix)
    wrong = [
        name
        for name, taps in expected.items()
        if name in state and not (np.shape(state[name]) == taps.shape and np.allclose(state[name], taps, atol=1e-6))
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} filters are not those of this network's taps {net.taps}: {', '.join(wrong[:8])}"
        )
    if lacking := sorted(set(expected) - set(state)):
        raise ValueError(f"the state dict lacks {len(lacking)} filters ({', '.join(lacking[:8])}); check the network")
    return {name: value for name, value in state.items() if name not in expected}


def export_song_unet(params: Params, net: NCSNpp, *, image_size: int, prefix: str = "model.") -> dict[str, np.ndarray]:
    """The state dict of a parameter tree, filters included: the exact inverse of `import_song_unet`."""
    state = export_params(song_unet_entries(net, image_size=image_size, prefix=prefix), params)
    return state | filters(net, image_size, prefix)


def song_unet_entries(net: NCSNpp, *, image_size: int, prefix: str = "model.") -> list[Entry]:
    """Every leaf of a network with its name in the release."""
    if net.z_dim is not None or net.resample != "block" or not net.rescale or net.output_pyramid == "residual":
        raise ValueError("SongUNet has no latent, resizes in its blocks, rescales its sums and grows no features")
    entries = []
    if net.num_classes is not None:
        entries += layer("label", f"{prefix}map_label", LINEAR)
    if net.augment_dim is not None:
        entries.append(Entry("augment/kernel", (f"{prefix}map_augment.weight",), LINEAR))
    for part, name in _names(net, image_size, prefix):
        entries += _part_entries(part, name)
    return entries


def _names(net: NCSNpp, image_size: int, prefix: str) -> list[tuple[Part, str]]:
    """Each part with the name of its module; attention has that of its block."""
    named, name = [], ""
    level = 0
    for part in ncsnpp_parts(net):
        way, *rest = part.name.split("_")
        if way in ("down", "up", "image", "out") and rest[0].isdigit():
            level = int(rest[0])
        side, at = ("dec" if way in ("mid", "up", "out") else "enc"), image_size >> level
        size = f"{prefix}{side}.{at}x{at}_"
        below = f"{prefix}{side}.{image_size >> level + 1}x{image_size >> level + 1}_"
        above = f"{prefix}{side}.{2 * at}x{2 * at}_"
        if part.kind == "fourier":
            name = f"{prefix}map_noise"
        elif part.kind == "time":
            name = f"{prefix}map_layer{int(part.name == 'time_out')}"
        elif part.kind == "conv_in":
            name = f"{size}conv"
        elif part.kind == "shrink":
            name = f"{size}aux_{'residual' if net.input_pyramid == 'residual' else 'down'}"
        elif part.kind == "combine":
            name = f"{size}aux_skip"
        elif part.kind == "grow":
            name = f"{size}aux_up"
        elif part.kind in ("norm", "conv"):
            level = int(rest[1]) if len(rest) > 1 else 0
            at = image_size >> level
            name = f"{prefix}dec.{at}x{at}_aux_{part.kind}"
        elif part.kind == "block" and part.direction:
            name = f"{below}down" if part.direction == "down" else f"{above}up"
        elif part.kind == "block":
            name = f"{size}in{rest[0]}" if way == "mid" else f"{size}block{rest[1]}"
        named.append((part, name))
    return named


def _part_entries(part: Part, name: str) -> list[Entry]:
    path = part.name
    if part.kind == "fourier":
        return [Entry(f"{path}/frequencies", (f"{name}.freqs",), SAME)]
    if part.kind == "time":
        return layer(path, name, LINEAR)
    if part.kind in ("conv_in", "conv"):
        return layer(path, name, CONV)
    if part.kind == "norm":
        return norm(path, name)
    if part.kind == "combine" or (part.kind == "shrink" and name.endswith("residual")):
        return layer(f"{path}/conv", name, CONV)
    if part.kind in ("shrink", "grow"):
        return []
    if part.kind == "attention":
        return [
            *norm(f"{path}/norm", f"{name}.norm2"),
            Entry(f"{path}/qkv/kernel", (f"{name}.qkv.weight",), _channel_first(pointwise(2))),
            Entry(f"{path}/qkv/bias", (f"{name}.qkv.bias",), _channel_first(SAME)),
            *layer(f"{path}/out", f"{name}.proj", pointwise(2)),
        ]
    entries = [
        *norm(f"{path}/norm_in", f"{name}.norm0"),
        *layer(f"{path}/conv_in", f"{name}.conv0", CONV),
        *layer(f"{path}/time", f"{name}.affine", LINEAR),
        *norm(f"{path}/norm_out", f"{name}.norm1"),
        *layer(f"{path}/conv_out", f"{name}.conv1", CONV),
    ]
    if part.direction or part.inputs != part.features:
        entries += layer(f"{path}/skip", f"{name}.skip", CONV)
    return entries


def filters(net: NCSNpp, image_size: int, prefix: str) -> dict[str, np.ndarray]:
    """The buffers of a state dict: outer products of the taps, summing to one, [1, 1, K, K]."""
    taps = np.asarray((1.0, 1.0) if net.taps is None else net.taps, np.float32)
    value = (np.outer(taps, taps) / np.square(taps.sum()))[None, None].astype(np.float32)
    buffers = {}
    for part, name in _names(net, image_size, prefix):
        if part.kind == "block" and part.direction:
            buffers |= {f"{name}.conv0.{FILTER}": value, f"{name}.skip.{FILTER}": value}
        elif part.kind in ("shrink", "grow"):
            buffers[f"{name}.{FILTER}"] = value
    return buffers

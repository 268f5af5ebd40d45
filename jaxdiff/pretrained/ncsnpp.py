"""NCSN++ and DDPM++ under the names of their Flax release, openai/consistency_models_cifar10.

Flax counted the submodules of each class in the order of their use; that order is `ncsnpp_parts`. Names are paths
joined by "/", as the reader of msgpack files gives them. `part_entries` also serves the PyTorch names of these
modules (`pretrained.ddgan`), which differ in leaf names and layouts alone. Files are not read here.
"""

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple

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
    fused,
    import_params,
)
from jaxdiff.types import Params

CONFIG_KEYS = frozenset(
    "name nonlinearity nf ch_mult num_res_blocks attn_resolutions dropout resamp_with_conv conditional fir fir_kernel "
    "skip_rescale resblock_type progressive progressive_input progressive_combine embedding_type fourier_scale "
    "init_scale double_heads normalization".split()
)
PYRAMIDS = {"none": "none", "input_skip": "skip", "output_skip": "skip", "residual": "residual"}
# A shortcut of the older blocks is a matrix; ours is a 1x1 convolution.
MATRIX = Layout(lambda a: a[0][None, None], lambda a: [a[0, 0]])


class Dialect(NamedTuple):
    """How one framework spells the leaves of these modules: separator, then (name, layout) of each kind of weight."""

    separator: str
    conv: tuple[str, Layout]
    filtered_conv: tuple[str, Layout]
    dense: tuple[str, Layout]
    scale: str


FLAX = Dialect("/", ("kernel", SAME), ("weight", SAME), ("kernel", SAME), "scale")
TORCH = Dialect(".", ("weight", CONV), ("weight", CONV), ("weight", LINEAR), "weight")


def ncsnpp_from_config(config: Mapping[str, Any], *, image_size: int) -> NCSNpp:
    """The network of a `config.model` section of the release.

    Attention sizes that do not occur have no effect there and are dropped.

    Args:
      config: the section.
      image_size: height and width of the images.

    Raises:
      ValueError: an unknown or missing setting, or one this network does not have.
    """
    check_config(config, CONFIG_KEYS, "NCSN++")
    fixed = {"nonlinearity": "swish", "conditional": True, "double_heads": False, "normalization": "GroupNorm"}
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ValueError(f"only {name} {value!r} is supported, got {config[name]!r}")
    return common_ncsnpp(config, base_channels="nf", image_size=image_size)


def common_ncsnpp(config: Mapping[str, Any], *, base_channels: str, image_size: int) -> NCSNpp:
    """The settings that mean the same in the Flax release and in DDGAN."""
    needed = {base_channels, "ch_mult", "num_res_blocks", "attn_resolutions"}
    if missing := sorted(needed - set(config)):
        raise ValueError(f"the NCSN++ configuration lacks {missing}")
    levels = range(len(config["ch_mult"]))
    sizes = {image_size // 2**level: 2**level for level in levels}
    block = config.get("resblock_type", "biggan")
    if block not in ("biggan", "biggan_oneadagn", "ddpm"):
        raise ValueError(f"resblock_type must be 'biggan', 'biggan_oneadagn' or 'ddpm', got {block!r}")
    by_block = "conv" if config.get("resamp_with_conv", True) else "plain"
    for name in ("progressive", "progressive_input"):
        if config.get(name, "none") not in PYRAMIDS:
            raise ValueError(f"{name} must be one of {sorted(PYRAMIDS)}, got {config[name]!r}")
    return NCSNpp(
        base_channels=config[base_channels],
        channel_mult=tuple(config["ch_mult"]),
        num_res_blocks=config["num_res_blocks"],
        attention_factors=tuple(sorted(sizes[size] for size in set(config["attn_resolutions"]) & set(sizes))),
        time_features=config.get("embedding_type", "positional"),
        fourier_scale=float(config.get("fourier_scale", 16.0)),
        resample=by_block if block == "ddpm" else "block",
        taps=tuple(float(tap) for tap in config["fir_kernel"]) if config.get("fir", False) else None,
        input_pyramid=PYRAMIDS[config.get("progressive_input", "none")],
        output_pyramid=PYRAMIDS[config.get("progressive", "none")],
        combine=config.get("progressive_combine", "sum"),
        rescale=bool(config.get("skip_rescale", True)),
        adaptive_norms=1 if block == "biggan_oneadagn" else 2,
        dropout=float(config.get("dropout", 0.0)),
    )


def import_ncsnpp(state: Mapping[str, Any], net: NCSNpp, *, prefix: str = "") -> Params:
    """Parameters of `net` from the arrays of the Flax release.

    Args:
      state: arrays by path, one tree of parameters (such as `params_ema` of a checkpoint).
      net: the network, e.g. from `ncsnpp_from_config` or `ncsnpp_presets.consistency_ncsnpp`.
      prefix: what all names begin with.

    Returns:
      The parameter tree, NumPy float32.

    Raises:
      ValueError: arrays are missing, unexpected or wrongly shaped; all of them are named.
    """
    return import_params(ncsnpp_entries(net, prefix=prefix), state, param_shapes(net, *example_inputs(net)))


def export_ncsnpp(params: Params, net: NCSNpp, *, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of a parameter tree: the exact inverse of `import_ncsnpp`."""
    return export_params(ncsnpp_entries(net, prefix=prefix), params)


def ncsnpp_entries(net: NCSNpp, *, prefix: str = "") -> list[Entry]:
    """Every leaf of a network with its name in the Flax release."""
    if net.num_classes is not None or net.augment_dim is not None or net.z_dim is not None:
        raise ValueError("the Flax release has neither labels nor latents; use pretrained.edm or pretrained.ddgan")
    classes = {
        "fourier": "GaussianFourierProjection",
        "time": "Dense",
        "conv_in": "Conv",
        "block": "ResnetBlockBigGANpp" if net.resample == "block" else "ResnetBlockDDPMpp",
        "attention": "AttnBlockpp",
        "combine": "Combine",
        "norm": "GroupNorm",
        "conv": "Conv",
    }
    count: collections.Counter[str] = collections.Counter()
    entries = []
    for part in ncsnpp_parts(net):
        name = classes.get(part.kind, f"{part.direction.title()}sample")
        entries += part_entries(net, part, f"{prefix}{name}_{count[name]}", FLAX)
        count[name] += 1
    return entries


def part_entries(net: NCSNpp, part: Part, name: str, dialect: Dialect) -> list[Entry]:
    """The leaves of one part; `name` is that of its module."""
    path, join = part.name, dialect.separator

    def leaf(ours: str, weight: tuple[str, Layout], theirs: str = "", bias: str = "bias") -> list[Entry]:
        module = f"{name}{join}{theirs}" if theirs else name
        return [
            Entry(f"{ours}/kernel", (f"{module}{join}{weight[0]}",), weight[1]),
            Entry(f"{ours}/bias", (f"{module}{join}{bias}",), SAME),
        ]

    def norm(ours: str, theirs: str = "") -> list[Entry]:
        module = f"{name}{join}{theirs}" if theirs else name
        return [
            Entry(f"{ours}/scale", (f"{module}{join}{dialect.scale}",), SAME),
            Entry(f"{ours}/bias", (f"{module}{join}bias",), SAME),
        ]

    if part.kind == "fourier":
        return [Entry(f"{path}/frequencies", (f"{name}{join}W",), SAME)]
    if part.kind == "time":
        return leaf(path, dialect.dense)
    if part.kind in ("conv_in", "conv"):
        return leaf(path, dialect.conv)
    if part.kind == "norm":
        return norm(path)
    if part.kind == "combine":
        return leaf(f"{path}/conv", dialect.conv, "Conv_0")
    if part.kind == "attention":
        three = [f"{name}{join}NIN_{i}{join}" for i in range(3)]
        return [
            *norm(f"{path}/norm", "GroupNorm_0"),
            Entry(f"{path}/qkv/kernel", tuple(f"{one}W" for one in three), fused(SAME, 3)),
            Entry(f"{path}/qkv/bias", tuple(f"{one}b" for one in three), fused(SAME, 3)),
            *leaf(f"{path}/out", ("W", SAME), "NIN_3", "b"),
        ]
    if part.kind != "block":
        if not has_convolution(net, part):
            return []
        filtered = net.taps is not None
        conv = dialect.filtered_conv if filtered else dialect.conv
        return leaf(f"{path}/conv", conv, "Conv2d_0" if filtered else "Conv_0")

    def modulated(ours: str, theirs: str, adaptive: bool) -> list[Entry]:
        if adaptive and net.z_dim is not None:
            return leaf(f"{ours}/style", dialect.dense, f"{theirs}{join}style")
        return norm(ours, theirs)

    entries = [
        *modulated(f"{path}/norm_in", "GroupNorm_0", True),
        *leaf(f"{path}/conv_in", dialect.conv, "Conv_0"),
        *leaf(f"{path}/time", dialect.dense, "Dense_0"),
        *modulated(f"{path}/norm_out", "GroupNorm_1", net.adaptive_norms > 1),
        *leaf(f"{path}/conv_out", dialect.conv, "Conv_1"),
    ]
    if part.direction or part.inputs != part.features:
        matrix = net.resample != "block"
        skip = (
            leaf(f"{path}/skip", ("W", MATRIX), "NIN_0", "b")
            if matrix
            else leaf(f"{path}/skip", dialect.conv, "Conv_2")
        )
        entries += skip
    return entries


def has_convolution(net: NCSNpp, part: Part) -> bool:
    """Whether a change of size has parameters."""
    setting = {"resample": net.resample, "shrink": net.input_pyramid, "grow": net.output_pyramid}[part.kind]
    return setting in ("conv", "residual")

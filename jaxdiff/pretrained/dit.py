"""DiT of facebookresearch: configurations, names and layout of its weights, both ways.

The released state dicts also hold the table of positions, which is computed here and not a parameter: on import it
must be that table, on export it is added. The released weights may be used non-commercially only (CC-BY-NC 4.0).
Files are not read here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.dit import DiT, example_inputs, grid_positions
from jaxdiff.pretrained.torch_layout import (
    LINEAR,
    SAME,
    Entry,
    Layout,
    export_params,
    import_params,
    layer,
)
from jaxdiff.types import Params

POSITIONS = "pos_embed"
DEFAULTS = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "learn_sigma": True,
}


def dit_from_config(config: Mapping[str, Any]) -> DiT:
    """The network of a facebookresearch `DiT` configuration: the keyword arguments of the class.

    Raises:
      ValueError: an unknown setting, or an MLP whose width is no multiple of the tokens' width.
    """
    if unknown := sorted(set(config) - set(DEFAULTS)):
        raise ValueError(f"{unknown[0]!r} is not a setting of the released DiT; known are {sorted(DEFAULTS)}")
    get = {**DEFAULTS, **config}
    if get["mlp_ratio"] != int(get["mlp_ratio"]):
        raise ValueError(f"only whole mlp_ratio are supported, got {get['mlp_ratio']}")
    return DiT(
        in_channels=get["in_channels"],
        out_channels=get["in_channels"] * (2 if get["learn_sigma"] else 1),
        input_size=get["input_size"],
        patch_size=get["patch_size"],
        width=get["hidden_size"],
        depth=get["depth"],
        num_heads=get["num_heads"],
        mlp_ratio=int(get["mlp_ratio"]),
        num_classes=get["num_classes"],
        null_label=get["class_dropout_prob"] > 0,
    )


def import_dit(state: Mapping[str, Any], dit: DiT) -> Params:
    """Parameters of `dit` from a facebookresearch state dict.

    Args:
      state: arrays by name.
      dit: the network, e.g. `dit_preset("XL/2")` or from a configuration.

    Returns:
      The parameter tree, NumPy float32.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped, and all of them are named; or the positions are
        not those of this network.
    """
    return import_params(dit_entries(dit), without_positions(state, dit), param_shapes(dit, *example_inputs(dit)))


def export_dit(params: Params, dit: DiT) -> dict[str, np.ndarray]:
    """The state dict of a parameter tree: the exact inverse of `import_dit`, with the table of positions."""
    return positions(dit) | export_params(dit_entries(dit), params)


def positions(dit: DiT) -> dict[str, np.ndarray]:
    """The table of positions under its released name."""
    side = dit.input_size // dit.patch_size
    return {POSITIONS: grid_positions(side, side, dit.width)[None]}


def without_positions(state: Mapping[str, Any], dit: DiT) -> dict[str, Any]:
    """The state dict without the table of positions, once it is that of this network.

    Raises:
      ValueError: it is missing or another one.
    """
    rest, expected = dict(state), positions(dit)[POSITIONS]
    found = np.asarray(rest.pop(POSITIONS, np.zeros(0)), np.float32)
    if found.shape != expected.shape:
        raise ValueError(
            f"{POSITIONS} of this DiT must be {expected.shape}, got {found.shape}; check its configuration"
        )
    error = np.abs(found - expected).max()
    if not error < 1e-3:  # more than half precision rounds, less than any other table differs by
        raise ValueError(
            f"{POSITIONS} of the state dict is not the fixed table of this network (they differ by {error:.2g}); "
            "a trained table is not supported"
        )
    return rest


def dit_entries(dit: DiT) -> list[Entry]:
    """Every leaf of a DiT with its released name, or its names where the blocks are stacked."""
    entries = [
        *layer("patch", "x_embedder.proj", patch_layout(dit.patch_size)),
        *layer("time_in", "t_embedder.mlp.0", LINEAR),
        *layer("time_out", "t_embedder.mlp.2", LINEAR),
    ]
    if dit.num_classes is not None:
        entries.append(Entry("label/embedding", ("y_embedder.embedding_table.weight",), SAME))
    names = {
        "qkv": "attn.qkv",
        "attention_out": "attn.proj",
        "mlp_in": "mlp.fc1",
        "mlp_out": "mlp.fc2",
        "modulation": "adaLN_modulation.1",
    }
    for path, name in names.items():
        if dit.scan:
            for leaf, suffix, inner in (("kernel", "weight", LINEAR), ("bias", "bias", SAME)):
                blocks = tuple(f"blocks.{i}.{name}.{suffix}" for i in range(dit.depth))
                entries.append(Entry(f"blocks/{path}/{leaf}", blocks, stacked(inner)))
        else:
            for i in range(dit.depth):
                entries += layer(f"block_{i}/{path}", f"blocks.{i}.{name}", LINEAR)
    return [
        *entries,
        *layer("out", "final_layer.linear", LINEAR),
        *layer("modulation", "final_layer.adaLN_modulation.1", LINEAR),
    ]


def patch_layout(size: int) -> Layout:
    """A dense kernel [p p I, O] of patches kept as a convolution [O, I, p, p]."""
    return Layout(
        lambda a: a[0].transpose(2, 3, 1, 0).reshape(-1, a[0].shape[0]),
        lambda a: [a.reshape(size, size, -1, a.shape[-1]).transpose(3, 2, 0, 1)],
    )


def stacked(inner: Layout) -> Layout:
    """One tensor a block, stacked along our first axis."""
    return Layout(
        lambda a: np.stack([inner.to_ours([part]) for part in a]),
        lambda a: [inner.to_torch(part)[0] for part in a],
    )

"""LPIPS and the Inception network of Frechet distances: names and layout of their weights, both ways.

LPIPS comes whole (the lpips package, the `perceptual_loss` of CompVis and taming checkpoints) or in two files,
torchvision's VGG16 and the heads. Inception comes under torchvision's names, as pytorch-fid converted it. Files are
named by the user; nothing is downloaded.
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.inception import SMALLEST, Inception
from jaxdiff.networks.lpips import FEATURES, LPIPS, SCALE, SHIFT, STAGES
from jaxdiff.pretrained import files
from jaxdiff.pretrained.torch_layout import (
    CONV,
    LINEAR,
    SAME,
    Entry,
    Layout,
    export_params,
    import_params,
    layer,
)
from jaxdiff.types import Params

HEAD = Layout(lambda a: a[0].reshape(-1), lambda a: [a.reshape(1, -1, 1, 1)])
CONSTANTS = {"scaling_layer.shift": SHIFT, "scaling_layer.scale": SCALE}


def import_lpips(state: Mapping[str, Any], lpips: LPIPS) -> Params:
    """Parameters of LPIPS from a whole state dict ("net.slice1.0.weight", "lin0.model.1.weight").

    The constants of its scaling layer, where present, must be those of `networks.lpips`; the heads that the lpips
    package lists a second time ("lins.0.model.1.weight") must be equal to the first. Neither is a parameter here.

    Args:
      state: arrays by name, without prefix.
      lpips: the network.

    Returns:
      The parameter tree, NumPy float32.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped, all of them named; or a constant differs.
    """
    return import_params(lpips_entries(), without_copies(state), lpips_shapes(lpips))


def import_lpips_parts(vgg16: Mapping[str, Any], heads: Mapping[str, Any], lpips: LPIPS) -> Params:
    """Parameters of LPIPS from torchvision's VGG16 ("features.0.weight") and the heads ("lin0.model.1.weight").

    VGG16's classifier is not part of the network, so "classifier.*" is passed over.

    Args:
      vgg16: arrays of VGG16 by name.
      heads: arrays of the heads by name.
      lpips: the network.

    Returns:
      The parameter tree, NumPy float32.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped; all of them are named.
    """
    shapes = lpips_shapes(lpips)
    convolutions = {name: a for name, a in vgg16.items() if not name.startswith("classifier.")}
    return {
        "vgg": import_params(_vgg_entries("", _torchvision), convolutions, shapes["vgg"]),
        "heads": import_params(_head_entries(""), without_copies(heads), shapes["heads"]),
    }


def export_lpips(params: Params) -> dict[str, np.ndarray]:
    """The whole state dict, without constants and copies: the exact inverse of `import_lpips`."""
    return export_params(lpips_entries(), params)


def lpips_entries() -> list[Entry]:
    """Every leaf of LPIPS with its name in a whole state dict."""
    return _vgg_entries("vgg/", _slices) + _head_entries("heads/")


def import_inception(state: Mapping[str, Any], inception: Inception | None = None) -> Params:
    """Parameters of Inception from the state dict of pytorch-fid ("Mixed_5b.branch1x1.conv.weight").

    How many batches a norm has seen ("*.num_batches_tracked") means nothing to a frozen network and is passed over.

    Args:
      state: arrays by name.
      inception: the network; None for the one with 1008 logits.

    Returns:
      The parameter tree, NumPy float32.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped; all of them are named.
    """
    inception = inception or Inception()
    state = {name: a for name, a in state.items() if not name.endswith(".num_batches_tracked")}
    return import_params(inception_entries(inception), state, inception_shapes(inception))


def export_inception(params: Params, inception: Inception | None = None) -> dict[str, np.ndarray]:
    """The state dict of a parameter tree, without counts: the exact inverse of `import_inception`."""
    return export_params(inception_entries(inception or Inception()), params)


def load_inception(path: str | os.PathLike[str]) -> Params:
    """Parameters of Inception from a file of the user's: pytorch-fid's weights, in any format `files.read` knows.

    Raises:
      ValueError: the file is not readable, or holds another network.
    """
    return import_inception(files.read(path))


def inception_entries(inception: Inception) -> list[Entry]:
    """Every leaf of Inception with its torchvision name."""
    names = {"kernel": "conv.weight", "scale": "bn.weight", "bias": "bn.bias"}
    names |= {"mean": "bn.running_mean", "variance": "bn.running_var"}
    leaves: Any = traverse_util.flatten_dict(inception_shapes(inception), sep="/")
    entries = layer("logits", "fc", LINEAR)
    for path in leaves:
        unit, _, leaf = path.rpartition("/")
        if unit != "logits":
            module = re.sub("^conv_", "Conv2d_", re.sub("^mixed_", "Mixed_", unit)).replace("/", ".")
            entries.append(Entry(path, (f"{module}.{names[leaf]}",), CONV if leaf == "kernel" else SAME))
    return entries


def _vgg_entries(prefix: str, name: Callable[[int, int], str]) -> list[Entry]:
    """Convolutions of VGG16; `name` is called with stage and index among VGG16's layers (ReLUs and pools count)."""
    entries, index = [], 0
    for stage, (_, convolutions) in enumerate(STAGES, 1):
        for i in range(1, convolutions + 1):
            entries += layer(f"{prefix}conv{stage}_{i}", name(stage, index), CONV)
            index += 2
        index += 1
    return entries


def _torchvision(stage: int, index: int) -> str:
    del stage
    return f"features.{index}"


def _slices(stage: int, index: int) -> str:
    return f"net.slice{stage}.{index}"


def _head_entries(prefix: str) -> list[Entry]:
    return [Entry(f"{prefix}{feature}", (f"lin{i}.model.1.weight",), HEAD) for i, feature in enumerate(FEATURES)]


def without_copies(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict without constants and second copies, once they are what they should be."""
    kept = {}
    for name, value in state.items():
        first = re.sub(r"^lins\.(\d)\.", r"lin\1.", name)
        expected = CONSTANTS.get(name) if first == name else state.get(first)
        if expected is None:
            kept[name] = value
        elif not np.array_equal(np.ravel(np.asarray(value, np.float32)), np.ravel(np.asarray(expected, np.float32))):
            raise ValueError(
                f"{name} of this LPIPS differs from {'the published one' if first == name else first}, expected equal "
                "values; only version 0.1 of LPIPS with VGG16 is supported"
            )
    return kept


def whole(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of LPIPS, from one that may hold torchvision's VGG16 under its own names.

    Raises:
      ValueError: as `without_copies`.
    """
    places = {
        theirs.names[0]: ours.names[0]
        for theirs, ours in zip(_vgg_entries("", _torchvision), _vgg_entries("", _slices), strict=True)
    }
    rest = {name: array for name, array in state.items() if not name.startswith("classifier.")}
    return without_copies({places.get(name, name): array for name, array in rest.items()})


def lpips_shapes(lpips: LPIPS) -> Params:
    """Shapes of the parameters of LPIPS."""
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    return param_shapes(lpips, image, image)


def inception_shapes(inception: Inception) -> Params:
    """Shapes of the parameters of Inception."""
    return param_shapes(inception, jax.ShapeDtypeStruct((1, SMALLEST, SMALLEST, 3), jnp.float32))

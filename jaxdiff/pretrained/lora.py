"""Published LoRA files: names of kohya's scripts and of diffusers/peft, both ways.

The additions are named after the modules that they change, so the names of the network come from the caller: the
entries of `diffusers_layout` for a UNet, those of `clip` for a text encoder. A file often holds both; `part` splits it.
peft keeps alpha apart from the tensors, in a text of the file (diffusers) or in adapter_config.json beside it.
Merging is in `networks.lora`. Variants that are no product of two matrices (LoHa, LoKr, DoRA) are refused.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from jaxdiff.networks.clip_text import ClipText
from jaxdiff.networks.lora import Lora, LowRank
from jaxdiff.networks.unet import UNet
from jaxdiff.pretrained import clip, diffusers_layout, files
from jaxdiff.pretrained.mapped import WeightsError
from jaxdiff.pretrained.plans import read_json
from jaxdiff.pretrained.torch_layout import Entry
from jaxdiff.types import Params


class Convention(NamedTuple):
    """How a file names the additions of one network.

    Attributes:
      prefix: of every name.
      separator: what joins the parts of a module's path.
      down: ending of the matrix that is applied first.
      up: ending of the other.
    """

    prefix: str
    separator: str
    down: str
    up: str


KOHYA_UNET = Convention("lora_unet_", "_", ".lora_down.weight", ".lora_up.weight")
KOHYA_TEXT = Convention("lora_te_", "_", ".lora_down.weight", ".lora_up.weight")
PEFT_UNET = Convention("unet.", ".", ".lora_A.weight", ".lora_B.weight")
PEFT_TEXT = Convention("text_encoder.", ".", ".lora_A.weight", ".lora_B.weight")
PEFT_ALONE = Convention("", ".", ".lora_A.weight", ".lora_B.weight")  # the adapter of one network
ALPHA = ".alpha"
# Where peft's settings are: a text in a safetensors file of diffusers, and a file of peft itself.
SETTINGS, SETTINGS_FILE = "lora_adapter_metadata", "adapter_config.json"

PREFIXES = ("lora_unet_", "lora_te", "unet.", "text_encoder")

# Names that older diffusers and bare peft models used, and the present ones.
OLD_NAMES = (
    (r"^base_model\.model\.", ""),
    (r"\.processor\.", "."),
    (r"\.to_out_lora\.", ".to_out.0.lora."),
    (r"\.(to_[qkv])_lora\.", r".\1.lora."),
    (r"\.lora_linear_layer\.", ".lora."),
    (r"\.lora_([AB])\.default\.", r".lora_\1."),
    (r"\.lora\.down\.", ".lora_A."),
    (r"\.lora\.up\.", ".lora_B."),
)


def read_for(path: str | os.PathLike[str], network: Any, options: Mapping[str, Any], shapes: Params) -> Lora:
    """The additions in a file that are meant for a network, whatever convention the file follows.

    Args:
      path: of the file.
      network: a UNet or a text encoder.
      options: of its layout; `linear_projection` is read.
      shapes: of its parameters.

    Raises:
      ValueError: no addition in it is meant for such a network, or they do not fit; one line says which.
    """
    state, settings = files.read(path), _settings(path)
    text = isinstance(network, ClipText)
    if not text and not isinstance(network, UNet):
        raise WeightsError(
            path, f"LoRA changes UNets and text encoders, the network is a {type(network).__name__}; give another"
        )
    if text:  # transformers 5 no longer has the prefix in memory, and so in what peft saves
        inner = any("text_model" in name for name in state)
        entries = clip.text_encoder_entries(network, "text_model." if inner else "")
    else:
        entries = diffusers_layout.unet_entries(network, bool(options.get("linear_projection", False)))
    alone = not any(_present(name).startswith(PREFIXES) for name in state)
    if alone and not any(_present(name).endswith((PEFT_ALONE.down, PEFT_ALONE.up)) for name in state):
        raise WeightsError(path, f"holds no LoRA, got names such as {sorted(state)[:2]}; give another file")
    for convention in [PEFT_ALONE] if alone else [KOHYA_TEXT, PEFT_TEXT] if text else [KOHYA_UNET, PEFT_UNET]:
        if found := part(state, convention):
            try:
                return import_lora(found | _alphas(found, settings, convention), entries, shapes, convention)
            except ValueError as error:
                raise WeightsError(path, str(error)) from None
    what = "text encoder" if text else "UNet"
    raise WeightsError(path, f"holds no LoRA of a {what}, got names such as {sorted(state)[:2]}; give another --base")


def _settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What peft wrote about an adapter; {} if nothing."""
    text, beside = files.summary(path).metadata.get(SETTINGS), Path(path).with_name(SETTINGS_FILE)
    if text is None:
        return read_json(beside) if beside.is_file() else {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise WeightsError(path, f"has {SETTINGS} that are no JSON object; save the LoRA again")
    return found


def _alphas(state: Mapping[str, Any], settings: Mapping[str, Any], convention: Convention) -> dict[str, np.ndarray]:
    """The alphas of additions that have none of their own, from peft's settings, whose names may have the prefix."""
    named = {name.removeprefix(convention.prefix): value for name, value in settings.items()}
    alpha, patterns = named.get("lora_alpha"), named.get("alpha_pattern") or {}
    if alpha is None:
        return {}
    if not isinstance(patterns, dict) or not all(isinstance(a, int | float) for a in (alpha, *patterns.values())):
        raise ValueError(f"its lora_alpha {alpha!r} or alpha_pattern is no number; save the LoRA again")
    # peft takes these for regular expressions; what it and diffusers write are names of modules, or how they end.
    ends = {name.removeprefix("^").removesuffix("$").replace("\\.", "."): value for name, value in patterns.items()}
    if strange := [name for name in ends if not re.fullmatch(r"[\w.]+", name)]:
        raise ValueError(f"its alpha_pattern has {strange[0][:80]!r}, expected names of modules; merge it with peft")
    found = {}
    for name in state:
        base = name.removesuffix(convention.down)
        if base == name or base + ALPHA in state:
            continue
        module = f".{base.removeprefix(convention.prefix)}"
        value = next((value for end, value in ends.items() if module.endswith(f".{end}")), alpha)
        rank = np.shape(state[name])[0]
        found[base + ALPHA] = np.asarray(value * rank**0.5 if named.get("use_rslora") else value, np.float32)
    return found


def part(state: Mapping[str, Any], convention: Convention) -> dict[str, Any]:
    """The tensors of one network of a file, under present names."""
    found = {_present(name): array for name, array in state.items()}
    return {name: array for name, array in found.items() if name.startswith(convention.prefix)}


def import_lora(state: Mapping[str, Any], entries: Sequence[Entry], shapes: Params, convention: Convention) -> Lora:
    """The additions in a state dict.

    Args:
      state: arrays by name, all of one network (see `part`).
      entries: of the network, e.g. `diffusers_layout.unet_entries(unet)`.
      shapes: its parameters or their shapes.
      convention: e.g. KOHYA_UNET.

    Returns:
      Additions by path of the kernel, NumPy float32.

    Raises:
      ValueError: tensors belong to no kernel, lack their other half or have the wrong shape; all of them are named.
    """
    targets: Any = traverse_util.flatten_dict(shapes, sep="/")
    found: dict[str, list[LowRank]] = {}
    used, problems = set(), []
    for base, (entry, index) in _modules(entries, convention).items():
        down, up, alpha = (base + ending for ending in (convention.down, convention.up, ALPHA))
        present = [name for name in (down, up, alpha) if name in state]
        used.update(present)
        if not present:
            continue
        if down not in state or up not in state:
            problems.append(f"{present[0]} lacks its other half")
            continue
        kernel, a, b = targets[entry.path].shape, np.asarray(state[down]), np.asarray(state[up])
        features, rank = kernel[-1] // len(entry.names), a.shape[0] if a.ndim else 0
        expected = _torch_shapes(entry, kernel, rank)
        if (a.shape, b.shape) != expected:
            problems.append(f"{base} is {a.shape} and {b.shape}, expected {expected[0]} and {expected[1]}")
            continue
        ours = a.T if a.ndim == 2 else a.transpose(2, 3, 1, 0)
        addition = LowRank(
            np.ascontiguousarray(ours.reshape(*kernel[:-1], rank), np.float32),
            np.ascontiguousarray(b.reshape(features, rank).T, np.float32),
            np.asarray(state[alpha], np.float32) if alpha in state else None,
            index * features,
        )
        found.setdefault(entry.path, []).append(addition)
    if unexpected := sorted(set(state) - used):
        more = f" and {len(unexpected) - 4} more" if len(unexpected) > 4 else ""
        problems.append(f"{len(unexpected)} unexpected ({', '.join(unexpected[:4])}{more})")
    if not found and not problems:
        problems.append(f"no name starts with {convention.prefix!r}")
    if problems:
        raise ValueError(f"the LoRA does not fit this network: {'; '.join(problems[:8])}; check network and convention")
    return {path: tuple(additions) for path, additions in found.items()}


def export_lora(
    lora: Mapping[str, tuple[LowRank, ...]], entries: Sequence[Entry], shapes: Params, convention: Convention
) -> dict[str, np.ndarray]:
    """The state dict of additions: the exact inverse of `import_lora`.

    An addition over several parts that the release keeps apart (q, k and v) is written once for each, with the same
    `down`; the sum that it stands for is the same.

    Args:
      lora: additions by path.
      entries: of the network.
      shapes: its parameters or their shapes.
      convention: e.g. PEFT_UNET.

    Raises:
      ValueError: a kernel has no name in this release, or an addition covers a fraction of a part.
    """
    targets: Any = traverse_util.flatten_dict(shapes, sep="/")
    bases: dict[str, list[tuple[str, Entry]]] = {}
    for base, (entry, _) in _modules(entries, convention).items():
        bases.setdefault(entry.path, []).append((base, entry))
    state = {}
    for path, additions in lora.items():
        if path not in bases:
            raise ValueError(f"{path} has no name in this release; export additions made for this network")
        kernel = targets[path].shape
        width = kernel[-1] // len(bases[path])
        for addition in additions:
            rank, features = np.shape(addition.up)
            if features % width or addition.start % width:
                raise ValueError(
                    f"the addition to {features} columns of {path} from {addition.start} cuts a tensor of {width} "
                    "columns in this release; merge it instead"
                )
            ups = np.split(np.asarray(addition.up), features // width, axis=-1)
            for (base, entry), up in zip(bases[path][addition.start // width :], ups, strict=False):
                down_shape, up_shape = _torch_shapes(entry, kernel, rank)
                down = np.moveaxis(np.asarray(addition.down), (-1, -2), (0, 1))
                state[base + convention.down] = np.ascontiguousarray(down).reshape(down_shape)
                state[base + convention.up] = np.ascontiguousarray(up.T).reshape(up_shape)
                if addition.alpha is not None:
                    state[base + ALPHA] = np.asarray(addition.alpha)
    return state


def _present(name: str) -> str:
    for old, new in OLD_NAMES:
        name = re.sub(old, new, name)
    return name


def _modules(entries: Sequence[Entry], convention: Convention) -> dict[str, tuple[Entry, int]]:
    """Name of each module's additions, without ending -> its entry and its place among the fused."""
    kernels = [entry for entry in entries if entry.path.endswith("/kernel")]
    return {
        convention.prefix + name.removesuffix(".weight").replace(".", convention.separator): (entry, i)
        for entry in kernels
        for i, name in enumerate(entry.names)
    }


def _torch_shapes(entry: Entry, kernel: Sequence[int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two matrices in the file; a release that keeps a dense layer as a convolution keeps them so too."""
    *window, width, features = kernel
    axes = entry.layout.to_torch(np.broadcast_to(np.float32(0), tuple(kernel)))[0].ndim - 2
    window = window or [1] * axes
    return (rank, width, *window), (features // len(entry.names), rank, *[1] * axes)

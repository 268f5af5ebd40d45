"""What an import would write: published files read by name, the networks found that they fit, nothing translated yet.

The kind is named or guessed, the configuration is given, lies beside the weights, or is the published one that fits.
Every tensor must be used; those that are passed over are of other networks, of training, or were named. Files are read
by `files`, leaves are made by `kinds` when they are asked for, folders are written by `folders`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.pretrained import families, files
from jaxdiff.pretrained.catalog import BUNDLES, KINDS
from jaxdiff.pretrained.kinds import Deferred, State, below, find, spec_of, translated
from jaxdiff.pretrained.mapped import WeightsError

AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16")
# What diffusers and transformers call their weight files, most wanted first.
WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors", "model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors.index.json", "diffusion_pytorch_model.bin", "pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json", "pytorch_model.bin.index.json",
)  # fmt: skip
MODEL_CONFIG = "config.json"
KEEP_CONFIG = ("diffusers-", "clip-text")  # kinds whose publisher keeps it beside the weights
PIPELINE = "model_index.json"
PIPELINE_PARTS = ("unet", "vae", "vqvae", "text_encoder", "text_encoder_2", "controlnet")


class Plan(NamedTuple):
    """What an import will write: leaves that are made when they are asked for, and the record of the network."""

    name: str
    leaves: dict[str, Deferred]
    record: dict[str, Any]
    passed_over: int


def plan_import(
    kind: str,
    paths: Sequence[str | os.PathLike[str]],
    *,
    config: str | Mapping[str, Any] | None = None,
    dtype: str = "float32",
    prefix: str | None = None,
    skip: Sequence[str] = (),
    ema: bool = False,
) -> list[Plan]:
    """Reads the names of published files and finds the networks that they fit; no leaf is made yet.

    Args:
      kind: a name in `catalog.KINDS` or `catalog.BUNDLES`, or "auto" for that of the names in the file.
      paths: of the file; of several files that belong together; or of a folder of diffusers or transformers.
      config: a published name, or the publisher's configuration (of a bundle {part: configuration}); None for
        config.json beside the weights, or else for the published configuration that fits.
      dtype: of floating-point parameters: float32, bfloat16 or float16.
      prefix: of the names, instead of those that the kind usually has.
      skip: beginnings of names that are passed over.
      ema: take the UNet of a CompVis checkpoint from its moving average (`model_ema.`).

    Returns:
      One plan for each network; its name is "" where there is only one.

    Raises:
      ValueError: a file cannot be read or does not fit; one line says what was found and what was expected.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if kind not in (*KINDS, *BUNDLES, AUTO):
        raise ValueError(f"there is no kind of weights {kind!r}; known are auto, {', '.join((*KINDS, *BUNDLES))}")
    path = Path(paths[0])
    if len(paths) == 1 and (path / PIPELINE).is_file():
        return _plan_pipeline(path, dtype)
    if len(paths) == 1 and path.is_dir():
        path = weights_in(path)
        paths = [path]
    everything = _read_all(paths)
    state = {name: array for name, array in everything.items() if not name.startswith(tuple(skip))}
    if not state:
        raise WeightsError(path, f"nothing is left without the names that begin with {', '.join(skip)}; skip less")
    named = [kind] if kind != AUTO else _guessed(state, path)
    problems = []
    for name in named:
        chosen = config
        if config is None and name.startswith(KEEP_CONFIG) and (path.parent / MODEL_CONFIG).is_file():
            chosen = read_json(path.parent / MODEL_CONFIG)
        try:
            if name in BUNDLES:
                plans = _plan_bundle(name, _from_average(state, path) if ema else state, path, chosen, dtype)
            elif ema:
                raise WeightsError(path, f"is read as {name}, which has no model_ema.; leave ema out")
            else:
                plans = [_plan_one(name, state, path, chosen, dtype, prefix)]
            skipped = plans[0].passed_over + len(everything) - len(state)
            return [plans[0]._replace(passed_over=skipped), *plans[1:]]
        except ValueError as error:
            problems.append(error)
    raise problems[0]


def _read_all(paths: Sequence[str | os.PathLike[str]]) -> dict[str, np.ndarray]:
    state: dict[str, np.ndarray] = {}
    for path in paths:
        found = files.read(path)
        if twice := sorted(set(found) & set(state)):
            raise WeightsError(path, f"holds {twice[0]!r}, which the files before it hold too; give each file once")
        state |= found
    return state


def _guessed(state: State, path: Path) -> list[str]:
    """Kinds whose family the names suggest."""
    family = families.guess({name: array.shape for name, array in state.items()})
    rows: dict[str, Any] = {**BUNDLES, **KINDS}
    named = [name for name, row in rows.items() if family in row.families]
    if not named:
        what = "of no known network" if family == families.UNKNOWN else f"{family}, which cannot be imported"
        raise WeightsError(path, f"the weights seem to be {what}; name a kind: {', '.join(rows)}")
    return named


def _plan_one(
    name: str, state: State, path: Path, config: str | Mapping[str, Any] | None, dtype: str, prefix: str | None
) -> Plan:
    kind = KINDS[name]
    mine, passed_over = below(state, kind.roots if prefix is None else (prefix,))
    try:
        chosen = find(kind, mine) if config is None else config
        spec = spec_of(kind, chosen)
        leaves = translated(kind, spec, mine, dtype)
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(path, f"as {name}: {error}") from None
    record = {
        "kind": name,
        "config": chosen if isinstance(chosen, str) else dict(chosen),
        "dtype": dtype,
        "parameters": sum(leaf.size for leaf in leaves.values()),
        "source": path.name,
    }
    return Plan("", leaves, record, passed_over)


def _plan_bundle(name: str, state: State, path: Path, config: str | Mapping[str, Any] | None, dtype: str) -> list[Plan]:
    bundle, rest = BUNDLES[name], dict(state)
    plans, ignored = [], 0
    for tensor in list(rest):
        if bundle.ignored.match(tensor):
            del rest[tensor]
            ignored += 1
    for part in bundle.parts:
        mine = {tensor: rest.pop(tensor) for tensor in list(rest) if tensor.startswith(part.prefix)}
        if not mine:
            continue
        inner = {tensor.removeprefix(part.prefix): array for tensor, array in mine.items()}
        chosen = config
        if isinstance(config, Mapping) and "_class_name" not in config:  # else one config.json for all parts
            chosen = config.get(part.name)
        plan = _plan_one(part.kind, inner, path, chosen, dtype, "")
        plans.append(plan._replace(name=part.name))
    ema = [tensor for tensor in rest if tensor.startswith("model_ema.")]
    for tensor in ema:
        del rest[tensor]
    if rest or not plans:
        known = ", ".join(repr(part.prefix) for part in bundle.parts)
        found = ", ".join(sorted(rest)[:4])
        problem = (
            f"{len(rest)} tensors belong to no part ({found}), parts start with {known}; skip them by their prefix"
        )
        raise WeightsError(path, f"as {name}: {problem}")
    plans[0] = plans[0]._replace(passed_over=ignored + len(ema))
    return plans


def _from_average(state: State, path: Path) -> dict[str, Any]:
    """A CompVis state dict with its UNet from the moving average, whose names have lost their dots."""
    averaged = {tensor for tensor in state if tensor.startswith("model_ema.diffusion_model")}
    if not averaged:
        raise WeightsError(path, "holds no moving average (model_ema.); leave ema out")
    found = dict(state)
    for tensor in state:
        if tensor.startswith("model.diffusion_model."):
            average = "model_ema." + tensor.removeprefix("model.").replace(".", "")
            if average not in averaged:
                raise WeightsError(path, f"holds {tensor} and no average of it ({average}); leave ema out")
            found[tensor] = state[average]
    return found


def _plan_pipeline(folder: Path, dtype: str) -> list[Plan]:
    """The networks of a diffusers pipeline that have a kind; what has no weights (scheduler, tokenizer) has none."""
    kinds = {"unet": "diffusers-unet", "controlnet": "diffusers-controlnet", "vqvae": "diffusers-autoencoder"}
    kinds |= {"vae": "diffusers-autoencoder", "text_encoder": "clip-text", "text_encoder_2": "clip-text"}
    plans = []
    for part in PIPELINE_PARTS:
        if (folder / part / MODEL_CONFIG).is_file():
            path = weights_in(folder / part)
            plan = _plan_one(kinds[part], files.read(path), path, read_json(folder / part / MODEL_CONFIG), dtype, None)
            plans.append(plan._replace(name=part))
    if not plans:
        raise WeightsError(folder, f"is a pipeline without {', '.join(PIPELINE_PARTS)}; nothing in it can be imported")
    return plans


def weights_in(folder: Path) -> Path:
    """The weight file of a folder of diffusers or transformers: under the names that they use, or the only one.

    Raises:
      WeightsError: there is none, or there are several.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".safetensors", ".bin", ".ckpt", ".pt"))
    if len(found) == 1:  # of a variant, such as diffusion_pytorch_model.fp16.safetensors
        return folder / found[0]
    hint = f"it has {', '.join(found[:4])}; name one" if found else "it has no weight file"
    raise WeightsError(folder, f"is a folder without {WEIGHT_FILES[0]} or {WEIGHT_FILES[1]}; {hint}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      WeightsError: it is none.
    """
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError, OSError):
        found = None
    if not isinstance(found, dict):
        raise WeightsError(path, "is not a JSON object; expected the configuration of a network")
    return found

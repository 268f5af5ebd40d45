"""Imported weights on disk: a folder with `network.json` (which network) and `params.safetensors` (leaves by path).

`import_weights` makes such a folder from published files, `export_weights` writes the publisher's layout back, `load`
gives network and parameters. A checkpoint of several networks becomes a folder of such folders. A folder is written
beside its place and takes its name at the end, so nothing partial is left; leaves pass through memory one at a time.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from jaxdiff.pretrained import files, safetensors_file
from jaxdiff.pretrained.catalog import BUNDLES, KINDS
from jaxdiff.pretrained.kinds import Deferred, Spec, released, spec_of
from jaxdiff.pretrained.mapped import WeightsError
from jaxdiff.pretrained.plans import MODEL_CONFIG, WEIGHT_FILES, Plan, plan_import, read_json
from jaxdiff.types import Params

NETWORK = "network.json"
PARAMS = "params.safetensors"

Progress = Callable[[int], None]


class Imported(NamedTuple):
    """A network with its parameters.

    Attributes:
      kind: the form they were published in.
      spec: network, and what its layout there depended on.
      params: nested dict of read-only arrays, views into the mapped file.
    """

    kind: str
    spec: Spec
    params: Params


def write_import(plans: Sequence[Plan], folder: str | os.PathLike[str], progress: Progress = lambda _: None) -> None:
    """Makes the leaves of an import one after the other and writes them into a folder, whole or not at all.

    Args:
      plans: from `plan_import`.
      folder: must not be there, or be empty.
      progress: called with the bytes of each leaf that is written.

    Raises:
      ValueError: the folder is something else, or a leaf holds NaN or infinity. Nothing is left then.
    """
    target = Path(folder)
    check_target(target)
    with _beside(target) as partial:
        for plan in plans:
            place = partial / plan.name if plan.name else partial
            place.mkdir(parents=True, exist_ok=True)
            safetensors_file.write(place / PARAMS, {path: _counted(d, progress) for path, d in plan.leaves.items()})
            (place / NETWORK).write_text(json.dumps(plan.record, indent=2) + "\n")


def import_weights(
    kind: str,
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    config: str | Mapping[str, Any] | None = None,
    dtype: str = "float32",
    prefix: str | None = None,
) -> list[Plan]:
    """`plan_import`, then `write_import`."""
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    plans = plan_import(kind, paths, config=config, dtype=dtype, prefix=prefix)
    write_import(plans, folder)
    return plans


def load(folder: str | os.PathLike[str]) -> Imported:
    """Network and parameters of a folder that `import_weights` made.

    Returns:
      NumPy arrays in the dtype of the import, views into the mapped file; `jax.device_put` copies them to a device.

    Raises:
      ValueError: the folder is none, is damaged, or holds several networks, which are named.
    """
    path = Path(folder)
    kind, spec = read_record(path)
    arrays = files.read(path / PARAMS)
    wanted: Any = traverse_util.flatten_dict(KINDS[kind].shapes(spec.network), sep="/")
    if {name: array.shape for name, array in arrays.items()} != {name: tuple(a.shape) for name, a in wanted.items()}:
        raise WeightsError(path / PARAMS, f"does not hold the parameters that {NETWORK} describes; import them again")
    return Imported(kind, spec, traverse_util.unflatten_dict(arrays, sep="/"))


def read_record(folder: str | os.PathLike[str]) -> tuple[str, Spec]:
    """Kind and network of an imported folder.

    Raises:
      ValueError: the folder is none, or its record is damaged.
    """
    path = Path(folder)
    if not (path / NETWORK).is_file():
        inside = parts_of(path)
        what = f"holds several networks; name one of {', '.join(inside)}" if inside else f"has no {NETWORK}"
        raise WeightsError(path, f"{what}; expected a folder that jaxdiff import made")
    about = read_json(path / NETWORK)
    kind, config = about.get("kind"), about.get("config")
    if kind not in KINDS or not isinstance(config, str | dict):
        raise WeightsError(path / NETWORK, "is damaged, expected a known kind and a configuration; import it again")
    return kind, spec_of(KINDS[kind], config)


def parts_of(folder: Path) -> list[str]:
    """Names of the imported networks in a folder of several."""
    return sorted(record.parent.name for record in folder.glob(f"*/{NETWORK}"))


def export_weights(
    kind: str,
    spec: Spec,
    params: Params,
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    progress: Progress = lambda _: None,
) -> int:
    """Writes parameters in the layout of a publisher: one safetensors file, or a folder with config.json beside it.

    Args:
      kind: the form to write.
      spec: the network.
      params: its parameters.
      path: of a file ending in .safetensors, or of a folder, where the publisher keeps a configuration (diffusers,
        transformers).
      dtype: of floating-point tensors; None for that of the parameters.
      progress: called with the bytes of each tensor that is written.

    Returns:
      The number of tensors.

    Raises:
      ValueError: the parameters or the network have no such form, or the path is taken.
    """
    row, target = KINDS[kind], Path(path)
    arrays = released(row, spec, params, dtype)
    if target.suffix == ".safetensors":
        _write_state(target, arrays, progress)
        return len(arrays)
    if row.configure is None:
        raise ValueError(f"{kind} is written as one file, got {target}; give a name ending in .safetensors")
    _write_folder(target, arrays, row.configure(spec.network, **spec.options), progress)
    return len(arrays)


def export_bundle(
    kind: str, parts: Mapping[str, Imported], path: str | os.PathLike[str], *, dtype: str | None = None,
    progress: Progress = lambda _: None,
) -> int:  # fmt: skip
    """Writes several networks as one model of a publisher; see `export_weights`. Parts are named as in `catalog`.

    Raises:
      ValueError: a part is unknown or of another kind, or the path is taken.
    """
    bundle, target = BUNDLES[kind], Path(path)
    places = {(part.name, part.kind): part.prefix for part in bundle.parts}
    arrays = {}
    for name, part in parts.items():
        if (name, part.kind) not in places:
            raise ValueError(f"{kind} has no part {name!r} of kind {part.kind}; its parts are {sorted(places)}")
        row = released(KINDS[part.kind], part.spec, part.params, dtype)
        arrays |= {places[name, part.kind] + tensor: array for tensor, array in row.items()}
    if not arrays:
        raise ValueError(f"nothing to export as {kind}: no part was given")
    if target.suffix == ".safetensors" or bundle.configure is None:
        _write_state(target, arrays, progress)
    else:
        config = bundle.configure({name: part.spec.network for name, part in parts.items()})
        _write_folder(target, arrays, config, progress)
    return len(arrays)


def check_target(target: Path) -> None:
    """Refuses a folder to import into that holds anything: nothing of a user's is ever replaced.

    Raises:
      ValueError: it is a file, or a folder that is not empty.
    """
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        raise ValueError(f"{target} exists and is not an empty folder; choose another")


def _write_state(target: Path, arrays: Mapping[str, Deferred], progress: Progress) -> None:
    if target.suffix != ".safetensors":
        raise ValueError(f"weights are written as safetensors, got {target}; give a name ending in .safetensors")
    if target.exists():
        raise ValueError(f"{target} exists; choose another name")
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {target.parent}; make it first")
    counted = {name: _counted(array, progress) for name, array in arrays.items()}
    safetensors_file.write(target, counted, metadata={"format": "pt"})


def _write_folder(target: Path, arrays: Mapping[str, Deferred], config: Mapping[str, Any], progress: Progress) -> None:
    if target.exists():
        raise ValueError(f"{target} exists; choose another name")
    name = WEIGHT_FILES[1] if "architectures" in config else WEIGHT_FILES[0]
    with _beside(target) as partial:
        partial.mkdir(parents=True)
        counted = {n: _counted(array, progress) for n, array in arrays.items()}
        safetensors_file.write(partial / name, counted, metadata={"format": "pt"})
        (partial / MODEL_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _counted(deferred: Deferred, progress: Progress) -> Deferred:
    def make() -> np.ndarray:
        made = deferred.make()
        progress(deferred.nbytes)
        return made

    return deferred._replace(make=make)


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A folder that takes the name of `target` if all goes well, and goes otherwise."""
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {target.parent}; make it first")
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        if target.exists():
            target.rmdir()  # empty, or this fails
        partial.rename(target)
    finally:
        if partial.exists():
            shutil.rmtree(partial)

"""How an array of a PyTorch state dict lies in our trees, and strict translation of whole dicts.

An `Entry` ties one of our leaves to one name of the state dict (or to several that are fused in ours) and a `Layout`,
a pair of inverse functions. Translation uses every tensor and fills every leaf exactly once, or refuses and says which
are missing, unexpected or wrongly shaped. Only dicts of arrays are known here: no files, no PyTorch.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from jaxdiff.types import Params


class Layout(NamedTuple):
    """Arrays of the state dict to one of ours, and back. The two are exact inverses: they only move numbers."""

    to_ours: Callable[[Sequence[np.ndarray]], np.ndarray]
    to_torch: Callable[[np.ndarray], Sequence[np.ndarray]]


class Entry(NamedTuple):
    """One of our leaves ("a/b/kernel") and the names it is made from."""

    path: str
    names: tuple[str, ...]
    layout: Layout


SAME = Layout(lambda a: a[0], lambda a: [a])
LINEAR = Layout(lambda a: a[0].T, lambda a: [a.T])
CONV = Layout(lambda a: a[0].transpose(2, 3, 1, 0), lambda a: [a.transpose(3, 2, 0, 1)])


def pointwise(axes: int) -> Layout:
    """A dense kernel [I, O] kept as a convolution [O, I, 1, ...] with `axes` trailing axes of size 1."""
    return Layout(
        lambda a: a[0].reshape(a[0].shape[:2]).T,
        lambda a: [a.T.reshape(a.shape[1], a.shape[0], *(1,) * axes)],
    )


def heads_first(inner: Layout, heads: int) -> Layout:
    """Rows ordered head, (q, k, v), channel in the state dict; (q, k, v), head, channel in ours."""

    def swap(a: np.ndarray, first: int, second: int) -> np.ndarray:
        parts = a.reshape(*a.shape[:-1], first, second, a.shape[-1] // (first * second))
        return parts.swapaxes(-3, -2).reshape(a.shape)

    return Layout(
        lambda a: swap(inner.to_ours(a), heads, 3),
        lambda a: inner.to_torch(swap(a, 3, heads)),
    )


def fused(inner: Layout, parts: int) -> Layout:
    """Several tensors side by side along our last axis."""
    return Layout(
        lambda a: np.concatenate([inner.to_ours([part]) for part in a], axis=-1),
        lambda a: [inner.to_torch(part)[0] for part in np.split(a, parts, axis=-1)],
    )


def layer(path: str, name: str, layout: Layout) -> list[Entry]:
    """Kernel and bias of a layer."""
    return [Entry(f"{path}/kernel", (f"{name}.weight",), layout), Entry(f"{path}/bias", (f"{name}.bias",), SAME)]


def norm(path: str, name: str) -> list[Entry]:
    """Scale and bias of a norm."""
    return [Entry(f"{path}/scale", (f"{name}.weight",), SAME), Entry(f"{path}/bias", (f"{name}.bias",), SAME)]


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def import_params(entries: Sequence[Entry], state: Mapping[str, Any], shapes: Params) -> Params:
    """Translates a state dict into a parameter tree.

    Args:
      entries: one for each leaf of `shapes`.
      state: arrays by name; anything `np.asarray` takes.
      shapes: the tree to fill, with a shape and dtype at each leaf.

    Returns:
      A nested dict of NumPy arrays with the shapes and dtypes asked for.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped; all of them are named.
    """
    check_state(entries, state, shapes)
    targets: Any = traverse_util.flatten_dict(shapes, sep="/")
    tree = {entry.path: leaf(entry, state, targets[entry.path]) for entry in entries}
    return traverse_util.unflatten_dict(tree, sep="/")


def check_state(entries: Sequence[Entry], state: Mapping[str, Any], shapes: Params) -> None:
    """Refuses a state dict that does not fill every leaf and use up every tensor, by names and shapes alone.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped; all of them are named.
    """
    targets: Any = traverse_util.flatten_dict(shapes, sep="/")
    _check_entries(entries, targets)
    names = {name for entry in entries for name in entry.names}
    problems = []
    if missing := sorted(names - set(state)):
        problems.append(f"{len(missing)} missing ({_listed(missing)})")
    if unexpected := sorted(set(state) - names):
        problems.append(f"{len(unexpected)} unexpected ({_listed(unexpected)})")
    wrong = []
    for entry in entries:
        blank = np.broadcast_to(np.float32(0), targets[entry.path].shape)
        for name, expected in zip(entry.names, entry.layout.to_torch(blank), strict=True):
            if name in state and tuple(np.shape(state[name])) != expected.shape:
                wrong.append(f"{name} {tuple(np.shape(state[name]))}, expected {expected.shape}")
    if wrong:
        problems.append(f"{len(wrong)} wrongly shaped ({_listed(wrong)})")
    if problems:
        raise ValueError(f"the state dict does not fit this network: {'; '.join(problems)}; check its configuration")


def leaf(entry: Entry, state: Mapping[str, Any], target: Any) -> np.ndarray:
    """One leaf of a tree from a state dict that `check_state` has let pass; target has its shape and dtype."""
    value = entry.layout.to_ours([np.asarray(state[name]) for name in entry.names])
    return np.asarray(value, dtype=target.dtype, order="C")


def export_params(entries: Sequence[Entry], params: Params) -> dict[str, np.ndarray]:
    """Translates a parameter tree (or a tree of gradients of the same shape) into a state dict; undoes `import_params`.

    Raises:
      ValueError: the tree is not that of this network.
    """
    leaves: Any = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    _check_entries(entries, leaves)
    state = {}
    for entry in entries:
        tensors = entry.layout.to_torch(np.asarray(leaves[entry.path]))
        state |= {name: np.asarray(tensor, order="C") for name, tensor in zip(entry.names, tensors, strict=True)}
    return state


def _check_entries(entries: Sequence[Entry], leaves: Mapping[str, Any]) -> None:
    paths = {entry.path for entry in entries}
    lacks, besides = sorted(paths - set(leaves)), sorted(set(leaves) - paths)
    if lacks or besides:
        raise ValueError(
            f"the parameter tree does not fit this network: it lacks {_listed(lacks) or 'nothing'} and has besides "
            f"{_listed(besides) or 'nothing'}; check the configuration"
        )


def check_config(config: Mapping[str, Any], known: Iterable[str], release: str) -> None:
    """Refuses configuration keys that a release does not have.

    Raises:
      ValueError: an unknown key, with the closest known one.
    """
    known = sorted(known)
    for key in config:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {known}"
            raise ValueError(f"{key!r} is not a setting of the {release} network{hint}")

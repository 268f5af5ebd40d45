"""Kinds of published weights: how names, shapes and a configuration become one of our networks with its parameters.

A `Kind` is one network in the form of one publisher; `catalog` lists them. Here is what is the same for all: finding
the published configuration that a state dict fits, checking it strictly, and translating it leaf by leaf, each leaf
when it is asked for, so that a large checkpoint is never twice in memory. Files and folders are in `folders`.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from jaxdiff.pretrained.mapped import DTYPES
from jaxdiff.pretrained.torch_layout import Entry, check_state, leaf
from jaxdiff.types import Params

State = Mapping[str, Any]


class Spec(NamedTuple):
    """A network, and what the layout of its weights depends on besides."""

    network: Any
    options: Mapping[str, Any] = {}


class Translation(NamedTuple):
    """How the weights of one network lie in one release.

    Attributes:
      entries: one for each of our leaves.
      clean: the state dict without what is no weight, under present names.
      constants: tensors that are computed here; `clean` drops them, export adds them.
    """

    entries: Sequence[Entry]
    clean: Callable[[State], State] = dict
    constants: Mapping[str, np.ndarray] = {}


class Kind(NamedTuple):
    """One network in the form of one publisher.

    Attributes:
      about: for lists, in a few words.
      translate: (network, **options) -> Translation.
      shapes: of a network's parameters.
      published: configurations by name.
      parse: a publisher's configuration as a Spec; None where there is only the published one.
      families: what `families.guess` calls it.
      roots: prefixes of its tensors, in order of preference; the first that occurs is taken, the rest left alone.
      configure: (network, **options) -> the publisher's configuration, for those that keep it beside the weights.
    """

    about: str
    translate: Callable[..., Translation]
    shapes: Callable[[Any], Params]
    published: Mapping[str, Callable[[], Spec]]
    parse: Callable[[Mapping[str, Any]], Spec] | None = None
    families: tuple[str, ...] = ()
    roots: tuple[str, ...] = ("",)
    configure: Callable[..., dict[str, Any]] | None = None


class Deferred(NamedTuple):
    """An array that is made when it is asked for: `np.asarray` of it works, `shape` and `dtype` cost nothing."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        made = np.asarray(self.make(), self.dtype, order="C")
        return made if dtype is None else made.astype(dtype, copy=False)


def spec_of(kind: Kind, config: str | Mapping[str, Any]) -> Spec:
    """The network of a published name or of a publisher's configuration.

    Raises:
      ValueError: there is no such name, or a setting is unknown, missing or not supported.
    """
    if not isinstance(config, str):
        if kind.parse is None:
            raise ValueError(f"{kind.about} has no configuration; choose one of {', '.join(kind.published)}")
        return kind.parse(config)
    if config not in kind.published:
        close = difflib.get_close_matches(config, kind.published, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"published are {', '.join(kind.published)}"
        raise ValueError(f"there is no published configuration {config!r} of this kind; {hint}")
    return kind.published[config]()


def find(kind: Kind, state: State) -> str:
    """The published configuration that a state dict fits, told from names and shapes.

    Where several fit, as configurations of different heads may, the first is taken: `catalog` puts what is usual first.

    Raises:
      ValueError: none fits; the message is that of the nearest one.
    """
    nearest: tuple[int, str] | None = None
    for name, build in kind.published.items():
        spec = build()
        translation = kind.translate(spec.network, **spec.options)
        theirs = {name for entry in translation.entries for name in entry.names}
        distance = len(theirs ^ (set(state) - set(translation.constants)))
        if nearest is None or distance < nearest[0]:
            nearest = (distance, name)
        try:
            cleaned = translation.clean(state)
            if theirs != set(cleaned):
                continue
            check_state(translation.entries, cleaned, kind.shapes(spec.network))
        except ValueError:
            continue
        return name
    if nearest is None:
        raise ValueError(f"{kind.about} has no published configuration; give its own as a JSON file")
    spec = kind.published[nearest[1]]()
    translation = kind.translate(spec.network, **spec.options)
    try:
        check_state(translation.entries, translation.clean(state), kind.shapes(spec.network))
    except ValueError as error:
        remedy = "give its configuration as a JSON file" if kind.parse else "is it of another kind?"
        raise ValueError(f"no published configuration fits, the nearest is {nearest[1]!r}: {error}; {remedy}") from None
    raise AssertionError(f"{nearest[1]} fits after all")


def translated(kind: Kind, spec: Spec, state: State, dtype: str = "float32") -> dict[str, Deferred]:
    """Our leaves by path, each made from the state dict when it is asked for.

    Args:
      kind: of the state dict.
      spec: the network.
      state: arrays by name.
      dtype: of the floating-point leaves; the others keep theirs.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped, all of them named, before any is translated; when
        a leaf is made, if it holds NaN or infinity.
    """
    translation, shapes = kind.translate(spec.network, **spec.options), kind.shapes(spec.network)
    cleaned = translation.clean(state)
    check_state(translation.entries, cleaned, shapes)
    targets: Any = traverse_util.flatten_dict(shapes, sep="/")
    found = {}
    for entry in translation.entries:
        target = targets[entry.path]
        floating = np.issubdtype(target.dtype, np.floating)

        def make(entry: Entry = entry, target: Any = target) -> np.ndarray:
            made = leaf(entry, cleaned, target)
            if not np.isfinite(made).all():
                raise ValueError(
                    f"NaN or infinite numbers in {', '.join(entry.names)}: the weights are damaged; get them again"
                )
            return made

        found[entry.path] = Deferred(tuple(target.shape), DTYPES[dtype] if floating else np.dtype(target.dtype), make)
    return found


def released(kind: Kind, spec: Spec, params: Params, dtype: str | None = None) -> dict[str, Deferred]:
    """A parameter tree under the names of the release, each tensor made when it is asked for; undoes `translated`.

    Args:
      kind: the form to write.
      spec: the network.
      params: its parameters.
      dtype: of the floating-point tensors; None for that of the parameters.

    Raises:
      ValueError: the tree is not that of this network.
    """
    translation, shapes = kind.translate(spec.network, **spec.options), kind.shapes(spec.network)
    wanted: Any = traverse_util.flatten_dict(shapes, sep="/")
    leaves: Any = traverse_util.flatten_dict(params, sep="/")
    _check_tree(wanted, leaves)
    found = {}
    for entry in translation.entries:
        array = leaves[entry.path]
        source = np.dtype(array.dtype)
        floating = source.kind in "fV"  # bfloat16 calls itself V
        for i, blank in enumerate(entry.layout.to_torch(np.broadcast_to(np.zeros((), source), array.shape))):

            def make(entry: Entry = entry, array: Any = array, i: int = i) -> np.ndarray:
                return entry.layout.to_torch(np.asarray(array))[i]

            kept = DTYPES[dtype] if dtype and floating else np.dtype(blank.dtype)
            found[entry.names[i]] = Deferred(blank.shape, kept, make)
    for name, constant in translation.constants.items():
        found[name] = Deferred(constant.shape, constant.dtype, lambda constant=constant: constant)
    return found


def below(state: State, roots: Iterable[str]) -> tuple[dict[str, Any], int]:
    """The tensors below the first of `roots` that occurs, without it, and how many others there are."""
    for root in roots:
        for prefix in (f"{root}module.", root):
            found = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
            if found:
                return found, len(state) - len(found)
    return dict(state), 0


def _check_tree(wanted: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    lacks, besides = sorted(set(wanted) - set(leaves)), sorted(set(leaves) - set(wanted))
    wrong = [p for p in sorted(set(wanted) & set(leaves)) if tuple(wanted[p].shape) != tuple(leaves[p].shape)]
    problems = {"lacks": lacks, "has besides": besides}
    texts = [f"{what} {len(paths)} leaves ({', '.join(paths[:4])})" for what, paths in problems.items() if paths]
    texts += [f"has {p} {tuple(leaves[p].shape)}, expected {tuple(wanted[p].shape)}" for p in wrong[:4]]
    if texts:
        raise ValueError(
            f"the parameters do not fit this network: their tree {'; '.join(texts)}; check its configuration"
        )

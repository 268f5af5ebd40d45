"""What the pickles in PyTorch files describe: storages, tensors over them, modules that hold tensors.

The table of calls that such pickles may make stands here, with our own stand-ins: a tensor becomes a record until all
is read, then a view into the file. Names are paths with dots. Of objects with an entry `state_dict` (PyTorch Lightning)
only that entry counts; of modules, the parameters and buffers under the names that `state_dict()` gives them. That
covers TorchScript and the persistent objects in NVlabs' .pkl files, whose embedded source stays text. Sparse and
quantised tensors are refused.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.pretrained.mapped import DTYPES, MAX_NODES, Mapped, flatten
from jaxdiff.pretrained.pickles import Call, Inert, Name

STORAGES = {
    f"{prefix}{kind}Storage": DTYPES[dtype]
    for prefix in ("torch.", "torch.cuda.", "torch.storage.")
    for kind, dtype in dict(
        Double="float64", Float="float32", Half="float16", BFloat16="bfloat16", Long="int64", Int="int32",
        Short="int16", Char="int8", Byte="uint8", Bool="bool", ComplexFloat="complex64", ComplexDouble="complex128",
        Untyped="uint8",
    ).items()
}  # fmt: skip
MAX_OWN = 1000  # buffers that a module does not save
INERT = (
    "argparse.Namespace copyreg._reconstructor copy_reg._reconstructor builtins.complex builtins.slice "
    "builtins.range builtins.bytearray collections.deque collections.Counter collections.defaultdict datetime.datetime "
    "datetime.timedelta pathlib.Path pathlib.PosixPath pathlib.WindowsPath pathlib.PurePosixPath "
    "pathlib._local.PosixPath uuid.UUID torch.device torch.Size torch.serialization._get_layout numpy.dtype "
    "numpy.core.multiarray.scalar numpy._core.multiarray.scalar numpy.core.multiarray._reconstruct "
    "numpy._core.multiarray._reconstruct numpy.random._pickle.__randomstate_ctor "
    "numpy.random._pickle.__generator_ctor numpy.random._pickle.__bit_generator_ctor"
).split()
LISTS = [f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor")] + [
    f"{module}.{kind}" for module in ("builtins", "__builtin__") for kind in ("set", "frozenset", "list", "tuple")
]


class Archive:
    """Where the storages of one pickle lie. In the format before 1.6 that is known only after the pickle is read."""

    def __init__(self, file: Mapped, spans: dict[str, tuple[int, int]]):
        self.file, self.spans, self.little = file, spans, True
        self.widths: dict[str, int] = {}


class Storage(NamedTuple):
    """Numbers in an archive: `count` of a dtype from the one with index `first` on."""

    archive: Archive
    key: str
    dtype: np.dtype
    count: int
    first: int = 0


class Tensor(NamedTuple):
    """A strided part of a storage. Offset and strides count numbers."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def storage_of(archive: Archive, described: Any) -> Any:
    """("storage", type, key, device, count[, view]); or the class of a whole module, with its source."""
    file = archive.file
    if isinstance(described, tuple) and len(described) == 4 and described[0] == "module":
        return described[1]
    if not isinstance(described, tuple) or not 5 <= len(described) <= 6 or described[0] != "storage":
        raise file.error("refers to something outside its pickle that is no storage: damaged, or not a torch file")
    _, kind, key, _, count, *view = list[Any](described)
    if not isinstance(kind, Name) or str(kind) not in STORAGES:
        shown = kind if isinstance(kind, Name) else "unknown"
        raise file.error(f"has a storage of type {shown}; readable are {', '.join(list(STORAGES)[:13])}")
    if not isinstance(key, str) or not _sizes((count,)):
        raise file.error("has a storage without a name or with a negative size: damaged")
    dtype = STORAGES[str(kind)]
    archive.widths.setdefault(key, dtype.itemsize)
    if not view or view[0] is None:
        return Storage(archive, key, dtype, count)
    (view,) = view
    if not isinstance(view, tuple) or len(view) != 3 or not _sizes(view[1:]) or view[1] + view[2] > count:
        raise file.error(f"has a view of storage {key[:40]!r} that does not lie inside it: damaged")
    return Storage(archive, key, dtype, view[2], view[1])


def calls_for(archive: Archive) -> dict[str, Call]:
    """Our stand-ins for the functions that files of weights call, by dotted name."""
    file, pairs_left, bytes_left = archive.file, [MAX_NODES], [len(archive.file.data)]

    def tensor(args: tuple[Any, ...], dtype: Name | None = None) -> Tensor:
        storage, offset, shape, strides = (*args[:4], None, None, None, None)[:4]
        if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
            raise file.error("has a tensor without storage, shape or strides: damaged")
        shape = file.shape(shape, "a tensor")
        if len(shape) != len(strides) or type(offset) is not int or not _sizes((offset, *strides)):
            raise file.error("has a tensor with a negative offset or stride: refused")
        kind = storage.dtype if dtype is None else DTYPES.get(dtype.name if dtype.module == "torch" else "")
        if kind is None:
            raise file.error(f"has a tensor of {dtype}; readable are {', '.join(DTYPES)}")
        return Tensor(storage, kind, offset, shape, strides)

    def with_dtype(args: tuple[Any, ...]) -> Tensor:
        if len(args) < 7 or not isinstance(args[6], Name):
            raise file.error("has a tensor without a dtype: damaged")
        return tensor(args, args[6])

    def first(args: tuple[Any, ...]) -> Any:
        if not args:
            raise file.error("calls a stand-in without a value: damaged")
        return args[0]

    def from_type(args: tuple[Any, ...]) -> Any:
        name = str(args[0]) if args and isinstance(args[0], Name) else "a value"
        if len(args) < 3 or name not in tensors or not isinstance(args[2], tuple):
            raise file.error(f"refers to {name}, which is not a tensor: refused, nothing was run")
        return tensors[name](args[2])

    def ordered(args: tuple[Any, ...]) -> dict[Any, Any]:
        pairs = args[0] if args else []
        # A pickle could pass one long list again and again; those since Python 3 pass none.
        pairs_left[0] -= len(pairs) if isinstance(pairs, list) else MAX_NODES + 1
        if pairs_left[0] < 0:
            raise file.error("has an OrderedDict that is not made from a list of pairs: refused")
        return {p[0]: p[1] for p in pairs if isinstance(p, list | tuple) and len(p) == 2 and isinstance(p[0], str)}

    def encoded(args: tuple[Any, ...]) -> memoryview:
        """How protocol 2 keeps bytes: as a text of Latin-1."""
        text = args[0] if args and isinstance(args[0], str) else ""
        bytes_left[0] -= len(text)
        if bytes_left[0] < 0 or not text.isascii() and max(text) > "\xff":
            raise file.error("has bytes written as text that are none, or many times the same: damaged")
        return memoryview(text.encode("latin1"))

    def persistent(args: tuple[Any, ...]) -> Inert:
        meta = args[0] if len(args) == 1 else None
        meta = meta.items if isinstance(meta, Inert) else meta
        if not isinstance(meta, dict) or "state" not in meta:
            raise file.error("has a persistent object without state: not readable")
        return Inert(Name("torch_utils.persistence", "object"), (), meta["state"])

    tensors: dict[str, Call] = {
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_tensor_v3": with_dtype,
        "torch._utils._rebuild_parameter": first,
        "torch._utils._rebuild_parameter_with_state": first,
    }
    inert = {name: lambda args, name=name: Inert(Name(*name.rsplit(".", 1)), args) for name in INERT}
    lists = {name: lambda args: args[0] if args else [] for name in LISTS}
    return (
        tensors
        | inert
        | lists
        | {
            "torch._tensor._rebuild_from_type_v2": from_type,
            "torch.jit._pickle.restore_type_tag": first,
            "collections.OrderedDict": ordered,
            "_codecs.encode": encoded,
            "torch_utils.persistence._reconstruct_persistent_obj": persistent,
        }
    )


def _sizes(values: Iterable[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**60 for value in values)


def tensors_in(file: Mapped, value: Any) -> dict[str, np.ndarray]:
    """All tensors below a value, under their dotted names."""
    root = value.get("state_dict") if isinstance(value, dict) else None
    left = [8 * len(file.data) + 2**26]

    def leaf(value: Any, name: str) -> np.ndarray | None:
        array = None
        if isinstance(value, Tensor):
            array = _array(value, name)
        elif isinstance(value, Inert) and value.cls.name == "_reconstruct":
            array = _numpy_array(file, value, name)
        if array is not None:
            left[0] -= array.nbytes
            if left[0] < 0:
                raise file.error("describes tensors of many times its own size, over the same bytes: refused")
        return array

    return flatten(file, root if isinstance(root, dict) else value, _children, leaf, ".")


def _children(value: Any) -> Iterable[tuple[Any, Any]] | None:
    if isinstance(value, dict):
        return _pairs(value)
    if isinstance(value, Inert) and value.cls.name != "_reconstruct":
        state = value.state if isinstance(value.state, dict) else {}
        if not isinstance(state.get("_modules"), dict):
            return [pair for part in (value.items, state) for pair in _pairs(part)]
        passing = state.get("_non_persistent_buffers_set")
        passing = (
            {key for key in passing if isinstance(key, str)}
            if isinstance(passing, list) and len(passing) <= MAX_OWN
            else ()
        )
        held = [pair for part in ("_parameters", "_buffers", "_modules") for pair in _pairs(state.get(part))]
        return [(key, child) for key, child in held if not isinstance(key, str) or key not in passing]
    return enumerate(value) if type(value) is list or type(value) is tuple else None


def _pairs(value: Any) -> Iterable[tuple[Any, Any]]:
    return value.items() if isinstance(value, dict) else ()


def _array(tensor: Tensor, name: str) -> np.ndarray:
    """The view that a tensor is; strided ones share the storage as well."""
    storage, dtype, shape = tensor.storage, tensor.dtype, tensor.shape
    file, what, width = storage.archive.file, f"tensor {name[:80]!r}", dtype.itemsize
    if storage.key not in storage.archive.spans:
        raise file.error(f"{what} is in storage {storage.key[:40]!r}, which the file lacks: damaged; download it again")
    start, size = storage.archive.spans[storage.key]
    room = storage.count * storage.dtype.itemsize
    first = storage.first * storage.dtype.itemsize + tensor.offset * width
    extent = sum((n - 1) * step for n, step in zip(shape, tensor.strides, strict=True)) + 1 if 0 not in shape else 0
    if (storage.first * storage.dtype.itemsize + room) > size or tensor.offset * width + extent * width > room:
        raise file.error(
            f"{what} needs {tensor.offset + extent} numbers of {dtype}, its storage has {min(room, size)} bytes: "
            "the file is cut short or damaged; download it again"
        )
    dense = math.prod(shape)
    packed = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if all(n == 1 or step == want for n, step, want in zip(shape, tensor.strides, packed, strict=True)) or not dense:
        return file.array(start + first, dtype, shape, what, storage.archive.little)
    flat = file.array(start + first, dtype, (extent,), what, storage.archive.little)
    steps = tuple(width * step for step in tensor.strides)
    return np.ndarray(shape, dtype, flat.view(np.uint8), strides=steps)


def _numpy_array(file: Mapped, value: Inert, name: str) -> np.ndarray | None:
    """A NumPy array from its state (version, shape, dtype, Fortran order, bytes); None for one of objects."""
    state = value.state if isinstance(value.state, tuple) and len(value.state) == 5 else (None,) * 5
    _, shape, dtype, fortran, raw = state
    if not isinstance(dtype, Inert) or not isinstance(dtype.args, tuple) or not dtype.args:
        return None
    code = dtype.args[0]
    codes = {f"{d.kind}{d.itemsize}": d for d in DTYPES.values() if d.kind in "biufc"}
    if not isinstance(raw, memoryview) or not isinstance(code, str) or code not in codes:
        return None
    shape = file.shape(shape, f"array {name[:80]!r}")
    order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "<"
    array = Mapped(file.path, raw).array(0, codes[code], shape[::-1] if fortran else shape, name, order != ">")
    return array.T if fortran else array

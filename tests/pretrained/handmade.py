"""Weight files of every format made by hand, instruction by instruction, so that tests need none of the libraries.

A pickle is bytes joined from the helpers below; `ref` names a class, `call` calls one. What the files hold is `ARRAYS`.
"""

import json
import struct
import zipfile

import ml_dtypes
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
KINDS = {"float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long",
         "int32": "Int", "int16": "Short", "int8": "Char", "uint8": "Byte", "bool": "Bool", "complex64": "ComplexFloat",
         "complex128": "ComplexDouble"}  # fmt: skip
UNTYPED = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")  # torch keeps these as bytes and a dtype


def dtype(name):
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def values(name):
    return np.arange(1, 7).reshape(2, 3).astype(dtype(name))


ARRAYS = {"net.weight": values("float32"), "net.bias": values("float16")[0], "steps": np.int64(7).reshape(())}


def text(s):
    raw = s if isinstance(s, bytes) else s.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(i):
    return b"\x8a\x08" + struct.pack("<q", i)


def tup(*parts):
    return b"(" + b"".join(parts) + b"t"


def ref(name):
    module, _, last = name.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def call(name, *args):
    return ref(name) + tup(*args) + b"R"


def mapping(pairs):
    pairs = pairs.items() if isinstance(pairs, dict) else pairs
    return b"}(" + b"".join((text(k) if isinstance(k, str) else k) + v for k, v in pairs) + b"u"


def made(cls, state):
    """An object of a class, filled with a state."""
    return ref(cls) + b")\x81" + state + b"b"


def program(body, protocol=2):
    return bytes([0x80, protocol]) + body + b"."


def storage(kind, key, count, *view, device="cpu"):
    parts = (text("storage"), ref(f"torch.{kind}Storage"), text(key), text(device), number(count), *view)
    return tup(*parts) + b"Q"


def tensor(kind, key, shape, strides=None, offset=0, count=None, view=()):
    strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))] if strides is None else strides
    stored = storage(kind, key, int(np.prod(shape)) if count is None else count, *view)
    sizes = [tup(*map(number, numbers)) for numbers in (shape, strides)]
    return call("torch._utils._rebuild_tensor_v2", stored, number(offset), *sizes, b"\x89", ordered())


def ordered():
    return call("collections.OrderedDict")


def described(arrays, legacy=False):
    """The pickle's body for arrays, each in a storage of its own, and the storages."""
    pairs, stored = {}, {}
    for i, (name, array) in enumerate(arrays.items()):
        if array.dtype.name in KINDS:
            pairs[name] = tensor(KINDS[array.dtype.name], str(i), array.shape, view=(b"N",) if legacy else ())
        else:
            sizes = [tup(*map(number, n)) for n in (array.shape, np.array(array.strides) // array.itemsize)]
            where = (storage("storage.Untyped", str(i), array.nbytes), number(0), *sizes, b"\x89", ordered())
            pairs[name] = call("torch._utils._rebuild_tensor_v3", *where, ref(f"torch.{array.dtype.name}"))
        stored[str(i)] = array
    return mapping(pairs), stored


def torch_zip(path, body=None, storages=None, arrays=ARRAYS, root="archive", extra=(), **options):
    """A zip archive as torch.save writes it, without the alignment."""
    if body is None:
        body, storages = described(arrays)
    members = {"data.pkl": body if body[:1] == b"\x80" else program(body)}
    members |= {f"data/{key}": np.asarray(a).tobytes() for key, a in (storages or {}).items()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in [*((f"{root}/{n}", c) for n, c in members.items()), *extra]:
            archive.writestr(name, content)
    return path


def legacy_bytes(body=None, storages=None, arrays=ARRAYS, little=True):
    """The format before torch 1.6."""
    if body is None:
        body, storages = described(arrays, legacy=True)
    magic = b"\x8a\x0a" + MAGIC.to_bytes(10, "little")
    system = mapping({"little_endian": b"\x88" if little else b"\x89"})
    keys = b"](" + b"".join(map(text, storages)) + b"e"
    parts = [program(p) for p in (magic, b"M" + struct.pack("<H", 1001), system, body, keys)]
    for array in storages.values():
        array, order = np.asarray(array), "<" if little else ">"
        count = array.size if array.dtype.name in KINDS else array.nbytes
        parts += [struct.pack(f"{order}q", count), array.astype(array.dtype.newbyteorder(order)).tobytes()]
    return b"".join(parts)


def safetensors_bytes(arrays=ARRAYS, header=None, data=None):
    """A header (made from the arrays, or as given) and data."""
    codes = {"float32": "F32", "float16": "F16", "int64": "I64", "float64": "F64"}
    if header is None:
        header, end = {}, 0
        for name, a in arrays.items():
            header[name] = dict(dtype=codes[a.dtype.name], shape=a.shape, data_offsets=[end, end + a.nbytes])
            end += a.nbytes
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = b"".join(a.tobytes() for a in arrays.values()) if data is None else data
    return struct.pack("<Q", len(raw)) + raw + data


def packed(value):
    """MessagePack of nested maps, lists, texts, bytes, truth values, small ints and arrays (extension 1)."""
    if isinstance(value, dict):
        return struct.pack(">BH", 0xDE, len(value)) + b"".join(packed(k) + packed(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return struct.pack(">BH", 0xDC, len(value)) + b"".join(map(packed, value))
    if isinstance(value, str):
        return struct.pack(">BB", 0xD9, len(value.encode())) + value.encode()
    if isinstance(value, bytes):
        return struct.pack(">BI", 0xC6, len(value)) + value
    if isinstance(value, bool | None):
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        return struct.pack(">Bq", 0xD3, value)
    raw = packed([list(value.shape), value.dtype.name, value.tobytes()])
    return struct.pack(">BIb", 0xC9, len(raw), 1 if value.ndim else 3) + raw


def nested(arrays, separator="."):
    """{"a.b": x} as {"a": {"b": x}}."""
    tree = {}
    for name, array in arrays.items():
        *above, last = name.split(separator)
        here = tree
        for part in above:
            here = here.setdefault(part, {})
        here[last] = array
    return tree


def write_each(folder, arrays=ARRAYS):
    """The same arrays in every format: {format: path}."""
    paths = {name: folder / name for name in ("zip", "legacy", "safetensors", "msgpack", "pickle")}
    torch_zip(paths["zip"], arrays=arrays)
    paths["legacy"].write_bytes(legacy_bytes(arrays=arrays))
    paths["safetensors"].write_bytes(safetensors_bytes(arrays=arrays))
    paths["msgpack"].write_bytes(packed(nested(arrays)))
    paths["pickle"].write_bytes(module_pickle(arrays))
    return paths


def module_pickle(arrays=ARRAYS, source="import os"):
    """A persistent object as NVlabs pickle them: nested modules with embedded source, storages as embedded files."""

    def loaded(array):
        kind, count = KINDS[array.dtype.name], array.size
        raw = legacy_bytes(storage(kind, "0", count, b"N"), {"0": array})
        stored = call("torch.storage._load_from_bytes", b"B" + struct.pack("<I", len(raw)) + raw)
        strides = np.array(array.strides, int) // array.itemsize
        sizes = [tup(*map(number, n)) for n in (array.shape, strides)]
        whole = call("torch._utils._rebuild_tensor_v2", stored, number(0), *sizes, b"\x89", ordered())
        return call("torch._utils._rebuild_parameter", whole, b"\x88", ordered())

    def module(tree):
        own = {k: loaded(v) for k, v in tree.items() if not isinstance(v, dict)}
        below = {k: module(v) for k, v in tree.items() if isinstance(v, dict)}
        state = mapping({"_parameters": mapping(own), "_buffers": mapping({}), "_modules": mapping(below)})
        meta = mapping({"type": text("class"), "module_src": text(source), "class_name": text("Net"), "state": state})
        return call("torch_utils.persistence._reconstruct_persistent_obj", meta)

    return program(module(nested(arrays)), protocol=4)

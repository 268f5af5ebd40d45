"""Reads and writes safetensors: 8 bytes of header length, a JSON header, then the tensors without a gap.

Every rule of the format is checked, and tensors are views into the mapped file. The reader is our own because the
package of that name gives NumPy users no bfloat16 and copies; the format is a page long. Types of less than a byte are
refused. Sharded files are `files`' business.

Source: the format description of huggingface/safetensors.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.pretrained.mapped import DTYPES, MAX_NAME, Mapped, WeightsError

MAX_HEADER = 100_000_000
METADATA = "__metadata__"
NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
CODES = {DTYPES[name]: code for code, name in NAMES.items()}


def read(file: Mapped) -> dict[str, np.ndarray]:
    """The tensors of a file by name, in the order of their bytes.

    Raises:
      WeightsError: if any rule of the format is broken.
    """
    header, start = _header(file)
    header.pop(METADATA, None)
    found, end = {}, 0
    for name, (dtype, shape, first, last) in sorted(_entries(file, header).items(), key=lambda item: item[1][2:]):
        if first != end:
            problem = "overlaps the one before it" if first < end else f"leaves a hole of {first - end} bytes before it"
            raise file.error(f"tensor {name[:80]!r} {problem}; expected it at byte {end} of the data: refused")
        found[name] = file.array(start + first, dtype, shape, f"tensor {name[:80]!r}")
        end = last
    if start + end != len(file.data):
        raise file.error(
            f"the header describes {start + end} bytes, the file has {len(file.data)}: "
            "it is cut short or damaged; download it again"
        )
    return found


def read_metadata(file: Mapped) -> dict[str, str]:
    """The texts that a file carries beside its tensors.

    Raises:
      WeightsError: if the header is broken.
    """
    return _header(file)[0].get(METADATA, {})


def write(path: str | os.PathLike[str], arrays: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
    """Writes arrays, whole or not at all: into a file beside `path` that takes its name once all is on disk.

    Args:
      path: of the file; one that is there is replaced.
      arrays: NumPy or JAX arrays by name.
      metadata: texts by name.

    Raises:
      WeightsError: for a name, dtype or text that the format does not have. Nothing is written then.
    """
    for name, text in (metadata or {}).items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise WeightsError(path, f"metadata are texts by name, got {name!r}: {type(text).__name__}; write str(...)")
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    # Wide types first, so that every tensor lies at a multiple of its item size.
    order = sorted(arrays, key=lambda name: (-np.dtype(arrays[name].dtype).itemsize, name))
    for name in order:
        array = arrays[name]
        dtype = np.dtype(array.dtype).newbyteorder("=")
        if name == METADATA or len(name) > MAX_NAME or not _encodable(name):
            raise WeightsError(path, f"a tensor cannot be named {name[:80]!r}; rename it")
        if dtype not in CODES:
            raise WeightsError(path, f"tensor {name!r} is {dtype}; safetensors has {', '.join(NAMES.values())}")
        header[name] = {"dtype": CODES[dtype], "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise WeightsError(path, f"the header would take {len(text)} bytes, the format allows {MAX_HEADER}: split it")
    partial = f"{os.fspath(path)}.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                array = np.asarray(arrays[name])
                little = array.astype(array.dtype.newbyteorder("<"), copy=False)
                opened.write(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def _header(file: Mapped) -> tuple[dict[str, Any], int]:
    """The checked JSON object, and where the data starts."""
    length = int.from_bytes(file.take(0, 8, "the header length"), "little")
    if length > MAX_HEADER:
        raise file.error(f"the header would be {length} bytes, the format allows {MAX_HEADER}: not safetensors")
    raw = file.take(8, length, "the header")
    if not length or raw[0] != ord("{"):
        raise file.error("the header does not start with '{': not safetensors, or damaged")
    try:
        header = json.loads(str(raw, "utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:  # json and Unicode errors are ValueErrors
        reason = "it is nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise file.error(f"the header is not the JSON that safetensors asks for: {reason}") from None
    metadata = header.get(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) and _encodable(k + v) for k, v in metadata.items()):
        raise file.error(f"{METADATA} is not a map of texts; the format allows nothing else")
    return header, 8 + length


def _entries(file: Mapped, header: dict[str, Any]) -> dict[str, tuple[np.dtype, tuple[int, ...], int, int]]:
    """{name: (dtype, shape, first byte, byte after the last)}, each right in itself."""
    found = {}
    for name, entry in header.items():
        what = f"tensor {name[:80]!r}"
        if len(name) > MAX_NAME or not _encodable(name):
            raise file.error(f"{what} has a name that is too long or no text: refused")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise file.error(f"{what} is not described by dtype, shape and data_offsets alone: not safetensors")
        code, offsets = entry["dtype"], entry["data_offsets"]
        if not isinstance(code, str) or code not in NAMES:
            raise file.error(f"{what} has the dtype {str(code)[:40]!r}; readable are {', '.join(NAMES)}")
        shape, dtype = file.shape(entry["shape"], what), DTYPES[NAMES[code]]
        if not isinstance(offsets, list) or len(offsets) != 2 or any(type(o) is not int or o < 0 for o in offsets):
            raise file.error(f"{what} has data_offsets that are not two byte positions: not safetensors, or damaged")
        size = int(np.prod(shape, dtype=np.uint64)) * dtype.itemsize
        if offsets[1] - offsets[0] != size:
            raise file.error(
                f"{what} spans {str(offsets[1] - offsets[0])[:24]} bytes, but {code}{list(shape)} needs {size}: damaged"
            )
        found[name] = (dtype, shape, *offsets)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"it holds {twice[:80]!r} twice")
    return found


def _encodable(text: str) -> bool:
    """Whether a text has no lone surrogates, which JSON can smuggle in and no terminal can print."""
    return not any("\ud800" <= c <= "\udfff" for c in text)

"""Reads what `flax.serialization.to_bytes` writes: nested maps of arrays in MessagePack, as views into the file.

Arrays are extension 1, NumPy scalars 3, complex numbers 2; arrays beyond a GiB lie in chunks, which are joined and so
copied. Names are paths with slashes, because parts may hold dots ("params/down_0.block_1/conv1/kernel"). Whatever is
not an array, such as a step count, is left out. The rest of MessagePack (dates, other extensions, keys that are not
text) does not occur in weights and is refused.
"""

import struct
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxdiff.pretrained.mapped import DTYPES, MAX_DEPTH, MAX_NODES, Mapped, flatten

NDARRAY, COMPLEX, SCALAR = 1, 2, 3
CHUNKED = "__msgpack_chunked_array__"
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
NUMBERS = dict(zip((*range(0xCA, 0xD4),), ("f", "d", "B", "H", "I", "Q", "b", "h", "i", "q"), strict=True))
# Byte -> (kind, format of the length that follows). Short forms keep the length in the byte itself.
LENGTHS = {
    **{0xD9 + i: ("text", f) for i, f in enumerate("BHI")},
    **{0xC4 + i: ("bytes", f) for i, f in enumerate("BHI")},
    **{0xC7 + i: ("extension", f) for i, f in enumerate("BHI")},
    **{0xDC + i: ("list", f) for i, f in enumerate("HI")},
    **{0xDE + i: ("map", f) for i, f in enumerate("HI")},
}


def read(file: Mapped) -> dict[str, np.ndarray]:
    """The arrays of a file by their path.

    Raises:
      WeightsError: if the file is damaged or not a map of arrays.
    """
    decoder = _Decoder(file)
    tree = decoder.value()
    if decoder.at != len(file.data):
        raise file.error(f"has {len(file.data) - decoder.at} bytes after its end; expected none: not a Flax file")
    return flatten(file, tree, _children, lambda v, _: v if isinstance(v, np.ndarray) else None, "/")


def _children(value: Any) -> Iterable[tuple[Any, Any]] | None:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list) else None


class _Decoder:
    """A position in the bytes and how much more may be read."""

    def __init__(self, file: Mapped):
        self.file, self.at, self.left = file, 0, MAX_NODES

    def take(self, size: int, what: str = "a value") -> memoryview:
        taken = self.file.take(self.at, size, what)
        self.at += size
        return taken

    def number(self, form: str) -> Any:
        return struct.unpack(f">{form}", self.take(struct.calcsize(f">{form}")))[0]

    def value(self, depth: int = 0) -> Any:
        self.left -= 1
        if depth > MAX_DEPTH or self.left < 0:
            raise self.file.error(f"is nested deeper than {MAX_DEPTH} or holds more than {MAX_NODES} values; refused")
        code = self.number("B")
        if code < 0x80 or code >= 0xE0:
            return code if code < 0x80 else code - 256
        if code in CONSTANTS:
            return CONSTANTS[code]
        if code in NUMBERS:
            return self.number(NUMBERS[code])
        if code < 0xC0:
            kind, length = ("map" if code < 0x90 else "list", code & 15) if code < 0xA0 else ("text", code & 31)
        elif 0xD4 <= code <= 0xD8:
            kind, length = "extension", 1 << (code - 0xD4)
        elif code in LENGTHS:
            kind, form = LENGTHS[code]
            length = self.number(form)
        else:
            raise self.file.error(f"holds the byte {code:#x} at {self.at - 1}, which starts no value: not a Flax file")
        match kind:
            case "text":
                return self.text(length)
            case "bytes":
                return self.take(length, "a string of bytes")
            case "list":
                return [self.value(depth + 1) for _ in self.counted(length)]
            case "map":
                return self.mapping(length, depth)
            case _:
                return self.extension(length, depth)

    def text(self, length: int) -> str:
        try:
            return str(self.take(length, "a text"), "utf-8")
        except UnicodeDecodeError:
            raise self.file.error(f"holds text before byte {self.at} that is not UTF-8: the file is damaged") from None

    def counted(self, length: int) -> range:
        if length > len(self.file.data) - self.at:
            raise self.file.error(
                f"says that {length} values follow byte {self.at}, but {len(self.file.data) - self.at} bytes: "
                "the file is cut short or damaged; download it again"
            )
        return range(length)

    def mapping(self, length: int, depth: int) -> Any:
        found = {}
        for _ in self.counted(length):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in found:
                problem = f"the key {key[:80]!r} twice" if isinstance(key, str) else "a key that is not text"
                raise self.file.error(f"has {problem} before byte {self.at}: not a Flax file, or damaged")
            found[key] = self.value(depth + 1)
        return self.joined(found) if found.get(CHUNKED) is True else found

    def extension(self, length: int, depth: int) -> Any:
        code, end = self.number("b"), self.at + length
        self.file.take(self.at, length, "an extension")
        if code not in (NDARRAY, COMPLEX, SCALAR):
            raise self.file.error(f"holds the extension {code} before byte {self.at}; Flax writes 1, 2 and 3: refused")
        parts = self.value(depth + 1)
        if self.at != end or not isinstance(parts, list) or len(parts) != (2 if code == COMPLEX else 3):
            raise self.file.error(f"has an array before byte {end} that is not (shape, dtype, bytes): damaged")
        return self.array(*parts) if code != COMPLEX else None

    def array(self, shape: Any, dtype: Any, raw: Any) -> np.ndarray:
        what = f"the array before byte {self.at}"
        shape = self.file.shape(shape, what)
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self.file.error(f"{what} has the dtype {str(dtype)[:40]!r}; known are {', '.join(DTYPES)}")
        size = int(np.prod(shape, dtype=np.uint64)) * DTYPES[dtype].itemsize
        if not isinstance(raw, memoryview) or len(raw) != size:
            got = len(raw) if isinstance(raw, memoryview) else "no"
            raise self.file.error(f"{what} has {got} bytes; {dtype}{list(shape)} needs {size}: the file is damaged")
        return Mapped(self.file.path, raw).array(0, DTYPES[dtype], shape, what)

    def joined(self, parts: dict[str, Any]) -> np.ndarray:
        """One array from its chunks, which lie flat in order."""
        shape, chunks = (_in_order(parts.get(name)) for name in ("shape", "chunks"))
        shape = self.file.shape(shape, "a chunked array")
        flat = all(isinstance(c, np.ndarray) and c.ndim == 1 and c.dtype == chunks[0].dtype for c in chunks)
        if not chunks or not flat or sum(c.size for c in chunks) != int(np.prod(shape, dtype=np.uint64)):
            raise self.file.error(f"the chunks before byte {self.at} do not make an array {list(shape)}: damaged")
        return np.concatenate(chunks).reshape(shape)


def _in_order(parts: Any) -> list[Any]:
    """Flax keeps a list as a map from "0", "1", ..."""
    return [parts[str(i)] for i in range(len(parts)) if str(i) in parts] if isinstance(parts, dict) else []

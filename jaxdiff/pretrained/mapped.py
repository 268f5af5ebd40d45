"""A weight file as mapped bytes, and what every reader of one needs: one-line errors, array views, flat names.

Nothing is copied: arrays are read-only views into the mapped file, so the memory in use is that of the tensors which
are touched. A file must not be cut or rewritten while its arrays live; replacing it by renaming is safe. What the bytes
mean is said by `safetensors_file`, `torch_file` and `msgpack_file`.
"""

import math
import mmap
import os
import stat
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAX_NODES = 500_000  # of a nested container; the largest training checkpoints hold some 50,000
MAX_DEPTH = 64
MAX_NAME = 1000
MAX_AXES = 32
MAX_LINE = 500

DTYPES = {
    name: np.dtype(name)
    for name in "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 "
    "complex64 complex128".split()
} | {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in "bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu".split()
}


class WeightsError(ValueError):
    """A weight file that cannot be read as what it should be: one line with the file, what was found, the remedy."""

    def __init__(self, path: str | os.PathLike[str], problem: str):
        # Names come from the file: without this a hostile one could forge lines or flood a terminal.
        line = "".join(c if c.isprintable() else "?" for c in f"{os.fspath(path)}: {problem}")
        super().__init__(line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - 3]}...")


class Mapped(NamedTuple):
    """The bytes of a file, or of a part of it, under the file's name."""

    path: str
    data: memoryview

    def error(self, problem: str) -> WeightsError:
        return WeightsError(self.path, problem)

    def take(self, start: int, size: int, what: str) -> memoryview:
        """A range of bytes.

        Raises:
          WeightsError: if it does not lie inside the file.
        """
        if start < 0 or size < 0 or start + size > len(self.data):
            raise self.error(
                f"{what} should be bytes {start} to {start + size}, but there are {len(self.data)}: "
                "the file is cut short or damaged; download it again"
            )
        return self.data[start : start + size]

    def shape(self, shape: Any, what: str) -> tuple[int, ...]:
        """A shape read from the file, once it is known to be one.

        Raises:
          WeightsError: if it is not a short list of non-negative integers with a product that can be addressed.
        """
        known = isinstance(shape, list | tuple) and len(shape) <= MAX_AXES
        if not known or not all(type(size) is int and abs(size) < 2**64 for size in shape):
            raise self.error(f"{what} has no list of at most {MAX_AXES} sizes as its shape: the file is damaged")
        if min(shape, default=0) < 0 or math.prod(max(size, 1) for size in shape) >= 2**56:
            raise self.error(f"{what} has the shape {list(shape[:8])}, which no tensor can have: the file is damaged")
        return tuple(shape)

    def array(self, start: int, dtype: np.dtype, shape: Sequence[int], what: str, little: bool = True) -> np.ndarray:
        """A read-only array at a byte offset; a view, unless the bytes are in the other order or truth values."""
        raw = self.take(start, math.prod(shape) * dtype.itemsize, what)
        if not raw:
            return np.zeros(shape, dtype)
        if dtype == np.bool_:  # any byte may stand there, but a bool other than 0 or 1 breaks NumPy
            return (np.frombuffer(raw, np.uint8) != 0).reshape(shape)
        if dtype.itemsize > 1 and little != (sys.byteorder == "little"):
            width = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
            raw = np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(-1, width)[:, ::-1])
        return np.frombuffer(raw, dtype).reshape(shape)


def map_file(path: str | os.PathLike[str]) -> Mapped:
    """Maps a file for reading.

    Symbolic links are followed: download caches are made of them.

    Raises:
      WeightsError: if there is no such file, or it is a folder, a device or empty.
    """
    name = os.fspath(path)
    try:
        mode = os.stat(name).st_mode
        if stat.S_ISDIR(mode):
            inside = sorted(n for n in os.listdir(name) if "." in n and not n.startswith("."))[:5]
            raise WeightsError(name, f"is a folder; give one file of it, such as {', '.join(inside) or 'none: empty'}")
        if not stat.S_ISREG(mode):
            raise WeightsError(name, "is neither a file nor a link to one; give a weight file")
        with open(name, "rb") as opened:
            if not os.fstat(opened.fileno()).st_size:
                raise WeightsError(name, "is empty (0 bytes); download it again")
            return Mapped(name, memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)))
    except FileNotFoundError:
        where = f"is a link to {os.readlink(name)}, which is not there" if os.path.islink(name) else "is not there"
        raise WeightsError(name, f"{where}; check the path") from None
    except (OSError, ValueError) as e:
        if isinstance(e, WeightsError):
            raise
        raise WeightsError(name, f"cannot be opened: {getattr(e, 'strerror', None) or e}") from None


def flatten(
    file: Mapped,
    root: Any,
    children: Callable[[Any], Iterable[tuple[Any, Any]] | None],
    leaf: Callable[[Any, str], np.ndarray | None],
    separator: str,
) -> dict[str, np.ndarray]:
    """Arrays of a nested container by their path, in the order of the file.

    Args:
      file: where it came from.
      root: the container. It may hold itself, or one part at many places.
      children: the (key, value) pairs of a container, or None for what is not one. Keys other than texts and ints
        cannot be part of a name: what lies there is left out.
      leaf: the array of anything else, or None to leave it out. It also gets the name.
      separator: between the parts of a name.

    Raises:
      WeightsError: for more parts, depth or length of names than weights have, or two arrays of one name.
    """
    found, pending, nodes = {}, [("", 0, root)], 0
    while pending:
        name, depth, value = pending.pop()
        pairs = children(value)
        if pairs is None:
            array = leaf(value, name)
            if array is not None and name in found:
                raise file.error(f"holds two tensors named {name[:80]!r}; expected one: the file is damaged")
            if array is not None:
                found[name] = array
            continue
        if depth == MAX_DEPTH:
            raise file.error(f"is nested deeper than {MAX_DEPTH} levels, as weights never are; refused")
        below = []
        for key, child in pairs:
            nodes += 1
            if nodes > MAX_NODES:
                raise file.error(f"holds more than {MAX_NODES} parts, counting shared ones again; refused")
            if not isinstance(key, str | int):
                continue
            part = str(key)
            path = f"{name}{separator}{part}" if depth else part
            if len(path) > MAX_NAME:
                raise file.error(f"has a name of more than {MAX_NAME} characters, {path[:40]!r}...; refused")
            below.append((path, depth + 1, child))
        pending += reversed(below)
    return found

"""One door to weight files of any kind: what a file is, is told from its bytes, never from its name.

`read` gives arrays by name, as views into the mapped file; `summary` says what is in it; `check_finite` warns of NaN.
Nothing that a file holds is run (see `pickles`). Which network the names belong to is the business of the importers.
"""

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.pretrained import families, msgpack_file, safetensors_file, torch_file
from jaxdiff.pretrained.mapped import Mapped, map_file

MAX_INDEX = 100_000_000
MAX_SHARDS = 1000

Reader = Callable[[Mapped], dict[str, np.ndarray]]

# First bytes -> what a file is that cannot be read, and what to do about it.
REFUSED = {
    b"version https://git-lfs": "is a git-lfs pointer, not the weights it stands for; run git lfs pull",
    b"\x1f\x8b": "is compressed with gzip; unpack it first",
    b"\x89HDF": "is HDF5 (Keras); convert it to safetensors",
    b"\x93NUMPY": "is a NumPy array; read it with numpy.load",
    b"GGUF": "is GGUF, whose quantised weights cannot be read; take the safetensors file",
    b"PK\x05\x06": "is an empty zip archive; download it again",
    b"7z\xbc\xaf": "is a 7z archive; unpack it first",
    b"Rar!": "is a rar archive; unpack it first",
}


class Summary(NamedTuple):
    """What a weight file holds.

    Attributes:
      path: of the file.
      format: in words.
      family: whose weights they seem to be, or "unknown".
      tensors: their number.
      parameters: the scalars in them.
      bytes: the bytes in them.
      dtypes: {dtype: number of tensors}, the most frequent first.
      metadata: texts that the file carries (safetensors).
    """

    path: str
    format: str
    family: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    metadata: dict[str, str]


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a weight file by name.

    Safetensors and their sharded index, PyTorch files of every age (zip, TorchScript, before 1.6), pickles of EDM, and
    Flax MessagePack. Names are those of the file: paths with dots, with slashes for Flax. Of a file with an entry
    `state_dict` only that entry is read.

    Args:
      path: of the file, or of a `*.index.json`, whose shards lie beside it.

    Returns:
      Read-only NumPy arrays in the dtype of the file, views into it where possible. Keep the file while they live.

    Raises:
      WeightsError: one line that says what was found, what was expected and what to do.
    """
    return _open(path)[1]


def write(path: str | os.PathLike[str], arrays: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
    """Writes safetensors, whole or not at all; see `safetensors_file.write`."""
    safetensors_file.write(path, arrays, metadata)


def summary(path: str | os.PathLike[str]) -> Summary:
    """Counts what a weight file holds; no tensor is touched.

    Raises:
      WeightsError: as `read`.
    """
    name, arrays, metadata = _open(path)
    return Summary(
        path=os.fspath(path),
        format=name,
        family=families.guess({n: array.shape for n, array in arrays.items()}),
        tensors=len(arrays),
        parameters=sum(array.size for array in arrays.values()),
        bytes=sum(array.nbytes for array in arrays.values()),
        dtypes=dict(Counter(array.dtype.name for array in arrays.values()).most_common()),
        metadata=metadata,
    )


def describe(summary: Summary) -> str:
    """A summary as lines for a terminal."""
    dtypes = ", ".join(f"{dtype} ({count})" for dtype, count in summary.dtypes.items())
    rows = {
        "file": summary.path,
        "format": summary.format,
        "family": summary.family,
        "tensors": f"{summary.tensors:,}",
        "parameters": f"{summary.parameters:,}",
        "bytes": f"{summary.bytes:,}",
        "dtypes": dtypes,
    }
    texts = {
        f"metadata {key}"[:60]: value if len(value) <= 80 else f"{value[:77]}..."
        for key, value in summary.metadata.items()
    }
    lines = [f"{key:<11} {value}" for key, value in (rows | texts).items()]
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def check_finite(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Warns, in one line, of tensors with NaN or infinity; reads every number.

    Returns:
      Their names.
    """
    found = [name for name, array in arrays.items() if array.dtype.kind in "fcV" and not _finite(array)]
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        warnings.warn(f"NaN or infinite numbers in {', '.join(found[:5])}{more}: the weights are damaged", stacklevel=2)
    return found


def _finite(array: np.ndarray) -> bool:
    """Whether every number is finite; in pieces, so that large tensors need no copy of their size."""
    flat = array.reshape(-1)
    return all(bool(np.isfinite(flat[i : i + 2**22]).all()) for i in range(0, flat.size, 2**22))


def _open(path: str | os.PathLike[str]) -> tuple[str, dict[str, np.ndarray], dict[str, str]]:
    """(format in words, arrays, metadata) of a file."""
    file = map_file(path)
    if bytes(file.data[:1]) == b"{":
        name, arrays = _read_index(file)
        metadata = {}
    else:
        name, reader = _reader(file)
        arrays = reader(file)
        metadata = safetensors_file.read_metadata(file) if reader is safetensors_file.read else {}
    if not arrays:
        raise file.error(f"holds no tensors ({name}); give a file of weights")
    return name, arrays, metadata


def _reader(file: Mapped) -> tuple[str, Reader]:
    """The format of a file, in words, and its reader.

    The three binary formats have no common signature: a safetensors file starts with a length and then '{', a pickle
    with 0x80 and its protocol, MessagePack with the size of a map.
    """
    head = bytes(file.data[:512])
    for start, problem in REFUSED.items():
        if head.startswith(start):
            raise file.error(problem)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise file.error("is a web page, probably the error or log-in page of a download; download it again")
    if head[257:262] == b"ustar":
        raise file.error("is a tar archive; unpack it, or load and save it again with a newer torch")
    if head.startswith(torch_file.ZIP_START):
        return "torch (zip)", torch_file.read_zip
    if head[4:9] == b"\0\0\0\0{":
        return "safetensors", safetensors_file.read
    if head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5:
        return ("torch (before 1.6)" if torch_file.is_legacy(file) else "pickle"), torch_file.read_pickle
    if head[0] in (0xDE, 0xDF) or 0x81 <= head[0] <= 0x8F:
        return "Flax MessagePack", msgpack_file.read
    if head[8:9] == b"{":  # with a length that is too large, which the reader will say
        return "safetensors", safetensors_file.read
    raise file.error(
        f"starts with {head[:8]!r}, which no weight file does; "
        "readable are safetensors, torch files and Flax MessagePack"
    )


def _read_index(file: Mapped) -> tuple[str, dict[str, np.ndarray]]:
    """All tensors of the shards that an index names, each where the index says."""
    try:
        index = json.loads(str(file.take(0, min(len(file.data), MAX_INDEX), "the index"), "utf-8"))
    except (ValueError, RecursionError):
        raise file.error("starts like JSON but is not: cut short, or no weight file; download it again") from None
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise file.error("is JSON without a weight_map; give a weight file, or a *.index.json of shards")
    shards = list(dict.fromkeys(places.values()))
    folder = os.path.dirname(file.path)
    for shard in shards:
        if os.path.basename(shard) != shard or shard in ("", ".", "..") or "\\" in shard or "\0" in shard:
            raise file.error(f"names the shard {shard[:80]!r}, which is not a file beside it: refused")
    if len(shards) > MAX_SHARDS:
        raise file.error(f"names {len(shards)} shards; expected at most {MAX_SHARDS}: refused")
    if missing := [shard for shard in shards if not os.path.exists(os.path.join(folder, shard))]:
        raise file.error(f"lacks {len(missing)} of {len(shards)} shards, such as {missing[0]}; download them beside it")
    found, name = {}, ""
    for shard in shards:
        part = map_file(os.path.join(folder, shard))
        name, reader = _reader(part)
        for tensor, array in reader(part).items():
            if places.get(tensor) != shard:
                raise part.error(
                    f"holds {tensor[:80]!r}, which the index does not place here; download all shards again"
                )
            found[tensor] = array
    if absent := [tensor for tensor in places if tensor not in found]:
        raise file.error(
            f"places {absent[0][:80]!r} in {places[absent[0]]}, which lacks it "
            f"({len(absent)} tensors are absent); download all shards again"
        )
    return f"{name}, {len(shards)} shards", {tensor: found[tensor] for tensor in places}

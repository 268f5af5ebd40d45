"""Reads files that PyTorch saves, without PyTorch: zip archives, TorchScript, the format before 1.6, plain pickles.

A file is a pickle that describes objects, read as inert data (`pickles`, `torch_objects`), and storages that hold the
numbers, into which the tensors are views. Code and constants of TorchScript are not looked at. The tar files of 2016
are not readable.
"""

import struct
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxdiff.pretrained.mapped import Mapped
from jaxdiff.pretrained.pickles import MAX_STEPS, load
from jaxdiff.pretrained.torch_objects import Archive, calls_for, storage_of, tensors_in

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
MAX_MEMBERS = 100_000
ZIP_START = b"PK\x03\x04"


def read_zip(file: Mapped) -> dict[str, np.ndarray]:
    """The tensors of a zip archive by name.

    Raises:
      WeightsError: if the archive or its pickle is damaged, hostile or not PyTorch's.
    """
    members = _members(file)
    pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        hint = "; an .npz is read with numpy.load" if any(name.endswith(".npy") for name in members) else ""
        raise file.error(f"is a zip archive with {len(pickles)} members data.pkl; a torch file has one{hint}")
    root = pickles[0].removesuffix("data.pkl")
    spans = {n.removeprefix(f"{root}data/"): span for n, span in members.items() if n.startswith(f"{root}data/")}
    archive = Archive(file, spans)
    if f"{root}byteorder" in members:
        order = bytes(file.take(*members[f"{root}byteorder"], "byteorder")[:16])
        if order not in (b"little", b"big"):
            raise file.error(f"has the byte order {order!r}; expected little or big: damaged")
        archive.little = order == b"little"
    start, size = members[pickles[0]]
    inner = Mapped(file.path, file.take(start, size, "data.pkl"))
    value, _ = load(inner, 0, calls_for(archive), lambda described: storage_of(archive, described))
    return tensors_in(file, value)


def read_pickle(file: Mapped) -> dict[str, np.ndarray]:
    """The tensors of a file that starts with a pickle: the format before 1.6, or objects pickled directly.

    Raises:
      WeightsError: if the pickle is damaged or hostile.
    """
    archive, steps = Archive(file, {}), iter(range(MAX_STEPS))
    if is_legacy(file):
        return tensors_in(file, _read_legacy(archive, steps))
    nested = [len(file.data)]  # bytes that embedded files may still have together

    def embedded(args: tuple[Any, ...]) -> Any:
        data = args[0] if len(args) == 1 else None
        if not isinstance(data, memoryview) or len(data) > nested[0]:
            raise file.error("holds a storage that is no bytes, or the same one many times: damaged")
        nested[0] -= len(data)
        part = Archive(Mapped(file.path, data), {})
        if not is_legacy(part.file):
            raise file.error("holds a storage in a format other than that of torch before 1.6: not readable")
        return _read_legacy(part, steps)

    value, _ = load(file, 0, calls_for(archive) | {"torch.storage._load_from_bytes": embedded}, None, steps)
    return tensors_in(file, value)


def _members(file: Mapped) -> dict[str, tuple[int, int]]:
    """{name: (first byte, size)} of an archive's members; those that are read are not compressed, as torch has it.

    Without compression nothing in the archive can be larger than the file.
    """
    broken = (zipfile.BadZipFile, struct.error, EOFError, LookupError, NotImplementedError, OSError, OverflowError)
    try:
        with zipfile.ZipFile(file.path) as archive:
            infos = archive.infolist()
    except (*broken, ValueError) as e:
        raise file.error(f"is a broken zip archive ({e}): cut short or damaged; download it again") from None
    found, ranges = {}, []
    for info in infos[: MAX_MEMBERS + 1]:
        name = info.filename
        if name in found or len(found) == MAX_MEMBERS:
            raise file.error(f"has the member {name[:80]!r} twice, or more than {MAX_MEMBERS}: refused")
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name[:3]:
            raise file.error(f"has a member that would leave the archive, {name[:80]!r}: refused")
        if name.split("/")[1:2] not in (["data.pkl"], ["data"], ["byteorder"]):
            found[name] = (0, 0)  # not read: TorchScript's source, for one, which is compressed
            continue
        if info.flag_bits & 1 or info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise file.error(f"member {name[:80]!r} is compressed or encrypted, as torch never does; zip again with -0")
        head = file.take(info.header_offset, 30, f"member {name[:80]!r}")
        if bytes(head[:4]) != ZIP_START:
            raise file.error(f"member {name[:80]!r} does not start where the archive says: damaged; download it again")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
        file.take(start, info.file_size, f"member {name[:80]!r}")
        found[name] = (start, info.file_size)
        ranges.append((info.header_offset, start + info.file_size, name))
    ranges.sort()
    for (_, end, _), (start, _, name) in zip(ranges, ranges[1:], strict=False):
        if start < end:
            raise file.error(f"member {name[:80]!r} overlaps another: refused")
    return found


def is_legacy(file: Mapped) -> bool:
    """Whether a file is of torch's format before 1.6, by its magic number."""
    return bytes(file.data[:15]) == b"\x80\x02\x8a\x0a" + MAGIC.to_bytes(10, "little") + b"."


def _read_legacy(archive: Archive, steps: Iterator[int]) -> Any:
    """Magic number, version, system, object, keys of storages: five pickles; then count and bytes of each storage."""
    file = archive.file
    _, at = load(file, 0, {}, None, steps)
    version, at = load(file, at, {}, None, steps)
    system, at = load(file, at, {}, None, steps)
    if version != VERSION or not isinstance(system, dict):
        raise file.error("is of an unknown version of torch's old format: save it again with a newer torch")
    archive.little = system.get("little_endian") is not False
    value, at = load(file, at, calls_for(archive), lambda described: storage_of(archive, described), steps)
    keys, at = load(file, at, {}, None, steps)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise file.error("has no list of storages after its objects: damaged; download it again")
    for key in keys:
        if key not in archive.widths or key in archive.spans:
            raise file.error(f"has the storage {key[:40]!r} twice, or without use: damaged")
        count = int.from_bytes(file.take(at, 8, f"storage {key[:40]!r}"), "little" if archive.little else "big")
        size = count * archive.widths[key]
        file.take(at + 8, size, f"storage {key[:40]!r}")
        archive.spans[key] = (at + 8, size)
        at += 8 + size
    if at != len(file.data):
        raise file.error(f"has {len(file.data) - at} bytes after its last storage; expected none: damaged")
    return value

"""Pairs for reflow: noise and what a flow makes of it, made in batches, kept in a folder, and read as a source.

An example is {"x0", "noise"} with the conditioning it was made with, so `data.pipeline` shuffles whole examples and
never parts a pair. A folder holds one .npy file for each array of each shard (`x0-00000.npy`, `noise-00000.npy`, ...),
mapped into memory when read, in float32 or float16: eight bits would bend the lines. Which flow makes the pairs is the
caller's business, and so are their guidance and solver. Nothing is unpickled.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.data.images import Example

Chunk = dict[str, np.ndarray]
Generate = Callable[[np.ndarray, Chunk], np.ndarray]
DTYPES = ("float32", "float16")
ENDS = ("x0", "noise")


class PairSource:
    """A source over chunks of pairs, in memory or mapped; index i always gives the same pair, in float32.

    Args:
      chunks: each {"x0", "noise": [n, ...] of one shape, further arrays [n, ...]}, all with the same names and shapes
        but n.

    Raises:
      ValueError: for chunks that are no pairs, or differ in their arrays.
    """

    def __init__(self, chunks: Sequence[Chunk]):
        if not chunks:
            raise ValueError("pairs: got no chunk; make at least one pair")
        for chunk in chunks:
            _check(chunk, chunks[0])
        self._chunks = list(chunks)
        self._ends = np.cumsum([len(chunk["x0"]) for chunk in chunks])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        chunk = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[chunk])  # counted from the end of its chunk
        return {name: _plain(array[row]) for name, array in self._chunks[chunk].items()}


def make_pairs(
    generate: Generate,
    *,
    shape: tuple[int, ...],
    num: int,
    batch_size: int,
    seed: int,
    cond: Callable[[np.random.Generator, int], Chunk] | None = None,
) -> Iterator[Chunk]:
    """Yields `num` pairs in chunks of at most batch_size; the last one is cut, not generated in another shape.

    Args:
      generate: (noise float32 [B, *shape], conditioning) -> x0 [B, *shape], deterministic: the same noise must give the
        same x0. Usually a compiled `Method.generate` around a run's parameters.
      shape: of one example.
      num: how many.
      batch_size: B, of all calls.
      seed: >= 0, of noise and conditioning; equal seeds give equal pairs.
      cond: (rng, B) -> conditioning arrays [B, ...]; None without.

    Raises:
      ValueError: for a number out of range.
      FloatingPointError: if a sample is not finite.
    """
    if num < 1 or batch_size < 1 or seed < 0:
        raise ValueError(
            f"make_pairs: num and batch_size are at least 1 and seed 0, got {num}, {batch_size} and {seed}"
        )
    return _made(generate, shape, num, batch_size, seed, cond)


def _made(generate, shape, num, batch_size, seed, cond) -> Iterator[Chunk]:
    for i, start in enumerate(range(0, num, batch_size)):
        rng = np.random.default_rng((seed, i))
        noise = rng.standard_normal((batch_size, *shape), np.float32)
        given = {} if cond is None else cond(rng, batch_size)
        x0 = np.asarray(generate(noise, given))
        if not np.isfinite(x0).all():
            raise FloatingPointError("pairs: samples are not finite; use more steps, another solver or less guidance")
        chunk = {"x0": x0, "noise": noise, **given}
        yield {name: array[: num - start] for name, array in chunk.items()}


def write_pairs(folder: str | Path, chunks: Iterable[Chunk], dtype: str = "float16") -> int:
    """Writes chunks to a new folder, a shard each, and returns the number of pairs.

    A shard counts once its x0 is there, which is written last: what was cut short is read up to its last whole shard.

    Args:
      folder: absent or empty.
      chunks: from `make_pairs`.
      dtype: "float16" or "float32", of all floating arrays.

    Raises:
      ValueError: for another dtype, a folder in use, or chunks that are no pairs.
    """
    if dtype not in DTYPES:
        raise ValueError(f"pairs are stored as {' or '.join(DTYPES)}, got {dtype!r}; eight bits bend the lines")
    folder = Path(folder)
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    for i, chunk in enumerate(chunks):
        _check(chunk, chunk)
        for name in sorted(chunk, key=lambda name: name == "x0"):
            array = np.asarray(chunk[name])
            array = array.astype(dtype) if array.dtype.kind == "f" else array
            part = folder / f"{name}-{i:05d}.part"
            with part.open("wb") as file:
                np.save(file, array, allow_pickle=False)
            os.replace(part, folder / f"{name}-{i:05d}.npy")
        total += len(chunk["x0"])
    return total


def check_folder(folder: Path) -> None:
    """Raises ValueError if pairs cannot be written there: a file, or a folder that holds something."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} is in use; write pairs to an empty folder")


def stored_pairs(folder: str | Path) -> PairSource:
    """The pairs of a folder, mapped into memory.

    Raises:
      ValueError: naming the folder or file, if it holds no pairs or something else.
    """
    folder = Path(folder)
    shards = sorted(path.stem.removeprefix("x0-") for path in folder.glob("x0-*.npy"))
    if not shards:
        raise ValueError(
            f"{folder} holds no pairs (x0-00000.npy, noise-00000.npy, ...); make them with `jaxdiff pairs`"
        )
    names = sorted(path.stem.removesuffix(f"-{shards[0]}") for path in folder.glob(f"*-{shards[0]}.npy"))
    return PairSource([{name: _mapped(folder / f"{name}-{shard}.npy") for name in names} for shard in shards])


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; every shard needs the same arrays, make the pairs again") from error
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as .npy without objects; make the pairs again") from error


def _check(chunk: Chunk, first: Chunk) -> None:
    for name in ENDS:
        if name not in chunk:
            raise ValueError(f"pairs need {name!r}, got arrays {sorted(chunk)}; an example is x0 and its noise")
        if chunk[name].dtype.name not in DTYPES:
            raise ValueError(f"pairs: {name} is {chunk[name].dtype}, expected {' or '.join(DTYPES)}; make them again")
    if chunk["x0"].shape != chunk["noise"].shape:
        raise ValueError(f"pairs: x0 is {chunk['x0'].shape} and noise {chunk['noise'].shape}; a pair has one shape")
    forms, expected = ({n: (a.shape[1:], a.dtype) for n, a in c.items()} for c in (chunk, first))
    if forms != expected:
        raise ValueError(f"pairs: shards differ, got {forms} after {expected}; make them again")
    if lengths := {name: len(a) for name, a in chunk.items() if len(a) != len(chunk["x0"])}:
        raise ValueError(f"pairs: {len(chunk['x0'])} pairs but {lengths} further rows; give one for each pair")


def _plain(value: Any) -> np.ndarray:
    array = np.asarray(value)
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int32)

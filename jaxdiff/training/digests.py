"""Digests: 64 bits for each leaf of a state, the same on every layout, and SHA-256 for what JSON can hold.

A leaf is read as unsigned words w_i: one for each element of up to 32 bits, two for each of 64, in the order of
its elements. With i the place of a word, all arithmetic modulo 2^32 and h a mixing function that is one-to-one in w,

    plain = sum_i h(w_i, i),    weighted = sum_i (2 i + 1) h(w_i, i).

Sums do not depend on how a leaf is split, so one device, four devices and two processes agree. A change of a single
word always changes the plain sum; other damage goes unseen with a chance of about 2^-64. This guards against bad disks
and cut files, not against somebody who means to deceive. Nothing here reads or writes files.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

SPREAD, FIRST, SECOND, SALT = (np.uint32(odd) for odd in (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F))
INDEX_LIMIT = 2**32  # places count modulo this; leaves with more words are salted
CHUNK = 2**16  # words that `host_digest` mixes at once, few enough to stay in a processor's cache

Sums = tuple[UInt32[Array, ""], UInt32[Array, ""]]


def digests(leaves: Sequence[Any]) -> list[str]:
    """Digests of arrays, computed where they lie.

    One small program is compiled for each distinct shape, dtype and sharding; all are sent off before the first is
    waited for.

    Args:
      leaves: arrays or typed keys; on several processes the same global arrays on each.

    Returns:
      16 hexadecimal digits for each, on every process.

    Raises:
      ValueError: for a dtype that has no words of 8 to 64 bits.
    """
    return [_text(*sums) for sums in jax.device_get([_device_sums(leaf) for leaf in leaves])]


def host_digest(values: np.ndarray) -> str:
    """The digest of an array in host memory: NumPy only, nothing is compiled. A key is given as its words.

    Raises:
      ValueError: as `digests`.
    """
    kind = _word_type(values.dtype)
    plain = weighted = 0
    for part, base, salt in _host_parts(np.ascontiguousarray(values).reshape(values.shape), kind):
        words = part.reshape(-1).view(kind)
        for start in range(0, words.size, CHUNK):
            word = words[start : start + CHUNK].astype(np.uint32)
            place = np.arange(start, start + word.size, dtype=np.uint64).astype(np.uint32) + np.uint32(base % 2**32)
            mixed = _mixed(word, place, salt)
            plain += int(mixed.sum(dtype=np.uint64))
            weighted += int((mixed * (place * np.uint32(2) + np.uint32(1))).sum(dtype=np.uint64))
    return _text(plain % 2**32, weighted % 2**32)


def json_digest(value: Any) -> str:
    """SHA-256 of a value as JSON would give it back, whatever the order of its names and its white space."""
    plain = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _device_sums(leaf: Any) -> Sums:
    place = getattr(leaf, "sharding", None)
    # Named, or another process could not read the result.
    out = NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else None
    return _compiled(out)(leaf)


@functools.lru_cache(maxsize=32)
def _compiled(out: NamedSharding | None) -> Any:
    return jax.jit(_sums, out_shardings=out)


def _sums(leaf: Array) -> Sums:
    words = _words(leaf)
    place = jnp.zeros(words.shape, jnp.uint32)
    salt = jnp.zeros(words.shape, jnp.uint32)
    for axis, stride, odd in _axes(words.shape):
        along = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place + along * np.uint32(stride % 2**32)
        salt = salt if odd is None else salt + along * odd
    mixed = _mixed(words, place, salt)
    both = mixed, mixed * (place * np.uint32(2) + np.uint32(1))
    # One pass over two operands; two separate sums would read the leaf twice and are far slower on a CPU.
    zero = np.uint32(0)
    plain, weighted = lax.reduce(both, (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(words.ndim)))
    return plain, weighted


def _mixed(words: Any, place: Any, salt: Any) -> Any:
    mixed = (words ^ (place * SPREAD + salt)) * FIRST
    mixed = (mixed ^ (mixed >> np.uint32(16))) * SECOND
    return mixed ^ (mixed >> np.uint32(13))


def _words(leaf: Array) -> UInt32[Array, "..."]:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    kind = _word_type(leaf.dtype)
    words = leaf.astype(kind) if jnp.issubdtype(leaf.dtype, jnp.bool_) else lax.bitcast_convert_type(leaf, kind)
    return jnp.atleast_1d(words.astype(jnp.uint32))


def _word_type(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.bool_):
        return np.uint8
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.uint32
    numeric = jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)
    bits = (jnp.iinfo(dtype) if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype)).bits if numeric else 0
    if bits not in (8, 16, 32, 64):
        raise ValueError(f"dtype {dtype} has no digest: keep it as bool, integer or float of 8 to 64 bits")
    return {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint32}[bits]


def _axes(shape: tuple[int, ...]) -> list[tuple[int, int, np.uint32 | None]]:
    """(axis, stride in words, factor of its salt) for each axis; only axes above `INDEX_LIMIT` words have a salt.

    Places repeat after that many words. The salt tells repeated ones apart by the coordinates of the leading axes, so
    that only along a single axis of more than 2^32 words could two words swap unseen.
    """
    found, inner = [], 1
    for axis in reversed(range(len(shape))):
        salted = axis < len(shape) - 1 and inner * shape[axis] > INDEX_LIMIT
        found.append((axis, inner, _salt(axis) if salted else None))
        inner *= shape[axis]
    return found


def _salt(axis: int) -> np.uint32:
    return np.uint32(int(SALT) ** (axis + 1) % 2**32)


def _host_parts(values: np.ndarray, kind: Any, axis: int = 0, base: int = 0, salt: int = 0) -> Any:
    """(part, place of its first word, salt): the leaf itself, or slices of its leading axes if it is salted."""
    words = values.size * values.dtype.itemsize // np.dtype(kind).itemsize
    # 64-bit and complex elements have an axis of words of their own behind the last.
    last = values.ndim + (values.dtype.itemsize > np.dtype(kind).itemsize) <= 1
    if words <= INDEX_LIMIT or last:
        yield values, base, np.uint32(salt)
        return
    stride = words // values.shape[0]
    for index in range(values.shape[0]):
        deeper = (salt + index * int(_salt(axis))) % 2**32
        yield from _host_parts(values[index], kind, axis + 1, base + index * stride, deeper)


def _text(plain: Any, weighted: Any) -> str:
    return f"{int(plain):08x}{int(weighted):08x}"

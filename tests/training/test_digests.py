"""Digests: equal on every layout, computed twice by independent code, and different after any damage."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxdiff.training import digests as lib
from jaxdiff.training import sharding
from jaxdiff.training.digests import digests, host_digest, json_digest

DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "bfloat16", "float16", "float32"]
WIDE = ["int64", "uint64", "float64", "complex64", "complex128"]
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (0,), (3, 0)]


def draw(dtype, shape, seed=0):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, np.dtype(kind).itemsize), dtype=np.uint8)
    return (raw[..., 0] > 127) if dtype == "bool" else raw.view(kind).reshape(shape)


def by_hand(values):
    """The formula of the module in Python integers, word after word."""
    if values.dtype == bool:
        values = values.astype(np.uint8)
    size = values.dtype.itemsize if values.dtype.kind != "c" else 4
    raw = np.ascontiguousarray(values).tobytes()
    words = [int.from_bytes(raw[i : i + min(size, 4)], "little") for i in range(0, len(raw), min(size, 4))]
    plain = weighted = 0
    for i, word in enumerate(words):
        h = (word ^ (i * 0x9E3779B9) % 2**32) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 16)) * 0xC2B2AE35 % 2**32
        h ^= h >> 13
        plain, weighted = plain + h, weighted + (2 * i + 1) * h
    return f"{plain % 2**32:08x}{weighted % 2**32:08x}"


@pytest.mark.parametrize("dtype", DTYPES + WIDE)
def test_host_and_device_follow_the_formula_for_every_dtype_and_shape(dtype):
    with jax.enable_x64(dtype in WIDE):
        for shape in SHAPES if dtype in ("float32", "float64") else SHAPES[3:6]:
            values = draw(dtype, shape)
            leaf = jnp.asarray(values)
            assert str(leaf.dtype) == dtype
            assert digests([leaf]) == [host_digest(values)] == [by_hand(values)]


def test_a_key_is_its_words():
    key = jax.random.key(7)
    assert digests([key]) == digests([jax.random.key_data(key)]) == [host_digest(np.asarray(jax.random.key_data(key)))]
    assert digests([key]) != digests([jax.random.key(8)])


@pytest.mark.parametrize("axes", [(4, 1), (1, 4), (2, 2)])
def test_layouts_agree(axes):
    mesh = sharding.make_mesh(*axes, devices=jax.devices()[:4])
    leaf = jnp.asarray(draw("float32", (8, 12)))
    expected = [host_digest(np.asarray(leaf))]
    for spec in [(), ("data",), ("fsdp",), (None, "fsdp"), ("data", "fsdp"), (("data", "fsdp"),)]:
        place = jax.NamedSharding(mesh, jax.P(*spec))
        assert digests([jax.device_put(leaf, place)]) == expected


def test_every_bit_counts():
    values = draw("float32", (4, 3))
    seen = {host_digest(values)}
    for position in range(values.nbytes * 8):
        damaged = values.copy()
        damaged.reshape(-1).view(np.uint8)[position // 8] ^= 1 << position % 8
        seen.add(host_digest(damaged))
    assert len(seen) == 1 + values.nbytes * 8


def test_swaps_shifts_and_zeros_count():
    values = draw("float32", (64, 4))
    swapped, rolled, cut = values[[1, 0, *range(2, 64)]], np.roll(values, 1), values.copy()
    cut[40:] = 0
    zeros = [np.zeros(n, np.float32) for n in (1, 2, 3)]
    assert len({host_digest(array) for array in (values, swapped, rolled, cut, *zeros)}) == 7
    assert len({host_digest(np.asarray(x, np.float32)) for x in (0.0, -0.0, np.nan, -np.nan, np.inf)}) == 5


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_leaves_beyond_the_range_of_places_are_salted(monkeypatch, dtype):
    values = draw(dtype, (5, 3, 2, 2))
    plain = host_digest(values)
    monkeypatch.setattr(lib, "INDEX_LIMIT", 8)
    assert digests([jnp.asarray(values)]) != [plain]
    assert digests([jnp.asarray(values)]) == [host_digest(values)]
    assert digests([jnp.asarray(values[0, 0])]) == [by_hand(values[0, 0])]


def test_more_words_than_a_place_has_bits_for_can_be_lowered():
    big = jax.ShapeDtypeStruct((5, 2, 2**30), jnp.uint8)
    salts = [odd for _, _, odd in lib._axes(big.shape)]
    assert salts[0] is None and salts[1] is None and salts[2] is not None
    assert [out.shape for out in jax.eval_shape(lib._sums, big)] == [(), ()]


def test_one_program_for_each_form_and_none_the_second_time():
    leaves = [jnp.full((3, 11), float(n)) for n in range(20)] + [jnp.full(13, float(n)) for n in range(20)]
    compiled = lib._compiled(None) if not isinstance(leaves[0].sharding, jax.NamedSharding) else None
    assert compiled is not None
    before = compiled._cache_size()
    first = digests(leaves)
    assert compiled._cache_size() == before + 2
    assert digests(leaves) == first and len(set(first)) == 40
    assert compiled._cache_size() == before + 2


def test_a_dtype_without_words_is_refused():
    with pytest.raises(ValueError, match="dtype int4 has no digest: keep it as"):
        digests([jnp.zeros(3, jnp.int4)])
    with pytest.raises(ValueError, match="dtype object has no digest"):
        host_digest(np.array([None]))


def test_json_digests_know_values_not_text():
    value = {"b": [1, 2.5, None], "a": {"x": "ä"}}
    assert json_digest(value) == json_digest(json.loads(json.dumps(value, indent=3, sort_keys=True)))
    assert json_digest((1, 2)) == json_digest([1, 2])
    assert len({json_digest(v) for v in (1, 1.0, True, "1", [1], {"1": 1}, None)}) == 7

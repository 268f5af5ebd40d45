"""Small weight files, mutated at random: a reader gives arrays or raises WeightsError, in little time and memory."""

import signal
import tracemalloc

import handmade as hand
import numpy as np
import pytest

from jaxdiff.pretrained import files
from jaxdiff.pretrained.mapped import WeightsError

KINDS = ("zip", "legacy", "safetensors", "msgpack", "pickle")
SECONDS = 20  # for one file of some kilobytes, on a busy machine
MEMORY = 2**26


def flip(random, data):
    for _ in range(random.integers(1, 9)):
        data[random.integers(len(data))] ^= 1 << int(random.integers(8))
    return data


def overwrite(random, data):
    at = random.integers(len(data))
    data[at : at + 4] = random.choice(
        [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"}](\x85"]
    )
    return data


def cut(random, data):
    return data[: random.integers(1, len(data))]


def drop(random, data):
    at = random.integers(len(data))
    del data[at : at + random.integers(1, 40)]
    return data or bytearray(b"x")


def insert(random, data):
    at = random.integers(len(data) + 1)
    data[at:at] = random.bytes(random.integers(1, 20))
    return data


def swap(random, data):
    size = int(random.integers(1, 32))
    a, b = sorted(random.integers(0, len(data), 2))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    return data


def repeat(random, data):
    a, size = random.integers(len(data)), random.integers(1, 60)
    data[a:a] = data[a : a + size] * int(random.integers(1, 30))
    return data


MUTATIONS = (flip, overwrite, cut, drop, insert, swap, repeat)


def too_slow(signum, frame):
    raise AssertionError(f"one file took more than {SECONDS} seconds")


def run(folder, kind, seeds):
    """Reads mutations of one file; returns how many were refused and how many read."""
    original = hand.write_each(folder)[kind].read_bytes()
    path, counts = folder / "mutated", {"refused": 0, "read": 0}
    before = signal.signal(signal.SIGALRM, too_slow)
    try:
        for seed in seeds:
            random = np.random.default_rng([KINDS.index(kind), seed])
            data = bytearray(original)
            for _ in range(random.integers(1, 4)):
                data = MUTATIONS[random.integers(len(MUTATIONS))](random, data)
            path.unlink(missing_ok=True)
            path.write_bytes(data)
            signal.alarm(SECONDS)
            try:
                for array in files.read(path).values():
                    assert array.nbytes <= 8 * len(data) + 2**26
                    array.ravel()[:10].tobytes()
                counts["read"] += 1
            except WeightsError as e:
                assert str(e).isprintable(), seed
                counts["refused"] += 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files(kind, tmp_path):
    counts = run(tmp_path, kind, range(60))
    assert counts["refused"] + counts["read"] == 60
    assert counts["refused"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutated_files(kind, tmp_path):
    counts = run(tmp_path, kind, range(1000, 1400))
    assert counts["refused"] > 150


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_take_little_memory(kind, tmp_path):
    tracemalloc.start()
    try:
        run(tmp_path, kind, range(500, 515))
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()

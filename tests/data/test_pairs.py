"""Pairs stay pairs: made, stored, mapped and shuffled, each x0 is still what was made of its noise."""

import numpy as np
import pytest

from jaxdiff.data.images import Source
from jaxdiff.data.pairs import PairSource, make_pairs, stored_pairs, write_pairs
from jaxdiff.data.pipeline import batches


def flow(noise, cond):
    return 2 * noise + cond["label"].reshape(-1, 1, 1).astype(np.float32)


def labels(rng, n):
    return {"label": rng.integers(0, 10, n).astype(np.int32)}


def made(num=10, batch_size=4, seed=0, cond=labels):
    return list(make_pairs(flow, shape=(2, 3), num=num, batch_size=batch_size, seed=seed, cond=cond))


def belong(example, atol=1e-5):
    expected = 2 * example["noise"] + np.reshape(example["label"], (*np.shape(example["label"]), 1, 1))
    np.testing.assert_allclose(example["x0"], expected, rtol=0, atol=atol)


def test_pairs_are_made_in_one_shape_and_cut():
    seen = []

    def generate(noise, cond):
        seen.append(noise.shape)
        return flow(noise, cond)

    chunks = list(make_pairs(generate, shape=(2, 3), num=10, batch_size=4, seed=0, cond=labels))
    assert seen == [(4, 2, 3)] * 3
    assert [len(chunk["x0"]) for chunk in chunks] == [4, 4, 2]
    for chunk in chunks:
        belong(chunk)
    assert not (chunks[0]["noise"] == chunks[1]["noise"]).any()


def test_equal_seeds_give_equal_pairs():
    first, same, other = (PairSource(made(seed=seed)) for seed in (0, 0, 1))
    for i in range(10):
        assert (first[i]["x0"] == same[i]["x0"]).all()
        assert not (first[i]["noise"] == other[i]["noise"]).any()


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-5), ("float16", 0.02)])
def test_a_folder_gives_back_what_was_written(tmp_path, dtype, atol):
    assert write_pairs(tmp_path / "pairs", made(), dtype) == 10
    files = sorted(path.name for path in (tmp_path / "pairs").iterdir())
    assert files == [f"{name}-0000{i}.npy" for name in ("label", "noise", "x0") for i in range(3)]
    source, memory = stored_pairs(tmp_path / "pairs"), PairSource(made())
    assert isinstance(source, Source) and len(source) == len(memory) == 10
    for i in range(10):
        assert source[i]["x0"].dtype == source[i]["noise"].dtype == np.float32
        assert source[i]["label"] == memory[i]["label"] and source[i]["label"].dtype == np.int32
        np.testing.assert_allclose(source[i]["noise"], memory[i]["noise"], rtol=0, atol=atol)
        belong(source[i], atol)
    with pytest.raises(IndexError, match="pair 10 of 10"):
        source[10]


def test_shuffling_never_parts_a_pair(tmp_path):
    write_pairs(tmp_path / "pairs", made(num=40, batch_size=8), "float32")
    stream = batches(stored_pairs(tmp_path / "pairs"), batch_size=16, seed=3)
    first = next(stream)
    assert first["x0"].shape == first["noise"].shape == (16, 2, 3) and first["noise"].dtype == np.float32
    belong(first)
    assert len(np.unique(first["noise"][:, 0, 0])) == 16
    for _ in range(3):
        belong(next(stream))


def test_what_was_cut_short_is_read_up_to_its_last_whole_shard(tmp_path):
    def interrupted():
        yield from made()[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pairs(tmp_path / "pairs", interrupted(), "float32")
    (tmp_path / "pairs" / "noise-00002.npy").write_bytes(b"half")  # its x0 was never written
    source = stored_pairs(tmp_path / "pairs")
    assert len(source) == 8
    belong(source[7])


@pytest.mark.parametrize(
    "chunk, message",
    [
        ({"x0": np.zeros((2, 3), np.float32)}, "pairs need 'noise', got arrays"),
        ({"x0": np.zeros((2, 3), np.uint8), "noise": np.zeros((2, 3), np.float32)}, "x0 is uint8, expected float32"),
        ({"x0": np.zeros((2, 3), np.float32), "noise": np.zeros((2, 4), np.float32)}, "a pair has one shape"),
        (
            {"x0": np.zeros((2, 3), np.float32), "noise": np.zeros((2, 3), np.float32), "label": np.zeros(3, np.int32)},
            "2 pairs but {'label': 3} further rows",
        ),
    ],
)
def test_arrays_that_are_no_pairs_are_refused(tmp_path, chunk, message):
    with pytest.raises(ValueError, match=message):
        PairSource([chunk])
    with pytest.raises(ValueError, match=message):
        write_pairs(tmp_path / "pairs", [chunk])


def test_other_refusals(tmp_path):
    with pytest.raises(ValueError, match="got no chunk"):
        PairSource([])
    with pytest.raises(ValueError, match="shards differ"):
        PairSource([made()[0], made(cond=lambda rng, n: {"label": np.zeros(n, np.int64)})[0]])
    with pytest.raises(ValueError, match="float32 or float16, got 'uint8'"):
        write_pairs(tmp_path / "pairs", made(), "uint8")
    write_pairs(tmp_path / "pairs", made())
    with pytest.raises(ValueError, match="is in use; write pairs to an empty folder"):
        write_pairs(tmp_path / "pairs", made())
    with pytest.raises(ValueError, match="holds no pairs"):
        stored_pairs(tmp_path)
    with pytest.raises(ValueError, match="at least 1 and seed 0, got 0, 4 and 0"):
        made(num=0)
    with pytest.raises(FloatingPointError, match="not finite"):
        list(make_pairs(lambda noise, cond: noise * np.nan, shape=(2,), num=1, batch_size=1, seed=0))
    (tmp_path / "pairs" / "noise-00001.npy").unlink()
    with pytest.raises(ValueError, match="noise-00001.npy is missing"):
        stored_pairs(tmp_path / "pairs")
    np.save(tmp_path / "pairs" / "noise-00001.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read as .npy without objects"):
        stored_pairs(tmp_path / "pairs")

"""The embedded digits are the published ones, split once and for all; .npz files are read or refused in one line."""

import hashlib
import pickle

import numpy as np
import pytest

from jaxdiff.data.images import ArraySource, Source, digits, npz


def test_digits_are_the_published_ones():
    everything = digits("all")
    levels = ((everything.x0 + 1) * 8).astype(np.uint8)
    # Of scikit-learn's load_digits: images as uint8 followed by targets as uint8.
    stored = hashlib.sha256(levels.tobytes() + everything.label.astype(np.uint8).tobytes()).hexdigest()
    assert stored == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
    assert everything.x0.shape == (1797, 8, 8, 1) and everything.x0.dtype == np.float32
    assert everything.x0.min() == -1 and everything.x0.max() == 1
    assert np.bincount(everything.label).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_split_is_stratified_and_complete():
    train, held_out, everything = digits("train"), digits("held_out"), digits("all")
    assert (len(train), len(held_out)) == (1437, 360)
    assert np.bincount(held_out.label).tolist() == [36] * 10
    together = np.concatenate([train.x0, held_out.x0]).reshape(1797, -1)
    assert np.array_equal(np.sort(together, axis=0), np.sort(everything.x0.reshape(1797, -1), axis=0))
    assert hashlib.sha256(held_out.x0.tobytes()).hexdigest()[:16] == "b8a52d7b55a1594d"


def test_digits_refuses_other_splits():
    with pytest.raises(ValueError, match="split must be one of train, held_out, all, got 'test'"):
        digits("test")


def test_array_source_gives_x0_and_label():
    source = ArraySource(np.arange(6, dtype=np.float64).reshape(3, 2), np.array([4, 5, 6]))
    assert isinstance(source, Source)
    assert source[1]["x0"].dtype == np.float32 and source[1]["x0"].tolist() == [2, 3]
    assert source[1]["label"] == 5 and source[1]["label"].dtype == np.int32
    assert set(ArraySource(np.zeros((3, 2)))[0]) == {"x0"}


@pytest.mark.parametrize("names", [("images", "labels"), ("arr_0", "arr_1")])
def test_npz_reads_images_and_labels(tmp_path, names):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", **{names[0]: images, names[1]: np.arange(5)})
    source = npz(tmp_path / "a.npz")
    assert len(source) == 5
    assert np.array_equal(source[3]["x0"], images[3]) and source[3]["x0"].dtype == np.uint8
    assert source[3]["label"] == 3


def test_npz_reads_float_images_without_labels(tmp_path):
    images = np.linspace(-1, 1, 2 * 4 * 4).reshape(2, 4, 4, 1)
    np.savez_compressed(tmp_path / "a.npz", images=images)
    source = npz(tmp_path / "a.npz")
    assert source[1]["x0"].dtype == np.float32 and np.allclose(source[1]["x0"], images[1], atol=1e-7)
    assert "label" not in source[1]


GOOD = np.zeros((2, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": GOOD}, "expected an array `images`"),
        ({"images": GOOD[0]}, r"must be \[n, H, W, C\].*got \[4, 4, 3\]"),
        ({"images": GOOD.transpose(0, 3, 1, 2)}, "transpose or add a channel axis"),
        ({"images": GOOD[:0]}, r"got \[0, 4, 4, 3\]"),
        ({"images": GOOD.astype(np.int64)}, "must be uint8 or float .* got int64"),
        ({"images": GOOD.astype(np.float32) + 255}, r"must lie in \[-1, 1\], got \[255, 255\]"),
        ({"images": GOOD.astype(np.float32) * np.nan}, r"must lie in \[-1, 1\], got \[nan, nan\]"),
        ({"images": GOOD, "labels": np.arange(3)}, "labels must be 2 integers"),
        ({"images": GOOD, "labels": np.array(["cat", "dog"])}, "store class numbers, not names"),
        ({"images": GOOD, "labels": np.array([-1, 0])}, "integers >= 0"),
        ({"images": np.array([{}, {}], dtype=object)}, "it holds Python objects"),
    ],
)
def test_npz_refuses_wrong_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        npz(tmp_path / "bad.npz")
    assert str(tmp_path / "bad.npz") in str(caught.value) and "\n" not in str(caught.value)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the file was executed",))


@pytest.mark.parametrize(
    "content", [b"", b"not a zip file", b"PK\x03\x04 broken", pickle.dumps(Bomb())], ids=["0", "text", "zip", "pickle"]
)
def test_npz_refuses_other_files(tmp_path, content):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as .npz"):
        npz(tmp_path / "bad.npz")


def test_npz_refuses_a_damaged_archive(tmp_path):
    path = tmp_path / "bad.npz"
    np.savez_compressed(path, images=np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    content[500:520] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="it is broken or of another format"):
        npz(path)


def test_npz_refuses_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        npz(tmp_path / "none.npz")

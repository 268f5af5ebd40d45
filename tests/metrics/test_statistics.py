"""Streaming moments: equal to one-shot ones, mergeable in any grouping, tied to their extractor, safe on disk."""

import numpy as np
import pytest

from jaxdiff.metrics import statistics as stats
from jaxdiff.metrics.features import Extractor

EXTRACTOR = Extractor("identity", "none", lambda images: images)
X = np.random.default_rng(0).normal(size=(101, 5)) @ np.random.default_rng(1).normal(size=(5, 5)) + 100.0


def assert_equal(a, b):
    assert a.n == b.n
    assert np.allclose(a.mean, b.mean, rtol=1e-12, atol=0)
    assert np.allclose(a.scatter, b.scatter, rtol=1e-12, atol=1e-12 * np.abs(b.scatter).max())


def test_moments_are_numpys():
    got = stats.of(EXTRACTOR, X)
    assert np.allclose(got.mean, X.mean(0), rtol=1e-13)
    assert np.allclose(got.covariance, np.cov(X, rowvar=False), rtol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 7, 101])
def test_streaming_equals_one_shot(batch_size):
    streamed = stats.empty(EXTRACTOR, 5)
    for start in range(0, 101, batch_size):
        streamed = stats.update(streamed, X[start : start + batch_size])
    assert_equal(streamed, stats.of(EXTRACTOR, X))


def test_merge_is_associative_and_commutative():
    a, b, c = (stats.of(EXTRACTOR, part) for part in (X[:3], X[3:60], X[60:]))
    whole = stats.of(EXTRACTOR, X)
    for merged in (
        stats.merge(stats.merge(a, b), c),
        stats.merge(a, stats.merge(b, c)),
        stats.merge(c, stats.merge(a, b)),
    ):
        assert_equal(merged, whole)


def test_nothing_is_neutral():
    nothing, something = stats.empty(EXTRACTOR, 5, name="nothing"), stats.of(EXTRACTOR, X, name="x")
    assert_equal(stats.merge(nothing, something), something)
    assert_equal(stats.merge(something, nothing), something)
    assert stats.merge(nothing, something).name == "nothing"
    assert_equal(stats.update(something, X[:0]), something)


def test_a_large_offset_does_not_cancel():
    shifted = stats.of(EXTRACTOR, X[:50] + 1e6)
    shifted = stats.update(shifted, X[50:] + 1e6)
    assert np.allclose(shifted.covariance, np.cov(X, rowvar=False), rtol=1e-8)


def test_float32_features_are_summed_in_float64():
    features = X.astype(np.float32)
    assert_equal(stats.of(EXTRACTOR, features), stats.of(EXTRACTOR, features.astype(np.float64)))


def test_merging_across_one_host_changes_nothing():
    whole = stats.of(EXTRACTOR, X, name="x")
    merged = stats.across_processes(whole)
    assert merged.n == whole.n and merged.name == "x"
    assert np.array_equal(merged.mean, whole.mean) and np.array_equal(merged.scatter, whole.scatter)


def test_a_file_gives_back_the_same(tmp_path):
    saved = stats.of(EXTRACTOR, X, name="the name")
    stats.save(tmp_path / "x.npz", saved)
    loaded = stats.load(tmp_path / "x.npz")
    assert (loaded.n, loaded.extractor, loaded.preprocessing, loaded.name) == (101, "identity", "none", "the name")
    assert np.array_equal(loaded.mean, saved.mean) and np.array_equal(loaded.scatter, saved.scatter)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not an archive"),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: np.savez(path, mean=np.zeros(3)),
        lambda path: np.savez(path, **{**dict(np.load(path)), "mean": np.zeros(3)}),
        lambda path: np.savez(path, **{**dict(np.load(path)), "mean": np.full(5, np.nan)}),
        lambda path: np.savez(path, **{**dict(np.load(path)), "n": np.array(None, dtype=object)}),
    ],
    ids=["empty", "text", "cut", "other", "shape", "nan", "object"],
)
def test_broken_files_are_refused(tmp_path, break_it):
    path = tmp_path / "x.npz"
    stats.save(path, stats.of(EXTRACTOR, X))
    break_it(path)
    with pytest.raises(ValueError, match="x.npz: not a file of feature statistics, or broken"):
        stats.load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        stats.load(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (stats.empty(Extractor("inception", "none", None), 5, name="b"), "extractor 'identity' against 'inception'"),
        (stats.empty(Extractor("identity", "resize", None), 5, name="b"), "preprocessing 'none' against 'resize'"),
        (stats.empty(EXTRACTOR, 4, name="b"), "5 features against 4"),
    ],
)
def test_unlike_statistics_are_refused(other, message):
    with pytest.raises(ValueError, match=f"cannot compare a and b: {message}; make both with one extractor"):
        stats.merge(stats.of(EXTRACTOR, X, name="a"), other)


def test_wrong_features_are_refused():
    with pytest.raises(ValueError, match="features have dimension 4, the statistics 5"):
        stats.update(stats.empty(EXTRACTOR, 5), X[:, :4])
    with pytest.raises(ValueError, match="values that are not finite"):
        stats.of(EXTRACTOR, X * np.nan)
    with pytest.raises(ValueError, match="at least 2 images, one has 1"):
        _ = stats.of(EXTRACTOR, X[:1], name="one").covariance

"""The embedded extractor: its stated accuracy, its scale, and batching that does not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.data.images import digits
from jaxdiff.metrics.digits import (
    ACCURACY,
    digits_extractor,
    init_params,
    load_params,
    network,
    save_params,
)
from jaxdiff.metrics.features import Extractor, Features, extract


@pytest.fixture(scope="module")
def held_out():
    return digits("held_out")


def test_reaches_its_stated_accuracy(held_out):
    logits = extract(digits_extractor(), held_out.x0).logits
    assert np.mean(logits.argmax(1) == held_out.label) == ACCURACY == 358 / 360


def test_features_have_unit_mean_square_on_the_training_images():
    features = extract(digits_extractor(), digits("train").x0).features
    assert features.shape == (1437, 64) and np.mean(features**2) == pytest.approx(1, abs=1e-3)


def test_images_are_clipped(held_out):
    far = extract(digits_extractor(), held_out.x0[:8] * 5).features
    assert np.allclose(far, extract(digits_extractor(), np.clip(held_out.x0[:8] * 5, -1, 1)).features, atol=1e-6)


def test_batches_change_nothing(held_out):
    whole, parts = (extract(digits_extractor(), held_out.x0[:21], batch_size=size) for size in (21, 8))
    assert np.allclose(whole.features, parts.features, atol=1e-5) and np.allclose(whole.logits, parts.logits, atol=1e-4)


def test_the_last_batch_is_padded_to_one_shape():
    shapes = []

    def apply(images):
        shapes.append(images.shape)
        return Features(images.reshape(len(images), -1))

    images = np.random.default_rng(0).normal(size=(7, 2, 2, 1)).astype(np.float32)
    got = extract(Extractor("pixels", "none", apply), images, batch_size=3)
    assert shapes == [(3, 2, 2, 1)] * 3
    assert np.array_equal(got.features, images.reshape(7, 4)) and got.logits is None


def test_weights_survive_a_file_to_half_precision(tmp_path):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init_params, jax.random.key(0))
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), shapes)
    save_params(str(tmp_path / "p.npz"), params)
    loaded = load_params(str(tmp_path / "p.npz"))
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    close = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.allclose(a, b, rtol=1e-3, atol=1e-6), loaded, params)
    assert all(jax.tree.leaves(close))


def test_network_shapes():
    out = jax.eval_shape(network, jax.eval_shape(init_params, jax.random.key(0)), jnp.zeros((3, 8, 8, 1)))
    assert out.features.shape == (3, 64) and out.logits.shape == (3, 10)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 16, 16, 1), np.float32), r"takes images \[n, 8, 8, 1\], got \[2, 16, 16, 1\]"),
        (np.zeros((0, 8, 8, 1), np.float32), "got 0 images"),
        (np.full((2, 8, 8, 1), np.nan, np.float32), "2 of 2 images hold values that are not finite"),
    ],
)
def test_wrong_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        extract(digits_extractor(), images)


def test_broken_extractors_and_batches_are_refused(held_out):
    broken = Extractor("broken", "none", lambda images: Features(images.reshape(len(images), -1) * jnp.nan))
    with pytest.raises(ValueError, match="extractor broken gave features that are not finite"):
        extract(broken, held_out.x0[:2])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        extract(broken, held_out.x0[:2], batch_size=0)

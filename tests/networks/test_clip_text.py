"""CLIP's text encoder: published sizes, causality, skipped layers, where the pooled vector is read, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.networks.base import init_params, num_params, param_shapes
from jaxdiff.networks.clip_text import ClipText, clip_l, exact_gelu, example_ids, open_clip_h, quick_gelu

TINY = ClipText(vocab_size=12, max_length=6, width=8, num_layers=3, heads=2, end_token=9, projection_dim=5)
IDS = jnp.asarray([[1, 4, 2, 9, 9, 9], [1, 7, 9, 3, 11, 9]])


@pytest.fixture(scope="module")
def params():
    drawn = init_params(TINY, jax.random.key(0), example_ids(TINY))
    return jax.tree.map(lambda a: a * 4, drawn)


@pytest.mark.parametrize(("encoder", "millions"), [(clip_l(), 123.060), (open_clip_h(), 340.388)])
def test_parameter_count_is_the_released_one(encoder, millions):
    assert round(num_params(param_shapes(encoder, example_ids(encoder))) / 1e6, 3) == millions


def test_tokens_do_not_see_what_follows(params):
    first = TINY.apply({"params": params}, IDS).tokens
    second = TINY.apply({"params": params}, IDS.at[:, 4].set(5)).tokens
    np.testing.assert_allclose(first[:, :4], second[:, :4], atol=1e-6)
    assert np.abs(first[:, 4:] - second[:, 4:]).max() > 1e-3


def test_skipping_a_layer_is_a_network_without_it(params):
    shorter = TINY.clone(num_layers=2)
    skipped = TINY.apply({"params": params}, IDS, skip=1)
    whole = shorter.apply({"params": {k: v for k, v in params.items() if k != "layer_2"}}, IDS)
    np.testing.assert_array_equal(skipped.tokens, whole.tokens)
    np.testing.assert_array_equal(skipped.hidden[2], whole.hidden[2])
    np.testing.assert_array_equal(skipped.pooled, TINY.apply({"params": params}, IDS).pooled)


def test_pooled_is_read_at_the_end(params):
    features = TINY.apply({"params": params}, IDS)
    np.testing.assert_array_equal(features.pooled, features.tokens[jnp.asarray([0, 1]), jnp.asarray([3, 2])])
    largest = TINY.clone(end_token=None).apply({"params": params}, IDS)
    np.testing.assert_array_equal(largest.pooled, features.tokens[jnp.asarray([0, 1]), jnp.asarray([3, 4])])
    expected = features.pooled @ params["projection"]["kernel"]
    np.testing.assert_allclose(features.projected, expected, atol=1e-6)


def test_activations():
    x = jnp.asarray([-1.0, 0.0, 2.0])
    np.testing.assert_allclose(quick_gelu(x), [-0.154203, 0.0, 1.935651], atol=1e-5)
    np.testing.assert_allclose(exact_gelu(x), [-0.158655, 0.0, 1.954500], atol=1e-5)


def test_half_precision_stays_near(params):
    half = TINY.clone(dtype=jnp.bfloat16).apply({"params": params}, IDS)
    whole = TINY.apply({"params": params}, IDS)
    assert half.tokens.dtype == half.pooled.dtype == jnp.float32
    assert np.abs(half.tokens - whole.tokens).max() < 0.05 * np.abs(whole.tokens).max()


def test_ids_outside_the_table_are_nan(params):
    assert np.isnan(TINY.apply({"params": params}, jnp.asarray([[-1] * 6, [12] * 6])).tokens).all()


def test_what_does_not_fit_is_refused(params):
    with pytest.raises(ValueError, match="width 8 does not split into 3 heads"):
        TINY.clone(heads=3)
    with pytest.raises(ValueError, match="7 tokens is longer than this encoder's 6"):
        TINY.apply({"params": params}, jnp.ones((1, 7), jnp.int32))
    with pytest.raises(ValueError, match="skip must be at least 0 and at most 3 layers, got 4"):
        TINY.apply({"params": params}, IDS, skip=4)

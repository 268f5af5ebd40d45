"""Layers against their formulas, written again in NumPy float64 where that says something."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.networks.layers import (
    Conv,
    Dense,
    GroupNorm,
    LabelEmbedding,
    LayerNorm,
    downsample_mean,
    dropout,
    fourier_embedding,
    sinusoidal_embedding,
    upsample_nearest,
)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_group_norm_is_its_formula_also_far_from_zero(mean):
    x = (normal(0, 2, 6, 5, 8) * np.arange(1, 9, dtype=np.float32) + mean).astype(np.float32)
    scale, bias = normal(1, 8), normal(2, 8)
    groups = x.astype(np.float64).reshape(2, 30, 4, 2)
    centred = groups - groups.mean((1, 3), keepdims=True)
    exact = (centred / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)).reshape(x.shape) * scale + bias
    out = GroupNorm(4).apply({"params": {"scale": scale, "bias": bias}}, jnp.asarray(x))
    # at 1e4 the input itself carries an error of 5e-4 of the spread of the first channel, but both sides see the same x
    np.testing.assert_allclose(out, exact, atol=1e-5)


def test_group_norm_has_the_gradient_of_its_formula():
    x, weight = jnp.asarray(normal(0, 2, 3, 3, 4) + 3), jnp.asarray(normal(1, 2, 3, 3, 4))
    params = {"scale": jnp.asarray(normal(2, 4)), "bias": jnp.zeros(4)}

    def two_passes(x):
        groups = x.reshape(2, 9, 2, 2)
        centred = groups - groups.mean((1, 3), keepdims=True)
        out = centred * jax.lax.rsqrt(jnp.square(centred).mean((1, 3), keepdims=True) + 1e-5)
        return jnp.sum(weight * out.reshape(x.shape) * params["scale"].reshape(1, 1, 1, 4))

    ours = jax.grad(lambda x: jnp.sum(weight * GroupNorm(2).apply({"params": params}, x)))(x)
    np.testing.assert_allclose(ours, jax.grad(two_passes)(x), atol=2e-5)


def test_group_norm_refuses_a_width_that_does_not_split():
    with pytest.raises(ValueError, match="6 channels do not split into 4 groups"):
        jax.eval_shape(GroupNorm(4).init, jax.random.key(0), jnp.zeros((1, 2, 2, 6)))


def test_layer_norm_is_its_formula():
    x, scale, bias = normal(0, 2, 3, 8) + 100, normal(1, 8), normal(2, 8)
    wide = x.astype(np.float64)
    exact = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5) * scale + bias
    np.testing.assert_allclose(
        LayerNorm().apply({"params": {"scale": scale, "bias": bias}}, jnp.asarray(x)), exact, atol=5e-5
    )


def test_sinusoidal_embedding_has_its_closed_form():
    t = jnp.asarray([0.0, 1.0, 999.0])
    frequencies = 10_000.0 ** -(np.arange(4) / 4)
    angles = np.asarray(t, np.float64)[:, None] * frequencies
    np.testing.assert_allclose(sinusoidal_embedding(t, 8), np.hstack([np.cos(angles), np.sin(angles)]), atol=1e-4)
    # with a shift of 1 the slowest frequency is reached
    shifted = sinusoidal_embedding(t, 8, sin_first=True, frequency_shift=1)
    np.testing.assert_allclose(shifted[:, 3], np.sin(np.asarray(t) / 10_000), atol=1e-6)
    np.testing.assert_allclose(shifted[:, 4], np.cos(np.asarray(t)), atol=1e-4)


def test_embeddings_of_odd_width_end_with_a_zero():
    for features in (sinusoidal_embedding, fourier_embedding):
        out = features(jnp.asarray([0.3, 2.0]), 9)
        assert out.shape == (2, 9)
        np.testing.assert_array_equal(out[:, -1], 0.0)


def test_fourier_embedding_spans_its_frequencies():
    out = fourier_embedding(jnp.asarray([0.7]), 6, slowest=0.5, fastest=8.0)
    np.testing.assert_allclose(
        out[0], np.hstack([f(0.7 * np.asarray([0.5, 2.0, 8.0])) for f in (np.cos, np.sin)]), atol=1e-6
    )


def test_embedding_without_frequencies_is_refused():
    with pytest.raises(ValueError, match="2 features with frequency_shift 1 has no frequencies"):
        sinusoidal_embedding(jnp.zeros(1), 2, frequency_shift=1)


def test_convolution_paddings():
    x = jnp.asarray(normal(0, 1, 6, 6, 2))
    params = {"kernel": jnp.asarray(normal(1, 3, 3, 2, 4)), "bias": jnp.asarray(normal(2, 4))}
    same = jax.lax.conv_general_dilated(x, params["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    bias = params["bias"].reshape(1, 1, 1, 4)
    np.testing.assert_allclose(Conv(4, stride=2, asymmetric=True).apply({"params": params}, x), same + bias, atol=1e-5)
    full = Conv(4).apply({"params": params}, x)
    np.testing.assert_allclose(Conv(4, stride=2).apply({"params": params}, x), full[:, ::2, ::2], atol=1e-5)
    assert full.shape == (1, 6, 6, 4)


def test_dense_without_bias_has_a_kernel_only():
    params = Dense(3, use_bias=False).init(jax.random.key(0), jnp.zeros((1, 2)))["params"]
    assert {name: leaf.shape for name, leaf in params.items()} == {"kernel": (2, 3)}


def test_resampling_keeps_constants_and_inverts():
    x = jnp.asarray(normal(0, 2, 3, 4, 5))
    up = upsample_nearest(x)
    np.testing.assert_array_equal(up, np.repeat(np.repeat(x, 2, 1), 2, 2))
    np.testing.assert_allclose(downsample_mean(up), x, atol=1e-6)


def test_a_label_outside_the_table_is_not_a_number():
    params = {"embedding": jnp.asarray(normal(0, 3, 4))}
    out = LabelEmbedding(3, 4).apply({"params": params}, jnp.asarray([2, 3, -1]))
    np.testing.assert_array_equal(out[0], params["embedding"][2])
    assert np.isnan(out[1:]).all()


class Drop(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return dropout(self, x, 0.25, train)


def test_dropout_keeps_the_mean_and_needs_a_key_to_train():
    x = jnp.ones((100, 100))
    out = np.asarray(Drop().apply({}, x, True, rngs={"dropout": jax.random.key(0)}))
    assert set(np.unique(out)) == {np.float32(0), np.float32(1 / 0.75)}
    assert out.mean() == pytest.approx(1.0, abs=0.02)
    np.testing.assert_array_equal(Drop().apply({}, x, False), x)
    with pytest.raises(ValueError, match=r"dropout 0.25 needs a random key; pass key="):
        Drop().apply({}, x, True)

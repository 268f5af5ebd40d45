"""The consistency decoder's network: its size, its time table, its latent, and refusals."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.networks.base import as_network, init_params, num_params, param_shapes
from jaxdiff.networks.consistency_decoder import (
    LATENT_MEAN,
    LATENT_STD,
    ConsistencyDecoder,
    example_inputs,
    normalize_latent,
)
from jaxdiff.networks.layers import Conv

TINY = ConsistencyDecoder(
    base_channels=4, channel_mult=(1, 2), num_res_blocks=1, norm_groups=2, emb_channels=6, num_times=5, upscale=2
)


def test_parameter_count_is_the_released_one():
    decoder = ConsistencyDecoder()
    assert num_params(param_shapes(decoder, *example_inputs(decoder))) == 621_277_702


def test_times_are_rows_of_a_table():
    params = init_params(TINY.clone(output_rule=TINY.layer_rule), jax.random.key(0), *example_inputs(TINY))
    network = jax.jit(as_network(TINY))
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    latent = jax.random.normal(jax.random.key(2), (2, 2, 2, 4))

    def at(first, second):
        return np.asarray(network(params, x, jnp.asarray([first, second]), {"latent": latent}))

    out = at(3.0, 1.0)
    np.testing.assert_array_equal(at(3.2, 0.9), out)
    assert np.abs(at(2.0, 1.0)[0] - out[0]).max() > 1e-4
    beyond = at(5.0, 1.0)
    assert np.isnan(beyond[0]).all()
    np.testing.assert_array_equal(beyond[1], out[1])


def test_the_latent_stands_beside_the_image_at_its_size():
    params = init_params(TINY, jax.random.key(0), *example_inputs(TINY))
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    latent = jax.random.normal(jax.random.key(2), (2, 2, 2, 4))
    found: Any = TINY.apply({"params": params}, x, jnp.zeros(2), {"latent": latent}, return_features=True)
    beside = jnp.concatenate([x, jnp.repeat(jnp.repeat(latent, 2, axis=1), 2, axis=2)], axis=-1)
    expected: Any = Conv(4).apply({"params": params["conv_in"]}, beside)
    np.testing.assert_allclose(found[1]["conv_in"], expected, atol=1e-6)


def test_normalised_latents_have_mean_0_and_deviation_1():
    mean, std = np.asarray(LATENT_MEAN, np.float32), np.asarray(LATENT_STD, np.float32)
    latent = jnp.asarray(np.stack([mean, mean + std]).reshape(1, 1, 2, 4))
    np.testing.assert_allclose(normalize_latent(latent)[0, 0], [[0.0] * 4, [1.0] * 4], atol=1e-6)


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        ({}, r"this consistency decoder needs cond\['latent'\]"),
        ({"latent": jnp.zeros((1, 4, 4, 4))}, r"must be \(1, 2, 2, 4\), 2 times smaller than the image"),
        ({"concat": jnp.zeros((1, 4, 4, 4))}, "cond has 'concat' but this consistency decoder is not built for it"),
    ],
)
def test_conditioning_that_does_not_fit_is_refused(cond, message):
    with pytest.raises(ValueError, match=message):
        TINY.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1), cond)


def test_parts_that_the_decoder_has_not_are_refused():
    with pytest.raises(ValueError, match="num_classes is not part of the consistency decoder, got 3"):
        TINY.clone(num_classes=3)

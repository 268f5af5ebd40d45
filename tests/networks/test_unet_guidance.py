"""The guidance scale as an input of a UNet: absent from a new network, seen by a trained one, required where built."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.networks.base import init_params
from jaxdiff.networks.layers import sinusoidal_embedding
from jaxdiff.networks.unet import UNet, example_inputs

UNET = UNet(
    in_channels=2, out_channels=2, base_channels=8, channel_mult=(1,), num_res_blocks=1, norm_groups=4, guidance_dim=6
)
X, T = jnp.ones((2, 4, 4, 2)), jnp.asarray([3.0, 500.0])


def test_a_new_network_ignores_the_scale_and_a_trained_one_sees_it():
    drawn = init_params(UNET, jax.random.key(0), *example_inputs(UNET))
    assert drawn["guidance"]["kernel"].shape == (6, 8) and not np.any(np.asarray(drawn["guidance"]["kernel"]))
    params = jax.tree.map(lambda a: a + 0.05, drawn)
    apply = jax.jit(lambda p, w: UNET.apply({"params": p}, X, T, {"guidance": w}))
    low, high = (apply(params, jnp.full(2, w)) for w in (2.0, 9.0))
    assert np.abs(low - high).max() > 1e-4
    params["guidance"]["kernel"] = drawn["guidance"]["kernel"]
    np.testing.assert_array_equal(apply(params, jnp.full(2, 2.0)), apply(params, jnp.full(2, 9.0)))


def test_the_scale_is_embedded_as_in_latent_consistency_models():
    """Sines, then cosines, of 1000 w at frequencies from 1 down to 1/10000."""
    angles = 1000 * 7.5 * np.asarray([1.0, 0.01, 0.0001])
    expected = np.concatenate([np.sin(angles), np.cos(angles)])
    embedded = sinusoidal_embedding(jnp.asarray([7500.0]), 6, sin_first=True, frequency_shift=1)[0]
    np.testing.assert_allclose(embedded, expected, atol=1e-3)


def test_the_scale_is_required_where_built_and_refused_elsewhere():
    with pytest.raises(ValueError, match=r"this UNet needs cond\['guidance'\]"):
        UNET.apply({"params": {}}, X, T, {})
    with pytest.raises(ValueError, match="cond has 'guidance' but this UNet is not built for it"):
        UNET.clone(guidance_dim=None).apply({"params": {}}, X, T, {"guidance": T})

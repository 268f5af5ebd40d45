"""The progressive distillation UNet: published settings, its classes, and its time input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import schedules
from jaxdiff.networks.base import as_network, init_params, param_shapes
from jaxdiff.networks.progdist_unet import ProgDistUNet, lecun_normal, progdist_cifar10_unet, progdist_imagenet64_unet
from jaxdiff.networks.unet import example_inputs
from jaxdiff.pretrained.progdist import time_input

TINY = ProgDistUNet(
    base_channels=8, channel_mult=(1,), num_res_blocks=1, norm_groups=4, num_classes=3, emb_channels=6
).clone(output_rule=lecun_normal)


@pytest.mark.parametrize(
    ("unet", "emb_channels", "out_channels", "coarsest"),
    [(progdist_cifar10_unet(), 1024, 3, 256), (progdist_imagenet64_unet(), 768, 6, 768)],
)
def test_published_settings(unet, emb_channels, out_channels, coarsest):
    shapes = param_shapes(unet, *example_inputs(unet))
    assert shapes["time_in"]["kernel"].shape == (unet.base_channels, emb_channels)
    assert shapes["conv_out"]["kernel"].shape == (3, 3, unet.base_channels, out_channels)
    assert shapes["mid_attention"]["qkv"]["kernel"].shape == (coarsest, 3 * coarsest)
    assert ("label" in shapes) == (unet.num_classes is not None)


def test_a_class_is_a_row_and_a_label_outside_gives_nan():
    params = init_params(TINY, jax.random.key(0), *example_inputs(TINY))
    network = jax.jit(as_network(TINY))
    x, t = jax.random.normal(jax.random.key(1), (4, 2, 2, 3)), jnp.full(4, 7.0)
    out = np.asarray(network(params, x, t, {"label": jnp.asarray([0, 2, 3, -1])}))
    assert np.isfinite(out[:2]).all() and np.isnan(out[2:]).all()
    label = params["label"]
    # The row of class 2 in place of that of class 0 makes class 0 what class 2 was.
    moved = {**params, "label": {**label, "kernel": label["kernel"].at[0].set(label["kernel"][2])}}
    again = np.asarray(network(moved, x, t, {"label": jnp.asarray([0, 0, 0, 0])}))
    np.testing.assert_array_equal(again[1], out[1])
    assert np.abs(again[0] - out[0]).max() > 1e-4


def test_the_inverse_cosine_input_is_the_time_of_the_cosine_schedule():
    t = jnp.linspace(0.01, 0.99, 9)
    level = schedules.cosine().level(t)
    log_snr = 2 * jnp.log(level.alpha / level.sigma)
    # The schedule leaves out exp(-10) of the quarter circle at both ends: 0.03 of 1000.
    np.testing.assert_allclose(time_input("inv_cos")(log_snr), 1000 * t, atol=0.03)


def test_the_other_time_inputs():
    log_snr = jnp.asarray([-10.0, 0.0, 10.0])
    np.testing.assert_allclose(time_input("linear")(log_snr), [0.0, 500.0, 1000.0], atol=1e-4)
    np.testing.assert_allclose(time_input("linear", (-20.0, 20.0))(log_snr), [250.0, 500.0, 750.0], atol=1e-4)
    np.testing.assert_allclose(time_input("sigmoid")(log_snr), 1000 / (1 + np.exp([10.0, 0.0, -10.0])), rtol=1e-5)
    with pytest.raises(ValueError, match=r"must be one of \['inv_cos', 'linear', 'sigmoid'\], got 'cos'"):
        time_input("cos")


def test_parts_that_the_release_has_not_are_refused():
    with pytest.raises(ValueError, match="vector_dim is not part of the progressive distillation UNet, got 4"):
        TINY.clone(vector_dim=4)

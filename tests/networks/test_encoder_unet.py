"""Classifiers of noisy images: published sizes, what each pool computes, and refusals."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.networks.attention import attention
from jaxdiff.networks.base import as_network, init_params, num_params, param_shapes
from jaxdiff.networks.encoder_unet import AttentionPool, EncoderUNet, adm_classifier, example_inputs
from jaxdiff.networks.unet import UNet
from jaxdiff.networks.unet import example_inputs as unet_inputs

SIZES = {"base_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "norm_groups": 4, "attention_factors": (2,)}
TINY = EncoderUNet(**SIZES, head_channels=8, out_channels=3, image_size=4)


@pytest.mark.parametrize(("image_size", "millions"), [(64, 65.439), (128, 42.568), (256, 54.096), (512, 54.448)])
def test_parameter_count_is_the_released_one(image_size, millions):
    classifier = adm_classifier(image_size)
    assert round(num_params(param_shapes(classifier, *example_inputs(classifier))) / 1e6, 3) == millions


def test_the_trunk_is_that_of_the_unet():
    unet = UNet(**SIZES, head_channels=8)
    ours, whole = param_shapes(TINY, *example_inputs(TINY)), param_shapes(unet, *unet_inputs(unet))
    assert set(ours) - set(whole) == {"pool"}
    assert set(whole) - set(ours) == {"conv_out", *(name for name in whole if name.startswith("up_"))}
    for name in set(ours) & set(whole) - {"norm_out"}:  # after the middle here, after the way up there
        assert ours[name] == whole[name]


def test_attention_pool_is_the_first_token_of_full_attention():
    pool = AttentionPool(features=5, heads=2)
    x = jax.random.normal(jax.random.key(0), (2, 2, 3, 8))
    params = init_params(pool, jax.random.key(1), x)
    tokens = x.reshape(2, 6, 8)
    tokens = jnp.concatenate([tokens.mean(1, keepdims=True), tokens], axis=1) + params["positions"][None]
    qkv = (tokens @ params["qkv"]["kernel"] + params["qkv"]["bias"][None, None]).reshape(2, 7, 3, 2, 4)
    full = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(2, 7, 8)
    expected = full[:, 0] @ params["out"]["kernel"] + params["out"]["bias"][None]
    pooled: Any = pool.apply({"params": params}, x)
    np.testing.assert_allclose(pooled, expected, atol=1e-6)


def test_spatial_pools_see_every_step():
    for pool in ("spatial", "spatial_v2"):
        encoder = TINY.clone(pool=pool)
        shapes = param_shapes(encoder, *example_inputs(encoder))
        # conv_in, a block and a downsampling of 8 channels, a block and the middle of 16
        assert shapes["hidden"]["kernel"].shape == (8 + 8 + 8 + 16 + 16, 2048)
        assert shapes["out"]["kernel"].shape == (2048, 3)
        assert ("norm_out" in shapes) == (pool == "spatial_v2")


def test_an_untrained_classifier_with_a_zero_output_layer_prefers_no_class():
    encoder = TINY.clone(pool="adaptive")
    params = init_params(encoder, jax.random.key(0), *example_inputs(encoder))
    x = jax.random.normal(jax.random.key(1), (2, 6, 4, 3))
    logits = jax.jit(as_network(encoder))(params, x, jnp.asarray([1.0, 2.0]), {})
    np.testing.assert_array_equal(logits, np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TINY.clone(pool="mean"), r"pool must be one of \('attention', .*got 'mean'"),
        (lambda: TINY.clone(head_channels=None), "pool 'attention' needs head_channels, got None"),
        (lambda: TINY.clone(image_size=5), "image_size must be divisible by 2 for 2 levels, got 5"),
        (lambda: TINY.clone(low_res_channels=3), "low_res_channels 3 has no effect in an EncoderUNet"),
        (lambda: TINY.clone(base_channels=6), "level 0 has 6 channels"),
        (lambda: adm_classifier(32), "ADM has no UNet for 32 pixels"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("shape", "cond", "message"),
    [
        ((1, 8, 8, 3), {}, "pools images of 4 x 4 by attention, got 8 x 8"),
        ((1, 4, 4, 1), {}, r"x_t must be \[B, H, W, 3\]"),
        ((1, 4, 4, 3), {"label": jnp.zeros(1, jnp.int32)}, "cond has 'label' but this UNet is not built for it"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(shape, cond, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: TINY.init(jax.random.key(0), jnp.zeros(shape), jnp.zeros(1), cond))

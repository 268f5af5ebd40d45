"""Discriminators on diffusion backbones: they start undecided and from given weights, and read what they should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.networks import dit
from jaxdiff.networks.base import as_network, init_params, num_params
from jaxdiff.networks.dit import DiT
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.networks.unet_discriminator import (
    FeatureDiscriminator,
    FeatureHeads,
    UNetDiscriminator,
    as_judge,
    from_backbone,
    on_backbone,
    tapped_blocks,
)

UNET = UNet(in_channels=2, out_channels=3, base_channels=8, channel_mult=(1,), num_res_blocks=1, norm_groups=4)
TRANSFORMER = DiT(in_channels=2, out_channels=2, input_size=4, width=8, depth=3, num_heads=2, num_classes=3)
ON_UNET = UNetDiscriminator(UNET, regression=True)
X, T = jax.random.normal(jax.random.key(1), (2, 4, 4, 2)), jnp.asarray([3.0, 700.0])


def inputs_of(backbone):
    return dit.example_inputs(backbone) if isinstance(backbone, DiT) else example_inputs(backbone)


@functools.cache
def fresh(module):
    return init_params(module, jax.random.key(0), *inputs_of(module.backbone))


@functools.cache
def trained(backbone):
    """Parameters of a backbone none of which is zero."""
    generator = np.random.default_rng(0)
    params = init_params(backbone, jax.random.key(0), *inputs_of(backbone))
    return jax.tree.map(lambda a: a + 0.1 * generator.standard_normal(a.shape, np.float32), params)


def test_a_unet_discriminator_starts_undecided_and_from_the_weights_of_a_diffusion_model():
    backbone = trained(UNET)
    params = from_backbone(fresh(ON_UNET), backbone)
    started = on_backbone(ON_UNET, backbone, X, T, {})(jax.random.key(9), None)
    assert jax.tree.structure(started) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(started["backbone"]), jax.tree.leaves(backbone), strict=True):
        assert (ours == theirs).all() and ours is not theirs
    found = jax.jit(as_judge(ON_UNET))(params, X, T, {})
    assert (found.sample.shape, found.pixel.shape, found.regression.shape) == ((2,), (2, 4, 4), (2, 4, 4, 2))
    np.testing.assert_array_equal(found.sample, 0.0)
    np.testing.assert_array_equal(found.pixel, 0.0)
    np.testing.assert_allclose(found.image, jax.jit(as_network(UNET))(backbone, X, T, {}), atol=1e-6)


def test_its_logit_is_that_of_the_sample_and_the_mean_of_the_pixels():
    params = from_backbone(fresh(ON_UNET), trained(UNET))
    for head in ("sample_logit", "pixel_logit"):
        params[head] = jax.tree.map(lambda a: a + 0.3, params[head])
    found = jax.jit(as_judge(ON_UNET))(params, X, T, {})
    logit = jax.jit(as_network(ON_UNET))(params, X, T, {})
    np.testing.assert_allclose(logit, found.sample + found.pixel.mean((1, 2)), rtol=1e-6)
    assert np.abs(found.sample).min() > 0.1 and np.abs(found.pixel).min() > 0


def test_dropout_of_the_backbone_takes_its_key():
    disc = UNetDiscriminator(UNET.clone(dropout=0.5))
    params, judge = from_backbone(fresh(disc), trained(UNET)), jax.jit(as_judge(disc), static_argnames="train")
    images = [judge(params, X, T, {}, train=True, key=jax.random.key(seed)).image for seed in (0, 0, 1)]
    np.testing.assert_array_equal(images[0], images[1])
    assert np.abs(images[0] - images[2]).max() > 1e-3


def test_the_regression_head_is_there_if_asked_for():
    without = fresh(UNetDiscriminator(UNET))
    assert {"regression", "regression_norm"} == fresh(ON_UNET).keys() - without.keys()
    assert num_params(without["backbone"]) == num_params(trained(UNET))


@pytest.mark.parametrize(
    "disc",
    [
        FeatureDiscriminator(TRANSFORMER, ("block_0", "block_2"), 2),
        FeatureDiscriminator(UNET.clone(num_classes=3), ("down_0_0", "mid"), 4),
    ],
    ids=["dit", "unet"],
)
def test_a_feature_discriminator_starts_undecided_then_sees_everything(disc):
    cond = {"label": jnp.asarray([0, 2], jnp.int32)}
    params = fresh(disc)
    run = jax.jit(as_network(disc))
    np.testing.assert_array_equal(run(params, X, T, cond), np.zeros(2))
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda a: a + 0.1 * generator.standard_normal(a.shape, np.float32), params)
    logit = run(params, X, T, cond)
    assert logit.shape == (2,) and logit.dtype == jnp.float32
    for changed in ((-X, T, cond), (X, T + 100.0, cond), (X, T, {"label": jnp.asarray([1, 1], jnp.int32)})):
        assert np.abs(run(params, *changed) - logit).min() > 1e-6


def active_heads(taps):
    heads = FeatureHeads(2)
    generator = np.random.default_rng(0)
    params = init_params(heads, jax.random.key(0), taps)
    params = jax.tree.map(lambda a: a + 0.3 * generator.standard_normal(a.shape, np.float32), params)
    return jax.jit(lambda taps, mask: heads.apply({"params": params}, taps, mask))


def test_heads_do_not_read_masked_tokens_nor_their_order():
    taps = list(jax.random.normal(jax.random.key(0), (2, 3, 5, 8)))
    run = active_heads(taps)
    mask = jnp.arange(5)[None] < jnp.asarray([5, 3, 2])[:, None]
    logit = run(taps, mask)
    hidden = [jnp.where(mask[..., None], a, 7.0) for a in taps]
    np.testing.assert_allclose(run(hidden, mask), logit, atol=1e-5)
    assert np.abs(run(hidden, None) - logit)[1:].min() > 1e-3
    np.testing.assert_allclose(run([a[:, ::-1] for a in taps], mask[:, ::-1]), logit, atol=1e-5)
    np.testing.assert_allclose(run([a[:, :2] for a in taps], mask[:, :2])[2], logit[2], atol=1e-5)


def test_blocks_of_apt():
    assert tapped_blocks(36) == ("block_15", "block_25", "block_35")
    assert tapped_blocks(28) == ("block_11", "block_19", "block_27")
    assert tapped_blocks(3) == ("block_0", "block_1", "block_2")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tapped_blocks(2), "a transformer of depth 2 has no three blocks to read"),
        (
            lambda: fresh(FeatureDiscriminator(TRANSFORMER, ("block_7",))),
            "the backbone has no feature 'block_7' to read; it has .*'block_2'",
        ),
        (
            lambda: fresh(FeatureDiscriminator(TRANSFORMER, ("block_1",), 3)),
            "features of width 8 do not split into 3 heads; change num_heads",
        ),
        (
            lambda: from_backbone(fresh(ON_UNET), trained(TRANSFORMER)),
            r"not those of the backbone: block_0/attention_out/bias is \(8,\), expected none",
        ),
        (
            lambda: from_backbone(fresh(ON_UNET), fresh(ON_UNET)["backbone"] | {"conv_in": {"kernel": X, "bias": T}}),
            r"conv_in/bias is \(2,\), expected \(8,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)

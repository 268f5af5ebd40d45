"""Discriminator, LPIPS, Inception and its extractor: published sizes, closed forms, gradients, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.metrics.inception import inception_extractor, prepare
from jaxdiff.networks.autoencoder_blocks import example_input
from jaxdiff.networks.autoencoder_vq import vqgan_f16
from jaxdiff.networks.base import init_params, num_params, param_shapes
from jaxdiff.networks.inception import Inception, Mixed, Unit
from jaxdiff.networks.lpips import FEATURES, LPIPS, unit_length
from jaxdiff.networks.patch_discriminator import BatchNorm, PatchDiscriminator, example_inputs, initial_statistics

IMAGE = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
FIVE = {"mean": jnp.zeros(5), "variance": jnp.ones(5), "count": jnp.zeros((), jnp.int32)}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def count_of(module, *inputs):
    return num_params(param_shapes(module, *inputs))


def test_networks_have_the_published_sizes():
    discriminator = PatchDiscriminator()
    sizes = [count_of(LPIPS(), IMAGE, IMAGE), count_of(discriminator, *example_inputs(discriminator))]
    assert sizes == [14_716_160, 2_765_633]
    # VQGAN's checkpoint holds all three; its trainer prints 89.6 M.
    autoencoder = vqgan_f16()
    assert count_of(autoencoder, example_input(autoencoder)) + sum(sizes) == 89_623_492


def test_inception_has_the_published_size():
    tree = param_shapes(Inception(), jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    trained = [leaf for path, leaf in leaves if path[-1].key not in ("mean", "variance")]
    # 27,161,264 with 1000 classes and an auxiliary classifier of 3,326,696; here 1008 and none.
    assert num_params(trained) == 27_161_264 - 3_326_696 + 8 * 2049
    assert (tree["logits"]["kernel"].shape, len(leaves)) == ((2048, 1008), 94 * 5 + 2)


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch_of_the_published_size(layers, patch):
    discriminator = PatchDiscriminator(1, 1, layers)
    statistics = initial_statistics(discriminator)
    params = init_params(discriminator, jax.random.key(0), *example_inputs(discriminator))
    x = normal(0, 1, 96, 96, 1)

    def middle(x):
        logits = discriminator.apply({"params": params}, x, statistics, train=False)[0]
        return logits[0, logits.shape[1] // 2, logits.shape[2] // 2, 0]

    seen = np.nonzero(jax.jit(jax.grad(middle))(x)[0, :, :, 0])
    assert [int(np.ptp(axis)) + 1 for axis in seen] == [patch, patch]


def test_batch_norm_normalises_by_the_batch_and_remembers_the_unbiased_variance():
    x = 3.0 + 2.0 * normal(0, 2, 3, 4, 5)
    params = {"params": {"scale": jnp.ones(5), "bias": jnp.zeros(5)}}
    y, after = BatchNorm().apply(params, x, FIVE, True)
    values = np.asarray(x, np.float64).reshape(-1, 5)
    expected = (values - values.mean(0)) / np.sqrt(values.var(0) + 1e-5)
    np.testing.assert_allclose(y, expected.reshape(x.shape), atol=1e-5)
    np.testing.assert_allclose(after["mean"], 0.1 * values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(after["variance"], 0.9 + 0.1 * values.var(0, ddof=1), rtol=1e-5)
    assert after["count"] == 1


def test_batch_norm_outside_training_uses_and_keeps_the_statistics():
    x, params = normal(0, 1, 2, 2, 5), {"params": {"scale": jnp.full(5, 2.0), "bias": jnp.ones(5)}}
    statistics = FIVE | {"mean": normal(1, 5), "variance": jnp.full(5, 4.0)}
    y, after = BatchNorm().apply(params, x, statistics, False)
    np.testing.assert_allclose(y, 2 * (x - statistics["mean"].reshape(1, 1, 1, 5)) / 4.00001**0.5 + 1, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, after, statistics)


def test_running_statistics_carry_no_gradient():
    params = {"params": {"scale": jnp.ones(5), "bias": jnp.zeros(5)}}

    def total(x):
        after = BatchNorm().apply(params, x, FIVE, True)[1]
        return jnp.sum(after["mean"]) + jnp.sum(after["variance"])

    assert not np.any(jax.grad(total)(normal(0, 2, 2, 2, 5)))


def test_the_discriminator_starts_as_in_the_release():
    discriminator = PatchDiscriminator(base_channels=16)
    params = init_params(discriminator, jax.random.key(0), *example_inputs(discriminator))
    assert np.std(params["conv_3"]["kernel"]) == pytest.approx(0.02, rel=0.02)
    scale = params["norm_3"]["scale"]
    assert (np.mean(scale), np.std(scale)) == (pytest.approx(1, abs=0.01), pytest.approx(0.02, rel=0.25))
    assert "bias" not in params["conv_3"] and not np.any(params["norm_3"]["bias"])
    assert 0.5 / 48**0.5 < np.abs(params["conv_0"]["bias"]).max() <= 1 / 48**0.5


def test_unit_length_of_zero_is_zero_and_differentiable():
    x = jnp.asarray([[[[3.0, 4.0], [0.0, 0.0]]]])
    np.testing.assert_allclose(unit_length(x), [[[[0.6, 0.8], [0.0, 0.0]]]], rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(jnp.square(unit_length(x) - 1.0)))(x)
    assert np.isfinite(gradient).all()


def test_lpips_is_the_weighted_difference_of_unit_features():
    module, x, y = LPIPS(width=2), normal(0, 2, 16, 16, 3), normal(1, 2, 16, 16, 3)
    params = init_params(module, jax.random.key(0), IMAGE, IMAGE)
    params["heads"] = jax.tree.map(lambda a: jnp.abs(normal(2, *a.shape)), params["heads"])

    def run(params, x, y):
        both = [module.apply({"params": params}, a, method="features") for a in (x, y)]
        forward, back, none = (module.apply({"params": params}, *pair) for pair in ((x, y), (y, x), (x, x)))
        gradient = jax.grad(lambda a: module.apply({"params": params}, a, x).sum())(x)
        return both, (forward, back, none, gradient)

    both, (forward, back, none, gradient) = jax.jit(run)(params, x, y)
    sides = [both[0][name].shape[1:] for name in FEATURES]
    assert sides == [(16, 16, 2), (8, 8, 4), (4, 4, 8), (2, 2, 16), (1, 1, 16)]
    expected = np.zeros(2)
    for name in FEATURES:
        a, b = (np.asarray(f[name], np.float64) for f in both)
        a, b = (f / (np.sqrt((f**2).sum(-1, keepdims=True)) + 1e-10) for f in (a, b))
        expected += ((a - b) ** 2 @ np.asarray(params["heads"][name])).mean((1, 2))
    np.testing.assert_allclose(forward, expected, rtol=1e-4)
    np.testing.assert_allclose(back, forward, rtol=1e-5)
    np.testing.assert_array_equal(none, [0.0, 0.0])
    np.testing.assert_array_equal(gradient, np.zeros_like(x))


@pytest.mark.parametrize(("pool", "corner"), [("average", 2.5), ("max", 4.5)])
def test_pools_of_inception_do_not_count_the_padding(pool, corner):
    x = jnp.arange(9, dtype=jnp.float32).reshape(1, 3, 3, 1) + 0.5
    module = Mixed([(pool, Unit("branch_pool", 1))])
    params = {"kernel": jnp.ones((1, 1, 1, 1)), "scale": jnp.ones(1), "bias": jnp.zeros(1)}
    params |= {"mean": jnp.zeros(1), "variance": jnp.full(1, 0.999)}
    y = module.apply({"params": {"branch_pool": params}}, x)
    assert y.shape == (1, 3, 3, 1)
    # The corner sees 0.5, 1.5, 3.5 and 4.5.
    np.testing.assert_allclose(y[0, 0, 0, 0], corner, rtol=1e-5)


def bilinear(image, size):
    """Half-pixel centres, edges repeated, two neighbours on each axis: the formula, one axis after the other."""
    for axis in (0, 1):
        old = image.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        share = (at - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        high = np.minimum(low + 1, old - 1)
        image = image.take(low, axis) * (1 - share) + image.take(high, axis) * share
    return image


@pytest.mark.parametrize("side", [32, 400])
def test_images_are_resized_without_antialiasing(side):
    pixels = np.random.default_rng(0).integers(0, 256, (side, side + 7, 3))
    images = (pixels / 127.5 - 1).astype(np.float32)[None]
    np.testing.assert_allclose(prepare(jnp.asarray(images))[0], bilinear(pixels / 127.5 - 1, 299), atol=1e-4)


def test_images_are_clipped_and_rounded_to_eight_bits():
    values = jnp.asarray([-3.0, -1.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1.0, 7.0])
    images = jnp.broadcast_to(values.reshape(6, 1, 1, 1), (6, 2, 2, 1))
    seen = prepare(images)
    assert seen.shape == (6, 299, 299, 3)
    np.testing.assert_allclose(127.5 * (seen[:, 150, 150, 1] + 1), [0, 0, 0, 1, 255, 255], atol=1e-3)


def test_the_extractor_is_named_by_its_weights():
    names = [inception_extractor({"logits": {"bias": jnp.asarray(b)}}).name for b in ([0.0], [0.0], [1.0])]
    assert names[0] == names[1] != names[2] and all(name.startswith("inception-v3-fid-") for name in names)


@pytest.mark.slow
def test_the_extractor_gives_features_and_logits():
    params = init_params(Inception(), jax.random.key(0), jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32))
    extractor = inception_extractor(params)
    grey = jnp.clip(normal(0, 2, 8, 8, 1), -1, 1)
    out = extractor.apply(jnp.broadcast_to(grey, (2, 8, 8, 3)))
    assert (out.features.shape, out.logits.shape) == ((2, 2048), (2, 1008))
    np.testing.assert_allclose(extractor.apply(grey).features, out.features, rtol=1e-4, atol=1e-4)
    logits = out.features @ params["logits"]["kernel"] + params["logits"]["bias"].reshape(1, -1)
    np.testing.assert_allclose(out.logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PatchDiscriminator(num_layers=0), "num_layers must be at least 1, got 0"),
        (
            lambda: PatchDiscriminator().apply({}, jnp.zeros((1, 23, 64, 3)), {}, train=False),
            r"images \[B, H, W, 3\] of at least 24 pixels a side, got \[1, 23, 64, 3\]; pass larger images",
        ),
        (
            lambda: BatchNorm().init(jax.random.key(0), jnp.zeros((1, 1, 1, 5)), FIVE, True),
            "more than one value a channel",
        ),
        (lambda: LPIPS(2).apply({}, jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 8, 8, 3))), "at least 16 pixels a side"),
        (
            lambda: Inception().apply({}, jnp.zeros((1, 32, 32, 3))),
            r"at least 75 pixels a side, got \[1, 32, 32, 3\]; resize them to 299",
        ),
        (
            lambda: inception_extractor({}).apply(jnp.zeros((1, 8, 8, 4))),
            r"\[n, H, W, 3\] or \[n, H, W, 1\], got \[1, 8, 8, 4\]; decode latents first",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)

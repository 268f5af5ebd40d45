"""NCSN++: sizes of the papers, equivalences between its switches, conditioning, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.networks import ncsnpp_presets
from jaxdiff.networks.base import as_network, init_params, num_params, param_shapes
from jaxdiff.networks.ncsnpp import NCSNpp, example_inputs, ncsnpp_parts
from jaxdiff.networks.ncsnpp_blocks import AdaptiveGroupNorm
from jaxdiff.types import Network

TINY = NCSNpp(base_channels=8, channel_mult=(1, 2), num_res_blocks=1)
SMALL = NCSNpp(base_channels=8, channel_mult=(1,), num_res_blocks=1, attention_factors=())
T = jnp.asarray([0.3, 1.2])
COUNTS = {
    "consistency": (ncsnpp_presets.consistency_ncsnpp(), 56_395_651),
    "ddgan_cifar10": (ncsnpp_presets.ddgan_generator(32), 48_432_515),
    "ddgan_256": (ncsnpp_presets.ddgan_generator(256), 39_726_979),
    "edm_ddpmpp_32": (ncsnpp_presets.edm_ddpmpp(32), 55_733_891),
    "edm_ncsnpp_32": (ncsnpp_presets.edm_ncsnpp(32), 56_397_955),
    "edm_ddpmpp_64": (ncsnpp_presets.edm_ddpmpp(64), 61_805_571),
}


def images(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def drawn(net):
    """Parameters of ordinary size: the last layers start near zero, and a test of zeros would see nothing."""
    generator = np.random.default_rng(1)
    shapes = param_shapes(net, *example_inputs(net))
    return jax.tree.map(lambda s: jnp.asarray(0.3 * generator.standard_normal(s.shape, np.float32)), shapes)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count_is_the_released_one(name):
    net, count = COUNTS[name]
    assert num_params(param_shapes(net, *example_inputs(net))) == count


def test_two_equal_taps_are_no_filter():
    x = images(2, 8, 8, 3)
    filtered = TINY.clone(taps=(1.0, 1.0), input_pyramid="skip", output_pyramid="skip")
    params = drawn(filtered)
    plain = filtered.clone(taps=None)
    found = [jax.jit(net.apply)({"params": params}, x, T, {}) for net in (filtered, plain)]
    np.testing.assert_allclose(*found, atol=1e-5)


def test_pyramids_of_convolutions_on_both_sides_reach_the_result():
    net = TINY.clone(
        taps=(1.0, 3.0, 3.0, 1.0), input_pyramid="residual", output_pyramid="residual", resample="conv", combine="cat"
    )
    params = drawn(net)

    def loss(p):
        return jnp.sum(net.apply({"params": p}, images(2, 8, 8, 3), T, {}) ** 2)

    gradient = jax.jit(jax.grad(loss))(params)
    # Kernels alone: the bias of the keys shifts all scores of a softmax and has gradient zero.
    silent = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        if "kernel" in jax.tree_util.keystr(path) and not np.any(leaf)
    ]
    assert silent == []


def test_frequencies_of_fourier_features_are_not_trained():
    net = SMALL.clone(time_features="fourier")
    params = drawn(net)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(net.apply({"params": p}, images(2, 8, 8, 3), T, {}))))(params)
    assert not np.any(gradient["fourier"]["frequencies"]) and np.any(gradient["time_in"]["kernel"])


def test_a_missing_augmentation_is_a_zero_one_and_no_class_is_a_label():
    net = SMALL.clone(augment_dim=4, num_classes=3)
    params = drawn(net)
    x = images(2, 8, 8, 3)
    apply = jax.jit(lambda cond: net.apply({"params": params}, x, T, cond))
    label = jnp.asarray([0, 3], jnp.int32)
    absent, zero = apply({"label": label}), apply({"label": label, "augment": jnp.zeros((2, 4))})
    np.testing.assert_allclose(absent, zero, atol=1e-6)
    unlabelled = SMALL.clone(augment_dim=4)
    weights = {name: value for name, value in params.items() if name != "label"}
    bias = params["label"]["bias"]
    # Without a class the label layer gives its bias alone, which the first layer of the embedding can take over.
    weights["time_in"] = {
        "kernel": params["time_in"]["kernel"],
        "bias": params["time_in"]["bias"] + bias @ params["time_in"]["kernel"],
    }
    expected = jax.jit(unlabelled.apply)({"params": weights}, x, T, {})
    np.testing.assert_allclose(absent[1], expected[1], atol=1e-4)
    assert np.abs(absent[0] - expected[0]).max() > 1e-2
    assert np.isnan(apply({"label": jnp.asarray([4, -1], jnp.int32)})).all()


def test_the_latent_is_scaled_to_unit_mean_square_and_changes_the_result():
    net = SMALL.clone(z_dim=6, z_features=8, z_layers=2, tanh=True, adaptive_norms=1)
    params = drawn(net)
    x, z = images(2, 8, 8, 3), images(2, 6)
    apply = jax.jit(lambda z: net.apply({"params": params}, x, T, {"z": z}))
    np.testing.assert_allclose(apply(z), apply(5.0 * z), atol=1e-4)
    assert np.abs(apply(z) - apply(-z)).max() > 1e-2
    assert np.abs(apply(z)).max() <= 1.0


def test_modulated_norms_start_as_plain_ones():
    norm = AdaptiveGroupNorm()
    x, z = images(2, 4, 4, 8), jnp.zeros((2, 5))
    params = init_params(norm, jax.random.key(0), x, z)
    np.testing.assert_array_equal(params["style"]["bias"], np.repeat([1.0, 0.0], 8))
    out = np.asarray(norm.apply({"params": params}, x, z)).reshape(2, 16, 2, 4)
    np.testing.assert_allclose(out.mean((1, 3)), 0.0, atol=1e-5)
    np.testing.assert_allclose(out.var((1, 3)), 1.0, atol=1e-4)
    drawn_by_jax = norm.init(jax.random.key(0), x, z)["params"]["style"]["bias"]
    np.testing.assert_array_equal(drawn_by_jax, params["style"]["bias"])


def test_a_new_network_gives_almost_nothing_and_follows_the_protocol():
    net = SMALL.clone(dropout=0.5, dtype=jnp.bfloat16)
    params = init_params(net, jax.random.key(0), *example_inputs(net))
    network = as_network(net)
    assert isinstance(network, Network)
    out = jax.jit(network)(params, images(2, 8, 8, 3), T, {})
    assert out.dtype == jnp.float32 and np.abs(out).max() < 1e-3
    with pytest.raises(ValueError, match="train=True with dropout 0.5 needs a random key"):
        network(params, images(2, 8, 8, 3), T, {}, train=True)


def test_features_are_named_after_the_parts():
    net = TINY.clone(input_pyramid="skip", output_pyramid="skip", time_features="fourier")
    shapes = jax.eval_shape(
        lambda p: net.apply({"params": p}, images(2, 8, 8, 3), T, {}, return_features=True)[1], drawn(net)
    )
    names = [part.name for part in ncsnpp_parts(net)]
    assert len(set(names)) == len(names)
    assert set(shapes) == {*names, "time_features"} - {"fourier"}
    widths = {part.name: part.features for part in ncsnpp_parts(net) if part.kind != "fourier"}
    assert {name: shapes[name].shape[-1] for name in widths} == widths


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TINY.clone(resample="blocks"), r"resample must be one of \('block', 'conv', 'plain'\), got 'blocks'"),
        (lambda: TINY.clone(input_pyramid="input_skip"), "input_pyramid must be one of"),
        (lambda: TINY.clone(channel_mult=()), "needs at least one level"),
        (lambda: TINY.clone(dropout=1.0), "dropout must be at least 0 and below 1, got 1.0"),
        (lambda: TINY.clone(base_channels=7), "base_channels must be even and at least 4, got 7"),
        (lambda: TINY.clone(adaptive_norms=3), "adaptive_norms must be 1 or 2"),
        (
            lambda: TINY.clone(attention_factors=(4,)),
            r"attention factor 4 never occurs: 2 levels have factors \[1, 2\]",
        ),
        (
            lambda: TINY.clone(base_channels=10),
            "channels, which do not split into .* norm groups; change base_channels",
        ),
        (lambda: ncsnpp_presets.ddgan_generator(64), "DDGAN has generators for 32 and 256 pixels, got 64"),
        (lambda: ncsnpp_presets.edm_ddpmpp(128), "EDM has DDPM.. for 32 and 64 pixels, got 128"),
        (lambda: shape_of(TINY, (2, 8, 8, 4), {}), r"x_t must be \[B, H, W, 3\] for this NCSN"),
        (lambda: shape_of(TINY, (2, 7, 8, 3), {}), "height and width must be divisible by 2 for 2 levels, got 7 x 8"),
        (lambda: shape_of(TINY, (2, 8, 8, 3), {"z": jnp.zeros((2, 6))}), "cond has 'z' but this NCSN"),
        (lambda: shape_of(TINY.clone(z_dim=6), (2, 8, 8, 3), {}), r"this NCSN.. needs cond\['z'\]"),
        (
            lambda: shape_of(TINY.clone(z_dim=6), (2, 8, 8, 3), {"z": jnp.zeros((2, 5))}),
            r"cond\['z'\] must be \[B, 6\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def shape_of(net, shape, cond):
    return jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros(shape), T, cond))


def test_recomputing_blocks_changes_no_gradient():
    net = TINY.clone(channel_mult=(1,), attention_factors=(1,))
    params, x = drawn(net), images(2, 2, 2, 3)

    def gradient(module):
        return jax.grad(lambda p: jnp.mean(module.apply({"params": p}, x, T, {}) ** 2))

    plain, again = gradient(net), gradient(net.clone(remat=True))
    kinds = [{e.primitive.name for e in jax.make_jaxpr(form)(params).eqns} for form in (plain, again)]
    assert kinds[1] - kinds[0] == {"remat2"}
    found = [jax.jit(form)(params) for form in (plain, again)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)

"""Rules draw what they declare, and init_params depends on the key and the path of a leaf alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.networks import initializers
from jaxdiff.networks.base import declared_params, init_params, num_params, param_shapes
from jaxdiff.networks.mlp import MLP
from jaxdiff.networks.unet import UNet, example_inputs

SMALL = UNet(base_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4, attention_factors=(2,))
POINTS = (jnp.zeros((2, 2)), jnp.zeros(2), {})


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


@pytest.mark.parametrize("draw", ["host", "device"])
def test_rules_have_their_moments(draw):
    def sample(rule):
        if draw == "host":
            return rule.host(np.random.default_rng(0), (200, 200))
        return np.asarray(rule(jax.random.key(0), (200, 200)))

    uniform, normal = sample(initializers.Uniform(0.3)), sample(initializers.Normal(2.0))
    assert uniform.dtype == normal.dtype == np.float32
    assert 0.2999 < uniform.max() <= 0.3 and -0.3 <= uniform.min() < -0.2999
    assert abs(uniform.mean()) < 0.003 and uniform.std() == pytest.approx(0.3 / 3**0.5, rel=0.01)
    assert abs(normal.mean()) < 0.03 and normal.std() == pytest.approx(2.0, rel=0.02)
    np.testing.assert_array_equal(sample(initializers.Constant(0.5)), 0.5)


def test_layer_rules_follow_their_formulas():
    kernel, bias = initializers.torch_default(27, 64)
    assert kernel == bias == initializers.Uniform(27**-0.5)
    kernel, bias = initializers.fan_average(20, 44)
    assert kernel.limit**2 / 3 == pytest.approx(2 / (20 + 44)) and bias == initializers.ZEROS
    tiny, _ = initializers.fan_average_tiny(20, 44)
    assert tiny.limit == pytest.approx(1e-5 * kernel.limit)


def test_each_leaf_declares_the_rule_of_its_layer():
    declared = declared_params(SMALL, *example_inputs(SMALL))
    assert declared["conv_in"]["kernel"].rule == initializers.Uniform((9 * 3) ** -0.5)
    assert declared["conv_in"]["bias"].rule == initializers.Uniform((9 * 3) ** -0.5)
    assert declared["conv_out"]["kernel"].rule == initializers.ZEROS
    assert declared["down_0_0_res"]["norm_in"]["scale"].rule == initializers.ONES
    averaged = declared_params(SMALL.clone(layer_rule=initializers.fan_average), *example_inputs(SMALL))
    # q, k and v are three maps of 16 to 16 channels, drawn as such though they are one product
    assert averaged["mid_attention"]["qkv"]["kernel"].rule.limit == pytest.approx((6 / 32) ** 0.5)


def test_init_has_the_tree_of_module_init():
    params = init_params(SMALL, jax.random.key(0), *example_inputs(SMALL))
    plain = jax.eval_shape(lambda: SMALL.init(jax.random.key(0), jnp.zeros((1, 2, 2, 3)), jnp.zeros(1), {}))["params"]
    shapes = param_shapes(SMALL, *example_inputs(SMALL))
    like = jax.tree.map(lambda a: (a.shape, a.dtype), params)
    assert (
        like == jax.tree.map(lambda a: (a.shape, a.dtype), plain) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)
    )
    assert num_params(params) == num_params(shapes) == sum(a.size for a in jax.tree.leaves(params))


def test_module_init_follows_the_same_rules():
    module = MLP(features=64, num_blocks=1)
    host, device = init_params(module, jax.random.key(0), *POINTS), module.init(jax.random.key(0), *POINTS)["params"]
    assert jax.tree.structure(host) == jax.tree.structure(device)
    for path, leaf in flat(device).items():
        assert np.abs(leaf).max() <= np.float32(declared_limit(module, path))
    ours, theirs = (float(np.std(tree["block_0_in"]["kernel"])) for tree in (host, device))
    assert ours == pytest.approx(theirs, rel=0.05)


def declared_limit(module, path):
    leaf = declared_params(module, *POINTS)
    for part in path.split("/"):
        leaf = leaf[part]
    return leaf.rule.limit


def test_init_is_deterministic_by_key():
    draw = [flat(init_params(SMALL, jax.random.key(seed), *example_inputs(SMALL))) for seed in (0, 0, 1)]
    for path, leaf in draw[0].items():
        np.testing.assert_array_equal(leaf, draw[1][path])
    assert not np.array_equal(draw[0]["conv_in/kernel"], draw[2]["conv_in/kernel"])


def test_init_does_not_change_between_releases():
    params = init_params(MLP(features=4, num_blocks=1), jax.random.key(7), *POINTS)
    np.testing.assert_allclose(params["in"]["bias"], [0.48470682, -0.26627105, 0.40660518, 0.47067958], rtol=1e-6)


def test_a_leaf_does_not_depend_on_the_others():
    with_classes = SMALL.clone(num_classes=3)
    plain = flat(init_params(SMALL, jax.random.key(0), *example_inputs(SMALL)))
    more = flat(init_params(with_classes, jax.random.key(0), *example_inputs(with_classes)))
    assert set(more) - set(plain) == {"label/embedding"}
    for path, leaf in plain.items():
        np.testing.assert_array_equal(leaf, more[path])


def test_different_leaves_get_different_numbers():
    params = init_params(SMALL, jax.random.key(0), *example_inputs(SMALL))
    assert not np.array_equal(params["time_out"]["kernel"][0], params["time_out"]["kernel"][1])
    assert not np.array_equal(params["mid_res"]["conv_in"]["kernel"], params["mid_res_out"]["conv_in"]["kernel"])


def test_init_under_jit_and_vmap_gives_the_same_numbers():
    module = MLP(features=8, num_blocks=1)
    outside = init_params(module, jax.random.key(3), *POINTS)
    inside = jax.jit(lambda key: init_params(module, key, *POINTS))(jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, outside, inside)
    stacked = jax.vmap(lambda key: init_params(module, key, *POINTS))(jax.random.split(jax.random.key(0), 2))
    for i, key in enumerate(jax.random.split(jax.random.key(0), 2)):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), stacked, init_params(module, key, *POINTS)
        )


def test_keys_of_the_old_style_give_the_same_numbers():
    module = MLP(features=8, num_blocks=1)
    new, old = (init_params(module, make(5), *POINTS) for make in (jax.random.key, jax.random.PRNGKey))
    jax.tree.map(np.testing.assert_array_equal, new, old)


def test_undeclared_initialisers_are_refused():
    with pytest.raises(ValueError, match=r"2 parameters of Dense \(bias, kernel\) do not start by a declared rule"):
        init_params(nn.Dense(3), jax.random.key(0), jnp.zeros((1, 2)))

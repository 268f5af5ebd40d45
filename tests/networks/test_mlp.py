"""The network for points: shapes, conditions, gradients, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.initializers import zeros
from jaxdiff.networks.layers import fourier_embedding
from jaxdiff.networks.mlp import MLP

X, T = jnp.asarray([[0.1, -0.4], [1.0, 2.0], [0.3, 0.3]]), jnp.asarray([0.0, 10.0, 999.0])
LABEL = {"label": jnp.asarray([0, 1, 2], jnp.int32)}
CLASSES = MLP(features=8, num_blocks=2, num_classes=2, null_label=True)


def test_output_has_the_shape_of_the_points_or_the_width_asked_for():
    for module, width in ((MLP(features=8), 2), (MLP(features=8, out_features=5), 5)):
        params = init_params(module, jax.random.key(0), X, T, {})
        out = jax.eval_shape(as_network(module), params, X, T, {})
        assert out.shape == (3, width) and out.dtype == jnp.float32


def test_gradient_reaches_every_parameter_and_time_and_label_matter():
    params = init_params(CLASSES, jax.random.key(0), X, T, LABEL)
    network = jax.jit(as_network(CLASSES))
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(network(p, X, T, LABEL) ** 2)))(params)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))
    out = network(params, X, T, LABEL)
    assert np.abs(out - network(params, X, T + 1, LABEL)).min() > 0
    assert np.abs(out - network(params, X, T, {"label": LABEL["label"][::-1]}))[[0, 2]].min() > 0


def test_examples_do_not_mix():
    params = init_params(CLASSES, jax.random.key(0), X, T, LABEL)
    network = jax.jit(as_network(CLASSES))
    whole = network(params, X, T, LABEL)
    alone = network(params, X[1:2], T[1:2], {"label": LABEL["label"][1:2]})
    np.testing.assert_allclose(whole[1:2], alone, atol=1e-6)


def test_fields_choose_time_features_output_rule_and_dtype():
    module = MLP(features=8, time_features=fourier_embedding, output_rule=zeros, dtype=jnp.bfloat16)
    params = init_params(module, jax.random.key(0), X, T, {})
    out = jax.jit(as_network(module))(params, X, T / 1000, {})
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0.0)


def test_dropout_acts_in_training_only():
    module = MLP(features=16, dropout=0.5)
    params = init_params(module, jax.random.key(0), X, T, {})
    network, without = (jax.jit(as_network(m), static_argnames="train") for m in (module, MLP(features=16)))
    np.testing.assert_array_equal(network(params, X, T, {}), without(params, X, T, {}))
    assert np.abs(network(params, X, T, {}, train=True, key=jax.random.key(0)) - network(params, X, T, {})).max() > 1e-3
    with pytest.raises(ValueError, match="needs a random key"):
        network(params, X, T, {}, train=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"features": 2}, "at least 4 features and 1 block, got features 2"),
        ({"num_blocks": 0}, "at least 4 features and 1 block, got features 128 and num_blocks 0"),
        ({"null_label": True}, "null_label needs num_classes"),
        ({"dropout": -0.1}, "dropout must be at least 0 and below 1, got -0.1"),
    ],
)
def test_contradicting_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MLP(**fields)


def test_conditions_must_fit():
    with pytest.raises(ValueError, match=r"this MLP needs cond\['label'\], got cond with keys \[\]"):
        init_params(CLASSES, jax.random.key(0), X, T, {})
    with pytest.raises(ValueError, match="cond has 'label' but this MLP is not built for it"):
        init_params(MLP(features=8), jax.random.key(0), X, T, LABEL)

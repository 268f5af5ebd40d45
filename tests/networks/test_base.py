"""Parameter trees made from others, and trees that a network cannot take."""

import chex
import jax
import jax.numpy as jnp
import pytest

from jaxdiff.networks.base import as_network, grown, init_params
from jaxdiff.networks.mlp import MLP


def test_a_grown_student_starts_at_its_teacher():
    old = {"in": {"kernel": jnp.ones((2, 3))}, "out": jnp.zeros(2)}
    fresh = {"in": {"kernel": jnp.zeros((2, 3))}, "out": jnp.ones(2), "guidance": {"kernel": jnp.zeros((4, 3))}}
    chex.assert_trees_all_equal(grown(fresh, old), fresh | old)
    with pytest.raises(ValueError, match="student lacks 'guidance/kernel' of the teacher"):
        grown(old, fresh)
    with pytest.raises(ValueError, match=r"in/kernel is \(2, 3\) in the teacher and \(4,\) in the student"):
        grown(fresh | {"in": {"kernel": jnp.zeros(4)}}, old)


def test_parameters_of_another_network_are_refused_by_name():
    point, t = jnp.zeros((1, 2)), jnp.zeros(1)
    wide, narrow = (init_params(MLP(2, width, 1), jax.random.key(0), point, t, {}) for width in (16, 8))
    network = jax.jit(as_network(MLP(2, 16, 1)))
    assert network(wide, point, t, {}).shape == (1, 2)
    with pytest.raises(
        ValueError, match=r"^parameter time/kernel is \(8, 8\), the network takes \(16, 16\); build the"
    ):
        network(narrow, point, t, {})
    with pytest.raises(
        ValueError, match="^parameter in/kernel of the network is missing; build the network as the one"
    ):
        network({name: part for name, part in wide.items() if name != "in"}, point, t, {})

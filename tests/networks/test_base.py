"""Parameter trees made from others."""

import chex
import jax.numpy as jnp
import pytest

from jaxdiff.networks.base import grown


def test_a_grown_student_starts_at_its_teacher():
    old = {"in": {"kernel": jnp.ones((2, 3))}, "out": jnp.zeros(2)}
    fresh = {"in": {"kernel": jnp.zeros((2, 3))}, "out": jnp.ones(2), "guidance": {"kernel": jnp.zeros((4, 3))}}
    chex.assert_trees_all_equal(grown(fresh, old), fresh | old)
    with pytest.raises(ValueError, match="student lacks 'guidance/kernel' of the teacher"):
        grown(old, fresh)
    with pytest.raises(ValueError, match=r"in/kernel is \(2, 3\) in the teacher and \(4,\) in the student"):
        grown(fresh | {"in": {"kernel": jnp.zeros(4)}}, old)

"""What methods share."""

import jax
import jax.numpy as jnp
import pytest

from jaxdiff.methods.base import lazily


def test_a_lazy_term_is_there_every_nth_step_with_its_gradient():
    traces = []

    @jax.jit
    def value_and_grad(x, step):
        traces.append(None)
        return jax.value_and_grad(lambda x: x + lazily(step, 3, lambda: 10.0 * x))(x)

    for step in range(7):
        value, slope = value_and_grad(jnp.float32(2.0), jnp.int32(step))
        assert (value, slope) == ((22.0, 11.0) if step % 3 == 0 else (2.0, 1.0))
    assert len(traces) == 1
    with pytest.raises(ValueError, match="every n-th step, n at least 1, got 0"):
        lazily(jnp.int32(0), 0, lambda: jnp.float32(1.0))

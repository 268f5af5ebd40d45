"""DDGAN's discriminators: published sizes, deviation within a batch, derivatives, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.networks import convolution
from jaxdiff.networks.base import as_network, init_params, num_params, param_shapes
from jaxdiff.networks.ddgan_discriminators import (
    DDGANDiscriminator,
    append_batch_deviation,
    ddgan_large_discriminator,
    ddgan_small_discriminator,
    example_inputs,
)
from jaxdiff.networks.initializers import fan_average

TINY = DDGANDiscriminator(2, 4, channel_mult=(2, 3), halves=(False, True), time_features=8, final_rule=fan_average)


@functools.cache
def active_params(net=TINY):
    generator = np.random.default_rng(0)
    params = init_params(net, jax.random.key(0), *example_inputs(net))
    return jax.tree.map(lambda a: a + 0.1 * generator.standard_normal(a.shape, np.float32), params)


def inputs(batch=4, size=8):
    x_s, x_t = jax.random.normal(jax.random.key(1), (2, batch, size, size, 2))
    return x_s, jnp.arange(batch, dtype=jnp.float32), {"x_t": x_t}


@pytest.mark.parametrize(
    ("net", "millions"), [(ddgan_small_discriminator(), 12.742), (ddgan_large_discriminator(), 27.737)]
)
def test_parameter_count_is_the_released_one(net, millions):
    assert round(num_params(param_shapes(net, *example_inputs(net))) / 1e6, 3) == millions


@pytest.mark.parametrize("batch", [1, 3, 4, 8, 12])
def test_deviation_is_taken_over_every_nth_example(batch):
    x = np.random.default_rng(0).standard_normal((batch, 2, 3, 5)).astype(np.float32)
    out = np.asarray(append_batch_deviation(jnp.asarray(x)))
    np.testing.assert_array_equal(out[..., :5], x)
    groups = max(batch // 4, 1)
    for i in range(batch):
        expected = np.sqrt(x[i % groups :: groups].var(0) + 1e-8).mean()
        np.testing.assert_allclose(out[i, ..., 5], expected, rtol=1e-5)


def test_the_pair_and_the_time_are_seen():
    params, (x_s, t, cond) = active_params(), inputs()
    run = jax.jit(as_network(TINY))
    out = run(params, x_s, t, cond)
    assert out.shape == (4,)
    for changed in ((-x_s, t, cond), (x_s, t + 1.0, cond), (x_s, t, {"x_t": -cond["x_t"]})):
        assert np.abs(run(params, *changed) - out).min() > 1e-4


def test_second_derivatives_through_convolutions_with_their_own_backward_pass(monkeypatch):
    net, (x_s, t, cond) = TINY.clone(channel_mult=(2,), halves=(True,)), inputs()
    params = active_params(net)

    def r1(params):
        slope = jax.grad(lambda x: net.apply({"params": params}, x, t, cond).sum())(x_s)
        return jnp.square(slope).sum()

    plain = jax.jit(jax.grad(r1))(params)
    monkeypatch.setattr(convolution, "MANY_PRODUCTS", 1)
    own = jax.jit(jax.grad(lambda params: r1(params)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), own, plain)


def test_bfloat16_ends_in_float32():
    out = jax.jit(as_network(TINY))(active_params(), *inputs())
    half = jax.jit(as_network(TINY.clone(dtype=jnp.bfloat16)))(active_params(), *inputs())
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, out, atol=0.05 * np.abs(out).max())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TINY.clone(halves=(True,)), r"channel_mult \(2, 3\) and halves \(True,\) need one entry"),
        (
            lambda: append_batch_deviation(jnp.ones((6, 1, 1, 1))),
            "groups of 4, got 6 examples; .* batch_size / accumulate",
        ),
        (lambda: as_network(TINY)(active_params(), *inputs(size=7)), "H and W divisible by 2"),
        (lambda: as_network(TINY)(active_params(), *inputs()[:2], {}), r"needs cond\['x_t'\]"),
        (
            lambda: as_network(TINY)(active_params(), *inputs()[:2], {"x_t": jnp.ones((4, 4, 4, 2))}),
            r"cond\['x_t'\] must have the shape of x_s, \(4, 8, 8, 2\), got \(4, 4, 4, 2\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)

"""The convolutions' own forms against the library's, in every mode of differentiation, and over devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxdiff.flops import count_flops
from jaxdiff.networks import convolution
from jaxdiff.networks.attention import forward_mode, portable
from jaxdiff.networks.convolution import convolve, convolve_doubled

# b, h, w, i, o, k: more outputs, more inputs, 1x1, kernels wider than the image
SHAPES = [(2, 5, 7, 3, 4, 3), (2, 6, 5, 5, 3, 3), (2, 4, 4, 3, 5, 1), (1, 2, 3, 2, 3, 5), (3, 1, 1, 4, 4, 3)]


@pytest.fixture
def by_products(monkeypatch):
    """Sends small convolutions down the path of large ones."""
    monkeypatch.setattr(convolution, "MANY_PRODUCTS", 0)


def operands(b, h, w, i, o, k, dtype=jnp.float32):
    draw = np.random.default_rng(0)
    return tuple(jnp.asarray(draw.standard_normal(s), dtype) for s in ((b, h, w, i), (k, k, i, o)))


def library(x, kernel):
    return convolution._library(x, kernel, 1, (kernel.shape[0] // 2,) * 2)


def value_and_vjp(form, x, kernel):
    @jax.jit
    def both(x, kernel):
        out, vjp = jax.vjp(form, x, kernel)
        return out, vjp(jnp.cos(out))

    return both(x, kernel)


def close(ours, theirs, atol):
    def compare(a, b):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), atol=atol)

    jax.tree.map(compare, ours, theirs)


def is_ours(*a, **options):
    return "custom_vjp" in str(jax.make_jaxpr(lambda *a: convolve(*a, **options))(*a))


@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_the_librarys(by_products, shape):
    a = operands(*shape)
    assert is_ours(*a)
    close(value_and_vjp(convolve, *a), value_and_vjp(library, *a), atol=3e-5)


def test_gradients_in_other_precisions(by_products):
    half = operands(*SHAPES[0], jnp.bfloat16)
    out, grads = value_and_vjp(convolve, *half)
    assert {leaf.dtype for leaf in (out, *grads)} == {jnp.dtype(jnp.bfloat16)}
    exact = value_and_vjp(library, *(a.astype(jnp.float32) for a in half))
    close((out, grads), exact, atol=0.3)
    with jax.enable_x64(True):
        double = operands(*SHAPES[0], jnp.float64)
        close(value_and_vjp(convolve, *double), value_and_vjp(library, *double), atol=1e-12)


def test_gradient_of_a_gradient_norm(by_products):
    def penalty(form):
        def slope(*a):
            return sum(jnp.sum(g**2) for g in jax.grad(lambda *a: jnp.sum(jnp.sin(form(*a))), argnums=(0, 1))(*a))

        return jax.jit(jax.grad(slope, argnums=(0, 1)))

    with jax.enable_x64(True):
        a = operands(*SHAPES[0], jnp.float64)
        close(penalty(convolve)(*a), penalty(library)(*a), atol=1e-9)


def test_forward_mode_needs_its_context(by_products):
    a = operands(*SHAPES[0])
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(convolve, a, a)
    with forward_mode():
        out, slope = jax.jvp(convolve, a, a)
    np.testing.assert_allclose(slope, 2 * out, atol=1e-4)  # bilinear: along (x, k) itself the slope is twice the value


def doubled_by_the_library(x, kernel):
    return library(x.repeat(2, 1).repeat(2, 2), kernel)


@pytest.fixture
def four_small(monkeypatch, by_products):
    """Sends small images that are doubled down the path of large ones."""
    monkeypatch.setattr(convolution, "FEW_PIXELS", 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_derivative_of_a_doubled_convolution_and_its_gradient_are_the_librarys(four_small, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        a = operands(2, 5, 7, 3, 4, 3, dtype)
        tangents = jax.tree.map(jnp.cos, a)

        def slope_and_gradient(form):
            def total(*a):
                out = jax.jvp(form, a, tangents)
                return sum(jnp.sum(jnp.sin(part)) for part in out), out

            return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(*a)

        with forward_mode():
            ours = slope_and_gradient(convolve_doubled)
        close(ours, slope_and_gradient(doubled_by_the_library), atol=5e-5 if dtype == jnp.float32 else 1e-12)
        np.testing.assert_array_equal(ours[1][0], jax.jit(convolve_doubled)(*a))


def test_the_derivative_of_a_doubled_convolution_costs_two_of_the_plain_pass(four_small):
    x, kernel = operands(1, 8, 8, 3, 4, 3)

    def flops(function):
        return count_flops(jax.make_jaxpr(function)(x).jaxpr, padding=True)

    def slope(form):
        return flops(lambda x: jax.jvp(lambda x: form(x, kernel), (x,), (x,)))

    plain = flops(lambda x: convolve_doubled(x, kernel))
    with forward_mode():
        assert slope(convolve_doubled) == 2 * plain
    assert slope(doubled_by_the_library) == 2 * plain * 9 / 4


def test_only_large_convolutions_of_stride_one_have_their_own_gradient(by_products, monkeypatch):
    a = operands(2, 6, 6, 3, 4, 3)
    assert not is_ours(*a, stride=2)
    assert not is_ours(*a, pad=(0, 1))
    with portable():
        assert not is_ours(*a)
    monkeypatch.setattr(convolution, "MANY_PRODUCTS", 2 * 6 * 6 * 3 * 4 + 1)
    assert not is_ours(*a)


def test_a_batch_over_two_devices_only_sums_the_weight_gradient(by_products):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    a = operands(4, 5, 6, 3, 4, 3)
    places = {"in_shardings": (split, whole), "out_shardings": (split, (split, whole))}
    program = jax.jit(lambda *a: value_and_vjp(convolve, *a), **places).lower(*a).compile()
    # One sum for each row of the kernel at most: XLA may join them.
    found = re.findall(r" (all-\w+|collective-\w+|reduce-scatter)\S*\(", program.as_text())
    assert set(found) == {"all-reduce"} and len(found) <= 3
    close(program(jax.device_put(a[0], split), jax.device_put(a[1], whole)), value_and_vjp(library, *a), atol=3e-5)

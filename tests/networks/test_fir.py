"""FIR resampling against a definition in NumPy, and the identities that tie its forms together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.networks import fir
from jaxdiff.networks.convolution import convolve
from jaxdiff.networks.layers import downsample_mean, upsample_nearest

TAPS = (1.0, 3.0, 3.0, 1.0)
INSIDE = slice(2, -2)


def compiled(function, taps=TAPS):
    return jax.jit(functools.partial(function, taps=taps))


def image(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def by_definition(row, taps, up, down, pad):
    spread = np.zeros(len(row) * up)
    spread[::up] = row
    spread = np.pad(spread, [max(p, 0) for p in pad])
    spread = spread[max(-pad[0], 0) : len(spread) - max(-pad[1], 0)]
    return np.convolve(spread, taps, mode="valid")[::down]


@pytest.mark.parametrize(("up", "down", "pad"), [(1, 1, (0, 0)), (2, 1, (2, 1)), (1, 2, (1, 1)), (3, 2, (4, -1))])
def test_upfirdn_is_its_definition_along_both_axes(up, down, pad):
    taps = (0.5, -1.0, 2.0)
    x = image(0, 1, 6, 7, 1)
    expected = np.stack([by_definition(row, taps, up, down, pad) for row in np.asarray(x)[0, :, :, 0]])
    expected = np.stack([by_definition(column, taps, up, down, pad) for column in expected.T]).T
    found = jax.jit(functools.partial(fir.upfirdn, taps=taps, up=up, down=down, pad=pad))(x)
    np.testing.assert_allclose(found[0, :, :, 0], expected, atol=1e-5)


def test_resampling_keeps_a_constant_inside_the_image():
    x = jnp.ones((1, 8, 8, 2))
    enlarged, shrunk = (np.asarray(compiled(f)(x)) for f in (fir.upsample_fir, fir.downsample_fir))
    np.testing.assert_allclose(enlarged[:, INSIDE, INSIDE], 1.0, atol=1e-6)
    np.testing.assert_allclose(shrunk[:, 1:-1, 1:-1], 1.0, atol=1e-6)


def test_two_equal_taps_repeat_pixels_and_take_means():
    x = image(1, 2, 4, 6, 3)
    np.testing.assert_allclose(compiled(fir.upsample_fir, (1.0, 1.0))(x), upsample_nearest(x), atol=1e-6)
    np.testing.assert_allclose(compiled(fir.downsample_fir, (1.0, 1.0))(x), downsample_mean(x), atol=1e-6)


def test_enlarging_is_four_times_the_adjoint_of_shrinking():
    small, large = image(2, 1, 4, 4, 2), image(3, 1, 8, 8, 2)
    left = np.sum(compiled(fir.upsample_fir)(small) * np.asarray(large))
    np.testing.assert_allclose(left, 4 * np.sum(small * np.asarray(compiled(fir.downsample_fir)(large))), rtol=1e-5)


def test_filtering_and_convolving_with_stride_is_convolving_and_then_shrinking_inside():
    x, kernel = image(4, 1, 12, 12, 2), image(5, 3, 3, 2, 3)
    found = np.asarray(compiled(fir.downsample_conv)(x, kernel))
    assert found.shape == (1, 6, 6, 3)
    expected = np.asarray(compiled(lambda x, kernel, taps: fir.downsample_fir(convolve(x, kernel), taps))(x, kernel))
    np.testing.assert_allclose(found[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], atol=1e-4)


def test_convolving_between_pixels_and_filtering_is_enlarging_and_then_convolving_inside():
    x, kernel = image(6, 1, 6, 6, 2), image(7, 3, 3, 2, 3)
    found = np.asarray(compiled(fir.upsample_conv)(x, kernel))
    assert found.shape == (1, 12, 12, 3)
    expected = np.asarray(compiled(lambda x, kernel, taps: convolve(fir.upsample_fir(x, taps), kernel))(x, kernel))
    np.testing.assert_allclose(found[:, INSIDE, INSIDE], expected[:, INSIDE, INSIDE], atol=1e-4)


def test_half_precision_stays_half_precision():
    assert jax.eval_shape(compiled(fir.upsample_fir), jnp.ones((1, 4, 4, 1), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: fir.upfirdn(x, TAPS, up=0), "factors of at least 1 and at least one tap, got up 0"),
        (lambda x: fir.upfirdn(x, ()), "at least one tap"),
        (lambda x: fir.upfirdn(x, TAPS), "has 2 pixels after padding, fewer than the 4 taps; use a larger image"),
        (lambda x: fir.upsample_fir(x, (1.0, -1.0)), "taps must not sum to zero"),
    ],
)
def test_what_cannot_be_filtered_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(make, jnp.ones((1, 2, 2, 1)))

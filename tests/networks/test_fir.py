"""FIR resampling against a definition in NumPy, and the identities that tie its forms together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.networks import fir
from jaxdiff.networks.convolution import convolve
from jaxdiff.networks.layers import downsample_mean, upsample_nearest

TAPS = (1.0, 3.0, 3.0, 1.0)
INSIDE = slice(2, -2)


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
    found = fir.upfirdn(x, taps, up=up, down=down, pad=pad)
    np.testing.assert_allclose(found[0, :, :, 0], expected, atol=1e-5)


def test_resampling_keeps_a_constant_inside_the_image():
    x = jnp.ones((1, 8, 8, 2))
    np.testing.assert_allclose(fir.upsample_fir(x, TAPS)[:, INSIDE, INSIDE], 1.0, atol=1e-6)
    np.testing.assert_allclose(fir.downsample_fir(x, TAPS)[:, 1:-1, 1:-1], 1.0, atol=1e-6)


def test_two_equal_taps_repeat_pixels_and_take_means():
    x = image(1, 2, 4, 6, 3)
    np.testing.assert_allclose(fir.upsample_fir(x, (1.0, 1.0)), upsample_nearest(x), atol=1e-6)
    np.testing.assert_allclose(fir.downsample_fir(x, (1.0, 1.0)), downsample_mean(x), atol=1e-6)


def test_enlarging_is_four_times_the_adjoint_of_shrinking():
    small, large = image(2, 1, 4, 4, 2), image(3, 1, 8, 8, 2)
    left = jnp.sum(fir.upsample_fir(small, TAPS) * large)
    np.testing.assert_allclose(left, 4 * jnp.sum(small * fir.downsample_fir(large, TAPS)), rtol=1e-5)


def test_filtering_and_convolving_with_stride_is_convolving_and_then_shrinking_inside():
    x, kernel = image(4, 1, 12, 12, 2), image(5, 3, 3, 2, 3)
    found = fir.downsample_conv(x, kernel, TAPS)
    assert found.shape == (1, 6, 6, 3)
    expected = fir.downsample_fir(convolve(x, kernel), TAPS)
    np.testing.assert_allclose(found[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], atol=1e-4)


def test_convolving_between_pixels_and_filtering_is_enlarging_and_then_convolving_inside():
    x, kernel = image(6, 1, 6, 6, 2), image(7, 3, 3, 2, 3)
    found = fir.upsample_conv(x, kernel, TAPS)
    assert found.shape == (1, 12, 12, 3)
    expected = convolve(fir.upsample_fir(x, TAPS), kernel)
    np.testing.assert_allclose(found[:, INSIDE, INSIDE], expected[:, INSIDE, INSIDE], atol=1e-4)


def test_half_precision_stays_half_precision():
    assert fir.upsample_fir(jnp.ones((1, 4, 4, 1), jnp.bfloat16), TAPS).dtype == jnp.bfloat16


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

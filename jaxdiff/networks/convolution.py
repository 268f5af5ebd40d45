"""One convolution of images, and one of images doubled before it, in forms that are fast on a CPU.

The gradient of a kernel is a matrix product, x^T g at each offset of the kernel. XLA's convolution computes it on a
CPU in up to three times the time of that product (measured with jax 0.10 on one core), so large convolutions of stride
1 have it written out here. A convolution after a doubling reads every pixel four times; on a CPU the products that
repeat are made once. Everything else, and every other device, takes the library's convolution as it is.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxdiff.networks.attention import only_cpu, only_reverse_mode

# Multiply-adds at one offset of the kernel from which on the products are faster.
MANY_PRODUCTS = 2**23
# Pixels below which making four kernels out of one takes longer than they save.
FEW_PIXELS = 64


def convolve(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"], stride: int = 1, pad: tuple[int, int] | None = None
) -> Float[Array, "b h2 w2 o"]:
    """Convolution (correlation) of images with a square kernel.

    Args:
      x: [B, H, W, I].
      kernel: [K, K, I, O], in the dtype of x.
      stride: step of the output grid.
      pad: zeros before and after each row and column; None for K // 2 on both sides.

    Returns:
      [B, H2, W2, O]; H2 = H for stride 1, odd K and no pad given.
    """
    (b, h, w, i), (size, _, _, o) = x.shape, kernel.shape
    pad = _half(kernel) if pad is None else pad
    plain = stride != 1 or size % 2 == 0 or pad != _half(kernel)
    if plain or not only_reverse_mode() or b * h * w * i * o < MANY_PRODUCTS:
        return _library(x, kernel, stride, pad)
    return _same(x, kernel)


def convolve_doubled(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b h2 w2 o"]:
    """`convolve` of an image whose height and width are doubled before it, by repeating each pixel.

    An output pixel sees 2 x 2 pixels of the image; which ones, and with which weights, depends on the parity of its
    row and column alone. So four convolutions by 2 x 2 kernels, whose entries are sums of entries of `kernel`, do the
    same with 4/9 of the products.

    Args:
      x: [B, H, W, I].
      kernel: [3, 3, I, O], in the dtype of x.

    Returns:
      [B, 2 H, 2 W, O].
    """
    (b, h, w, i), o = x.shape, kernel.shape[-1]
    few = h * w < FEW_PIXELS or 4 * b * h * w * i * o < MANY_PRODUCTS
    # Sums of kernel entries would round once more in half precision.
    if few or not only_cpu() or x.dtype not in (jnp.float32, jnp.float64):
        return convolve(x.repeat(2, 1).repeat(2, 2), kernel)
    convolve_small = _parity if only_reverse_mode() else _parity_library
    out = jnp.zeros((b, h, 2, w, 2, o), x.dtype)
    for row, over_rows in enumerate(_halved(kernel)):
        for column, small in enumerate(_halved(over_rows.swapaxes(0, 1))):
            part = convolve_small(x, small.swapaxes(0, 1), row, column).reshape(b, h, 1, w, 1, o)
            # Writing in place compiles faster than stacking.
            out = lax.dynamic_update_slice(out, part, (0, 0, row, 0, column, 0))
    return out.reshape(b, 2 * h, 2 * w, o)


def _halved(kernel: Array) -> tuple[Array, Array]:
    """[3, ...] to [2, ...] twice: what the taps of even and of odd pixels add up to on the pixels before doubling."""
    return jnp.stack([kernel[0], kernel[1] + kernel[2]]), jnp.stack([kernel[0] + kernel[1], kernel[2]])


def _parity_library(x: Array, kernel: Array, row: int, column: int) -> Array:
    """Convolution by a 2 x 2 kernel that begins at the pixel before (0) or at the pixel itself (1)."""
    pads = ((1 - row, row), (1 - column, column))
    return lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


_with_static: Any = functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
_parity = _with_static(_parity_library)


def _parity_forward(x: Array, kernel: Array, row: int, column: int) -> tuple[Array, tuple[Array, Array]]:
    return _parity(x, kernel, row, column), (x, kernel)


def _parity_backward(row: int, column: int, residuals: tuple[Array, Array], out_bar: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    (_, h, w, _), around = x.shape, ((0, 0), (1, 1), (1, 1), (0, 0))
    padded = jnp.pad(x, around)
    over_positions = (((0, 1, 2), (0, 1, 2)), ((), ()))

    def offset(a: int, c: int) -> Array:
        return lax.dot_general(padded[:, row + a : row + a + h, column + c : column + c + w], out_bar, over_positions)

    # The transposed convolution is the other parity of the kernel turned round.
    x_bar = _parity(out_bar, kernel[::-1, ::-1].swapaxes(2, 3), 1 - row, 1 - column)
    return x_bar, jnp.stack([jnp.stack([offset(a, c) for c in (0, 1)]) for a in (0, 1)])


_parity.defvjp(_parity_forward, _parity_backward)


def _half(kernel: Array) -> tuple[int, int]:
    return kernel.shape[0] // 2, kernel.shape[0] // 2


def _library(x: Array, kernel: Array, stride: int, pad: tuple[int, int]) -> Array:
    return lax.conv_general_dilated(x, kernel, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.custom_vjp
def _same(x: Array, kernel: Array) -> Array:
    return _library(x, kernel, 1, _half(kernel))


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _same(x, kernel), (x, kernel)


def _backward(residuals: tuple[Array, Array], out_bar: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    _, input_vjp = jax.vjp(lambda x: _library(x, kernel, 1, _half(kernel)), x)
    return *input_vjp(out_bar), _kernel_gradient(x, out_bar, kernel.shape[0])


def _kernel_gradient(x: Array, out_bar: Array, size: int) -> Array:
    """sum over b, y, x of padded x[b, y + a, x + c, i] out_bar[b, y, x, o] for each offset (a, c).

    The side with fewer channels is shifted; its shifts along a row lie side by side as columns, so that a kernel of
    3 x 3 costs three products. The batch is only summed over: split over devices, each needs its own part of it.
    """
    (_, h, _, i), o = x.shape, out_bar.shape[-1]
    narrow, wide = (out_bar, x) if o <= i else (x, out_bar)
    # Shifting the output by an offset is shifting the input by its opposite.
    offsets = [size - 1 - a if o <= i else a for a in range(size)]
    columns = _columns(narrow, offsets)
    over_positions = (((0, 1, 2), (0, 1, 2)), ((), ()))
    rows = [lax.dot_general(wide, columns[:, a : a + h], over_positions) for a in offsets]
    if o <= i:
        return jnp.stack(rows).reshape(size, i, size, o).transpose(0, 2, 1, 3)
    return jnp.stack(rows).reshape(size, o, size, i).transpose(0, 2, 3, 1)


def _columns(a: Array, offsets: list[int]) -> Array:
    """[B, H + K - 1, W, K C]: the rows between K // 2 rows of zeros; block j holds a shifted by offsets[j] - K // 2."""
    (b, h, w, c), half = a.shape, len(offsets) // 2
    columns = jnp.zeros((b, h + 2 * half, w, len(offsets) * c), a.dtype)
    for j, offset in enumerate(offsets):
        shift = offset - half
        part = a[:, :, max(shift, 0) : w + min(shift, 0)]
        # Writing in place compiles in half the time of padding and concatenating.
        columns = lax.dynamic_update_slice(columns, part, (0, half, max(-shift, 0), j * c))
    return columns


_same.defvjp(_forward, _backward)

"""Runge-Kutta of order 5 with an error estimate of order 4 that sets the step size, in one lax.while_loop.

The method of Dormand and Prince with the step control of SciPy's `solve_ivp(method="RK45")`, so that network calls
are counted as in the papers that used it. Not a `Solver`, since it finds its own grid. It knows no noise level: it
integrates any dx/dt, over any stretch of t in either direction. A batch shares the step size.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

NODES = np.array([1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0])
# Row i - 1 is what x at stage i takes of the slopes before it; the last row is the result, whose slope starts the next.
STAGES = np.array([
    [1 / 5, 0, 0, 0, 0, 0, 0],
    [3 / 40, 9 / 40, 0, 0, 0, 0, 0],
    [44 / 45, -56 / 15, 32 / 9, 0, 0, 0, 0],
    [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0, 0],
    [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0, 0],
    [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0],
])  # fmt: skip
ERROR = np.array([-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40])
SAFETY, SMALLEST, LARGEST = 0.9, 0.2, 10.0
EXPONENT = -1 / 5


class RK45State(NamedTuple):
    """x and its slope at t, the length of the next step, whether the last one was refused, and the calls made."""

    x: Array
    slope: Array
    t: Array
    h: Array
    refused: Array
    num_calls: Array


def rk45(
    derivative: Callable[[Array, Array], Array],
    x: Float[Array, "b ..."],
    t_start: float | Float[Array, ""],
    t_end: float | Float[Array, ""],
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_calls: int = 2000,
) -> tuple[Float[Array, "b ..."], Int[Array, ""]]:
    """Follows dx/dt from t_start to t_end with steps as large as the tolerance allows.

    A step is kept if the root mean square over the whole batch of error / (atol + rtol max(|x|, |new x|)) is below 1.

    Args:
      derivative: (x [B, ...], t [B]) -> dx/dt.
      x: [B, ...] at t_start.
      t_start, t_end: the stretch; t_end may be the smaller one.
      rtol, atol: relative and absolute tolerance.
      max_calls: bound of the calls of `derivative`.

    Returns:
      x [B, ...] at t_end, and the number of calls: two to begin, six for each step tried. If the bound is reached or
      an error is not finite, x is NaN everywhere.

    Raises:
      ValueError: for a tolerance that is not positive.

    Source: Dormand & Prince 1980; Hairer, Norsett & Wanner 1993 section II.4 for the step control.
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not value > 0:
            raise ValueError(f"rk45: {name} must be positive, got {value}")
    start, end = (jnp.asarray(t, x.dtype) for t in (t_start, t_end))
    direction, span = jnp.sign(end - start), jnp.abs(end - start)

    def slope(x, t):
        return derivative(x, jnp.full(x.shape[:1], t, x.dtype))

    def begin(x):
        """The slope at the start and the first |h|, from two calls in a loop, which holds the network once."""
        scale = atol + rtol * jnp.abs(x)

        def call(ends, _):
            f = slope(*ends)
            size, speed = _rms(x / scale), _rms(f / scale)
            tiny = (size < 1e-5) | (speed < 1e-5)
            h = jnp.minimum(jnp.where(tiny, 1e-6, 0.01 * size / jnp.where(tiny, 1.0, speed)), span)
            return (x + direction * h * f, start + direction * h), (f, h, speed)

        _, (f, h, speed) = jax.lax.scan(call, (x, start), None, length=2)
        h, speed = h[0], speed[0]
        bend = _rms((f[1] - f[0]) / scale) / jnp.where(h > 0, h, 1.0)
        most = jnp.maximum(speed, bend)
        still = most <= 1e-15
        longer = jnp.where(still, jnp.maximum(1e-6, 1e-3 * h), (0.01 / jnp.where(still, 1.0, most)) ** -EXPONENT)
        return f[0], jnp.minimum(jnp.minimum(100 * h, longer), span)

    def going(state):
        return (direction * (end - state.t) > 0) & jnp.isfinite(state.h) & (state.num_calls < max_calls)

    def attempt(state):
        t_new = jnp.where(state.h >= jnp.abs(end - state.t), end, state.t + direction * state.h)
        h = t_new - state.t

        def stage(carry, row):
            slopes, _ = carry
            i, weights, node = row
            x = state.x + h * jnp.tensordot(weights, slopes, 1)
            return (slopes.at[i].set(slope(x, state.t + node * h)), x), None

        slopes = jnp.zeros((7, *x.shape), x.dtype).at[0].set(state.slope)
        rows = (jnp.arange(1, 7), jnp.asarray(STAGES, x.dtype), jnp.asarray(NODES, x.dtype))
        (slopes, x_new), _ = jax.lax.scan(stage, (slopes, state.x), rows)
        scale = atol + rtol * jnp.maximum(jnp.abs(state.x), jnp.abs(x_new))
        error = _rms(h * jnp.tensordot(jnp.asarray(ERROR, x.dtype), slopes, 1) / scale)
        keep = error < 1
        factor = SAFETY * jnp.maximum(error, jnp.finfo(x.dtype).tiny) ** EXPONENT
        longest = jnp.where(state.refused, 1.0, LARGEST)
        factor = jnp.where(keep, jnp.minimum(factor, longest), jnp.maximum(factor, SMALLEST))
        return RK45State(
            x=jnp.where(keep, x_new, state.x),
            slope=jnp.where(keep, slopes[6], state.slope),
            t=jnp.where(keep, t_new, state.t),
            h=jnp.abs(h) * factor,
            refused=~keep,
            num_calls=state.num_calls + 6,
        )

    f, h = begin(x)
    state = RK45State(x, f, start, h, jnp.zeros([], bool), jnp.full([], 2, jnp.int32))
    state = jax.lax.while_loop(going, attempt, state)
    arrived = direction * (end - state.t) <= 0
    return jnp.where(arrived, state.x, jnp.full_like(x, jnp.nan)), state.num_calls


def _rms(x):
    return jnp.sqrt(jnp.mean(jnp.square(x)))

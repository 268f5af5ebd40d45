"""UniPC of order 1 to 3 with data prediction: a multistep predictor, corrected once the next prediction is known.

From s to t, with r_i = (lambda_i - lambda_s) / h for earlier predictions m_i and r = 1 for the one at t,
    x_t = on_x x_s - alpha_t (psi_1 m + sum_i w_i (m_i - m) / r_i),   sum_i w_i r_i^(j-1) = j! psi_{j+1}, j = 1, 2, ..
in the notation of `exponential`. The predictor leaves the unknown prediction at t out; the corrector has it, from the
network call that the next step makes anyway, so that each step costs one call. The last x is predicted, not corrected.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.schedules import Schedule
from jaxdiff.solvers.base import Solver
from jaxdiff.solvers.exponential import (
    DATA_ODE,
    check_choice,
    check_final_order,
    check_order,
    earlier,
    psi,
    ratio,
    step_orders,
    steps_of,
)


class PredictorCorrector(NamedTuple):
    """Every step of a grid: x_t = on_x x + sum_j predict[j] m_j, then on_x x + on_next m_t + sum_j correct[j] m_j.

    on_x, on_next [n - 1]; predict, correct [n - 1, order], for m_0 the newest.
    """

    on_x: Array
    predict: Array
    correct: Array
    on_next: Array


class UniPCState(NamedTuple):
    """index: steps made. linear: coefficients. x: corrected, before the last step. history: the last predictions."""

    index: Array
    linear: PredictorCorrector
    x: Array
    history: tuple[Array, ...]


def unipc(schedule: Schedule, order: int = 2, *, variant: str = "bh2", final_order: int | None = None) -> Solver:
    """UniPC-p, whose corrected steps have order p + 1. Step k has order min(k, order).

    Times may be traced and may increase (inversion). With "bh2" the first level may be pure noise (alpha = 0).

    Args:
      schedule: of the noise levels.
      order: p = 1, 2 or 3.
      variant: B(h) where one difference is weighted without solving for it: "bh1" is h, "bh2" is e^h - 1.
      final_order: order of the last step of the grid, one more for each step before it; None keeps the full order.
        The releases have 1 when the grid ends at a real noise level, and diffusers 2 before its step to clean data.

    Returns:
      Solver with one network call a step.

    Raises:
      ValueError: for an order or a variant that does not exist.

    Source: Zhao et al. 2023 (arXiv:2302.04867) algorithms 1-2 and appendix F (data prediction).
    """
    check_order("unipc", order)
    check_choice("unipc", "variant", variant, ("bh1", "bh2"))
    check_final_order("unipc", final_order)

    def init(x, times):
        linear = predictor_corrector(schedule, times, order, variant, final_order)
        linear = jax.tree.map(lambda a: a.astype(x.dtype), linear)
        return UniPCState(jnp.zeros([], jnp.int32), linear, x, (jnp.zeros_like(x),) * order)

    def step(noise, state, x, t, s, denoise):
        del noise, s
        x0 = denoise(x, t).x0
        c = jax.tree.map(lambda a: a[jnp.maximum(state.index - 1, 0)], state.linear)
        corrected = c.on_x * state.x + c.on_next * x0 + sum(c.correct[j] * m for j, m in enumerate(state.history))
        x = jnp.where(state.index > 0, corrected, x)
        c = jax.tree.map(lambda a: a[state.index], state.linear)
        history = (x0, *state.history[:-1])
        predicted = c.on_x * x + sum(c.predict[j] * m for j, m in enumerate(history))
        return predicted, UniPCState(state.index + 1, state.linear, x, history), x0

    return Solver(init, step)


def predictor_corrector(
    schedule: Schedule, times: Float[Array, " n"], order: int, variant: str, final_order: int | None
) -> PredictorCorrector:
    """The coefficients of `unipc` for a grid. Arguments as there."""
    grid = steps_of(schedule, times)
    orders = step_orders(grid.h.size, order, final_order)
    move = DATA_ODE.move(grid.s, grid.t, grid.h)
    psi_1, psi_2, psi_3, psi_4 = psi(move.z, 4)
    half = (move.z if variant == "bh1" else psi_1) / 2
    moments = (psi_2, 2 * psi_3, 6 * psi_4)
    h_1 = earlier(grid.h, 1)
    r_1, r_2, one = _node(-h_1, grid.h), _node(-h_1 - earlier(grid.h, 2), grid.h), jnp.ones_like(grid.h)
    none = jnp.zeros_like(grid.h)

    def select(*by_order):
        return jnp.select([orders == p for p in (1, 2, 3)], by_order, none)

    def on_history(d_1, d_2, on_next):
        d_1, d_2 = ratio(d_1, r_1), ratio(d_2, r_2)
        weights = [psi_1 - d_1 - d_2 - on_next, d_1, d_2][:order]
        return -move.scale[:, None] * jnp.stack(weights, axis=1)

    p_1, p_2 = _two(r_1, r_2, moments)
    predict = on_history(select(none, half, p_1), select(none, none, p_2), none)
    a_1, a_next = _two(r_1, one, moments)
    b_1, b_2, b_next = _three(r_1, r_2, one, moments)
    on_next = select(half, a_next, b_next)
    correct = on_history(select(none, a_1, b_1), select(none, none, b_2), on_next)
    return PredictorCorrector(move.on_x, predict, correct, -move.scale * on_next)


def _node(distance, h):
    """distance / h, bounded: an infinitely far point, which is pure noise, gets a weight that vanishes.

    Where h is 0 or infinite there is nothing to weight, and any point behind will do.
    """
    return jnp.where((h == 0) | jnp.isinf(h), -jnp.ones_like(h), jnp.clip(ratio(distance, h), -1e4, 1e4))


def _two(a, b, moments):
    """The weights of two nodes with sum w = moments[0] and sum w r = moments[1]."""
    on_b = ratio(moments[1] - a * moments[0], b - a)
    return moments[0] - on_b, on_b


def _three(a, b, c, moments):
    """The weights of three nodes with sum w r^j = moments[j] for j = 0, 1, 2."""

    def weight(r, p, q):
        return ratio(moments[2] - (p + q) * moments[1] + p * q * moments[0], (r - p) * (r - q))

    return weight(a, b, c), weight(b, a, c), weight(c, a, b)

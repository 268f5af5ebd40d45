"""Multistep DPM-Solver and DPM-Solver++ of order 1 to 3, and their SDE versions: one network call a step.

The prediction m (x0 or eps, see `exponential.Form`) is expanded around the current time; its derivatives come from the
predictions of earlier steps. With a = h / h_1 and D = a (m - m_1), order 2 is
    x_t = on_x x_s - scale (psi_1 m + w D),   w = psi_1 / 2 ("midpoint") or psi_2 ("taylor", "heun"),
and order 3 adds the second difference. Each step is therefore linear in x, m, m_1, m_2, with coefficients that depend
on the grid alone: `init` computes them for the whole grid. Order 1 is DDIM. Single-step versions are in
`dpm_solver_singlestep`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.schedules import Schedule
from jaxdiff.solvers.base import Solver
from jaxdiff.solvers.exponential import (
    DATA_ODE,
    VARIANTS,
    Form,
    check_choice,
    check_final_order,
    check_order,
    earlier,
    psi,
    ratio,
    step_orders,
    steps_of,
)


class Linear(NamedTuple):
    """Every step of a grid: x_t = on_x x + sum_j on_m[j] m_j + on_noise noise, m_0 the newest.

    on_x and on_noise [n - 1], on_m [n - 1, order].
    """

    on_x: Array
    on_m: Array
    on_noise: Array


class MultistepState(NamedTuple):
    """index: steps made. linear: coefficients of the grid. history: the last order - 1 predictions, newest first."""

    index: Array
    linear: Linear
    history: tuple[Array, ...]


def dpm_solver(
    schedule: Schedule,
    order: int = 2,
    *,
    form: Form = DATA_ODE,
    variant: str = "midpoint",
    final_order: int | None = None,
    released_third_order: bool = False,
) -> Solver:
    """The multistep solver of the DPM-Solver family. 2M of DPM-Solver++ by default.

    Step k has order min(k, order). Times may be traced; they may also increase, which inverts the ODE (data to noise).
    Equal neighbours in the grid are steps that move nothing.

    Args:
      schedule: of the noise levels; any, not only variance preserving ones.
      order: 1, 2 or 3.
      form: DATA_ODE (DPM-Solver++), NOISE_ODE (DPM-Solver), DATA_SDE or NOISE_SDE, from `solvers.exponential`.
      variant: weight of the first difference in order 2: "midpoint", or "taylor", which is also called "heun".
      final_order: order of the last step of the grid, one more for each step before it; None keeps the full order.
        The official code has 1 for grids of fewer than 10 steps, diffusers for fewer than 15: it steadies few large
        steps but costs order 3 one order. With `sample`, the step to clean data is already of first order, so that
        None (order 2) or 2 (order 3) is what diffusers does with `final_sigmas_type="zero"`.
      released_third_order: halve the second difference of order 3, as the official code and diffusers do. It then
        converges with order 2.

    Returns:
      Solver with one network call a step.

    Raises:
      ValueError: for an order or a variant that does not exist.

    Source: Lu et al. 2022 (arXiv:2206.00927) section 3; Lu et al. 2022b (arXiv:2211.01095) algorithm 2, section 5.
    """
    check_order("dpm_solver", order)
    check_choice("dpm_solver", "variant", variant, VARIANTS)
    check_final_order("dpm_solver", final_order)
    second_difference = 1.0 if released_third_order else 2.0

    def init(x, times):
        linear = multistep_linear(schedule, times, order, form, variant, final_order, second_difference)
        linear = jax.tree.map(lambda a: a.astype(x.dtype), linear)
        return MultistepState(jnp.zeros([], jnp.int32), linear, (jnp.zeros_like(x),) * (order - 1))

    def step(noise, state, x, t, s, denoise):
        del s
        x0 = denoise(x, t).x0
        predictions = (form.predict(x0, x, schedule.level(t)), *state.history)
        c = jax.tree.map(lambda a: a[state.index], state.linear)
        x = c.on_x * x + sum(c.on_m[j] * m for j, m in enumerate(predictions))
        if form.stochastic:
            x = x + c.on_noise * noise
        return x, MultistepState(state.index + 1, state.linear, predictions[: order - 1]), x0

    return Solver(init, step)


def multistep_linear(
    schedule: Schedule,
    times: Float[Array, " n"],
    order: int,
    form: Form,
    variant: str,
    final_order: int | None,
    second_difference: float,
) -> Linear:
    """The coefficients of `dpm_solver` for a grid. Arguments as there; second_difference: 2 (exact) or 1 (released)."""
    grid = steps_of(schedule, times)
    move = form.move(grid.s, grid.t, grid.h)
    orders = step_orders(grid.h.size, order, final_order)
    psi_1, psi_2, psi_3 = psi(move.z, 3)
    h, h_1, h_2 = grid.h, earlier(grid.h, 1), earlier(grid.h, 2)
    none = jnp.zeros_like(h)
    # differences: (m - m_1) h / h_1 and (m_1 - m_2) h / h_2, and what order 3 adds for the change between them
    bend = psi_2 * ratio(h_1, h_1 + h_2) + second_difference * psi_3 * ratio(h, h_1 + h_2)
    single = psi_1 / 2 if variant == "midpoint" else psi_2
    first = jnp.where(orders == 3, psi_2 + bend, single) * ratio(h, h_1)
    second = -bend * ratio(h, h_2)
    # selected after multiplying, since a step from pure noise has infinite h
    first, second = jnp.where(orders >= 2, first, none), jnp.where(orders == 3, second, none)
    on_m = [-move.scale * (psi_1 + first), move.scale * (first - second), move.scale * second]
    return Linear(move.on_x, jnp.stack(on_m[:order], axis=1), move.on_noise)

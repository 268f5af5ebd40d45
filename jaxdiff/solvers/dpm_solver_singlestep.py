"""Single-step DPM-Solver and DPM-Solver++: 2S, 3S and plans that mix orders, with one network call a scan step.

A step of order q from s to t calls the network at s and at q - 1 stages between s and t, and forgets it all at t. Here
the grid is the grid of calls: s, s1, s2, t, s1', ... and one solver step goes from a call to the next, always starting
from the base point s, so that n calls asked are n calls run and the network is compiled once. States between block ends
are stages, not samples. `stage_times` builds such a grid; a grid with equal steps in time (or in its root) is one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from jaxdiff.schedules import Schedule
from jaxdiff.solvers.base import Solver
from jaxdiff.solvers.exponential import (
    DATA_ODE,
    VARIANTS,
    Form,
    check_choice,
    check_order,
    psi,
    ratio,
    steps_of,
)
from jaxdiff.types import Level


class Stages(NamedTuple):
    """Every call of a grid: x = on_x base + on_first m_0 + on_second m_1 + on_new m, m the call's own. Each [n - 1].

    place: position of the call in its block: 0 at the base point, then 1 and 2.
    """

    on_x: Array
    on_first: Array
    on_second: Array
    on_new: Array
    place: Array


class SinglestepState(NamedTuple):
    """index: calls made. stages: coefficients. base, first, second: x and m at the base point, m at the next stage."""

    index: Array
    stages: Stages
    base: Array
    first: Array
    second: Array


def singlestep_orders(num_calls: int, order: int) -> tuple[int, ...]:
    """The orders of the blocks that spend `num_calls` network calls: as many of `order` as fit, then lower ones.

    For order 3 the rest is (2, 1), (1) or (2), so that 3n calls end 3, .., 3, 2, 1. For order 2 an odd call is a block
    of order 1.

    Raises:
      ValueError: if order is not 1, 2 or 3 or num_calls is below 1.

    Source: Lu et al. 2022 (arXiv:2206.00927) section 3.4, "DPM-Solver-fast".
    """
    check_order("singlestep_orders", order)
    if num_calls < 1:
        raise ValueError(f"singlestep_orders: num_calls must be at least 1, got {num_calls}")
    if order == 3 and num_calls % 3 == 0:
        return (3,) * (num_calls // 3 - 1) + (2, 1)
    rest = num_calls % order
    return (order,) * (num_calls // order) + ((rest,) if rest else ())


def stage_times(
    outer: Float64[np.ndarray, " k"],
    orders: tuple[int, ...],
    between: Callable[[float, float, int], np.ndarray],
) -> Float64[np.ndarray, " n"]:
    """The grid of calls, from the grid of block ends.

    Args:
      outer: [len(orders) + 1] times of the block ends.
      orders: order of each block.
      between: (start, end, n) -> n times from start to end, both included, such as `times.time_uniform`.

    Returns:
      float64 [sum(orders) + 1].

    Raises:
      ValueError: if outer does not have one time more than there are blocks.
    """
    if len(outer) != len(orders) + 1:
        raise ValueError(f"stage_times: {len(orders)} blocks need {len(orders) + 1} outer times, got {len(outer)}")
    blocks = [between(float(s), float(t), q + 1)[:-1] for s, t, q in zip(outer[:-1], outer[1:], orders, strict=True)]
    return np.concatenate([*blocks, outer[-1:]])


def dpm_solver_singlestep(
    schedule: Schedule, orders: tuple[int, ...], *, form: Form = DATA_ODE, variant: str = "midpoint"
) -> Solver:
    """The single-step solver of the DPM-Solver family, for a grid of sum(orders) + 1 times.

    Where a stage lies between its neighbours is read from the grid; 1/2 (order 2), 1/3 and 2/3 (order 3) of a block
    in half log SNR are the paper's. Times may be traced, and may increase (inversion). The first level needs signal
    (alpha > 0) unless the first block has order 1.

    Args:
      schedule: of the noise levels.
      orders: of the blocks, each 1, 2 or 3; see `singlestep_orders`.
      form: DATA_ODE (DPM-Solver++) or NOISE_ODE (DPM-Solver), from `solvers.exponential`.
      variant: how a block's last stage uses the differences: "midpoint" (the official "dpmsolver"), or "taylor", which
        is also called "heun".

    Returns:
      Solver with one network call a step. With `sample`, the call at the last time makes the step to clean data.

    Raises:
      ValueError: for a stochastic form, an unknown variant, an order outside 1 .. 3, or, when run, another grid length.

    Source: Lu et al. 2022 (arXiv:2206.00927) algorithms 1-2 and appendix B; Lu et al. 2022b (arXiv:2211.01095)
    algorithm 1.
    """
    for order in orders:
        check_order("dpm_solver_singlestep", order)
    check_choice("dpm_solver_singlestep", "variant", variant, VARIANTS)
    if form.stochastic:
        raise ValueError("dpm_solver_singlestep: got a stochastic form; use DATA_ODE or NOISE_ODE, or dpm_solver")

    def init(x, times):
        if times.size != sum(orders) + 1:
            raise ValueError(
                f"dpm_solver_singlestep: blocks of orders {orders} need {sum(orders) + 1} times, got {times.size}; "
                "see singlestep_orders and stage_times"
            )
        stages = stage_table(schedule, times, orders, form, variant)
        stages = jax.tree.map(lambda a: a.astype(x.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, stages)
        nothing = jnp.zeros_like(x)
        return SinglestepState(jnp.zeros([], jnp.int32), stages, nothing, nothing, nothing)

    def step(noise, state, x, t, s, denoise):
        del noise, s
        x0 = denoise(x, t).x0
        m = form.predict(x0, x, schedule.level(t))
        c = jax.tree.map(lambda a: a[state.index], state.stages)
        base, first = jnp.where(c.place == 0, x, state.base), jnp.where(c.place == 0, m, state.first)
        second = jnp.where(c.place == 1, m, state.second)
        x = c.on_x * base + c.on_first * first + c.on_second * second + c.on_new * m
        return x, SinglestepState(state.index + 1, state.stages, base, first, second), x0

    return Solver(init, step)


def stage_table(
    schedule: Schedule, times: Float[Array, " n"], orders: tuple[int, ...], form: Form, variant: str
) -> Stages:
    """The coefficients of `dpm_solver_singlestep` for a grid of calls."""
    place = np.array([p for q in orders for p in range(q)], np.int32)
    last = np.array([p == q - 1 for q in orders for p in range(q)])
    goal = np.arange(1, place.size + 1)
    base = goal - 1 - place
    grid = steps_of(schedule, times)
    position, level = grid.half_log_snr, schedule.level(times)
    # from the base point to this call's goal, to the first stage and to the second
    h, h_1 = position[goal] - position[base], position[base + 1] - position[base]
    h_2 = position[np.minimum(base + 2, place.size)] - position[base]
    move = form.move(Level(level.alpha[base], level.sigma[base]), Level(level.alpha[goal], level.sigma[goal]), h)
    psi_1, psi_2, psi_3 = psi(move.z, 3)
    none = jnp.zeros_like(h)
    # weights of m_1 - m_0 and m_2 - m_0
    slope_1, slope_2 = ratio(h, h_1), ratio(h, h_2)
    if variant == "midpoint":
        at_1 = jnp.where(last, psi_1 / 2, psi_2) * slope_1
        of_1, of_2 = none, psi_2 * slope_2
    else:
        at_1 = psi_2 * slope_1
        of_1 = slope_1 * ratio(h_2 * psi_2 - 2 * h * psi_3, h_2 - h_1)
        of_2 = slope_2 * ratio(2 * h * psi_3 - h_1 * psi_2, h_2 - h_1)
    on_second = jnp.where(place == 2, of_1, none)
    on_new = jnp.where(place == 2, of_2, jnp.where(place == 1, at_1, none))
    return Stages(
        on_x=move.on_x,
        on_first=-move.scale * (psi_1 - on_second - on_new),
        on_second=-move.scale * on_second,
        on_new=-move.scale * on_new,
        place=jnp.asarray(place),
    )

"""DPM-Solver-12 and -23: single steps of two orders whose difference sets the step size, in one lax.while_loop.

Not a `Solver`, since it finds its own grid: `integrate_adaptive` goes from one time to another. A batch shares the step
size, so the samples of a batch depend on each other. The step to clean data, `denoise(x, t_end).x0`, is left to the
caller.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff.process import half_log_snr
from jaxdiff.schedules import Schedule
from jaxdiff.solvers.dpm_solver_singlestep import dpm_solver_singlestep, stage_table
from jaxdiff.solvers.exponential import DATA_ODE, Form, check_order
from jaxdiff.types import Denoiser


class AdaptiveState(NamedTuple):
    """x, its lower-order estimate, where we are (t and half log SNR), the next |h|, and the network calls made."""

    x: Array
    x_lower: Array
    t: Array
    position: Array
    h: Array
    num_calls: Array


def integrate_adaptive(
    schedule: Schedule,
    denoise: Denoiser,
    x: Float[Array, "b ..."],
    t_start: float | Float[Array, ""],
    t_end: float | Float[Array, ""],
    *,
    order: int = 3,
    form: Form = DATA_ODE,
    variant: str = "midpoint",
    h_0: float = 0.05,
    atol: float = 0.0078,
    rtol: float = 0.05,
    theta: float = 0.9,
    max_calls: int = 2000,
) -> tuple[Float[Array, "b ..."], Int[Array, ""]]:
    """Follows the ODE from t_start to t_end with steps as large as the tolerance allows.

    A step is kept if the worst example of the batch has E <= 1, where E is the root mean square of
    (x_high - x_low) / max(atol, rtol max(|x_low|, |previous x_low|)); the next |h| is theta |h| E^(-1 / order).

    Args:
      schedule: of the noise levels.
      denoise: (x_t, t) -> Denoised.
      x: [B, ...] noisy data at t_start, where alpha must be positive.
      t_start, t_end: in the schedule's unit. t_end may be the noisier one (inversion).
      order: 2 (orders 1 and 2, "12") or 3 (orders 2 and 3, "23").
      form: DATA_ODE or NOISE_ODE, from `solvers.exponential`.
      variant: "midpoint" or "taylor", as in `dpm_solver_singlestep`.
      h_0: first step, in half log SNR.
      atol: absolute tolerance, in the unit of x. The default is 2 / 256, one grey level of data in [-1, 1].
      rtol: relative tolerance.
      theta: safety factor of the step size, below 1.
      max_calls: bound of the network calls.

    Returns:
      x [B, ...] at t_end, and the number of network calls, `order` for each step tried. If the bound is reached or an
      error is not finite, x is NaN everywhere.

    Raises:
      ValueError: for an order, variant, form or tolerance that cannot work.

    Source: Lu et al. 2022 (arXiv:2206.00927) appendix C, algorithm 3; norm and step of Jolicoeur-Martineau et al. 2021.
    """
    check_order("integrate_adaptive", order, (2, 3))
    for name, value in (("h_0", h_0), ("atol", atol), ("rtol", rtol), ("theta", theta)):
        if not value > 0:
            raise ValueError(f"integrate_adaptive: {name} must be positive, got {value}")
    solver = dpm_solver_singlestep(schedule, (order,), form=form, variant=variant)
    ends = jnp.stack([jnp.asarray(t, x.dtype) for t in (t_start, t_end)])
    start, end = half_log_snr(schedule.level(ends))
    direction, span = jnp.sign(end - start), jnp.abs(end - start)
    fractions = jnp.arange(1, order + 1, dtype=x.dtype) / order

    def going(state):
        finite = jnp.isfinite(state.h)
        return (jnp.abs(end - state.position) > 1e-5 * span) & finite & (state.num_calls < max_calls)

    def attempt(state):
        remaining = jnp.abs(end - state.position)
        inner = schedule.time(state.position + direction * state.h * fractions)
        inner = inner.at[-1].set(jnp.where(state.h >= remaining, ends[1], inner[-1]))
        times = jnp.concatenate([state.t[None], inner])
        high, block = _block(solver, denoise, state.x, times)
        low = _lower(schedule, block, times, order, form, variant)
        error = _error(high, low, state.x_lower, atol, rtol)
        keep = error <= 1
        left = jnp.where(keep, jnp.maximum(remaining - state.h, 0), remaining)
        h = jnp.minimum(theta * state.h * error ** (-1 / order), left)
        return AdaptiveState(
            x=jnp.where(keep, high, state.x),
            x_lower=jnp.where(keep, low, state.x_lower),
            t=jnp.where(keep, times[-1], state.t),
            position=jnp.where(keep, end - direction * left, state.position),
            h=h,
            num_calls=state.num_calls + order,
        )

    first = jnp.minimum(jnp.asarray(h_0, x.dtype), span)
    state = AdaptiveState(x, x, ends[0], start, first, jnp.zeros([], jnp.int32))
    state = jax.lax.while_loop(going, attempt, state)
    arrived = jnp.abs(end - state.position) <= 1e-5 * span
    return jnp.where(arrived, state.x, jnp.full_like(x, jnp.nan)), state.num_calls


def _block(solver, denoise, x, times):
    """One block of the single-step solver over its grid of calls, as a scan, so that the network is compiled once."""
    batch = x.shape[:1]

    def body(carry, ends):
        t, s = (jnp.full(batch, e, e.dtype) for e in ends)
        x, state, _ = solver.step(carry[0], carry[1], carry[0], t, s, denoise)
        return (x, state), None

    return jax.lax.scan(body, (x, solver.init(x, times)), (times[:-1], times[1:]))[0]


def _lower(schedule, block, times, order, form, variant):
    """The same step with one order less, from predictions that the block has made."""
    table = stage_table(schedule, jnp.delete(times, order - 1, assume_unique_indices=True), (order - 1,), form, variant)
    c = jax.tree.map(lambda a: a[-1], table)
    return c.on_x * block.base + c.on_first * block.first + c.on_new * block.second


def _error(high, low, previous_low, atol, rtol):
    scaled = (high - low) / jnp.maximum(atol, rtol * jnp.maximum(jnp.abs(low), jnp.abs(previous_low)))
    return jnp.sqrt(jnp.mean(scaled.reshape(scaled.shape[0], -1) ** 2, axis=1)).max()

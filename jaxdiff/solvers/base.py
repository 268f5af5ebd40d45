"""From noise to data: a Solver is three functions, and one lax.scan carries them along a grid of times.

`integrate` makes the n - 1 steps between the n real noise levels of `times`; `sample` adds the step from the last
level to clean data. The clean end is not a time, so no step divides by a zero sigma, and a one-step generator is the
empty scan: `sample(solver, denoise, key, x, times=[t_max])` is one call of the denoiser.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.schedules import Schedule
from jaxdiff.types import Denoised, Denoiser, Key, Level

State = Any


def last_x0(noise: Array, state: State, x: Array, t: Array, denoise: Denoiser) -> Array:
    """The step to clean data of nearly every solver: the denoiser's x0."""
    del noise, state
    return denoise(x, t).x0


class Solver(NamedTuple):
    """One way to go from a noise level to the next.

    Attributes:
      init: (x [B, ...], times [n]) -> state. Arrays in the state take their dtype from x.
      step: (noise, state, x, t, s, denoise) -> (x_s, state, x0), from time t to the less noisy s, both [B]. noise is
        unit normal in the shape of x; x0 is the prediction the step was made with, for previews.
      finish: (noise, state, x, t, denoise) -> x0, from the last time to clean data.
    """

    init: Callable[[Array, Array], State]
    step: Callable[[Array, State, Array, Array, Array, Denoiser], tuple[Array, State, Array]]
    finish: Callable[[Array, State, Array, Array, Denoiser], Array] = last_x0


def level_like(schedule: Schedule, t: Float[Array, " b"], x: Array) -> Level:
    """The level of t in the dtype of x, so that a solver keeps the dtype it was given."""
    level = schedule.level(t)
    return Level(level.alpha.astype(x.dtype), level.sigma.astype(x.dtype))


def no_state(x: Array, times: Array) -> None:
    """The `init` of a solver without memory."""
    del x, times


class Trajectory(NamedTuple):
    """Every state of a run: x [n - 1, B, ...] after each step, and x0 [n - 1, B, ...], which it was made with."""

    x: Array
    x0: Array


def integrate(
    solver: Solver,
    denoise: Denoiser,
    key: Key,
    x: Float[Array, "b ..."],
    times: Float[Array, " n"],
    *,
    noise: Array | None = None,
    return_trajectory: bool = False,
) -> Any:
    """Follows `times` from the first to the last, one solver step between neighbours.

    Args:
      solver: the rule of one step.
      denoise: (x_t, t) -> Denoised.
      key: for the noise of stochastic solvers; deterministic ones do not draw.
      x: [B, ...] noisy data at times[0], scaled as the schedule says (alpha x0 + sigma eps).
      times: [n] decreasing, all real noise levels. n = 1 returns x.
      noise: [n - 1 or more, B, ...] unit normal noise to use in order, instead of drawing from the key.
      return_trajectory: also return every state.

    Returns:
      x [B, ...] at times[-1], or (x, Trajectory).
    """
    x, _, trajectory = _scan(solver, denoise, key, x, times, noise, return_trajectory)
    return (x, trajectory) if return_trajectory else x


def sample(
    solver: Solver,
    denoise: Denoiser,
    key: Key,
    x: Float[Array, "b ..."],
    times: Float[Array, " n"],
    *,
    noise: Array | None = None,
    return_trajectory: bool = False,
) -> Any:
    """`integrate`, then the step from times[-1] to clean data. n times are n steps of the solver.

    Args and Returns: as for `integrate`, with noise [n, B, ...] and the clean data as the last state.
    """
    last = times.size - 1
    if last == 0:
        return _finish_alone(solver, denoise, key, x, times, noise, return_trajectory)
    x, _, trajectory = _scan(solver, denoise, key, x, times, noise, return_trajectory, finish=True)
    return (x, trajectory) if return_trajectory else x


def _finish_alone(solver, denoise, key, x, times, noise, return_trajectory):
    eps = _noise(key, 0, x) if noise is None else noise[0]
    x = solver.finish(eps, solver.init(x, times), x, jnp.full(x.shape[:1], times[0], times.dtype), denoise)
    return (x, Trajectory(x[None], x[None])) if return_trajectory else x


def _scan(solver, denoise, key, x, times, noise, return_trajectory, *, finish=False):
    batch, last = x.shape[:1], times.size - 1

    def body(carry, inputs):
        x, state = carry
        i, t, s = inputs
        eps = _noise(key, i, x) if noise is None else noise[i]
        t, s = jnp.full(batch, t, t.dtype), jnp.full(batch, s, s.dtype)
        if not finish:
            x, state, x0 = solver.step(eps, state, x, t, s, denoise)
        else:
            known = _remembering(denoise, x, t)
            x, state, x0 = jax.lax.cond(
                i == last,
                lambda: _finished(solver.finish(eps, state, x, t, known), state),
                lambda: solver.step(eps, state, x, t, s, known),
            )
        return (x, state), Trajectory(x, x0) if return_trajectory else None

    state = solver.init(x, times)
    count = times.size if finish else last
    if count == 0:  # no step: its body, which may look at neighbours in the grid, is not even traced
        none = jnp.zeros((0, *x.shape), x.dtype)
        return x, state, Trajectory(none, none) if return_trajectory else None
    # The finish has no next time: its s is never looked at.
    inputs = (jnp.arange(count), times[:count], jnp.append(times[1:], times[-1])[:count])
    (x, state), trajectory = jax.lax.scan(body, (x, state), inputs)
    return x, state, trajectory


def _finished(x0, state):
    return x0, state, x0


def _remembering(denoise: Denoiser, x: Array, t: Array) -> Denoiser:
    """The denoiser, with its answer at (x, t) computed once for the step and the finish, of which one is taken.

    So a sampler holds the network once, not twice, which halves its compile time.
    """
    here = denoise(x, t)

    now = t

    def known(x_t: Array, t: Array) -> Denoised:
        return here if x_t is x and t is now else denoise(x_t, t)

    return known


def _noise(key, i, x):
    return jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)

"""What a paper adds to the library: a Method, four pure functions.

`training/step.py` is the only train step. It walks over `objectives` in order, differentiates each for its own
player, applies that player's optimiser, and ends with `advance`. `generate` is the method's own way from noise to
data. Nothing here knows a network, a data set or a device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxdiff.schedules import Schedule
from jaxdiff.solvers.base import Solver
from jaxdiff.types import Array, Cond, Key, Metrics, Params

Players = dict[str, Params]
Aux = Any
Batch = dict[str, Array]


@runtime_checkable
class LossFn(Protocol):
    """(params, aux, batch, key, step) -> (scalar, metrics); the gradient is taken in params[player] alone.

    A metric is a scalar or a per-example [B] array. Logs show means; `advance` sees the arrays whole.
    """

    def __call__(self, params: Players, aux: Aux, batch: Batch, key: Key, step: Array) -> tuple[Array, Metrics]: ...


class Objective(NamedTuple):
    """A loss, the player it trains, and how often (`every` = 2: on even steps only)."""

    player: str
    loss: LossFn
    every: int = 1


class Sampling(NamedTuple):
    """How to generate. Only `num_steps` and `solver` are static; changing the arrays compiles nothing.

    Attributes:
      num_steps: number of points of the method's own time grid, or None for the method's default. Ignored when
        `times` is given.
      solver: builds a solver for a schedule, or None for the method's own.
      times: [n] decreasing grid in the schedule's unit, instead of the method's own.
      guidance_scale: scalar; 1 is no guidance, None leaves the unconditional pass out.
    """

    num_steps: int | None = None
    solver: Callable[[Schedule], Solver] | None = None
    times: Array | None = None
    guidance_scale: Array | None = None


def read_batch(batch: Batch, method: str, needed: tuple[str, ...] = ("x0",)) -> tuple[Array, Cond]:
    """x0 and, as conditioning, all other arrays of a batch.

    Args:
      batch: {"x0": [B, ...], further arrays [B, ...]}.
      method: its name, for the message.
      needed: names without which the method cannot train.

    Raises:
      ValueError: if one of them is missing.
    """
    for name in needed:
        if name not in batch:
            raise ValueError(f"{method}: a batch needs {name!r}, got keys {sorted(batch)}; rename it in the data")
    return batch["x0"], {name: value for name, value in batch.items() if name != "x0"}


def copied(tree: Params) -> Params:
    """The same numbers in buffers of their own, as trees in aux need."""
    return jax.tree.map(jnp.array, tree)


def lazily(step: Array, every: int, term: Callable[[], Array]) -> Array:
    """A term of a loss on every `every`-th step, from step 0 on, and 0 between: a lazy regulariser.

    It is part of one update, unlike an objective with `every`. On a CPU it is computed and thrown away, since
    convolutions are slow in a branch (see `training.step`).

    Args:
      step: of training, traced.
      every: >= 1.
      term: () -> scalar.

    Raises:
      ValueError: if every is below 1.
    """
    if every < 1:
        raise ValueError(f"a term is added every n-th step, n at least 1, got {every}")
    if every == 1:
        return term()
    now = step % every == 0
    if jax.default_backend() == "cpu":
        value = term()
        return jnp.where(now, value, jnp.zeros_like(value))
    like = jax.eval_shape(term)
    return jax.lax.cond(now, term, lambda: jnp.zeros(like.shape, like.dtype))


def keep(aux: Aux, params: Players, step: Array, metrics: Metrics) -> Aux:
    """The `advance` of a method without anything to move."""
    del params, step, metrics
    return aux


class Method(NamedTuple):
    """A generative method.

    Attributes:
      init: (key, batch) -> (params: {player: tree}, aux). aux holds whatever is not optimised: teacher, target
        network, statistics. Trees in aux are copies: a donated state may hold no buffer twice. It must be traceable:
        `jaxdiff info` and resuming take only its shapes.
      objectives: in update order. A later objective sees the parameters that the earlier ones updated.
      generate: (params, aux, key, noise, cond, sampling) -> samples [B, ...]. noise is unit normal [B, ...].
      advance: (aux, params, step, metrics) -> aux, after all updates of a step.
    """

    init: Callable[[Key, Batch], tuple[Players, Aux]]
    objectives: tuple[Objective, ...]
    generate: Callable[[Players, Aux, Key, Array, Cond, Sampling], Array]
    advance: Callable[[Aux, Players, Array, Metrics], Aux] = keep

"""The only train step: every method of this library is trained by this function.

For each objective of the method, in order: gradient in its own player's parameters, that player's optimiser, and on to
the next objective with the new parameters. Then `advance`, then the moving averages. A step whose loss or
gradient is not finite changes nothing but the step number, and says so. Compute dtype and rematerialisation belong to
the network, gradient clipping to the optax chain; devices are `sharding.py`'s.

Convolutions that run backward inside a loop or a branch are 10 to 40 times slower on a CPU (measured with XLA of jax
0.10: 2.06 s in `lax.cond`, 0.84 s in `lax.scan`, 0.06 s outside). So on a CPU micro-batches are unrolled, and an
objective that does not fire is computed and thrown away; elsewhere the same code is a scan and a branch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jaxdiff.methods.base import Batch, Method, Objective
from jaxdiff.training import ema as ema_lib
from jaxdiff.training.state import TrainState, check_players
from jaxdiff.types import Key, Metrics, Params

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class _Turn(NamedTuple):
    """What one objective leaves behind: new parameters and optimiser state, logs, and the method's raw metrics."""

    params: Params
    opt_state: Any
    finite: Array
    logs: Metrics
    metrics: Metrics


def make_train_step(
    method: Method,
    optimizers: Mapping[str, optax.GradientTransformation],
    emas: Sequence[ema_lib.EMA] = (),
    *,
    accumulate: int = 1,
) -> TrainStep:
    """Builds the train step of a method.

    Args:
      method: objectives, `advance`.
      optimizers: {player: optimiser} for every trained player. A learning rate that lives in the state
        (`optax.inject_hyperparams`) or in a schedule changes without compiling again.
      emas: averages to update; the same ones that `create_state` was given.
      accumulate: number of micro-batches. Micro-batch m holds rows m, m + accumulate, ... so that each device keeps
        its own rows; gradients are averaged over them.

    Returns:
      (state, batch) -> (state, metrics), pure, not yet compiled. Objective i draws from
      fold_in(fold_in(key, step), i), folded once more with the micro-batch. Metrics are scalars: `finite` (bool, all
      objectives), the method's own by their own names (arrays as means), and per objective `PLAYER/loss` and
      `PLAYER/grad_norm` (the second objective of one player is called PLAYER_2). Where an objective did not fire, its
      entries are NaN, integers 0; `advance` sees the same. A scalar metric is the mean over the micro-batches where it
      is not NaN, as `health` says NaN where examples are missing; a loss or gradient that is NaN in one of them is NaN.

    Raises:
      ValueError: if players and optimisers do not match, or accumulate or `every` is below 1. While tracing: if two
        objectives return a metric of one name, the batch does not divide into micro-batches, or `advance` changes
        the form of aux.
    """
    check_players(method, optimizers)
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1 micro-batch, got {accumulate}")
    for objective in method.objectives:
        if objective.every < 1:
            raise ValueError(f"objective of {objective.player!r}: every must be at least 1, got {objective.every}")
    labels = _labels(method.objectives)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch_size = jax.tree.leaves(batch)[0].shape[0]
        if batch_size % accumulate:
            raise ValueError(f"batch of {batch_size} does not divide into accumulate={accumulate} micro-batches")
        key = jax.random.fold_in(state.key, state.step)
        params, opt_state, metrics = dict(state.params), dict(state.opt_state), {}
        logs, finite = {}, jnp.bool_(True)
        for index, objective in enumerate(method.objectives):
            player = objective.player
            take = _turn(objective, optimizers[player], accumulate)
            turn = take(params, opt_state[player], state.aux, batch, jax.random.fold_in(key, index), state.step)
            params[player], opt_state[player] = turn.params, turn.opt_state
            finite &= turn.finite
            logs |= {f"{labels[index]}/{name}": value for name, value in turn.logs.items()}
            _merge(metrics, turn.metrics, labels[index])
        aux = method.advance(state.aux, params, state.step, metrics)
        _check_same_form(state.aux, aux)
        after, before = (params, opt_state, aux), (state.params, state.opt_state, state.aux)
        params, opt_state, aux = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
        averages = ema_lib.update(emas, state.ema, params, state.step, batch_size, moving=finite)
        _merge(logs, {name: _mean(value) for name, value in metrics.items()}, "the method")
        _merge(logs, {"finite": finite}, "the train step")
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=averages, aux=aux)
        return state, logs

    return train_step


def _turn(objective: Objective, optimizer: optax.GradientTransformation, accumulate: int) -> Callable[..., _Turn]:
    """One objective's share of a step, as a function of the parameters of all players."""
    player = objective.player

    def fire(params: Any, opt_state: Any, aux: Any, batch: Any, key: Key, step: Array) -> _Turn:
        def loss_of(own: Params, rows: Batch, key: Key) -> tuple[Array, Metrics]:
            loss, metrics = objective.loss({**params, player: own}, aux, rows, key, step)
            return loss, jax.tree.map(jnp.asarray, metrics)

        own = params[player]
        (loss, metrics), grads = _value_and_grad(loss_of, own, batch, key, accumulate)
        # optax mixes integers and floats in places, which strict promotion refuses; the rest of the step stays strict.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, opt_state, own)
        logs = {"loss": loss, "grad_norm": _norm(grads)}
        # A norm that overflows counts as not finite; so does anything that is infinite in the gradient.
        finite = jnp.stack([jnp.isfinite(value) for value in logs.values()]).all()
        return _Turn(optax.apply_updates(own, updates), opt_state, finite, logs, metrics)

    def take(params: Any, opt_state: Any, aux: Any, batch: Any, key: Key, step: Array) -> _Turn:
        operands = (params, opt_state, aux, batch, key, step)
        if objective.every == 1:
            return fire(*operands)

        def rest(like: Any) -> _Turn:
            nothing = jax.tree.map(_nothing, like)
            return nothing._replace(params=params[player], opt_state=opt_state, finite=jnp.bool_(True))

        now = step % objective.every == 0
        if _nested_is_slow():
            fired = fire(*operands)
            return jax.tree.map(lambda yes, no: jnp.where(now, yes, no), fired, rest(fired))
        fire_once = jax.jit(fire)  # asked for its shapes and then called, but traced a single time
        like = jax.eval_shape(fire_once, *operands)
        return jax.lax.cond(now, lambda: fire_once(*operands), lambda: rest(like))

    return take


def _value_and_grad(
    loss_of: Callable[..., Any], own: Params, batch: Batch, key: Key, accumulate: int
) -> tuple[tuple[Array, Metrics], Params]:
    """Loss, metrics and gradient over micro-batches: means, and per-example metrics in the order of the batch.

    Metrics that are NaN in a micro-batch are left out of the mean, losses and gradients never.
    """
    grad = jax.value_and_grad(loss_of, has_aux=True)
    if accumulate == 1:
        return grad(own, batch, jax.random.fold_in(key, 0))

    def one(total: Params, micro: tuple[Array, Batch]) -> tuple[Params, tuple[Array, Metrics]]:
        index, rows = micro
        out, grads = grad(own, rows, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, grads), out

    def split(rows: Array) -> Array:
        return rows.reshape(rows.shape[0] // accumulate, accumulate, *rows.shape[1:]).swapaxes(0, 1)

    def join(values: Array) -> Array:
        return jnp.nanmean(values, 0) if values.ndim == 1 else values.swapaxes(0, 1).reshape(-1, *values.shape[2:])

    micro = (jnp.arange(accumulate), jax.tree.map(split, batch))
    unroll = accumulate if _nested_is_slow() else 1
    total, (loss, metrics) = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, own), micro, unroll=unroll)
    return (loss.mean(), jax.tree.map(join, metrics)), jax.tree.map(lambda grads: grads / accumulate, total)


def _nested_is_slow() -> bool:
    return jax.default_backend() == "cpu"


def _labels(objectives: Sequence[Objective]) -> list[str]:
    """PLAYER, and PLAYER_2, ... for its further objectives."""
    players = [objective.player for objective in objectives]
    counts = [players[: index + 1].count(player) for index, player in enumerate(players)]
    return [player if count == 1 else f"{player}_{count}" for player, count in zip(players, counts, strict=True)]


def _merge(into: Metrics, new: Metrics, origin: str) -> None:
    for name, value in new.items():
        if name in into:
            raise ValueError(f"metric {name!r} of {origin} has a name that is taken: rename it")
        into[name] = value


def _check_same_form(before: PyTree[Any], after: PyTree[Any]) -> None:
    def forms(tree: PyTree[Any]) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}

    old, new = forms(before), forms(after)
    for name in [*old, *new]:
        if old.get(name) != new.get(name):
            got, wanted = new.get(name, "missing"), old.get(name, "absent")
            raise ValueError(f"advance must return aux in the form it came: aux{name} is {got}, was {wanted}")


def _norm(tree: PyTree[Any]) -> Array:
    return optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(ema_lib.at_least_float32(leaf.dtype)), tree))


def _mean(value: Array) -> Array:
    return value.mean() if jnp.issubdtype(value.dtype, jnp.inexact) else value.astype(jnp.float32).mean()


def _nothing(shape: Any) -> Array:
    return jnp.full(shape.shape, jnp.nan if jnp.issubdtype(shape.dtype, jnp.inexact) else 0, shape.dtype)

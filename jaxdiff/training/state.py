"""The train state: everything that a step carries over, and everything that a checkpoint must hold.

A state is plain data, one tree of arrays. Creating it copies what the method's `init` returned, because a donated
tree may hold no buffer twice (parameters and their average, student and teacher). Moving it to devices by the rule of
`sharding.py` happens in the same compiled call.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from jaxdiff.methods.base import Aux, Method, Players
from jaxdiff.training import ema as ema_lib
from jaxdiff.training import sharding
from jaxdiff.types import Key


class TrainState(flax.struct.PyTreeNode):
    """Carried from step to step.

    Attributes:
      step: int32 scalar, number of finished steps.
      key: typed PRNG key; never changes, each step folds its number into it.
      params: {player: tree}.
      opt_state: {player: optax state}.
      ema: {name: {player: tree}}.
      aux: whatever the method carries besides: teacher, target network, statistics.
    """

    # Not annotated as arrays: trees of shapes, shardings and booleans take this form, too.
    step: Any
    key: Any
    params: Any
    opt_state: Any
    ema: Any
    aux: Any


class Weights(NamedTuple):
    """The part of a train state that sampling needs."""

    params: Players
    ema: dict[str, Players]
    aux: Aux

    def select(self, name: str | None) -> Players:
        """Parameters to sample with.

        Args:
          name: name of an average, or None for the raw parameters. Players without that average keep raw ones.

        Raises:
          ValueError: if there is no average of that name.
        """
        if name is None:
            return self.params
        if name not in self.ema:
            raise ValueError(f"no EMA is called {name!r}: {sorted(self.ema)} are here, or None for the raw parameters")
        return {**self.params, **self.ema[name]}


def create_state(
    method: Method,
    optimizers: Mapping[str, optax.GradientTransformation],
    emas: Sequence[ema_lib.EMA],
    key: Key,
    batch: Mapping[str, Any],
    *,
    mesh: Mesh | None = None,
    partition: sharding.Partition = (),
    min_size: int = sharding.MIN_SIZE,
) -> TrainState:
    """Initialises parameters, optimisers and averages, laid out on the mesh.

    Args:
      method: whose `init` is called, outside of jit, so that it may draw on the host.
      optimizers: {player: optimiser}, one for every player that an objective trains.
      emas: the averages to keep.
      key: typed key; half of it initialises, the other half drives training.
      batch: an example batch, [B, ...] leaves. On several processes `init` must depend on its shapes alone.
      mesh: from `make_mesh`; the first device by default.
      partition: rules for its tensor axis, see `sharding.Partition`.
      min_size: see `sharding.partition_spec`.

    Returns:
      A state at step 0 in which no buffer occurs twice.

    Raises:
      ValueError: if an optimiser has no player, or a trained player no optimiser or no parameters, or a rule of the
        partition does not fit a parameter.
    """
    mesh = sharding.single_device() if mesh is None else mesh
    key_init, key_train = jax.random.split(key)
    params, aux = method.init(key_init, {name: jnp.asarray(value) for name, value in batch.items()})
    build = _builder(method, optimizers, emas)
    shapes = jax.eval_shape(build, params, aux, key_train)
    places = sharding.state_shardings(shapes, mesh, partition=partition, min_size=min_size)
    return jax.jit(build, out_shardings=places)(params, aux, key_train)


def abstract_state(
    method: Method,
    optimizers: Mapping[str, optax.GradientTransformation],
    emas: Sequence[ema_lib.EMA],
    batch: Mapping[str, Any],
    *,
    mesh: Mesh | None = None,
    partition: sharding.Partition = (),
    min_size: int = sharding.MIN_SIZE,
) -> TrainState:
    """The form of the state that `create_state` would make, without making it: what a checkpoint is restored into.

    Args:
      method: as for `create_state`; its `init` is traced, so it must not look at values.
      optimizers: as for `create_state`.
      emas: as for `create_state`.
      batch: an example batch, or its shapes.
      mesh: as for `create_state`.
      partition: as for `create_state`.
      min_size: as for `create_state`.

    Returns:
      A state of `jax.ShapeDtypeStruct`s, each with its sharding.

    Raises:
      ValueError: as `create_state`.
    """
    mesh = sharding.single_device() if mesh is None else mesh

    def create(key: Any, batch: Any) -> TrainState:
        params, aux = method.init(key, batch)
        return _builder(method, optimizers, emas)(params, aux, key)

    shapes = jax.eval_shape(create, jax.random.key(0), dict(batch))
    places = sharding.state_shardings(shapes, mesh, partition=partition, min_size=min_size)
    return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, places)


def _builder(
    method: Method, optimizers: Mapping[str, optax.GradientTransformation], emas: Sequence[ema_lib.EMA]
) -> Callable[[Any, Any, Any], TrainState]:
    def build(params: Any, aux: Any, key: Any) -> TrainState:
        check_players(method, optimizers, params)
        with jax.numpy_dtype_promotion("standard"):  # for optax, see step.py
            opt_state = {player: optimizers[player].init(params[player]) for player in sorted(optimizers)}
        averages = ema_lib.start(emas, params)
        state = TrainState(jnp.zeros((), jnp.int32), key, params, opt_state, averages, aux)
        return jax.tree.map(_own, state)

    return build


def set_hyperparameter(state: TrainState, player: str, name: str, value: float) -> TrainState:
    """Changes a number that `optax.inject_hyperparams` keeps in the state, such as the learning rate.

    The new number takes the dtype and the place of the old one; an array put there by hand makes the step compile once
    more, and one array for two players would be donated twice.

    Args:
      state: the train state.
      player: whose optimiser.
      name: of the hyper-parameter, e.g. "learning_rate".
      value: its new value.

    Raises:
      ValueError: if that player's optimiser keeps no such number.
    """
    found = optax.tree.get_all_with_path(state.opt_state.get(player, ()), name)
    if not found:
        raise ValueError(f"optimizer of {player!r} keeps no {name!r}: build it with optax.inject_hyperparams")
    old = found[0][1]
    new = jax.device_put(jnp.asarray(value, old.dtype), old.sharding)
    return state.replace(opt_state={**state.opt_state, player: optax.tree.set(state.opt_state[player], **{name: new})})


def check_players(method: Method, optimizers: Mapping[str, Any], params: Mapping[str, Any] | None = None) -> None:
    """Refuses objectives, optimisers and parameters that do not name the same players.

    Args:
      method: its objectives say who is trained.
      optimizers: {player: optimiser}.
      params: {player: tree}; None before anything is initialised.

    Raises:
      ValueError: naming the first player at fault.
    """
    trained = {objective.player for objective in method.objectives}
    for player in sorted(trained - set(optimizers)):
        raise ValueError(f"player {player!r} has no optimizer: optimizers were given for {sorted(optimizers)}")
    for player in sorted(set(optimizers) - trained):
        raise ValueError(f"optimizer for {player!r}, which no objective trains: players are {sorted(trained)}")
    for player in sorted(trained - set(trained if params is None else params)):
        raise ValueError(f"player {player!r} has an objective but no parameters: init returned {sorted(params or {})}")


def _own(leaf: Any) -> Array:
    """A copy with a strong type: a weak one would change after the first step and compile it a second time."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.copy(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
    return jnp.array(leaf, dtype=leaf.dtype, copy=True)

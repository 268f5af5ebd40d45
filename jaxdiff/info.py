"""What an experiment costs, from shapes alone: parameters, FLOPs of a train step, bytes on each device of a mesh.

Nothing is allocated and no device is needed: the state is `jax.eval_shape`d, FLOPs are counted in the traced step (see
`flops`), the state's bytes follow from the rule of `training/sharding.py`, and activations are what the traced forward
pass hands to the backward pass. Buffers that a compiler adds for a moment's work are not known here.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxdiff.flops import count_flops
from jaxdiff.methods.base import Objective
from jaxdiff.training import ema, sharding
from jaxdiff.training.experiment import Experiment
from jaxdiff.training.state import TrainState
from jaxdiff.training.step import make_train_step

PARTS = {"params": "parameters", "opt_state": "optimiser", "ema": "averages", "aux": "other"}


class Info(NamedTuple):
    """Costs of an experiment.

    Attributes:
      parameters: {player: number of scalars}.
      flops: of one train step over the whole batch.
      bytes: {part: bytes on one device}. Of the state: parameters, optimiser, averages, other. In a step besides:
        batch; gathered, the parameters that fsdp splits, brought together while a loss is computed; gradients;
        activations. The last two are those of the objective that needs most.
    """

    parameters: dict[str, int]
    flops: float
    bytes: dict[str, int]


def batch_shapes(experiment: Experiment, batch_size: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The form of a batch, without opening the data set: x0, label where there are classes, other conditioning.

    Args:
      experiment: whose batches are meant.
      batch_size: examples in it, or None for those of a step.
    """
    size = experiment.batch_size if batch_size is None else batch_size
    shapes = {"x0": jax.ShapeDtypeStruct((size, *experiment.sample_shape), jnp.float32)}
    if experiment.num_classes is not None:
        shapes["label"] = jax.ShapeDtypeStruct((size,), jnp.int32)
    more = experiment.conditioning.items()
    return shapes | {name: jax.ShapeDtypeStruct((size, *one.shape), one.dtype) for name, one in more}


def state_shapes(experiment: Experiment, batch: Mapping[str, Any]) -> TrainState:
    """The train state as shapes."""

    def create(key, batch):
        params, aux = experiment.method.init(key, batch)
        opt_state = {player: tx.init(params[player]) for player, tx in experiment.optimizers.items()}
        averages = ema.start(experiment.ema, params)
        return TrainState(jnp.int32(0), key, params, opt_state, averages, aux)

    return jax.eval_shape(create, jax.random.key(0), batch)


def info(experiment: Experiment, mesh: Mapping[str, int] | None = None) -> Info:
    """Counts an experiment's parameters, FLOPs and bytes.

    Args:
      experiment: any experiment whose batches are x0 and label.
      mesh: sizes of the axes data, fsdp, tensor; absent ones are 1. These devices need not be there.

    Raises:
      ValueError: if the mesh has an unknown axis or does not divide the batch, or a rule of the experiment's partition
        does not fit.
    """
    sizes = mesh_axes(mesh)
    parts = sizes["data"] * sizes["fsdp"]
    micro = micro_batch(experiment, parts)
    batch, partition = batch_shapes(experiment), experiment.partition
    state = state_shapes(experiment, batch)
    step = make_train_step(experiment.method, experiment.optimizers, experiment.ema, accumulate=experiment.accumulate)
    parameters = {p: sum(math.prod(a.shape) for a in jax.tree.leaves(t)) for p, t in state.params.items()}

    def on_device(prefix: str, tree: Any, axes: Mapping[str, int] = sizes) -> int:
        total = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}"
            total += _bytes(leaf, sharding.device_shape(name, leaf.shape, axes, partition))
        return total

    counted = {part: on_device(field, getattr(state, field)) for field, part in PARTS.items()}
    counted["batch"] = sum(_bytes(a) for a in batch.values()) // parts
    whole = on_device("params", state.params, {**sizes, "fsdp": 1})
    counted["gathered"] = whole if whole > counted["parameters"] else 0
    most = {"gradients": 0, "activations": 0}
    for objective in experiment.method.objectives:
        grown, fixed = activations(objective, state, batch_shapes(experiment, micro))
        # Accumulation keeps a sum beside the gradient of the newest micro-batch.
        gradients = on_device(f"params/{objective.player}", state.params[objective.player])
        gradients *= 1 if experiment.accumulate == 1 else 2
        costs = {"gradients": gradients, "activations": grown // parts + fixed}
        most = max(most, costs, key=lambda c: sum(c.values()))
    return Info(parameters, count_flops(jax.make_jaxpr(step)(state, batch).jaxpr), counted | most)


def mesh_axes(mesh: Mapping[str, int] | None) -> dict[str, int]:
    """Sizes of all axes of a mesh that was given as some of them.

    Raises:
      ValueError: for an unknown axis or a size below 1.
    """
    sizes = dict.fromkeys(sharding.AXES, 1) | dict(mesh or {})
    for axis, size in sizes.items():
        if axis not in sharding.AXES or size < 1:
            raise ValueError(f"a mesh has the axes {', '.join(sharding.AXES)} of size 1 or more, got {axis}={size}")
    return sizes


def micro_batch(experiment: Experiment, parts: int) -> int:
    """Examples in one micro-batch.

    Raises:
      ValueError: if they do not divide among `parts` devices.
    """
    micro = experiment.batch_size // experiment.accumulate
    if micro % parts:
        raise ValueError(
            f"batch_size / accumulate is {micro}, which does not divide among data x fsdp = {parts} devices; "
            "change one of them"
        )
    return micro


def activations(objective: Objective, state: TrainState, batch: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes that an objective's forward pass keeps for its backward pass, on one device that does all the work.

    These are the residuals of `jax.vjp` as traced, without parameters and batch, which are there anyway. Compilers fuse
    some of them away and add buffers of their own: gradients and activations together came out 0.67 to 1.35 times as
    large as XLA's temporary memory of the whole train step on a CPU, for UNets with and without attention, in float32
    and bfloat16, of width 16 to 128. With `jax.checkpoint` only what its blocks are given is counted; one block's own
    activations come on top while it is computed again, and XLA on a CPU keeps as much as without.

    Args:
      objective: of a method.
      state: the train state, or its shapes.
      batch: one micro-batch, or its shapes.

    Returns:
      (those that depend on the batch, those that depend on the state alone, such as parameters in another dtype).
    """
    player = objective.player

    def forward(params, aux, key, step, batch):
        def loss(own):
            return objective.loss({**params, player: own}, aux, batch, key, step)

        return jax.vjp(loss, params[player], has_aux=True)[1]

    fixed = (state.params, state.aux)
    jaxpr = jax.make_jaxpr(forward)(*fixed, state.key, state.step, dict(batch)).jaxpr
    varying = set(jaxpr.invars[len(jax.tree.leaves(fixed)) :])
    for equation in jaxpr.eqns:
        if any(not isinstance(variable, Literal) and variable in varying for variable in equation.invars):
            varying.update(equation.outvars)
    given = {*jaxpr.invars, *jaxpr.constvars}
    kept = {variable for variable in jaxpr.outvars if not isinstance(variable, Literal)} - given
    grown = sum(_bytes(variable.aval) for variable in kept & varying)
    return grown, sum(_bytes(variable.aval) for variable in kept - varying)


def _bytes(leaf: Any, shape: tuple[int, ...] | None = None) -> int:
    size = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
    return math.prod(leaf.shape if shape is None else shape) * size


def describe(experiment: Experiment, counted: Info, mesh: Mapping[str, int] | None = None) -> str:
    """The costs as lines of text; `mesh` as it was given to `info`."""
    shape = "x".join(map(str, experiment.sample_shape))
    on = ", ".join(f"{axis}={size}" for axis, size in (mesh or {}).items()) or "one device"
    lines = [f"{experiment.name}: {experiment.batch_size} examples of {shape} a step, on {on}"]
    for player, n in counted.parameters.items():
        lines.append(f"  {player:<12}{n / 1e6:10.3f} M parameters ({n:,})")
    whole, example = scaled(counted.flops, 1000), scaled(counted.flops / experiment.batch_size, 1000)
    lines.append(f"  train step  {whole}FLOP ({example.lstrip()}FLOP an example; convolutions and matrix products)")
    parts = ", ".join(f"{name} {scaled(float(n), 1024).lstrip()}B" for name, n in counted.bytes.items() if n)
    lines.append(f"  a device    {scaled(float(sum(counted.bytes.values())), 1024)}B ({parts})")
    return "\n".join(lines)


def scaled(value: float, base: int) -> str:
    """A number with a prefix: 1.5e9 as '1.500 G', and 2**20 to the base 1024 as '1.000 Mi'."""
    for power, prefix in reversed(list(enumerate(" kMGTPE"))):
        if power and abs(value) >= base**power:
            return f"{value / base**power:10.3f} {prefix.upper() + 'i' if base == 1024 else prefix}"
    return f"{value:10.0f} "

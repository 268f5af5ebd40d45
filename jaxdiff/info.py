"""What an experiment costs, from shapes alone: parameters, FLOPs of a train step, bytes on each device of a mesh.

Nothing is allocated and no device is needed: the state is `jax.eval_shape`d, FLOPs are counted in the traced step
(two for each multiply-add of convolutions and matrix products, elementwise work left out), and bytes follow from the
sharding rule. Activations are not counted.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxdiff.training import ema, sharding
from jaxdiff.training.experiment import Experiment
from jaxdiff.training.state import TrainState
from jaxdiff.training.step import make_train_step


class Info(NamedTuple):
    """Costs of an experiment.

    Attributes:
      parameters: {player: number of scalars}.
      flops: of one train step over the whole batch.
      bytes: {part of the state: bytes on one device}.
    """

    parameters: dict[str, int]
    flops: float
    bytes: dict[str, int]


def batch_shapes(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """The form of a batch, without opening the data set: x0, and label where there are classes."""
    shapes = {"x0": jax.ShapeDtypeStruct((experiment.batch_size, *experiment.sample_shape), jnp.float32)}
    if experiment.num_classes is not None:
        shapes["label"] = jax.ShapeDtypeStruct((experiment.batch_size,), jnp.int32)
    return shapes


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
      ValueError: if the mesh has an unknown axis or does not divide the batch.
    """
    sizes = dict.fromkeys(sharding.AXES, 1) | dict(mesh or {})
    for axis, size in sizes.items():
        if axis not in sharding.AXES or size < 1:
            raise ValueError(f"a mesh has the axes {', '.join(sharding.AXES)} of size 1 or more, got {axis}={size}")
    parts = sizes["data"] * sizes["fsdp"]
    micro = experiment.batch_size // experiment.accumulate
    if micro % parts:
        raise ValueError(
            f"batch_size / accumulate is {micro}, which does not divide among data x fsdp = {parts} devices; "
            "change one of them"
        )
    batch = batch_shapes(experiment)
    state = state_shapes(experiment, batch)
    step = make_train_step(experiment.method, experiment.optimizers, experiment.ema, accumulate=experiment.accumulate)
    parameters = {p: sum(int(np.prod(a.shape)) for a in jax.tree.leaves(t)) for p, t in state.params.items()}
    trees = {"parameters": state.params, "optimiser": state.opt_state, "averages": state.ema, "other": state.aux}
    per_device = {name: sum(_bytes(a, sizes["fsdp"]) for a in jax.tree.leaves(t)) for name, t in trees.items()}
    per_device["batch"] = sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in batch.values()) // parts
    return Info(parameters, count_flops(jax.make_jaxpr(step)(state, batch).jaxpr), per_device)


def count_flops(jaxpr: Any) -> float:
    """FLOPs of the convolutions and matrix products of a jaxpr, loops multiplied out where their length is known."""
    return sum((_flops(equation) for equation in jaxpr.eqns), 0.0)


def _flops(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        depth = np.prod([equation.invars[0].aval.shape[axis] for axis in contract])
        return 2.0 * float(depth) * float(np.prod(equation.outvars[0].aval.shape))
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
        depth = np.prod([kernel[axis] for axis in numbers.rhs_spec[1:]])
        # In a backward convolution the dilated side is mostly zeros: count the multiplications that are not.
        dilation = np.prod(params["lhs_dilation"])
        return 2.0 * float(depth) * float(np.prod(equation.outvars[0].aval.shape)) / float(dilation)
    if name == "cond":
        return max(count_flops(branch.jaxpr) for branch in params["branches"])
    times = params.get("length", 1) if name == "scan" else 1
    return float(times) * sum((count_flops(inner) for inner in _inner(params)), 0.0)


def _inner(params: Mapping[str, Any]) -> list[Any]:
    found = []
    for name, value in params.items():
        if name in ("cond_jaxpr", "fwd_jaxpr_thunk", "jvp_jaxpr_fun"):
            continue
        if hasattr(value, "eqns"):
            found.append(value)
        elif hasattr(value, "jaxpr") and hasattr(value.jaxpr, "eqns"):
            found.append(value.jaxpr)
    return found


def _bytes(leaf: Any, fsdp: int) -> int:
    size = int(np.prod(leaf.shape)) * (8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize)
    return size if sharding.leaf_spec(leaf.shape, fsdp) == PartitionSpec() else size // fsdp


def describe(experiment: Experiment, counted: Info, mesh: Mapping[str, int] | None = None) -> str:
    """The costs as lines of text; `mesh` as it was given to `info`."""
    shape = "x".join(map(str, experiment.sample_shape))
    on = ", ".join(f"{axis}={size}" for axis, size in (mesh or {}).items()) or "one device"
    lines = [f"{experiment.name}: {experiment.batch_size} examples of {shape} a step, on {on}"]
    for player, n in counted.parameters.items():
        lines.append(f"  {player:<12}{n / 1e6:10.3f} M parameters ({n:,})")
    whole, example = _scaled(counted.flops, 1000), _scaled(counted.flops / experiment.batch_size, 1000)
    lines.append(f"  train step  {whole}FLOP ({example.lstrip()}FLOP an example; convolutions and matrix products)")
    parts = ", ".join(f"{name} {_scaled(float(n), 1024).lstrip()}B" for name, n in counted.bytes.items() if n)
    lines.append(
        f"  a device    {_scaled(float(sum(counted.bytes.values())), 1024)}B ({parts}; activations not counted)"
    )
    return "\n".join(lines)


def _scaled(value: float, base: int) -> str:
    """A number with a prefix: 1.5e9 as '1.500 G', and 2**20 to the base 1024 as '1.000 Mi'."""
    for power, prefix in reversed(list(enumerate(" kMGTPE"))):
        if power and abs(value) >= base**power:
            return f"{value / base**power:10.3f} {prefix.upper() + 'i' if base == 1024 else prefix}"
    return f"{value:10.0f} "

"""Where arrays live: one mesh of three axes, one rule for the train state, one for batches.

The mesh is always (data, fsdp, tensor); a single device is the 1 x 1 x 1 mesh and takes the same path. Batches are
split over data and fsdp together, and metrics are replicated. A leaf of the train state is first split by the rules of
a partition, if there are any (the tensor axis), and then by size: along its largest free dimension that fsdp divides,
unless it is small. Weights that fsdp splits are gathered where they are used (`on_mesh`). No number is computed here,
and no network is known: partitions come from `networks/partition.py`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jaxdiff.methods.base import Aux, Batch, Method, Objective, Players
from jaxdiff.types import Key, Metrics

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
MIN_SIZE = 2**14  # below this many elements the messages cost more than the memory saved

# Rules (regular expression, found anywhere in a leaf's path; axis name or None for each dimension); the first one that
# matches counts. A dimension left None stays open to the size rule.
Partition = tuple[tuple[str, tuple[str | None, ...]], ...]


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh that every step of this library runs on.

    Args:
      data: devices along the data axis; -1 takes what the other two leave. At most one axis may be -1.
      fsdp: devices that share one copy of the parameters, and also split the batch.
      tensor: devices that split single layers.
      devices: which devices to use; all of them by default.

    Returns:
      A mesh with axes ("data", "fsdp", "tensor"), all of type Auto.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    said = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh sizes must be at least 1, and at most one of them -1 (the rest), got {said}")
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    sizes = {axis: len(devices) // known if size == -1 else size for axis, size in sizes.items()}
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise ValueError(f"mesh {said} does not fit {len(devices)} device(s): their product must be {len(devices)}")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def single_device() -> Mesh:
    """The 1 x 1 x 1 mesh on the first device of this process."""
    return make_mesh(devices=jax.local_devices()[:1])


def usual_mesh() -> Mesh:
    """All devices along `data`; on a CPU along `fsdp`.

    The devices of a CPU share its cores, so there it pays that each updates a part of the parameters only.
    """
    return make_mesh(1, -1) if jax.default_backend() == "cpu" else make_mesh()


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis is split over data and fsdp together."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_devices(mesh: Mesh) -> int:
    """Number of parts that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def partition_spec(
    path: str, shape: tuple[int, ...], mesh: Mapping[str, int], partition: Partition = (), *, min_size: int = MIN_SIZE
) -> PartitionSpec:
    """Where a leaf of a train state lies: the first rule that matches its path, then the size rule on what is left.

    The size rule takes the largest dimension that fsdp divides, the last of equals.

    Args:
      path: of the leaf, such as "params/model/conv_in/kernel".
      shape: of the leaf.
      mesh: {axis: size}; absent axes have size 1.
      partition: rules, see `Partition`.
      min_size: leaves with fewer elements on a device are not split further by fsdp.

    Raises:
      ValueError: if the rule for a parameter (a path that begins with "params/") has another number of dimensions, or
        names a dimension that the axis does not divide. Elsewhere such a rule is passed over, because an optimiser
        may keep moments of another shape under the same name.
    """
    names = _names_for(path, shape, mesh, partition)
    sizes = [1 if name is None else mesh.get(name, 1) for name in names]
    local = tuple(size // parts for size, parts in zip(shape, sizes, strict=True))
    fsdp = mesh.get("fsdp", 1)
    if fsdp > 1 and "fsdp" not in names and int(np.prod(local)) >= min_size:
        free = [(size, axis) for axis, size in enumerate(local) if names[axis] is None and size % fsdp == 0]
        if free:
            names[max(free)[1]] = "fsdp"
    return PartitionSpec(*names) if any(names) else PartitionSpec()


def device_shape(
    path: str, shape: tuple[int, ...], mesh: Mapping[str, int], partition: Partition = (), *, min_size: int = MIN_SIZE
) -> tuple[int, ...]:
    """The part of a leaf that one device holds; no device is needed to know it. Arguments as in `partition_spec`."""
    names = partition_spec(path, shape, mesh, partition, min_size=min_size)
    sizes = [1 if name is None else mesh.get(name, 1) for name in (*names, *[None] * (len(shape) - len(names)))]
    return tuple(size // parts for size, parts in zip(shape, sizes, strict=True))


def state_shardings(
    state: PyTree[Any], mesh: Mesh, *, partition: Partition = (), min_size: int = MIN_SIZE
) -> PyTree[NamedSharding]:
    """`partition_spec` for every leaf: moments and averages land where their parameters do, being named after them.

    Args:
      state: a train state, or its `jax.eval_shape`.
      mesh: from `make_mesh`.
      partition: rules for the tensor axis, see `Partition`.
      min_size: see `partition_spec`.

    Raises:
      ValueError: if a rule does not fit a parameter.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(name, leaf.shape, mesh.shape, partition, min_size=min_size))

    return jax.tree_util.tree_map_with_path(place, state)


def shard_state(state: PyTree[Any], mesh: Mesh, *, partition: Partition = (), min_size: int = MIN_SIZE) -> PyTree[Any]:
    """Moves a state to its place on the mesh."""
    return jax.device_put(state, state_shardings(state, mesh, partition=partition, min_size=min_size))


def on_mesh(method: Method, mesh: Mesh, *, partition: Partition = (), min_size: int = MIN_SIZE) -> Method:
    """The same method, with its weights brought together before they are used.

    What fsdp splits is gathered at the start of every loss and of `generate`, and gradients are added up before they
    are split again. Left to itself, the compiler gathers the activations of some layers instead. Splits over the other
    axes stay. A mesh without fsdp gets the method back as it was.

    Args:
      method: any method.
      mesh: from `make_mesh`.
      partition: as given to `state_shardings`.
      min_size: as given to `state_shardings`.
    """
    if mesh.shape["fsdp"] == 1:
        return method

    def gathered(part: str, tree: PyTree[Any]) -> PyTree[Any]:
        def gather(path: Any, leaf: Any) -> Any:
            name = "/".join([part, jax.tree_util.keystr(path, simple=True, separator="/")])
            spec = partition_spec(name, leaf.shape, mesh.shape, partition, min_size=min_size)
            if "fsdp" not in spec:
                return leaf
            kept = NamedSharding(mesh, PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec)))
            return jax.lax.with_sharding_constraint(leaf, kept)

        return jax.tree_util.tree_map_with_path(gather, tree)

    def wrap(objective: Objective) -> Objective:
        def loss(params: Players, aux: Aux, batch: Batch, key: Key, step: Array) -> tuple[Array, Metrics]:
            return objective.loss(gathered("params", params), gathered("aux", aux), batch, key, step)

        return objective._replace(loss=loss)

    def generate(params: Players, aux: Aux, *rest: Any) -> Array:
        return method.generate(gathered("params", params), gathered("aux", aux), *rest)

    return method._replace(objectives=tuple(map(wrap, method.objectives)), generate=generate)


def _names_for(path: str, shape: tuple[int, ...], mesh: Mapping[str, int], partition: Partition) -> list[str | None]:
    """The axis names of the first rule that matches, or None for every dimension."""
    whole: list[str | None] = [None] * len(shape)
    for pattern, names in partition:
        if not re.search(pattern, path):
            continue
        named = [name for name in names if name is not None]
        if not set(named) <= set(AXES) or len(set(named)) != len(named):
            raise ValueError(f"partition rule {pattern!r} takes each of {', '.join(AXES)} at most once, got {names}")
        if len(names) != len(shape):
            problem = f"has {len(names)} dimensions, {path} has {len(shape)}: write one name or None for each"
        elif bad := [i for i, name in enumerate(names) if name is not None and shape[i] % mesh.get(name, 1)]:
            name = names[bad[0]]
            problem = (
                f"splits dimension {bad[0]} of {path} {list(shape)} by {name}={mesh.get(str(name), 1)}, which does not "
                "divide it: change the mesh, the width or the rule"
            )
        else:
            return list(names)
        if path.startswith("params/"):
            raise ValueError(f"partition rule {pattern!r} {problem}")
        return whole
    return whole


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Turns this process' rows of a batch into global arrays [B, ...] split over the mesh.

    Raises:
      ValueError: if the rows of this process do not divide among its devices, or leaves disagree on their number.
    """
    batch = {name: np.asarray(value) for name, value in batch.items()}
    rows = {name: value.shape[:1] for name, value in batch.items()}
    if not rows or len(set(rows.values())) != 1 or () in rows.values():
        raise ValueError(f"a batch is a dict of arrays with one leading axis for all, got leading sizes {rows}")
    parts = max(1, batch_devices(mesh) // jax.process_count())
    size = next(iter(rows.values()))[0]
    if size % parts:
        raise ValueError(f"a batch of {size} does not divide among {parts} devices (data x fsdp): change one of them")
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def jit_train_step(step: Callable[[Any, Any], Any], mesh: Mesh, shardings: PyTree[NamedSharding]) -> Callable[..., Any]:
    """Compiles a train step for a mesh. The state is donated: after the call the old one is gone.

    Args:
      step: (state, batch) -> (state, metrics), from `make_train_step`.
      mesh: from `make_mesh`.
      shardings: from `state_shardings`.

    Returns:
      The same function, jitted; metrics come back replicated, so that every process can read them.
    """
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )

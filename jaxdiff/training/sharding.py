"""Where arrays live: one mesh of three axes, one rule for parameters, one for batches.

The mesh is always (data, fsdp, tensor); a single device is the 1 x 1 x 1 mesh and takes the same path. Batches are
split over data and fsdp together, metrics are replicated, and a leaf of the train state is split along its largest
dimension that fsdp divides, unless it is small. Nothing here computes, and nothing here uses the tensor axis yet.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
MIN_SIZE = 2**14  # below this many elements the messages cost more than the memory saved


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


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis is split over data and fsdp together."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_devices(mesh: Mesh) -> int:
    """Number of parts that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def leaf_spec(shape: tuple[int, ...], fsdp: int, *, min_size: int = MIN_SIZE) -> PartitionSpec:
    """The size rule: split the largest dimension that fsdp divides, the last of equals; leave small leaves whole.

    Args:
      shape: shape of the leaf.
      fsdp: size of the fsdp axis.
      min_size: leaves with fewer elements are replicated.
    """
    if fsdp == 1 or int(np.prod(shape)) < min_size:
        return PartitionSpec()
    candidates = [(size, axis) for axis, size in enumerate(shape) if size % fsdp == 0]
    if not candidates:
        return PartitionSpec()
    chosen = max(candidates)[1]
    return PartitionSpec(*(["fsdp" if axis == chosen else None for axis in range(len(shape))]))


def state_shardings(state: PyTree[Any], mesh: Mesh, *, min_size: int = MIN_SIZE) -> PyTree[NamedSharding]:
    """The size rule applied to every leaf: moments and averages land where their parameters do, having their shapes.

    Args:
      state: a train state, or its `jax.eval_shape`.
      mesh: from `make_mesh`.
      min_size: see `leaf_spec`.
    """
    fsdp = mesh.shape["fsdp"]
    return jax.tree.map(lambda leaf: NamedSharding(mesh, leaf_spec(leaf.shape, fsdp, min_size=min_size)), state)


def shard_state(state: PyTree[Any], mesh: Mesh, *, min_size: int = MIN_SIZE) -> PyTree[Any]:
    """Moves a state to its place on the mesh."""
    return jax.device_put(state, state_shardings(state, mesh, min_size=min_size))


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

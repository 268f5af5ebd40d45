"""Many samples from a trained method: one compiled call per batch, the same program for every guidance, eta and seed.

Example i starts from noise that depends on the seed and on i alone, so asking for more samples or another batch size
leaves the first ones as they were (up to the noise that stochastic solvers draw on the way). On a mesh the devices
share every batch and draw the same numbers as one device would; with several processes each of them gets all samples.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxdiff.methods.base import Aux, Method, Players, Sampling
from jaxdiff.solvers.named import NamedSolver
from jaxdiff.training import sharding
from jaxdiff.types import Cond, Key


class Dials(NamedTuple):
    """What may change without compiling: guidance scale (None leaves the unconditional pass out), and eta."""

    guidance_scale: Array | None = None
    eta: Array | None = None


PLAIN = Dials()
Generate = Callable[[Players, Aux, Key, Array, Cond, Dials], Array]


def compiled(
    method: Method,
    *,
    solver: NamedSolver | None = None,
    num_steps: int | None = None,
    mesh: Mesh | None = None,
    partition: sharding.Partition = (),
    min_size: int = sharding.MIN_SIZE,
) -> Generate:
    """The method's `generate` as one jitted function of (params, aux, key, noise [B, ...], cond, dials).

    Args:
      method: whose `generate` is called.
      solver: a solver by name, or None for the method's own.
      num_steps: points of the method's grid, or None for its default.
      mesh: that the parameters lie on. What fsdp splits is gathered once a call, before the first step.
      partition, min_size: the rules by which they lie there.
    """
    if mesh is not None:
        method = sharding.on_mesh(method, mesh, partition=partition, min_size=min_size)

    def generate(params, aux, key, noise, cond, dials):
        eta = jnp.float32(0) if dials.eta is None else dials.eta
        make = solver and solver.make
        maker = make and (lambda schedule: make(schedule, eta, num_steps))
        return method.generate(params, aux, key, noise, cond, Sampling(num_steps, maker, None, dials.guidance_scale))

    return jax.jit(generate)


def labels_for(num: int, num_classes: int | None, label: int | None = None) -> np.ndarray | None:
    """Labels [num] int32: one class, or all classes in turn; None for a model without classes.

    Raises:
      ValueError: if a label is asked of a model without classes, or is not one of them.
    """
    if num_classes is None:
        if label is not None:
            raise ValueError(f"class {label} was asked for, but this experiment has no classes; leave the class out")
        return None
    if label is None:
        return (np.arange(num) % num_classes).astype(np.int32)
    if not 0 <= label < num_classes:
        raise ValueError(f"class must be 0 to {num_classes - 1}, got {label}; leave it out for all classes in turn")
    return np.full(num, label, np.int32)


@functools.partial(jax.jit, static_argnames=("num", "shape", "mesh"))
def start_noise(key: Key, first: Array, num: int, shape: tuple[int, ...], mesh: Mesh | None = None) -> Array:
    """Unit normal noise [num, *shape] of the examples first .. first + num - 1, drawn where the mesh wants it."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(num, dtype=jnp.int32))
    noise = jax.vmap(lambda k: jax.random.normal(k, shape))(keys)
    return noise if mesh is None else jax.lax.with_sharding_constraint(noise, sharding.batch_sharding(mesh))


def whole_batch(num: int, batch_size: int, mesh: Mesh | None = None) -> int:
    """The examples of one call: at most batch_size and num, rounded up so that the mesh shares them evenly."""
    parts = 1 if mesh is None else sharding.batch_devices(mesh)
    return -(-min(num, batch_size) // parts) * parts


def batches(
    generate: Generate,
    params: Players,
    aux: Aux,
    *,
    shape: tuple[int, ...],
    labels: np.ndarray | None,
    num: int,
    batch_size: int,
    seed: int = 0,
    dials: Dials = PLAIN,
    mesh: Mesh | None = None,
) -> Iterator[np.ndarray]:
    """Yields `num` samples [b, *shape] in [-1, 1], batch by batch; the last batch is cut, not compiled anew.

    Args:
      generate: from `compiled`.
      params, aux: of the method, usually an average's parameters.
      shape: of one example.
      labels: int32 [num], or None.
      num: how many.
      batch_size: examples in one call, before `whole_batch` fits it to num and mesh.
      seed: of everything drawn.
      dials: guidance and eta.
      mesh: that the parameters lie on; batches are split over its devices.

    Raises:
      FloatingPointError: if a sample is not finite.
    """
    noise_key, solver_key = jax.random.split(jax.random.key(seed))
    size = whole_batch(num, batch_size, mesh)
    for start in range(0, num, size):
        noise = start_noise(noise_key, jnp.int32(start), size, shape, mesh)
        rows = np.minimum(np.arange(start, start + size), num - 1)
        cond = {} if labels is None else {"label": place(labels[rows], mesh)}
        out = generate(params, aux, jax.random.fold_in(solver_key, start), noise, cond, dials)
        out = to_host(out)[: num - start]
        if not np.isfinite(out).all():
            raise FloatingPointError("samples are not finite; use more steps, another solver or less guidance")
        yield out


def place(rows: np.ndarray, mesh: Mesh | None) -> Array:
    """Rows that every process holds in full, split over the mesh; without one, on the default device."""
    if mesh is None:
        return jnp.asarray(rows)
    return jax.make_array_from_callback(rows.shape, sharding.batch_sharding(mesh), lambda index: rows[index])


def to_host(out: Array) -> np.ndarray:
    """All rows, in every process."""
    if isinstance(out, jax.Array) and not out.is_fully_addressable:
        from jax.experimental import multihost_utils

        out = multihost_utils.process_allgather(out, tiled=True)
    return np.asarray(out)

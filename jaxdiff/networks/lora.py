"""Low-rank additions to kernels (LoRA), as pure functions on parameter trees: start, merge, and a network of them.

A kernel W [..., I, O] becomes W + weight alpha / r (down up) with down [..., I, r] and up [r, O]. Convolutions
keep their window in `down`. No module is changed: the sum is taken before the network is applied, inside the same jit.
Names of published files are in `pretrained.lora`.

Source: Hu et al. 2021 (arXiv:2106.09685) section 4.1.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct, traverse_util

from jaxdiff.networks.initializers import Uniform
from jaxdiff.types import Array, Cond, Key, Network, Params

# Attention of spatial transformers, which most published files change.
ATTENTION = r"_attention/(q|k|v|out)/kernel$"
# All layers inside a UNet's blocks: the choice of LCM-LoRA, Luo et al. 2023 (arXiv:2311.05556).
EVERY_BLOCK = r"^(down|mid|up)_.*kernel$"


class LowRank(struct.PyTreeNode):
    """The addition to one kernel, or to a range of its columns.

    Attributes:
      down: [..., I, r].
      up: [r, O].
      alpha: []; the product is multiplied by alpha / r. None for alpha = r.
      start: first column it is added to; q, k and v fused in one kernel have one each.
    """

    down: Any
    up: Any
    alpha: Any = None
    start: int = struct.field(pytree_node=False, default=0)


Lora = dict[str, tuple[LowRank, ...]]


def init_lora(key: Key, params: Params, rank: int, *, targets: str = ATTENTION, alpha: float | None = None) -> Lora:
    """Additions that are zero at first: down uniform on +-1/sqrt(fan_in), up zero.

    Args:
      key: a JAX key.
      params: of the network; only shapes matter.
      rank: r.
      targets: regular expression; kernels in whose path ("down_0_0_attention/block_0/...") it is found get one.
      alpha: see `LowRank`; None for alpha = r.

    Raises:
      ValueError: rank below 1, or no kernel fits.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    leaves: Any = traverse_util.flatten_dict(params, sep="/")
    paths = [path for path in sorted(leaves) if re.search(targets, path) and len(leaves[path].shape) in (2, 4)]
    if not paths:
        raise ValueError(f"no kernel has {targets!r} in its path; paths look like {sorted(leaves)[0]!r}")
    found = {}
    for path, part in zip(paths, jax.random.split(key, len(paths)), strict=True):
        *window, width, features = leaves[path].shape
        fan_in = width
        for size in window:
            fan_in *= size
        down = Uniform(fan_in**-0.5).device(part, (*window, width, rank), jnp.float32)
        scale = None if alpha is None else jnp.asarray(alpha, jnp.float32)
        found[path] = (LowRank(down, jnp.zeros((rank, features), jnp.float32), scale),)
    return found


def merge(params: Params, lora: Mapping[str, tuple[LowRank, ...]], weight: float | Array = 1.0) -> Params:
    """The parameters with the additions in them; several merge one after the other, weight -1 takes one out again.

    Args:
      params: of the network.
      lora: additions by path.
      weight: of all of them; may be traced.

    Raises:
      ValueError: an addition has no kernel, or does not fit it.
    """
    leaves: Any = dict(traverse_util.flatten_dict(params, sep="/"))
    for path, additions in lora.items():
        if path not in leaves:
            raise ValueError(f"the additions hold {path!r}, which this network lacks; take those made for it")
        kernel = jnp.asarray(leaves[path])
        for addition in additions:
            kernel = _add(path, kernel, addition, weight)
        leaves[path] = kernel
    return traverse_util.unflatten_dict(leaves, sep="/")


def adapt(network: Network, params: Params, weight: float | Array = 1.0) -> Network:
    """The network as a function of its additions: its own parameters are constants, a `Lora` takes their place."""
    base = params

    def adapted(params: Any, x_t: Array, t: Array, cond: Cond, *, train: bool = False, key: Key | None = None) -> Array:
        return network(merge(base, params, weight), x_t, t, cond, train=train, key=key)

    return adapted


def _add(path: str, kernel: Array, addition: LowRank, weight: float | Array) -> Array:
    (rank, features), start = addition.up.shape, addition.start
    if addition.down.shape != (*kernel.shape[:-1], rank) or start + features > kernel.shape[-1]:
        raise ValueError(
            f"{path} is {kernel.shape}, which down {addition.down.shape} and up {addition.up.shape} from column "
            f"{start} do not fit; take additions made for this network"
        )
    scale = 1.0 if addition.alpha is None else jnp.asarray(addition.alpha, kernel.dtype) / rank
    down, up = (jnp.asarray(a, kernel.dtype) for a in (addition.down, addition.up))
    delta = jnp.asarray(weight, kernel.dtype) * scale * jnp.tensordot(down, up, 1)
    return kernel.at[..., start : start + features].add(delta)

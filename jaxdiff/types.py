"""Types that everything else speaks: arrays, levels of noise, and the three callables.

B is the batch axis and comes first. Images are [B, H, W, C], video [B, F, H, W, C], points [B, D]; data lie in
[-1, 1] unless a docstring says otherwise. Nothing here computes anything but a broadcast.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, PyTree

Params = PyTree[Any]
Cond = dict[str, Array]
Metrics = dict[str, Array]
Key = jax.Array


class Level(NamedTuple):
    """A level of noise: x_t = alpha x0 + sigma eps. Both fields are float [B] (or [n] for a whole grid)."""

    alpha: Array
    sigma: Array


class Gaussian(NamedTuple):
    """A normal distribution with diagonal covariance: mean [B, ...], variance broadcastable to it."""

    mean: Array
    variance: Array


class Denoised(NamedTuple):
    """What a denoiser says about the clean data.

    Attributes:
      x0: [B, ...] prediction of the clean data.
      variance_out: [B, ...] the network's variance channels as they came out, or None. They mean something only
        together with two levels, so `process.log_variance` interprets them, not the denoiser.
    """

    x0: Array
    variance_out: Array | None = None


@runtime_checkable
class Network(Protocol):
    """(params, x_t[B, ...], t[B], cond) -> [B, ...]: any Flax module's apply, closed over nothing that is trained.

    `t` is what `Parameterization.net_time` returned. `train` switches dropout on and then needs a `key`.
    """

    def __call__(
        self, params: Params, x_t: Array, t: Array, cond: Cond, *, train: bool = False, key: Key | None = None
    ) -> Array: ...


@runtime_checkable
class Denoiser(Protocol):
    """(x_t[B, ...], t[B]) -> Denoised. Parameters, conditioning and guidance are already inside."""

    def __call__(self, x_t: Array, t: Array) -> Denoised: ...


def expand(a: Float[Array, " b"], like: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Reshapes [B] to [B, 1, ...] so that it broadcasts against `like` without rank promotion."""
    return a.reshape(a.shape + (1,) * (like.ndim - a.ndim))

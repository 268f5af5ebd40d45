"""Moving averages of parameters, several at once, each with a name.

    ema <- ema + rate(step) (params - ema),   rate = 1 - decay

The rate, not the decay, is what is computed: 1 - 0.9999 loses four digits in float32, 0.0001 does not. Every average
starts as a copy of the initial parameters and is kept in float32 or wider, because a bfloat16 average with a rate of
1e-4 never moves. Nothing here knows which average a sampler should use.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.types import Metrics, Params

Rate = Callable[[Int[Array, ""], int], Float[Array, ""]]


class EMA(NamedTuple):
    """One moving average.

    Attributes:
      name: its key in the train state, in checkpoints and on the command line.
      rate: (step, batch_size) -> 1 - decay, in [0, 1]. `step` counts finished updates, so it is 0 in the first one.
      about: what stands in config.json; two averages with the same text are the same.
      players: whose parameters are averaged; None for all.
    """

    name: str
    rate: Rate
    about: str
    players: tuple[str, ...] | None = None


def constant(name: str, decay: float, *, players: tuple[str, ...] | None = None) -> EMA:
    """A fixed decay.

    Args:
      name: name of the average.
      decay: in [0, 1), per update.
      players: whose parameters; None for all.

    Raises:
      ValueError: if decay is outside [0, 1).

    Source: guided-diffusion's `update_ema` (Dhariwal & Nichol 2021, arXiv:2105.05233).
    """
    _check_decay(decay)
    return EMA(name, lambda step, batch_size: jnp.float32(1 - decay), f"constant decay {decay}", players)


def after_first(name: str, decay: float, *, players: tuple[str, ...] | None = None) -> EMA:
    """A fixed decay that starts with the parameters after the first update, not with the first ones.

    Args:
      name: name of the average.
      decay: in [0, 1), per update.
      players: whose parameters; None for all.

    Raises:
      ValueError: if decay is outside [0, 1).

    Source: `EMA` of DDGAN's release (Xiao et al. 2022, arXiv:2112.07804).
    """
    _check_decay(decay)

    def rate(step: Int[Array, ""], batch_size: int) -> Float[Array, ""]:
        del batch_size
        return jnp.where(step == 0, jnp.float32(1), jnp.float32(1 - decay))

    return EMA(name, rate, f"decay {decay} from the first update on", players)


def warmup(name: str, decay: float, *, players: tuple[str, ...] | None = None) -> EMA:
    """decay_n = min(decay, (1 + n) / (10 + n)), with n = 1 in the first update.

    Args:
      name: name of the average.
      decay: the final decay, in [0, 1), per update.
      players: whose parameters; None for all.

    Raises:
      ValueError: if decay is outside [0, 1).

    Source: `LitEma` of latent diffusion (Rombach et al. 2022, arXiv:2112.10752).
    """
    _check_decay(decay)

    def rate(step: Int[Array, ""], batch_size: int) -> Float[Array, ""]:
        del batch_size
        return jnp.maximum(jnp.float32(1 - decay), 9 / (11 + step.astype(jnp.float32)))

    return EMA(name, rate, f"warm-up to decay {decay}", players)


def half_life(
    name: str, images: int | float, *, ramp_up: float | None = 0.05, players: tuple[str, ...] | None = None
) -> EMA:
    """decay = 0.5^(batch / min(images, ramp_up * seen)): half of the weight is younger than `images` images.

    With a ramp the first update copies the parameters, since nothing has been seen.

    Args:
      name: name of the average.
      images: half-life in training images, above 0.
      ramp_up: the half-life is at most this share of the images seen so far; None for no ramp.
      players: whose parameters; None for all.

    Raises:
      ValueError: if images or ramp_up is not positive.

    Source: Karras et al. 2022 (arXiv:2206.00364), training loop of the official release.
    """
    if not images > 0 or (ramp_up is not None and not ramp_up > 0):
        raise ValueError(f"half-life and ramp_up must be above 0, got images={images}, ramp_up={ramp_up}")

    def rate(step: Int[Array, ""], batch_size: int) -> Float[Array, ""]:
        life = jnp.float32(images)
        if ramp_up is not None:
            life = jnp.minimum(life, ramp_up * batch_size * step.astype(jnp.float32))
        # The floor is the release's: without images seen the exponent is huge and the rate exactly 1.
        return -jnp.expm1(-jnp.log(jnp.float32(2)) * batch_size / jnp.maximum(life, 1e-8))

    return EMA(name, rate, f"half-life {images} images, ramp-up {ramp_up}", players)


def initial(name: str, *, players: tuple[str, ...] | None = None) -> EMA:
    """No average: the parameters that the run began with, from which its drift is measured.

    Args:
      name: name of the average. The last average of an experiment is the one that is sampled with, so put this first.
      players: whose parameters; None for all.
    """
    return EMA(name, lambda step, batch_size: jnp.float32(0), "initial parameters", players)


def start(emas: Sequence[EMA], params: dict[str, Params]) -> dict[str, dict[str, Params]]:
    """Copies the parameters into every average.

    Args:
      emas: the averages.
      params: {player: tree}.

    Returns:
      {name: {player: tree}}, floating leaves in float32 or wider.

    Raises:
      ValueError: if an average names an unknown player.
    """
    for spec in emas:
        unknown = sorted(set(spec.players or ()) - set(params))
        if unknown:
            raise ValueError(f"EMA {spec.name!r} averages unknown player {unknown[0]!r}: players are {sorted(params)}")

    def copy(leaf: Any) -> Array:
        return jnp.array(leaf, dtype=at_least_float32(jnp.asarray(leaf).dtype), copy=True)

    return {e.name: {p: jax.tree.map(copy, params[p]) for p in e.players or sorted(params)} for e in emas}


def update(
    emas: Sequence[EMA],
    averages: dict[str, dict[str, Params]],
    params: dict[str, Params],
    step: Int[Array, ""],
    batch_size: int,
    *,
    moving: Bool[Array, ""] | None = None,
) -> dict[str, dict[str, Params]]:
    """Moves every average towards the parameters.

    Args:
      emas: the averages.
      averages: {name: {player: tree}} from `start` or the last update.
      params: {player: tree} after this step's update.
      step: number of updates finished before this one.
      batch_size: images in this update, over all devices and micro-batches.
      moving: where it is false, the averages stay as they are; None for true.

    Returns:
      The new averages, same structure and dtypes.
    """
    moved = {}
    for spec in emas:
        rate = spec.rate(step, batch_size)
        # Masking one scalar compiles faster than a select in every leaf.
        rate = rate if moving is None else jnp.where(moving, rate, jnp.zeros_like(rate))

        def move(average: Array, value: Array, rate: Array = rate) -> Array:
            if not jnp.issubdtype(average.dtype, jnp.inexact):
                return value
            return average + rate.astype(average.dtype) * (value.astype(average.dtype) - average)

        moved[spec.name] = {
            player: jax.tree.map(move, tree, params[player]) for player, tree in averages[spec.name].items()
        }
    return moved


def drift(averages: dict[str, dict[str, Params]], params: dict[str, Params]) -> Metrics:
    """{PLAYER/drift_NAME: |params - average| / |average|}: how far a player is from where it was on average.

    A normal run's falls with the learning rate; one that grows is a player that another one pushes about. From an
    average that `initial` made it is the way from the start.

    Args:
      averages: {name: {player: tree}}.
      params: {player: tree}.

    Returns:
      Scalars, float32 or wider, norms over all parameters of a player.
    """
    far = {}
    for name, players in averages.items():
        for player, average in players.items():
            apart = jax.tree.map(lambda a, p: p.astype(a.dtype) - a, average, params[player])
            far[f"{player}/drift_{name}"] = optax.tree.norm(apart) / jnp.maximum(optax.tree.norm(average), 1e-12)
    return far


def at_least_float32(dtype: Any) -> Any:
    """float32 for narrower floating types, every other type as it is."""
    return jnp.float32 if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32 else dtype


def _check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"EMA decay must lie in [0, 1), got {decay}: 0.9999 is usual")

"""What tells a healthy adversarial run from a broken one, as metrics of its objectives.

Logits of data and samples by noise level: a discriminator that is sure of itself at one level gives the generator
nothing to learn there, and one that is at chance there sees nothing. Diversity of the samples made from noise: near 0
is a collapse, whatever the losses say. The train step adds gradient norms of the players, and logs their drift from the
averages. `training.alarms.Alarm` stops a run by any metric of a step. A discriminator's loss near chance is usual. No
paper defines these; they are ours.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.losses import mean_flat
from jaxdiff.types import Level, Metrics

BANDS = 5
FROM_NOISE = 0.9
"""Share of noise from which on a prediction has to be invented."""


def noise_share(level: Level) -> Float[Array, " b"]:
    """sigma / (alpha + sigma): 0 for data, 1 for noise."""
    return level.sigma / (level.alpha + level.sigma)


def by_level(metrics: Mapping[str, Array], level: Level) -> Metrics:
    """The metrics, and of each the mean in every fifth of the noise share: `logit_real_0.2` is that of 0.2 to 0.4.

    Args:
      metrics: {name: [B]}.
      level: [B] where each example was judged.

    Returns:
      {name: [B], name_0.0: scalar, ...}; NaN, which logs, alarms and the mean over micro-batches pass over, where the
      batch has no example.
    """
    band = jnp.clip(jnp.floor(noise_share(level) * BANDS), 0, BANDS - 1)
    means = {f"{name}_{b / BANDS:.1f}": _mean(of, band == b) for name, of in metrics.items() for b in range(BANDS)}
    return dict(metrics) | means


def diversity(samples: Float[Array, "b ..."], data: Float[Array, "b ..."], level: Level | None = None) -> Array:
    """Deviation of samples over the batch, relative to that of data: 1 is usual, 0 is one sample for every noise.

    It does not see a collapse within classes, where the classes differ. With `accumulate` the batch is a micro-batch,
    and the log the mean of those that have a number.

    Args:
      samples: [B, ...] predictions of x0.
      data: [B, ...].
      level: [B] what each was predicted from; only those from noise (`FROM_NOISE`) count. None for all.

    Returns:
      Scalar; NaN for less than two examples.
    """
    chosen = jnp.ones(samples.shape[:1], bool) if level is None else noise_share(level) > FROM_NOISE
    ratio = jnp.sqrt(_variance(samples, chosen) / _variance(data, chosen))
    return jnp.where(chosen.sum() > 1, ratio, jnp.full_like(ratio, jnp.nan))


def _variance(x: Array, chosen: Array) -> Array:
    weight = chosen.astype(x.dtype) / jnp.maximum(chosen.sum(), 1).astype(x.dtype)
    flat = x.reshape(x.shape[0], -1)
    return jnp.sum(weight @ jnp.square(flat - (weight @ flat)[None]))


def _mean(values: Array, chosen: Array) -> Array:
    values = mean_flat(values)
    total = jnp.where(chosen, values, jnp.zeros_like(values)).sum()
    return jnp.where(
        chosen.any(), total / jnp.maximum(chosen.sum(), 1).astype(values.dtype), jnp.full_like(total, jnp.nan)
    )

"""Improved consistency training (iCT): a consistency model from data alone, without a target network.

Song & Dhariwal 2023 (arXiv:2310.14189): the target is the student itself with its gradient stopped, the number of
levels doubles in stages, levels are drawn by a log-normal cut into the steps of the grid, and the distance is
pseudo-Huber, weighted by one over the step. There is no official code. The networks' part of the recipe (a low Fourier
scale, dropout at low resolutions) belongs to the networks.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from jaxdiff import losses, parameterization, process, schedules, times, weighting
from jaxdiff.denoiser import clip_x0, denoiser
from jaxdiff.methods.base import Batch, Method, Objective, Sampling, read_batch
from jaxdiff.solvers.base import sample
from jaxdiff.solvers.stochastic_iterative import stochastic_iterative
from jaxdiff.types import Denoiser, Key, Level, Network, Params


def doubling_levels(start: int, end: int, total_steps: int) -> Callable[[Array], Array]:
    """N(k) = min(s0 2^floor(k / K'), s1) + 1 with K' = floor(K / (log2(floor(s1 / s0)) + 1)): equally long stages.

    Args:
      start: s0, steps of the first grid.
      end: s1, steps of the last.
      total_steps: K.

    Returns:
      step -> int32 number of levels, traced.

    Raises:
      ValueError: for counts out of order, or a K too short for its stages.

    Source: Song & Dhariwal 2023 section 3.4 and table 1.
    """
    if not 1 <= start <= end:
        raise ValueError(f"doubling_levels: need 1 <= start <= end, got {start} and {end}; swap them")
    length = math.floor(total_steps / (math.log2(end // start) + 1))
    if length < 1:
        raise ValueError(f"doubling_levels: total_steps {total_steps} are fewer than the stages; train longer")
    last = math.ceil(math.log2(end / start))  # later stages would overflow, and all are the same

    def num_levels(step):
        stage = jnp.minimum(jnp.asarray(step, jnp.int32) // length, last)
        return jnp.minimum(start * 2**stage, end) + 1

    return num_levels


def log_normal_steps(
    key: Key,
    n: int,
    num_levels: Array | int,
    *,
    log_mean: float = -1.1,
    log_std: float = 2.0,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Int[Array, " b"]:
    """Draws n steps of the Karras grid, each as often as a log-normal level falls into it.

    It is such a level that is drawn, within the grid's ends, so num_levels may be traced. `log_normal_shares` are the
    probabilities.

    Args:
      key: random key.
      n: number of draws.
      num_levels: points of the grid, at least 2.
      log_mean, log_std: of ln(sigma).
      sigma_min, sigma_max, rho: of the grid.

    Returns:
      int32 [n] in 0 .. num_levels - 2, for `times.karras_time`: step j leads from point j down to point j + 1.

    Source: Song & Dhariwal 2023 section 3.5.
    """
    lower, upper = ((math.log(sigma) - log_mean) / log_std for sigma in (sigma_min, sigma_max))
    sigma = jnp.exp(log_mean + log_std * jax.random.truncated_normal(key, lower, upper, (n,)))
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    last = jnp.asarray(num_levels, jnp.int32) - 1
    place = (high - sigma ** (1 / rho)) / (high - low) * last.astype(sigma.dtype)
    return jnp.clip(jnp.floor(place).astype(jnp.int32), 0, last - 1)


def log_normal_shares(
    grid: Float64[np.ndarray, " n"], log_mean: float = -1.1, log_std: float = 2.0
) -> Float64[np.ndarray, " m"]:
    """[n - 1] probabilities of the steps of a decreasing grid, proportional to differences of erf.

    Source: Song & Dhariwal 2023 section 3.5.
    """
    below = np.array([math.erf((math.log(sigma) - log_mean) / (math.sqrt(2) * log_std)) for sigma in grid])
    return (below[:-1] - below[1:]) / (below[0] - below[-1])


def improved_consistency(
    network: Network,
    *,
    init_params: Callable[[Key, Batch], Params],
    num_levels: Callable[[Array], Array],
    distance: losses.Distance | None = None,
    log_mean: float = -1.1,
    log_std: float = 2.0,
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    clip: float | None = 1.0,
    num_steps: int = 1,
) -> Method:
    """iCT. Batches are {"x0": [B, ...], further arrays as conditioning}.

    Args:
      network: (params, x_t, t, cond) -> [B, ...]; x_t has unit variance, t is ln(sigma) / 4.
      init_params: (key, batch) -> parameters of the network.
      num_levels: step -> N, for instance `doubling_levels(10, 1280, 400_000)`, CIFAR-10's.
      distance: (prediction, target) -> [B]; None for `losses.pseudo_huber()`.
      log_mean, log_std: of ln(sigma) in training.
      sigma_data: standard deviation of the data.
      sigma_min, sigma_max, rho: of the Karras grid. The result at sigma_min is x_t itself.
      clip: bound of |f| at every step of sampling; None for latents.
      num_steps: default of `generate`.

    Returns:
      Method with the player "model". `generate` makes n steps on the upper n of n + 1 Karras points, or on
      `Sampling.times`: for two steps the paper has (80, 0.821) on CIFAR-10. Metric: num_levels.

    Raises:
      ValueError: for a scale that is not positive or num_steps below 1; for a guidance_scale when sampling.

    Source: Song & Dhariwal 2023 sections 3.2-3.5 and table 1.
    """
    if not log_std > 0:
        raise ValueError(f"improved_consistency: log_std must be positive, got {log_std}")
    times.karras(num_steps, sigma_min, sigma_max, rho)  # refuses a bad grid now, not when sampling
    schedule = schedules.ve(sigma_min, sigma_max)
    meaning = parameterization.consistency(sigma_data, sigma_min)
    distance = losses.pseudo_huber() if distance is None else distance

    def init(key, batch):
        return {"model": init_params(key, batch)}, {}

    def objective(params, aux, batch, key, step):
        del aux
        x0, cond = read_batch(batch, "iCT")
        index_key, eps_key, network_key = jax.random.split(key, 3)
        n = num_levels(step)
        index = log_normal_steps(
            index_key, x0.shape[0], n, log_mean=log_mean, log_std=log_std, sigma_min=sigma_min, sigma_max=sigma_max,
            rho=rho,
        ).astype(x0.dtype)  # fmt: skip
        t, s = (times.karras_time(i, n, sigma_min, sigma_max, rho) for i in (index, index + 1))
        eps = jax.random.normal(eps_key, x0.shape, x0.dtype)
        # one key for both: independent dropout masks would be a distance of their own
        f = denoiser(network, params["model"], schedule, meaning, cond, train=True, key=network_key)
        loss = pair_loss(f, x0, eps, t, s, distance).mean()
        return loss, {"num_levels": n.astype(loss.dtype)}

    def generate(params, aux, key, noise, cond, sampling: Sampling):
        del aux
        if sampling.guidance_scale is not None:
            raise ValueError("a consistency model takes no guidance_scale; leave it out")
        n = num_steps if sampling.num_steps is None else sampling.num_steps
        grid = times.karras(n + 1, sigma_min, sigma_max, rho)[:-1] if sampling.times is None else sampling.times
        grid = jnp.asarray(grid, noise.dtype)
        make = sampling.solver or (lambda schedule: stochastic_iterative(schedule, sigma_min))
        f = denoiser(network, params["model"], schedule, meaning, cond)
        f = f if clip is None else clip_x0(f, clip)
        return sample(make(schedule), f, key, grid[0] * noise, grid)

    return Method(init, (Objective("model", objective),), generate)


def pair_loss(f: Denoiser, x0: Array, eps: Array, t: Array, s: Array, distance: losses.Distance) -> Float[Array, " b"]:
    """d(f(x_t, t), f(x_s, s)) / (t - s) per example, with the same x0 and eps; no gradient passes through f(x_s, s).

    Args:
      f: the consistency function.
      x0, eps: [B, ...].
      t, s: [B] neighbouring levels, t the noisier.
      distance: (prediction, target) -> [B].

    Source: Song & Dhariwal 2023 sections 3.1 and 3.2.
    """
    high, low = (Level(jnp.ones_like(a), a) for a in (t, s))
    target = jax.lax.stop_gradient(f(process.q_sample(x0, eps, low), s).x0)
    return weighting.inverse_gap(high, low) * distance(f(process.q_sample(x0, eps, high), t).x0, target)

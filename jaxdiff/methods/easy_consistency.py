"""Easy consistency tuning (ECT): a trained diffusion model becomes a consistency model by closing a gap.

Geng et al. 2024 (arXiv:2406.14548): training starts where diffusion training ends, with the clean image as the target
(r = 0), and moves the target's level r towards t in stages. The preconditioning is EDM's while training; results are
drawn with the one that is the identity at sigma_min, as in the release. Loading the diffusion model's parameters is
`init_params`' business.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff import losses, parameterization, process, schedules, times
from jaxdiff.denoiser import clip_x0, denoiser
from jaxdiff.methods.base import Batch, Method, Objective, Sampling, read_batch
from jaxdiff.solvers.base import sample
from jaxdiff.solvers.stochastic_iterative import stochastic_iterative
from jaxdiff.types import Denoiser, Key, Level, Network, Params, expand

Widening = Callable[[Array], Array]


def sigmoid_widening(k: float = 8.0, b: float = 1.0) -> Widening:
    """n(t) = 1 + k sigmoid(-b t): wider gaps at low noise."""
    return lambda t: 1 + k * jax.nn.sigmoid(-b * t)


def constant_widening(t: Float[Array, " b"]) -> Float[Array, " b"]:
    """n(t) = 1."""
    return jnp.ones_like(t)


def gap(t: Float[Array, " b"], stage: Array, q: float = 2.0, widening: Widening | None = None) -> Float[Array, " b"]:
    """t - r = min(t n(t) / q^(stage + 1), t), the distance to the target's level r.

    Args:
      t: [B] noise levels.
      stage: scalar, 0, 1, ...; traced.
      q: factor by which a stage narrows the gap, above 1.
      widening: n; None for `sigmoid_widening()`.

    Source: Geng et al. 2024 (arXiv:2406.14548); the defaults are the release's.
    """
    n = (sigmoid_widening() if widening is None else widening)(t)
    decay = jnp.asarray(q, t.dtype) ** -(jnp.asarray(stage).astype(t.dtype) + 1)
    return jnp.minimum(t * n * decay, t)


def easy_loss(
    denoise: Denoiser, x0: Array, eps: Array, t: Array, t_minus_r: Array, distance: losses.Distance
) -> Float[Array, " b"]:
    """d(D(x_t, t), D(x_r, r)) / (t - r) per example; where r is 0 the target is x0 itself.

    Args:
      denoise: D; no gradient passes through the target.
      x0, eps: [B, ...].
      t, t_minus_r: [B], from `gap`.
      distance: (prediction, target) -> [B].

    Source: Geng et al. 2024, with the weight and the target at r = 0 of the release.
    """
    r = t - t_minus_r
    level = jnp.where(r > 0, r, t)  # a level that every network can take, where the answer is not used

    def noisy(t):
        return process.q_sample(x0, eps, Level(jnp.ones_like(t), t))

    target = jax.lax.stop_gradient(denoise(noisy(level), level).x0)
    target = jnp.where(expand(r, x0) > 0, target, x0)
    return distance(denoise(noisy(t), t).x0, target) / t_minus_r


def easy_consistency(
    network: Network,
    *,
    init_params: Callable[[Key, Batch], Params],
    steps_per_stage: int,
    q: float = 2.0,
    widening: Widening | None = None,
    distance: losses.Distance = losses.euclidean,
    log_mean: float = -1.1,
    log_std: float = 2.0,
    sigma_data: float = 0.5,
    sigma_min: float = 0.003,
    sigma_max: float = 80.0,
    mid_sigma: float = 0.821,
    clip: float | None = None,
    num_steps: int = 2,
) -> Method:
    """Easy consistency tuning. Batches are {"x0": [B, ...], further arrays as conditioning}.

    Args:
      network: (params, x_t, t, cond) -> [B, ...]; x_t has unit variance, t is ln(sigma) / 4, as `edm` trained it.
      init_params: (key, batch) -> the parameters of a trained EDM network.
      steps_per_stage: steps until the gap narrows by q; 25,000 on CIFAR-10 at batch 128, and one stage with q = 256 in
        the one-hour recipe.
      q, widening: of `gap`.
      distance: (prediction, target) -> [B]; `losses.pseudo_huber(c)` for the robust form.
      log_mean, log_std: of ln(sigma) in training.
      sigma_data: standard deviation of the data.
      sigma_min: level that sampling leaves as it is; training has no lower end.
      sigma_max: level that sampling starts from.
      mid_sigma: level of the second of two steps, 0.821 on CIFAR-10.
      clip: bound of |f| at every step of sampling; None, as in the release, for none.
      num_steps: default of `generate`.

    Returns:
      Method with the player "model". `generate` makes one step from sigma_max, two with mid_sigma, or any number on
      `Sampling.times`; noise is added in full, with deviation s. Metric: stage.

    Raises:
      ValueError: for a scale that is not positive, q not above 1, or steps_per_stage below 1; when sampling, for a
        guidance_scale, or more than two steps without times.

    Source: Geng et al. 2024; the release's constants for CIFAR-10.
    """
    if not q > 1:
        raise ValueError(f"easy_consistency: q must be above 1, got {q}; the gap would not narrow")
    if steps_per_stage < 1:
        raise ValueError(f"easy_consistency: steps_per_stage must be at least 1, got {steps_per_stage}")
    if not sigma_min < mid_sigma < sigma_max:
        raise ValueError(
            f"easy_consistency: need sigma_min < mid_sigma < sigma_max, got {sigma_min}, {mid_sigma} and {sigma_max}"
        )
    schedule = schedules.ve(sigma_min, sigma_max)
    training = parameterization.edm(sigma_data)
    drawing = parameterization.consistency(sigma_data, sigma_min)
    time_sampler = times.log_normal(log_mean, log_std)

    def init(key, batch):
        return {"model": init_params(key, batch)}, {}

    def objective(params, aux, batch, key, step):
        del aux
        x0, cond = read_batch(batch, "ECT")
        time_key, eps_key, network_key = jax.random.split(key, 3)
        stage = jnp.asarray(step) // steps_per_stage
        t = time_sampler(time_key, x0.shape[0]).astype(x0.dtype)
        eps = jax.random.normal(eps_key, x0.shape, x0.dtype)
        # one key for both: independent dropout masks would be a distance of their own
        denoise = denoiser(network, params["model"], schedule, training, cond, train=True, key=network_key)
        loss = easy_loss(denoise, x0, eps, t, gap(t, stage, q, widening), distance).mean()
        return loss, {"stage": stage.astype(loss.dtype)}

    def generate(params, aux, key, noise, cond, sampling: Sampling):
        del aux
        if sampling.guidance_scale is not None:
            raise ValueError("a consistency model takes no guidance_scale; leave it out")
        grid = sampling.times
        if grid is None:
            n = num_steps if sampling.num_steps is None else sampling.num_steps
            if not 1 <= n <= 2:
                raise ValueError(f"easy_consistency: has times for 1 or 2 steps, got {n}; give Sampling.times")
            grid = [sigma_max, mid_sigma][:n]
        grid = jnp.asarray(grid, noise.dtype)
        make = sampling.solver or stochastic_iterative
        f = denoiser(network, params["model"], schedule, drawing, cond)
        f = f if clip is None else clip_x0(f, clip)
        return sample(make(schedule), f, key, grid[0] * noise, grid)

    return Method(init, (Objective("model", objective),), generate)

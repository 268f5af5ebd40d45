"""Ancestral sampling: x_s = posterior mean of the predicted x0 + exp(0.5 log_variance) z, with a choice of variance.

Algorithm 2 of Ho et al. 2020 between any two levels, so a respaced chain is nothing but a sparser grid of times. The
step to clean data adds no noise. Classifier guidance, if any, shifts the mean by the variance; for solvers without a
variance use `guidance.classifier` instead.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff.process import VarianceRule, bridge, clean_like, fixed_small, posterior_mean
from jaxdiff.schedules import Schedule
from jaxdiff.solvers.base import Solver, level_like
from jaxdiff.types import Denoised, Level


def ancestral(
    schedule: Schedule,
    variance: VarianceRule = fixed_small,
    *,
    classifier_gradient: Callable[[Array, Array], Array] | None = None,
) -> Solver:
    """The sampler of DDPM, Improved DDPM and ADM.

    Args:
      schedule: gives the levels.
      variance: `process.fixed_small`, `fixed_large`, `learned` or `learned_range`. The learned rules read the
        denoiser's `variance_out`.
      classifier_gradient: (x_t [B, ...], t [B]) -> gradient of log p(y | x_t) with respect to x_t, times the guidance
        scale. The mean moves by variance * gradient, also in the step to clean data.

    Returns:
      A solver whose state is the variance of the grid's last transition between real levels. It stands in for the
      variance of the step to clean data, which is 0, where a rule needs its logarithm. A grid of one point has no such
      transition and uses its sigma^2.

    Source: Ho et al. 2020 (arXiv:2006.11239) algorithm 2; Nichol & Dhariwal 2021 (arXiv:2102.09672) eq. 15;
      Dhariwal & Nichol 2021 (arXiv:2105.05233) algorithm 1.
    """

    def init(x, times):
        t = level_like(schedule, times[-2:], x)
        first, last = Level(t.alpha[:1], t.sigma[:1]), Level(t.alpha[-1:], t.sigma[-1:])
        if times.size == 1:
            return bridge(last, clean_like(last)).added[0]
        return bridge(first, last).variance[0]

    def mean_and_std(x, d: Denoised, between, t):
        spread = variance(between, x, d.variance_out)
        mean = posterior_mean(d.x0, x, between)
        if classifier_gradient is not None:
            mean = mean + spread.value * classifier_gradient(x, t)
        return mean, jnp.exp(0.5 * spread.log)

    def step(noise, state, x, t, s, denoise):
        d = denoise(x, t)
        mean, std = mean_and_std(x, d, bridge(level_like(schedule, t, x), level_like(schedule, s, x)), t)
        return mean + std * noise, state, d.x0

    def finish(noise, state, x, t, denoise):
        del noise
        level = level_like(schedule, t, x)
        between = bridge(level, clean_like(level))
        between = between._replace(log_variance=jnp.log(jnp.maximum(between.variance, state)))
        return mean_and_std(x, denoise(x, t), between, t)[0]

    return Solver(init, step, finish)

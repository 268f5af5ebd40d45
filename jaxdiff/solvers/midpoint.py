"""The midpoint rule along sigma / alpha with EDM's churn: the "dpm" sampler of the consistency releases.

Order 2 like Heun's rule, with the second network call between the two levels instead of at the lower one, so that the
step to clean data has two calls as well. DPM-Solver-2 of Lu et al. is the same idea with the middle in log SNR.
"""

import jax.numpy as jnp

from jaxdiff.process import clean_like, eps_from_x0, q_sample
from jaxdiff.schedules import Schedule
from jaxdiff.solvers.base import Solver, level_like
from jaxdiff.solvers.heun import Scalar, euler
from jaxdiff.types import Denoised, expand


def midpoint(
    schedule: Schedule,
    *,
    root: float = 3.0,
    churn: Scalar = 0.0,
    churn_min: Scalar = 0.0,
    churn_max: Scalar = float("inf"),
    churn_noise: Scalar = 1.0,
) -> Solver:
    """Euler's step to the middle level, and a step over the whole distance with the direction found there.

    2 n network calls for n times.

    Args:
      schedule: gives the levels and, for the middle, the time of a level. Levels without signal (alpha = 0) are not for
        this rule.
      root: the middle is halfway in (sigma / alpha)^(1 / root).
      churn, churn_min, churn_max, churn_noise: as for `heun`.

    Raises:
      ValueError: for a root that is not positive, and as `heun`.

    Source: Karras et al. 2022 (arXiv:2206.00364) for the churn; the middle is that of Song et al. 2023's release.
    """
    if not root > 0:
        raise ValueError(f"midpoint: root must be positive, got {root}; 1 is the middle of sigma / alpha itself")
    first = euler(schedule, churn=churn, churn_min=churn_min, churn_max=churn_max, churn_noise=churn_noise)

    def advance(noise, state, x, t, s, target, denoise):
        calls = []

        def watched(x_t, t):  # churn moves x and t, and only Euler's call says where to
            answer = denoise(x_t, t)
            calls.append((x_t, t, answer.x0))
            return Denoised(answer.x0)

        first.step(noise, state, x, t, s, watched)
        x, t, x0 = calls[0]
        level = level_like(schedule, t, x)
        ratio, end = level.sigma / level.alpha, target.sigma / target.alpha
        middle = ((ratio ** (1 / root) + end ** (1 / root)) / 2) ** root
        time = schedule.time(-jnp.log(middle).astype(t.dtype))
        level_mid = level_like(schedule, time, x)
        x_mid = q_sample(x0, eps_from_x0(x0, x, level), level_mid)
        eps = eps_from_x0(denoise(x_mid, time).x0, x_mid, level_mid)
        moved = x / expand(level.alpha, x) + expand(end - ratio, x) * eps
        return expand(target.alpha, x) * moved, x0

    def step(noise, state, x, t, s, denoise):
        x, x0 = advance(noise, state, x, t, s, level_like(schedule, s, x), denoise)
        return x, state, x0

    def finish(noise, state, x, t, denoise):
        return advance(noise, state, x, t, t, clean_like(level_like(schedule, t, x)), denoise)[0]

    return Solver(first.init, step, finish)

"""DDIM between any two levels, with any share eta of the ancestral noise, its inversion, and what other solvers share.

x_s = alpha_s x0 + sqrt(sigma_s^2 - (eta d)^2) eps + eta d z, with d^2 the variance of q(x_s | x_t, x0): equation 12
of the paper for a variance-preserving schedule, and the same family for every other. eta = 0 is Euler's method in
sigma / alpha, eta = 1 is ancestral sampling. eps is derived from the denoiser's x0, after clipping and guidance.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.process import bridge, eps_from_x0, q_sample
from jaxdiff.schedules import Schedule
from jaxdiff.solvers.base import Solver, level_like, no_state
from jaxdiff.types import Level, expand


def eps_weight(t: Level, s: Level) -> Float[Array, " b"]:
    """sigma_s - alpha_s sigma_t / alpha_t: what a change of eps, at a given x_t, does to x_s. 0 where alpha_t = 0.

    Solvers of higher order correct DDIM's x_s by this times the change of eps. Without signal at t the x0 prediction
    does not depend on eps, so there the correction is left out and the step has order 1.
    """
    pure = t.alpha == 0
    weight = s.sigma - s.alpha * t.sigma / jnp.where(pure, jnp.ones_like(t.alpha), t.alpha)
    return jnp.where(pure, jnp.zeros_like(weight), weight)


def ddim(
    schedule: Schedule,
    eta: float | Float[Array, ""] = 0.0,
    *,
    limit_x0: Callable[[Array], Array] | None = None,
) -> Solver:
    """Deterministic (eta = 0) to ancestral (eta = 1) sampling on any grid.

    Args:
      schedule: gives the levels. A grid may start at a level without signal if the denoiser can predict x0 there.
      eta: share of the ancestral noise, in [0, 1]. A traced scalar changes without compiling again.
      limit_x0: applied to x0 after eps was derived from it, as diffusers clips: the direction to x_t keeps the
        unlimited eps. None here and `denoiser.clip_x0` clip before, as the OpenAI releases do.

    Returns:
      A solver without state. With eta = 0 it also runs towards more noise, on an increasing grid.

    Source: Song et al. 2020 (arXiv:2010.02502) eq. 12 and 16.
    """

    def step(noise, state, x, t, s, denoise):
        level, target = level_like(schedule, t, x), level_like(schedule, s, x)
        x0 = denoise(x, t).x0
        eps = eps_from_x0(x0, x, level)
        x0 = x0 if limit_x0 is None else limit_x0(x0)
        if isinstance(eta, float | int) and eta == 0:
            return q_sample(x0, eps, target), state, x0
        share = jnp.asarray(eta, x.dtype)
        added = share * jnp.sqrt(jnp.maximum(bridge(level, target).variance, 0))
        # rounding can make the rest negative where alpha_t = 0, as at zero terminal SNR
        rest = jnp.sqrt(jnp.maximum(target.sigma**2 - added**2, 0))
        return q_sample(x0, eps, Level(target.alpha, rest)) + expand(added, x) * noise, state, x0

    def finish(noise, state, x, t, denoise):
        del noise, state
        x0 = denoise(x, t).x0
        return x0 if limit_x0 is None else limit_x0(x0)

    return Solver(no_state, step, finish)


def ddim_inversion(schedule: Schedule) -> Solver:
    """From data to the noise that DDIM would turn into it. Run it on an increasing grid, starting with clean data.

    `integrate` ends at times[-1]; `sample` goes on to pure noise, the eps of the last level, which is the release's
    last step to alphas_cumprod = 0. The error of a round trip falls with the number of steps, as Euler's does.

    Source: Song et al. 2020 section 4.3; Dhariwal & Nichol 2021, the released `ddim_reverse_sample`.
    """

    def finish(noise, state, x, t, denoise):
        del noise, state
        return eps_from_x0(denoise(x, t).x0, x, level_like(schedule, t, x))

    return ddim(schedule)._replace(finish=finish)

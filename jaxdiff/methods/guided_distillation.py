"""Distillation of guided diffusion models: stage one builds guidance of any scale into a single network call.

The student x(x_t, t, cond, w) learns what the guided teacher says, (1 + w) x_cond - w x_uncond, for w drawn from a
range; it sees w as cond["guidance"]. Stage two halves the number of steps at fixed w and is
`progressive.progressive(..., guidance_range=...)`, whose teacher is this student. Both stages sample by DDIM or by
`stochastic`. v or x0 as output, not eps, which says nothing about x0 where the signal vanishes.

Source: Meng et al. 2023 (arXiv:2210.03142).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import parameterization as parameterizations
from jaxdiff import process, schedules, times, weighting
from jaxdiff.denoiser import clip_x0, denoiser
from jaxdiff.guidance import classifier_free, with_guidance
from jaxdiff.losses import mse
from jaxdiff.methods.base import Batch, Method, Objective, Sampling, read_batch
from jaxdiff.parameterization import Parameterization
from jaxdiff.schedules import Schedule
from jaxdiff.solvers.base import Solver, level_like, sample
from jaxdiff.solvers.ddim import ddim
from jaxdiff.types import Cond, Key, Level, Network, Params


def stochastic(schedule: Schedule) -> Solver:
    """A DDIM step of twice the length, then noise for one step back: n network calls on a grid of n times.

    Args:
      schedule: gives the levels. From the last but one time the double step reaches clean data.

    Returns:
      A solver whose state is the times after the next one, and how many of them are used up.

    Source: Meng et al. 2023 section 3.3 and algorithm 4.
    """
    deterministic = ddim(schedule).step

    def init(x, times):
        return times, jnp.zeros((), jnp.int32)

    def step(noise, state, x, t, s, denoise):
        grid, i = state
        ends_clean = i + 2 >= grid.size
        further = jnp.full(t.shape, grid[jnp.minimum(i + 2, grid.size - 1)], t.dtype)
        x_far, _, x0 = deterministic(noise, None, x, t, further, denoise)
        far, near = level_like(schedule, further, x), level_like(schedule, s, x)
        clean = process.clean_like(near)
        far = Level(*(jnp.where(ends_clean, a, b) for a, b in zip(clean, far, strict=True)))
        back = process.transition(jnp.where(ends_clean, x0, x_far), near, far)
        return back.mean + jnp.sqrt(jnp.maximum(back.variance, 0)) * noise, (grid, i + 1), x0

    return Solver(init, step)


def guided_distillation(
    network: Network,
    *,
    teacher: Network,
    teacher_params: Params,
    init_params: Callable[[Key, Batch], Params] | None = None,
    null_cond: Callable[[Cond], Cond],
    guidance_range: tuple[float, float] = (0.0, 4.0),
    schedule: Schedule | None = None,
    parameterization: Parameterization | None = None,
    weight: weighting.Weighting = weighting.truncated_snr,
    time_sampler: times.TimeSampler | None = None,
    clip: float | None = 1.0,
    num_steps: int = 256,
) -> Method:
    """Stage one. Batches are {"x0": [B, ...], further arrays [B, ...] as conditioning}.

    Args:
      network: the student, (params, x_t, t, cond) -> [B, ...]; cond["guidance"] [B] is w.
      teacher: the teacher's network, which sees no w. Its output means the same as the student's.
      teacher_params: its parameters; a copy is held in aux["teacher"].
      init_params: (key, batch) -> the student's parameters, as by `networks.base.grown`; None copies the teacher's.
      null_cond: cond -> the same without a condition, e.g. every label replaced by the null label.
      guidance_range: (low, high) of w = guidance_scale - 1, drawn uniformly: (0, 4) for pixels, about (2, 14) for
        latents of text to image.
      schedule: None for `schedules.cosine()`.
      parameterization: what the outputs mean; None for v.
      weight: on the x0 error.
      time_sampler: None for t uniform between t_min and t_max.
      clip: bound of |x0| in sampling; None for latents.
      num_steps: of the default sampling grid, equal steps of t.

    Returns:
      Method with the player "model". `Sampling.guidance_scale` is 1 + w; without it, w is the least one.

    Raises:
      ValueError: for an empty guidance_range or num_steps below 1, or an output that is undefined at t_max.

    Source: Meng et al. 2023 algorithm 1.
    """
    if not guidance_range[0] <= guidance_range[1]:
        raise ValueError(f"guided_distillation: guidance_range is (low, high) of w, got {guidance_range}; swap them")
    if num_steps < 1:
        raise ValueError(f"guided_distillation: num_steps must be at least 1, got {num_steps}")
    schedule = schedules.cosine() if schedule is None else schedule
    meaning = parameterizations.v() if parameterization is None else parameterization
    parameterizations.require_defined(schedule, meaning)
    draw_t = times.uniform(schedule.t_min, schedule.t_max) if time_sampler is None else time_sampler

    def init(key, batch):
        params = init_params(key, batch) if init_params else jax.tree.map(jnp.array, teacher_params)
        return {"model": params}, {"teacher": jax.tree.map(jnp.array, teacher_params)}

    def objective(params, aux, batch, key, step):
        del step
        x0, cond = read_batch(batch, "guided_distillation")
        time_key, eps_key, guidance_key, network_key = jax.random.split(key, 4)
        t = draw_t(time_key, x0.shape[0]).astype(x0.dtype)
        level = level_like(schedule, t, x0)
        x_t = process.q_sample(x0, jax.random.normal(eps_key, x0.shape, x0.dtype), level)
        w = jax.random.uniform(guidance_key, t.shape, t.dtype, *guidance_range)

        def old(cond):
            return denoiser(teacher, aux["teacher"], schedule, meaning, cond)

        target = jax.lax.stop_gradient(classifier_free(old, cond, null_cond(cond), 1 + w)(x_t, t).x0)
        cond = cond | {"guidance": w}
        denoise = denoiser(network, params["model"], schedule, meaning, cond, train=True, key=network_key)
        error = mse(denoise(x_t, t).x0, target)
        return (weight(level) * error).mean(), {"mse": error}

    def generate(params, aux, key, noise, cond, sampling: Sampling):
        del aux
        cond = with_guidance(cond, sampling.guidance_scale, guidance_range, noise)
        denoise = denoiser(network, params["model"], schedule, meaning, cond)
        denoise = denoise if clip is None else clip_x0(denoise, clip)
        n = num_steps if sampling.num_steps is None else sampling.num_steps
        grid = sampling.times
        if grid is None:
            if n < 1:
                raise ValueError(f"guided_distillation: num_steps must be at least 1, got {n}")
            grid = np.linspace(schedule.t_max, 0.0, n, endpoint=False)
        grid = jnp.asarray(grid, noise.dtype)
        solver = (sampling.solver or ddim)(schedule)
        return sample(solver, denoise, key, schedule.level(grid[:1]).sigma[0] * noise, grid)

    return Method(init, (Objective("model", objective),), generate)

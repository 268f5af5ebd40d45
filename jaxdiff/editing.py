"""Editing with a trained denoiser: where image-to-image starts, and what inpainting holds fixed.

A start is a noise level and the rest of a grid; noise the image with `process.q_sample` there and integrate. Inpainting
wraps a Solver, so that it works with every solver and any guidance. Inversion is `solvers.ddim.ddim_inversion`.
Networks that take the mask as an input are the model's business, as are colourisation and super-resolution.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.process import q_sample
from jaxdiff.schedules import Schedule
from jaxdiff.solvers.base import Solver, level_like
from jaxdiff.types import Level


class Start(NamedTuple):
    """noise_time: the time whose level the image is noised to. times: [m] decreasing, what is left of the grid."""

    noise_time: Any
    times: Any


def image_to_image(times: Float[Array, " n"] | Float[np.ndarray, " n"], strength: float) -> Start:
    """The last int(n * strength) times of a grid, noised to the first of them: level and first step agree.

    Args:
      times: [n] decreasing.
      strength: in (0, 1]; 1 starts at times[0] and keeps little of the image.

    Raises:
      ValueError: for a strength outside (0, 1], or so small that no time is left.

    Source: Meng et al. 2021 (arXiv:2108.01073) algorithm 1; the count is diffusers'.
    """
    kept = _kept("image_to_image", times.shape[0], strength)
    rest = times[times.shape[0] - kept :]
    return Start(rest[0], rest)


def image_to_image_compvis(times: Float[Array, " n"] | Float[np.ndarray, " n"], strength: float) -> Start:
    """As `image_to_image`, but noised to the time before the first of the rest, as Stable Diffusion's script does.

    Every denoising call is then told one grid step less noise than there is. For reproducing that script.

    Raises:
      ValueError: as for `image_to_image`, and if int(n * strength) = n: the script has no such level.
    """
    n = times.shape[0]
    kept = _kept("image_to_image_compvis", n, strength)
    if kept == n:
        raise ValueError(
            f"image_to_image_compvis: strength {strength} keeps all {n} times and needs a level before the first; "
            "use a smaller strength, or image_to_image"
        )
    return Start(times[n - kept - 1], times[n - kept :])


class KeptState(NamedTuple):
    """step: int32, steps done. inner: the wrapped solver's state."""

    step: Array
    inner: Any


def keep_after_step(
    solver: Solver, schedule: Schedule, x0: Float[Array, "b ..."], mask: Float[Array, "..."], noise: Float[Array, "..."]
) -> Solver:
    """Inpainting: after every step the kept region is put back at the new level, and clean after the last step.

    Args:
      solver: any solver.
      schedule: gives the levels.
      x0: [B, ...] the data whose region is kept.
      mask: broadcastable to x0, of the same rank; 1 keeps x0, 0 paints. In between, blends.
      noise: what the kept region is noised with: [B, ...] the same every step, as in diffusers, or [n, B, ...] one
        for each step.

    Raises:
      ValueError: if mask or noise does not fit x0.

    Source: Lugmayr et al. 2022 (arXiv:2201.09865) algorithm 1 without resampling; diffusers keeps one noise.
    """
    blend = _blend(schedule, x0, mask, noise)

    def step(z, state, x, t, s, denoise):
        x, inner, prediction = solver.step(z, state.inner, x, t, s, denoise)
        return blend(x, s, state.step), KeptState(state.step + 1, inner), prediction

    def finish(z, state, x, t, denoise):
        return mask * x0 + (1 - mask) * solver.finish(z, state.inner, x, t, denoise)

    return Solver(_init(solver), step, finish)


def keep_before_step(
    solver: Solver, schedule: Schedule, x0: Float[Array, "b ..."], mask: Float[Array, "..."], noise: Float[Array, "..."]
) -> Solver:
    """Inpainting as in latent diffusion's sampler: the kept region is put back before every step, not after the last.

    Args and Raises: as for `keep_after_step`. Latent diffusion draws new noise for each step, [n, B, ...].
    """
    blend = _blend(schedule, x0, mask, noise)

    def step(z, state, x, t, s, denoise):
        x, inner, prediction = solver.step(z, state.inner, blend(x, t, state.step), t, s, denoise)
        return x, KeptState(state.step + 1, inner), prediction

    def finish(z, state, x, t, denoise):
        return solver.finish(z, state.inner, blend(x, t, state.step), t, denoise)

    return Solver(_init(solver), step, finish)


def _kept(name: str, n: int, strength: float) -> int:
    if not 0 < strength <= 1:
        raise ValueError(f"{name}: strength must be in (0, 1], got {strength}; 1 ignores the image, 0 would return it")
    kept = min(int(n * strength), n)
    if kept == 0:
        raise ValueError(
            f"{name}: strength {strength} of {n} steps leaves none; use at least {1 / n:.3g}, or more steps"
        )
    return kept


def _init(solver: Solver) -> Callable:
    return lambda x, times: KeptState(jnp.zeros([], jnp.int32), solver.init(x, times))


def _blend(schedule, x0, mask, noise) -> Callable:
    if mask.ndim != x0.ndim or any(m not in (1, n) for m, n in zip(mask.shape, x0.shape, strict=True)):
        raise ValueError(
            f"inpainting: mask {mask.shape} does not fit x0 {x0.shape}; give it the same rank, and sizes equal or 1"
        )
    per_step = noise.ndim == x0.ndim + 1
    if noise.shape[per_step:] != x0.shape:
        raise ValueError(
            f"inpainting: noise {noise.shape} does not fit x0 {x0.shape}; use {x0.shape} or one such per step"
        )

    def blend(x, t, i):
        eps = noise[i] if per_step else noise
        level: Level = level_like(schedule, t, x)
        return mask * q_sample(x0, eps, level) + (1 - mask) * x

    return blend

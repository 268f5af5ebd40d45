"""Editing with a trained denoiser: where to start, and what to hold fixed.

A start is a noise level and the rest of a grid; noise the image with `process.q_sample` there and sample on. That is
image-to-image, strokes to images (SDEdit) and, with one call at the image's own level, denoising. For generators of one
or a few steps, a `View` says which coordinates of the image are known (a region, the grey values, the means of
patches) and `zero_shot` finds the others: inpainting, colourisation, super-resolution. For samplers of many steps,
inpainting wraps a Solver, so that it works with every solver and any guidance. Inversion is
`solvers.ddim.ddim_inversion`. Networks that take the mask as an input are the model's business.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from jaxdiff.denoiser import map_x0
from jaxdiff.process import q_sample
from jaxdiff.schedules import Schedule
from jaxdiff.solvers.base import Solver, level_like, no_state, sample
from jaxdiff.solvers.stochastic_iterative import stochastic_iterative
from jaxdiff.types import Denoiser, Key, Level, expand


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


class View(NamedTuple):
    """An orthogonal change of coordinates in which some are known.

    Attributes:
      forward: [B, H, W, C] -> coordinates.
      inverse: back again.
      known: broadcastable to the coordinates, of the same rank; 1 is known, 0 is free.
    """

    forward: Callable[[Array], Array]
    inverse: Callable[[Array], Array]
    known: Array


def region(mask: Float[Array, "..."]) -> View:
    """The pixels where mask is 1, for inpainting. The mask has the rank of the images."""
    return View(lambda x: x, lambda x: x, mask)


def grey_values() -> View:
    """The luma of images [B, H, W, 3], for colourisation: two more directions in colour space are free."""
    q = jnp.asarray(orthogonal_from(np.array([0.2989, 0.5870, 0.1140])), jnp.float32)

    def rotate(rule):
        return lambda x: jnp.einsum(rule, x, q.astype(x.dtype), precision="highest")

    return View(rotate("...c,cd->...d"), rotate("...d,cd->...c"), jnp.zeros([1, 1, 1, 3]).at[..., 0].set(1.0))


def patch_means(size: int) -> View:
    """The means of size x size patches, one for each channel, for super-resolution by that factor.

    Raises:
      ValueError: for a size below 2; while tracing, if it does not divide height and width.
    """
    if size < 2:
        raise ValueError(f"patch_means: size must be at least 2, got {size}; 1 would know every pixel")
    q = jnp.asarray(orthogonal_from(np.ones(size**2)), jnp.float32)

    def forward(x):
        b, h, w, c = x.shape
        if h % size or w % size:
            raise ValueError(f"patch_means: {size} does not divide images of {h} x {w}; crop or pad them")
        patches = x.reshape(b, h // size, size, w // size, size, c).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(b, h // size, w // size, size**2, c)
        return jnp.einsum("bhwdc,de->bhwec", patches, q.astype(x.dtype), precision="highest")

    def inverse(x):
        b, h, w, _, c = x.shape
        patches = jnp.einsum("bhwec,de->bhwdc", x, q.astype(x.dtype), precision="highest")
        patches = patches.reshape(b, h, w, size, size, c).transpose(0, 1, 3, 2, 4, 5)
        return patches.reshape(b, h * size, w * size, c)

    return View(forward, inverse, jnp.zeros([1, 1, 1, size**2, 1]).at[..., 0, :].set(1.0))


def orthogonal_from(direction: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, "n n"]:
    """An orthogonal matrix whose first column is the direction, scaled to length 1. Its sum must be positive.

    Source: Song et al. 2023's release, whose other columns are those of a QR decomposition with the same sign.
    """
    if not direction.sum() > 0:
        raise ValueError(f"orthogonal_from: the direction's sum must be positive, got {direction.sum():g}; negate it")
    matrix = np.eye(direction.size)
    matrix[:, 0] = direction / np.linalg.norm(direction)
    q = np.linalg.qr(matrix)[0]
    return -q if q[:, 0].sum() < 0 else q


def replace_known(view: View, y: Float[Array, "b ..."], x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """x with the known coordinates of y. With x = 0 it is what y shows: the grey image, the small image enlarged."""
    known = view.known.astype(x.dtype)
    return view.inverse(known * view.forward(y) + (1 - known) * view.forward(x))


def hold(denoise: Denoiser, view: View, y: Float[Array, "b ..."]) -> Denoiser:
    """The denoiser whose every x0 has the known coordinates of y. Clip before, not after: `hold(clip_x0(f), view, y)`.

    Source: Song et al. 2023 (arXiv:2303.01469) algorithm 4, the step between prediction and noise.
    """
    return map_x0(denoise, lambda x0: replace_known(view, y, x0))


def zero_shot(
    denoise: Denoiser,
    schedule: Schedule,
    key: Key,
    y: Float[Array, "b ..."],
    view: View,
    times: Float[Array, " n"],
    *,
    sigma_min: float = 0.0,
) -> Float[Array, "b ..."]:
    """Fills in what a view of y does not show, with any generator that reaches good data in one call.

    Starts from the shown part, its free coordinates 0, with the noise of times[0], and alternates prediction, exchange
    of the known coordinates, and fresh noise.

    Args:
      denoise: (x_t, t) -> x0, clipped for images.
      schedule: gives the levels.
      key: for the noise.
      y: [B, H, W, C] reference images; free coordinates do not matter.
      view: which coordinates are known.
      times: [n] decreasing, levels of the predictions; more of them than for sampling give better agreement.
      sigma_min: as for `solvers.stochastic_iterative`.

    Source: Song et al. 2023 algorithm 4. The notebook of its release starts with another level of noise.
    """
    y = replace_known(view, y, jnp.zeros_like(y))
    first, rest = jax.random.split(key)
    start = level_like(schedule, jnp.full(y.shape[:1], times[0], times.dtype), y)
    x = q_sample(y, jax.random.normal(first, y.shape, y.dtype), start)
    return sample(stochastic_iterative(schedule, sigma_min), hold(denoise, view, y), rest, x, times)


def edit_solver(
    edit: Callable[[Schedule, Denoiser], Float[Array, "b ..."]],
) -> Callable[[Schedule], Solver]:
    """A rule of editing in the form of a solver, so that every method's `generate` runs it with its own denoiser.

    Hand it to `methods.base.Sampling` with num_steps=1: the method then calls `edit` once, in the place of its sampler.
    The noise that the method starts from is not used.

    Args:
      edit: (schedule, denoise) -> [B, ...], for instance by `zero_shot`.
    """

    def make(schedule: Schedule) -> Solver:
        def finish(noise, state, x, t, denoise):
            del noise, state, x, t
            return edit(schedule, denoise)

        def step(noise, state, x, t, s, denoise):
            raise ValueError("an edit is one call; give Sampling(num_steps=1)")

        return Solver(no_state, step, finish)

    return make


def slerp(z1: Float[Array, "b ..."], z2: Float[Array, "b ..."], weight: Float[Array, " b"]) -> Float[Array, "b ..."]:
    """Between two noises along the great circle through them, example by example: z1 at weight 0, z2 at 1.

    A one-step generator turns it into a path between two samples. Parallel noises are blended linearly.

    Source: Song et al. 2020 (arXiv:2010.02502) appendix D.5, used for consistency models by Song et al. 2023.
    """
    flat = [z.reshape(z.shape[0], -1) for z in (z1, z2)]
    units = [z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in flat]
    angle = jnp.arccos(jnp.clip((units[0] * units[1]).sum(axis=1), -1.0, 1.0))
    parallel = jnp.sin(angle) < 1e-6
    safe = jnp.where(parallel, jnp.ones_like(angle), angle)
    shares = (jnp.where(parallel, linear, jnp.sin(linear * safe) / jnp.sin(safe)) for linear in (1 - weight, weight))
    on_z1, on_z2 = (expand(share, z1) for share in shares)
    return on_z1 * z1 + on_z2 * z2


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

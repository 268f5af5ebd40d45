"""Few big denoising steps by a generator: a training step's two versions of x_s, and sampling with latents.

A denoising generator predicts x0 from x_t and, perhaps, from a latent z of its own; x_s is then drawn from the
posterior q(x_s | x_t, x0). Sampling with one is `ancestral`, whose step is that draw and whose finish is the
generator's x0. `show` makes what a discriminator compares: that draw, and the x_s of the forward process. A Denoiser
sees (x_t, t) alone, so `with_latents` gives it a new z in each call. Losses are the methods'.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.process import clean_like, posterior, q_sample, transition
from jaxdiff.schedules import Schedule
from jaxdiff.solvers.ancestral import ancestral
from jaxdiff.solvers.base import Solver, level_like, sample
from jaxdiff.times import TimeSampler
from jaxdiff.types import Cond, Denoiser, Key, Level

Latents = Callable[[Array], Array]


class Draws(NamedTuple):
    """All that is random in one training step of a generator or its discriminator.

    Attributes:
      t: [B] times of the noisier states.
      eps_s, eps_t, eps_fake: [B, ...] unit noise of the real x_s, from it to x_t, and of the generated x_s.
      z: [B, D] the generator's latent, or None.
    """

    t: Float[Array, " b"]
    eps_s: Array
    eps_t: Array
    eps_fake: Array
    z: Array | None


class Shown(NamedTuple):
    """Both versions of x_s, and where they come from.

    Attributes:
      x0: [B, ...] data.
      x_t: [B, ...] the noisier state, which both are said to come from.
      time: [B] its time.
      real: [B, ...] x_s of the forward process; x_t was made from it.
      fake: [B, ...] x_s drawn with the generator's prediction.
      prediction: [B, ...] the generator's x0.
      t, s: levels of x_t and x_s, [B]; s may be clean.
    """

    x0: Array
    x_t: Array
    time: Array
    real: Array
    fake: Array
    prediction: Array
    t: Level
    s: Level


def draw(key: Key, time_sampler: TimeSampler, x0: Float[Array, "b ..."], latent_dim: int | None) -> Draws:
    """Draws for a batch."""
    time_key, *noise_keys, z_key = jax.random.split(key, 5)
    noise = [jax.random.normal(k, x0.shape, x0.dtype) for k in noise_keys]
    z = None if latent_dim is None else jax.random.normal(z_key, (x0.shape[0], latent_dim), x0.dtype)
    return Draws(time_sampler(time_key, x0.shape[0]).astype(x0.dtype), noise[0], noise[1], noise[2], z)


def show(
    denoise: Denoiser, x0: Float[Array, "b ..."], draws: Draws, s: Float[Array, " b"], schedule: Schedule
) -> Shown:
    """Both versions of x_s for a batch.

    Args:
      denoise: the generator, with the latent of these draws inside.
      x0: [B, ...] data.
      draws: from `draw`.
      s: [B] times of the less noisy states.
      schedule: gives the levels; below its t_min x_s is clean data, and the generated one the prediction itself.
    """
    level, cleaner = level_like(schedule, draws.t, x0), level_like(schedule, jnp.maximum(s, schedule.t_min), x0)
    clean = s < schedule.t_min
    cleaner = jax.tree.map(lambda noisy, none: jnp.where(clean, none, noisy), cleaner, clean_like(cleaner))
    real = q_sample(x0, draws.eps_s, cleaner)
    forward = transition(real, level, cleaner)
    x_t = forward.mean + jnp.sqrt(forward.variance) * draws.eps_t
    prediction = denoise(x_t, draws.t).x0
    backward = posterior(prediction, x_t, level, cleaner)
    fake = backward.mean + jnp.sqrt(backward.variance) * draws.eps_fake
    return Shown(x0, x_t, draws.t, real, fake, prediction, level, cleaner)


def with_latents(build: Callable[[Cond], Denoiser], cond: Cond, latents: Latents | None) -> Denoiser:
    """The denoiser of a generator with cond["z"] = latents(t) in every call.

    Args:
      build: conditioning -> Denoiser.
      cond: the rest of the conditioning.
      latents: t [B] -> z [B, D], or None for a generator without a latent.
    """
    if latents is None:
        return build(cond)
    return lambda x_t, t: build(cond | {"z": latents(t)})(x_t, t)


def generate_with(
    build: Callable[[Cond], Denoiser],
    schedule: Schedule,
    key: Key,
    noise: Float[Array, "b ..."],
    cond: Cond,
    grid: Array | np.ndarray,
    *,
    latent_dim: int | None = None,
    solver: Callable[[Schedule], Solver] | None = None,
) -> Float[Array, "b ..."]:
    """Samples along a decreasing grid of times, with a new latent in each step. It starts from unit noise as it is.

    Args:
      build: conditioning -> Denoiser.
      schedule: gives the levels.
      key: for the solver's noise and the latents.
      noise: [B, ...] unit normal.
      cond: conditioning without "z".
      grid: [n] times; the last step is the denoiser's x0.
      latent_dim: width of z, None for none.
      solver: None for `ancestral`, the posterior.
    """
    noise_key, latent_key = jax.random.split(key)
    latents = None if latent_dim is None else fresh_latents(latent_key, latent_dim)
    denoise = with_latents(build, cond, latents)
    return sample((solver or ancestral)(schedule), denoise, noise_key, noise, jnp.asarray(grid, noise.dtype))


def fresh_latents(key: Key, latent_dim: int) -> Latents:
    """t [B] -> unit normal z [B, latent_dim], another one at each time of a grid."""

    def latents(t):
        word = jax.lax.bitcast_convert_type(t[0].astype(jnp.float32), jnp.uint32)
        return jax.random.normal(jax.random.fold_in(key, word), (t.size, latent_dim), t.dtype)

    return latents

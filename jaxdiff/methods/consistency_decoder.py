"""The consistency decoder: from latents of Stable Diffusion to images in two steps of a consistency function.

A cosine chain of 1024 steps with EDM's preconditioning, of which only every 16th index occurs. Decoding starts from
noise and alternates a jump to the image, which is clipped, and fresh noise of the next index. Of the training, the
report says that a diffusion decoder was trained and then distilled by consistency distillation: `diffusion_decoder`
and `consistency_decoder` do that on the chain's own levels, with the choices of the papers they build on where the
report is silent. The network and the normalisation of latents are in `networks.consistency_decoder`.

Source: Betker et al. 2023, "Improving image generation with better captions", and the released decoder.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from jaxdiff import losses, parameterization, process, schedules
from jaxdiff.denoiser import clip_x0, denoiser
from jaxdiff.methods.base import Batch, Method, Objective, Sampling, copied, read_batch
from jaxdiff.schedules import Schedule
from jaxdiff.solvers.base import Solver, level_like, sample
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.heun import heun
from jaxdiff.solvers.stochastic_iterative import stochastic_iterative
from jaxdiff.types import Cond, Denoiser, Key, Network, Params, expand


def decoder_schedule(num_times: int = 1024) -> Schedule:
    """The chain: `schedules.cosine_betas`, t an index."""
    return schedules.discrete(schedules.cosine_betas(num_times))


def rounded_index(t: Float[Array, " n"], num_times: int = 1024, num_levels: int = 64) -> Float[Array, " n"]:
    """The index above t that the network knows: a multiple of num_times / num_levels, below num_times itself.

    Source: the released decoder's `round_timesteps`.
    """
    space = num_times // num_levels
    return jnp.minimum((jnp.floor(t / space) + 1) * space, num_times - space)


def decoding_times(
    fractions: Float64[np.ndarray, " n"], num_times: int = 1024, num_levels: int = 64
) -> Float64[np.ndarray, " n"]:
    """The indices of a decoding schedule given as fractions of the chain: (1, 1/2) becomes (1008, 512).

    Args:
      fractions: decreasing, in (0, 1].
      num_times, num_levels: as for `rounded_index`.

    Raises:
      ValueError: for fractions outside (0, 1] or in another order.
    """
    fractions = np.asarray(fractions, np.float64)
    if fractions.size == 0 or fractions[0] > 1 or fractions[-1] <= 0 or (np.diff(fractions) >= 0).any():
        raise ValueError(f"decoding_times: fractions must decrease from at most 1 and stay above 0, got {fractions}")
    index = np.floor((num_times - 1) * fractions + 1e-4)  # 341, not 340, for a third of 1023 whatever its last digit
    space = num_times // num_levels
    return np.minimum((np.floor(index / space) + 1) * space, num_times - space)


def decoder_denoiser(
    network: Network,
    params: Params,
    schedule: Schedule,
    cond: Cond,
    *,
    sigma_data: float = 0.5,
    train: bool = False,
    key: Key | None = None,
) -> Denoiser:
    """The decoder as a function of noise: EDM's preconditioning at the chain's levels; a clean x_t stays as it is.

    Args:
      network: (params, x_t, t, cond) -> [B, H, W, C or more]; the first C channels are used.
      params: its parameters.
      schedule: `decoder_schedule`.
      cond: {"latent": [B, h, w, c]}, normalised by `networks.consistency_decoder.normalize_latent`.
      sigma_data: standard deviation of the images.
      train, key: for dropout.
    """

    def image(params, x_t, t, cond, *, train=False, key=None):
        return network(params, x_t, t, cond, train=train, key=key)[..., : x_t.shape[-1]]

    meaning = parameterization.edm(sigma_data, parameterization.same_time)
    return denoiser(image, params, schedule, meaning, cond, train=train, key=key)


def diffusion_decoder(
    network: Network,
    *,
    init_params: Callable[[Key, Batch], Params],
    num_times: int = 1024,
    num_levels: int = 64,
    sigma_data: float = 0.5,
    clip: float | None = 1.0,
    num_steps: int = 16,
) -> Method:
    """The first stage: denoising images given their latents. Batches are {"x0": images, "latent": normalised latents}.

    Args:
      network, num_times, num_levels, sigma_data, clip: as for `consistency_decoder`.
      init_params: (key, batch) -> parameters of the network.
      num_steps: of the default grid of DDIM.
    """
    _check(num_times, num_levels, num_steps)
    schedule = decoder_schedule(num_times)

    def objective(params, aux, batch, key, step):
        del aux, step
        x_t, t, cond, network_key = _noised(batch, key, schedule, num_times, num_levels)
        denoise = decoder_denoiser(
            network, params["model"], schedule, cond, sigma_data=sigma_data, train=True, key=network_key
        )
        # the error of the network's own output: EDM's weight on the x0 error
        out = parameterization.edm(sigma_data).coefficients(level_like(schedule, t, x_t)).out
        return (losses.mse(denoise(x_t, t).x0, batch["x0"]) / out**2).mean(), {}

    generate = _generate(network, schedule, sigma_data, clip, num_times, num_levels, num_steps, ddim)
    return Method(
        lambda key, batch: ({"model": init_params(key, batch)}, {}), (Objective("model", objective),), generate
    )


def consistency_decoder(
    network: Network,
    *,
    teacher_params: Params,
    init_params: Callable[[Key, Batch], Params] | None = None,
    target_decay: float = 0.95,
    distance: losses.Distance = losses.mse,
    solver: Callable[[Schedule], Solver] = heun,
    num_times: int = 1024,
    num_levels: int = 64,
    sigma_data: float = 0.5,
    clip: float | None = 1.0,
    num_steps: int = 2,
) -> Method:
    """The second stage, and decoding. Batches as for `diffusion_decoder`; cond of `generate` is {"latent"}.

    Args:
      network: (params, x_t, t, cond) -> [B, H, W, C or more], t one of the indices that `rounded_index` returns.
      teacher_params: of the first stage; a copy is held in aux["teacher"].
      init_params: (key, batch) -> the student's parameters; None for a copy of the teacher's.
      target_decay: of the slow copy in aux["target"].
      distance: between the images that neighbouring levels lead to.
      solver: of the teacher's step to the next level.
      num_times: length of the chain.
      num_levels: divides num_times; there are num_levels - 1 indices.
      sigma_data: standard deviation of the images.
      clip: bound of the images after each step; None as another port of the decoder has it.
      num_steps: default number of decoding steps, at fractions 1, (n - 1) / n, ... of the chain.

    Returns:
      Method with the player "model". noise of `generate` is [B, H, W, C], at the size of the image.

    Raises:
      ValueError: for numbers out of range.

    Source: the released decoder for decoding; Song et al. 2023 (arXiv:2303.01469) algorithm 2 for training.
    """
    _check(num_times, num_levels, num_steps)
    if not 0 <= target_decay < 1:
        raise ValueError(f"consistency_decoder: target_decay must lie in [0, 1), got {target_decay}")
    schedule, space = decoder_schedule(num_times), num_times // num_levels

    def function(params, cond, **training):
        return decoder_denoiser(network, params, schedule, cond, sigma_data=sigma_data, **training)

    def init(key, batch):
        params = init_params(key, batch) if init_params else copied(teacher_params)
        return {"model": params}, {"teacher": copied(teacher_params), "target": copied(params)}

    def objective(params, aux, batch, key, step):
        del step
        x_t, t, cond, network_key = _noised(batch, key, schedule, num_times, num_levels)
        lowest = t <= space
        s = jnp.maximum(t - space, space)  # below the lowest index lie the clean images, not a level
        x_s, _, x0 = solver(schedule).step(x_t, None, x_t, t, s, function(aux["teacher"], cond))
        target = function(aux["target"], cond, train=True, key=network_key)(x_s, s).x0
        target = jnp.where(expand(lowest.astype(x_t.dtype), x_t) > 0, x0, target)
        prediction = function(params["model"], cond, train=True, key=network_key)(x_t, t).x0
        return distance(prediction, jax.lax.stop_gradient(target)).mean(), {}

    def advance(aux, params, step, metrics):
        del step, metrics
        moved = jax.tree.map(lambda a, b: target_decay * a + (1 - target_decay) * b, aux["target"], params["model"])
        return aux | {"target": moved}

    generate = _generate(
        network, schedule, sigma_data, clip, num_times, num_levels, num_steps, stochastic_iterative
    )  # fmt: skip
    return Method(init, (Objective("model", objective),), generate, advance)


def _generate(network, schedule, sigma_data, clip, num_times, num_levels, num_steps, solver):
    def generate(params, aux, key, noise, cond, sampling: Sampling):
        del aux
        if sampling.guidance_scale is not None:
            raise ValueError("consistency_decoder: guidance_scale has no meaning for a decoder; leave it out")
        denoise = decoder_denoiser(network, params["model"], schedule, cond, sigma_data=sigma_data)
        denoise = denoise if clip is None else clip_x0(denoise, clip)
        grid = sampling.times
        if grid is None:
            n = num_steps if sampling.num_steps is None else sampling.num_steps
            grid = decoding_times(np.linspace(1, 0, n, endpoint=False), num_times, num_levels)
        grid = jnp.asarray(grid, noise.dtype)
        make = sampling.solver or solver
        return sample(make(schedule), denoise, key, schedule.level(grid[:1]).sigma[0] * noise, grid)

    return generate


def _noised(batch, key, schedule, num_times, num_levels):
    """x_t at indices drawn from those the network knows, the indices, cond and a key for the network."""
    x0, cond = read_batch(batch, "consistency_decoder", ("x0", "latent"))
    time_key, eps_key, network_key = jax.random.split(key, 3)
    t = (num_times // num_levels) * jax.random.randint(time_key, x0.shape[:1], 1, num_levels).astype(x0.dtype)
    x_t = process.q_sample(x0, jax.random.normal(eps_key, x0.shape, x0.dtype), level_like(schedule, t, x0))
    return x_t, t, cond, network_key


def _check(num_times, num_levels, num_steps):
    if not 2 <= num_levels <= num_times or num_times % num_levels:
        raise ValueError(f"consistency_decoder: num_levels must divide num_times, {num_times}, got {num_levels}")
    if not 1 <= num_steps < num_levels:
        raise ValueError(f"consistency_decoder: num_steps must be 1 to {num_levels - 1}, got {num_steps}")

"""Latent consistency models: a guided latent diffusion model distilled into a consistency function on its own chain.

f(z, t, cond, w) = c_skip(t) z + c_out(t) x0(z, t, cond, w) on the indices t of a chain. A step of the teacher's DDIM
sampler skips T / num_ddim_steps indices, guided with w drawn from a range, which the student sees as
cond["guidance"]; the target is f of a slow copy of the student at the end of that step. LCM-LoRA trains low-rank
additions to the teacher instead, without w as an input and without the copy. Encoding images into latents and texts
into embeddings happens before.

Source: Luo et al. 2023 (arXiv:2310.04378); Luo et al. 2023 (arXiv:2311.05556) for LCM-LoRA.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from jaxdiff import losses, process, schedules
from jaxdiff import parameterization as parameterizations
from jaxdiff.denoiser import clip_x0, denoiser
from jaxdiff.guidance import classifier_free, with_guidance
from jaxdiff.methods.base import Batch, Method, Objective, Sampling, copied, keep, read_batch
from jaxdiff.parameterization import Parameterization
from jaxdiff.schedules import Betas
from jaxdiff.solvers.base import level_like, sample
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.stochastic_iterative import stochastic_iterative
from jaxdiff.types import Cond, Denoiser, Key, Network, Params, expand


def boundary_scalings(
    t: Float[Array, " b"], sigma_data: float = 0.5, time_scale: float = 10.0
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """c_skip = sd^2 / ((t k)^2 + sd^2) and c_out = t k / sqrt((t k)^2 + sd^2), both [B]: 1 and 0 at index t = 0.

    Unlike in consistency models, c_out has no factor sigma_data.

    Source: Luo et al. 2023 (arXiv:2310.04378) section 4.1; the factor k = time_scale = 10 is the release's.
    """
    scaled = time_scale * t
    return sigma_data**2 / (scaled**2 + sigma_data**2), scaled / jnp.sqrt(scaled**2 + sigma_data**2)


def with_boundary(denoise: Denoiser, sigma_data: float = 0.5, time_scale: float = 10.0) -> Denoiser:
    """The consistency function of a denoiser on a chain: c_skip x_t + c_out x0, which is x_t at index 0."""

    def function(x_t, t):
        d = denoise(x_t, t)
        skip, out = (expand(c, x_t) for c in boundary_scalings(t.astype(x_t.dtype), sigma_data, time_scale))
        return d._replace(x0=skip * x_t + out * d.x0)

    return function


def elementwise_huber(c: float = 0.001) -> losses.Distance:
    """Mean of sqrt(d^2 + c^2) - c over the values of an example, not the norm of the example as `pseudo_huber` has it.

    Source: the latent consistency release.
    """
    if not c > 0:
        raise ValueError(f"elementwise_huber: c must be positive, got {c}; use losses.l1 for no quadratic part")

    def distance(prediction, target):
        chex.assert_equal_shape([prediction, target])
        wide = jnp.promote_types(prediction.dtype, jnp.float32)
        squared = jnp.square(prediction.astype(wide) - target.astype(wide))
        return losses.mean_flat(squared / (jnp.sqrt(squared + c**2) + c))  # the same, without cancellation near 0

    return distance


def skipping_indices(
    draw: Int[Array, " b"], num_train_steps: int = 1000, num_ddim_steps: int = 50
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Start k (j + 1) - 1 and end k j - 1 (at least 0) of a teacher's step, with k = num_train_steps // num_ddim_steps.

    Args:
      draw: [B] j in 0 .. num_ddim_steps - 1.
      num_train_steps: length of the chain.
      num_ddim_steps: number of the teacher's steps.

    Source: Luo et al. 2023 section 4.3, "skipping-step"; the release.
    """
    stride = num_train_steps // num_ddim_steps
    t = stride * (draw + 1) - 1
    return t.astype(jnp.float32), jnp.maximum(t - stride, 0).astype(jnp.float32)


def lcm_times(
    num_train_steps: int, n: int, *, original_steps: int = 50, strength: float = 1.0
) -> Float64[np.ndarray, " n"]:
    """n indices of a chain, evenly chosen among those that the distillation used, the noisiest first.

    Args:
      num_train_steps: length T of the chain.
      n: number of sampling steps.
      original_steps: number of indices that the distillation used: T / original_steps apart, T - 1 the last.
      strength: share of them to keep, from the clean end; below 1 for image to image.

    Raises:
      ValueError: if strength leaves (0, 1], or n or original_steps cannot be had.

    Source: Luo et al. 2023 section 4.3; the released scheduler.
    """
    if not 1 <= original_steps <= num_train_steps:
        raise ValueError(f"lcm_times: original_steps must be 1 to {num_train_steps}, got {original_steps}")
    if not 0 < strength <= 1:
        raise ValueError(f"lcm_times: strength must lie in (0, 1], got {strength}")
    kept = int(original_steps * strength)
    if not 1 <= n <= kept:
        raise ValueError(
            f"lcm_times: n must be 1 to {kept}, the {original_steps} original steps times strength {strength:g}, "
            f"got {n}; take fewer steps or more original_steps"
        )
    origin = np.arange(1, kept + 1, dtype=np.float64)[::-1] * (num_train_steps // original_steps) - 1
    return origin[np.floor(np.linspace(0, kept, n, endpoint=False)).astype(np.int64)]


def lcm(
    network: Network,
    betas: Betas,
    *,
    teacher: Network,
    teacher_params: Params,
    init_params: Callable[[Key, Batch], Params] | None = None,
    null_cond: Callable[[Cond], Cond],
    guidance_range: tuple[float, float] = (2.0, 14.0),
    guidance_input: bool = True,
    adapt: Callable[[Network, Params], Network] | None = None,
    target_decay: float | None = 0.95,
    parameterization: Parameterization | None = None,
    distance: losses.Distance | None = None,
    num_ddim_steps: int = 50,
    sigma_data: float = 0.5,
    time_scale: float = 10.0,
    clip: float | None = None,
    num_steps: int = 4,
) -> Method:
    """Latent consistency distillation. Batches are {"x0": latents [B, ...], further arrays [B, ...] as conditioning}.

    For LCM-LoRA: `adapt=networks.lora.adapt`, `init_params=lambda key, batch: init_lora(...)`, `guidance_input=False`,
    `target_decay=None`, and the teacher as network.

    Args:
      network: the student, (params, z, t, cond) -> [B, ...]; cond["guidance"] [B] is w.
      betas: [T] of the teacher's chain, e.g. `schedules.scaled_linear_betas(1000)`.
      teacher: the teacher's network, which sees no w. Its output means the same as the student's.
      teacher_params: its parameters; a copy is held in aux["teacher"].
      init_params: (key, batch) -> the student's parameters: the teacher's, and layers for w that start at zero. None
        for a copy of the teacher's.
      null_cond: cond -> the same without a condition: embeddings of the empty text, or the null label.
      guidance_range: (low, high) of w = guidance_scale - 1, drawn uniformly; the release draws from (5, 15).
      guidance_input: whether the student sees w.
      adapt: (network, aux["teacher"]) -> Network of the additions that are trained; None to train all parameters.
      target_decay: of the slow copy in aux["target"]; None to take the student itself, without a gradient.
      parameterization: what the outputs mean; None for eps.
      distance: None for `elementwise_huber()`.
      num_ddim_steps: number of the teacher's steps, divides T.
      sigma_data, time_scale: see `boundary_scalings`.
      clip: bound of |f| at every step of sampling, 1 for images; None for latents.
      num_steps: default number of sampling steps.

    Returns:
      Method with the player "model". With guidance_input, `Sampling.guidance_scale` is 1 + w, by default the least one;
      without, it is classifier-free guidance on top (1 to 2 in the report), by default none.

    Raises:
      ValueError: for numbers out of range, or an output that is undefined on the chain.

    Source: Luo et al. 2023 (arXiv:2310.04378) algorithm 1.
    """
    _check(betas, guidance_range, target_decay, num_ddim_steps, sigma_data)
    if adapt is not None and init_params is None:
        raise ValueError("lcm: adapt needs init_params, which starts the additions that are trained")
    meaning = parameterizations.eps() if parameterization is None else parameterization
    distance = elementwise_huber() if distance is None else distance
    schedule = schedules.discrete(betas)
    parameterizations.require_defined(schedule, meaning)
    lcm_times(len(betas), num_steps, original_steps=num_ddim_steps)  # refuses a bad grid now, not when sampling

    def function(params, aux, cond, *, train=False, key=None):
        student = network if adapt is None else adapt(network, jax.lax.stop_gradient(aux["teacher"]))
        plain = denoiser(student, params, schedule, meaning, cond, train=train, key=key)
        return with_boundary(plain, sigma_data, time_scale)

    def init(key, batch):
        params = init_params(key, batch) if init_params else copied(teacher_params)
        aux = {"teacher": copied(teacher_params)}
        return {"model": params}, aux if target_decay is None else aux | {"target": copied(params)}

    def objective(params, aux, batch, key, step):
        del step
        x0, cond = read_batch(batch, "lcm")
        index_key, eps_key, guidance_key, network_key = jax.random.split(key, 4)
        draw = jax.random.randint(index_key, x0.shape[:1], 0, num_ddim_steps)
        t, s = skipping_indices(draw, len(betas), num_ddim_steps)
        z_t = process.q_sample(x0, jax.random.normal(eps_key, x0.shape, x0.dtype), level_like(schedule, t, x0))
        w = jax.random.uniform(guidance_key, t.shape, x0.dtype, *guidance_range)

        def old(cond):
            return denoiser(teacher, aux["teacher"], schedule, meaning, cond)

        guided = classifier_free(old, cond, null_cond(cond), 1 + w)
        z_s, _, _ = ddim(schedule).step(z_t, None, z_t, t, s, guided)
        cond = cond | {"guidance": w} if guidance_input else cond
        slow = params["model"] if target_decay is None else aux["target"]
        target = function(jax.lax.stop_gradient(slow), aux, cond, train=True, key=network_key)(z_s, s).x0
        prediction = function(params["model"], aux, cond, train=True, key=network_key)(z_t, t).x0
        error = distance(prediction, jax.lax.stop_gradient(target))
        return error.mean(), {"error": error}

    def slower(slow, new):
        return new if target_decay is None else target_decay * slow + (1 - target_decay) * new

    def advance(aux, params, step, metrics):
        del step, metrics
        return aux | {"target": jax.tree.map(slower, aux["target"], params["model"])}

    def generate(params, aux, key, noise, cond, sampling: Sampling):
        scale = sampling.guidance_scale
        if guidance_input:
            cond = with_guidance(cond, scale, guidance_range, noise)
            denoise = function(params["model"], aux, cond)
        elif scale is None:
            denoise = function(params["model"], aux, cond)
        else:
            denoise = classifier_free(lambda c: function(params["model"], aux, c), cond, null_cond(cond), scale)
        denoise = denoise if clip is None else clip_x0(denoise, clip)
        grid = sampling.times
        if grid is None:
            n = num_steps if sampling.num_steps is None else sampling.num_steps
            grid = lcm_times(len(betas), n, original_steps=num_ddim_steps)
        solver = (sampling.solver or stochastic_iterative)(schedule)
        return sample(solver, denoise, key, noise, jnp.asarray(grid, noise.dtype))

    return Method(init, (Objective("model", objective),), generate, keep if target_decay is None else advance)


def _check(betas, guidance_range, target_decay, num_ddim_steps, sigma_data):
    if not guidance_range[0] <= guidance_range[1]:
        raise ValueError(f"lcm: guidance_range is (low, high) of guidance_scale - 1, got {guidance_range}; swap them")
    if target_decay is not None and not 0 <= target_decay < 1:
        raise ValueError(f"lcm: target_decay must lie in [0, 1), got {target_decay}; None takes the student itself")
    if num_ddim_steps < 1 or len(betas) % num_ddim_steps:
        raise ValueError(f"lcm: num_ddim_steps must divide the chain of {len(betas)} steps, got {num_ddim_steps}")
    if not sigma_data > 0:
        raise ValueError(f"lcm: sigma_data must be positive, got {sigma_data}")

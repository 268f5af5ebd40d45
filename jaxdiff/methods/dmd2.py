"""Distribution matching distillation: a generator whose samples have the teacher's score at every noise level.

The generator's gradient is the difference of two denoisers at its own diffused samples: the frozen teacher's (the real
score) and that of a network that keeps learning the generator's samples (the fake score), which may carry a logit head
and then also judges diffused data against diffused samples. `edm_form` (ImageNet) and `eps_form` (Stable Diffusion)
say on which levels. One step, or several, trained on the states that the student's own sampler visits (backward
simulation). The regression on stored pairs of the first paper is not here, nor is decoding latents.

Source: Yin et al. 2024 (arXiv:2405.14867); Yin et al. 2023 (arXiv:2311.18828) for the gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff import health, losses, one_step, process, schedules, times, weighting
from jaxdiff import parameterization as parameterizations
from jaxdiff.denoiser import denoiser
from jaxdiff.methods.base import Batch, Method, Objective, Sampling, copied, read_batch
from jaxdiff.parameterization import Parameterization
from jaxdiff.schedules import Betas, Schedule
from jaxdiff.solvers.base import integrate, level_like, sample
from jaxdiff.solvers.stochastic_iterative import stochastic_iterative
from jaxdiff.types import Cond, Denoiser, Key, Level, Network, Params, expand

ParamsFn = Callable[[Key, Batch], Params]
Teacher = Callable[[Params, Cond], Denoiser]
MAX_GAIN = 20.0
"""More than `one_step.MAX_GAIN`, since the release starts from the last level of Stable Diffusion, which has 14.6."""


class Form(NamedTuple):
    """The noise levels of all three networks, numbered, and what the networks' outputs mean there.

    Attributes:
      schedule, parameterization: of the networks.
      time: index float [B] -> t; index 0 is the least noisy level, num_levels - 1 the noisiest.
      num_levels: how many.
      weight: of the fake score's x0 error.
      prior: noisiest Level -> [B], deviation of the noise that a generator starts from.
    """

    schedule: Schedule
    parameterization: Parameterization
    time: Callable[[Array], Array]
    num_levels: int
    weight: weighting.Weighting
    prior: Callable[[Level], Array]


def edm_form(
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    num_levels: int = 1000,
    parameterization: Parameterization | None = None,
) -> Form:
    """EDM's networks on the Karras grid; None for `parameterization.edm(sigma_data)`. Source: the ImageNet release."""
    schedule = schedules.ve(sigma_min, sigma_max)

    def time(index):
        return times.karras_time(num_levels - 1 - index, num_levels, sigma_min, sigma_max, rho)

    meaning = parameterizations.edm(sigma_data) if parameterization is None else parameterization
    return Form(schedule, meaning, time, num_levels, weighting.edm(sigma_data), lambda level: level.sigma)


def eps_form(betas: Betas, parameterization: Parameterization | None = None) -> Form:
    """A chain, its networks trained by the eps error; None for `parameterization.eps()`. Source: the text release.

    A generator starts from unit noise, though the chain's last level may hold a little signal.

    Raises:
      ValueError: for an output that says nothing about x0 at the last level, as eps at zero terminal SNR.
    """
    schedule = schedules.discrete(betas)
    meaning = parameterizations.eps() if parameterization is None else parameterization
    parameterizations.require_defined(schedule, meaning)
    return Form(
        schedule, meaning, parameterizations.same_time, len(betas), weighting.snr,
        lambda level: jnp.ones_like(level.sigma),
    )  # fmt: skip


def matching_gradient(
    x: Float[Array, "b ..."], real_x0: Float[Array, "b ..."], fake_x0: Float[Array, "b ..."]
) -> Float[Array, "b ..."]:
    """((x - real_x0) - (x - fake_x0)) / mean |x - real_x0|, the mean over each example: where x should move, negated.

    It is 0 for an example that the teacher leaves exactly as it is, where the release has 0 or the largest float; other
    values that are not finite stay so, where the release hides them.

    Args:
      x: [B, ...] samples of the generator.
      real_x0, fake_x0: [B, ...] predictions at the diffused x by the teacher and by the fake score.

    Source: Yin et al. 2023 (arXiv:2311.18828) eq. 7-8.
    """
    scale = losses.l1(x, real_x0).astype(x.dtype)
    one = jnp.ones_like(scale)
    share = jnp.where(scale == 0, jnp.zeros_like(scale), 1 / jnp.where(scale == 0, one, scale))
    return ((x - real_x0) - (x - fake_x0)) * expand(share, x)


def matching_loss(x: Float[Array, "b ..."], gradient: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """Half the mean squared gradient; its derivative in x is the gradient over the number of values."""
    return 0.5 * losses.mse(x, jax.lax.stop_gradient(x - gradient))


def score_loss(form: Form, denoise: Denoiser, x: Array, index: Array, eps: Array) -> Float[Array, " b"]:
    """What the fake score minimises: the weighted error of its x0 for samples x [B, ...] at levels index [B]."""
    t = form.time(index)
    level = level_like(form.schedule, t, x)
    return form.weight(level) * losses.mse(denoise(process.q_sample(x, eps, level), t).x0, x)


def dmd2(
    network: Network,
    form: Form,
    *,
    teacher_params: Params,
    init_params: ParamsFn | None = None,
    teacher: Teacher | None = None,
    score: Network | None = None,
    judge: Network | None = None,
    init_fake: ParamsFn | None = None,
    step_range: tuple[float, float] = (0.02, 0.98),
    judge_range: tuple[float, float] = (0.0, 1.0),
    judge_weight: float = 1e-2,
    gan_weight: float = 3e-3,
    every: int = 5,
    num_steps: int = 1,
    max_gain: float = MAX_GAIN,
) -> Method:
    """DMD2. Batches are {"x0": [B, ...], further arrays [B, ...] as conditioning, of data and samples alike}.

    Without a judge x0 gives only the shape. The release updates the generator before the fake score, with one draw of
    samples for both; here the fake score comes first, and each draws its own.

    Args:
      network: the generator, (params, x_t, t, cond) -> [B, ...], and by default the other two as well.
      form: `edm_form(...)` or `eps_form(betas)`.
      teacher_params: of the real score; aux["teacher"] holds a copy.
      init_params: (key, batch) -> the generator's parameters; None for a copy of the teacher's.
      teacher: (teacher_params, cond) -> Denoiser in the form's times, with any guidance inside; None for `network`.
      score: the fake score, a network whose output means what the form says; None for `network`.
      judge: (params["fake"], x_t, t, cond) -> logits [B] or more, from the fake score's own parameters; None without.
        It sees input and time as `score` does.
      init_fake: (key, batch) -> params["fake"]; None for a copy of the teacher's. With a judge it must add the head,
        which should start at zero.
      step_range: share of the levels at which the scores are compared, (least noisy, noisiest).
      judge_range: the same for the judge.
      judge_weight: of the judge's loss beside the fake score's.
      gan_weight: of the adversarial term beside the matching loss: 3e-3 on ImageNet, 1e-3 and 5e-3 for text to image.
      every: the generator is updated on every n-th step, the fake score on all: 5, or 10 for Stable Diffusion 1.5.
      num_steps: of the student's sampler, at trailing levels of the form.
      max_gain: largest factor on the generator's error in x0 at the level it starts from: 14.6 for eps at the end of
        Stable Diffusion's chain, which the release uses, 157 at that of DDPM's. math.inf allows any.

    Returns:
      Method with the players "fake" and "model". `generate` alternates the student's x0 with fresh noise; other
      `Sampling.times` or num_steps are levels that the student was not trained at. Metrics: loss_score, loss_matching,
      diversity, and logit_real, logit_fake, also by level, and loss_gan with a judge.

    Raises:
      ValueError: for a range that is empty, a number out of range, a judge without init_fake, or an output that hardly
        determines x0 at the level it starts from; from `init`, without `teacher`, for a generator of another form than
        the teacher, and for such a fake score without `score` and judge; while tracing, if a network answers in another
        shape than the data's, and for a guidance_scale when sampling.

    Source: Yin et al. 2024 section 4, and the releases' settings.
    """
    low, high = _indices(step_range, form, "step_range")
    judge_low, judge_high = _indices(judge_range, form, "judge_range")
    if judge is not None and init_fake is None:
        raise ValueError("dmd2: a judge reads the parameters of the fake score; give init_fake, which adds its head")
    if every < 1:
        raise ValueError(f"dmd2: every must be at least 1, got {every}")
    _require_safe(form, float(sampling_times(form, num_steps)[0]), max_gain)
    adversarial = losses.non_saturating()
    solver = stochastic_iterative(form.schedule)

    def denoise_by(network, params, cond, **training) -> Denoiser:
        return denoiser(network, params, form.schedule, form.parameterization, cond, **training)

    teach = teacher or (lambda params, cond: denoise_by(network, params, cond))
    fake_score = network if score is None else score

    def init(key, batch):
        student_key, fake_key = jax.random.split(key)
        student = init_params(student_key, batch) if init_params else copied(teacher_params)
        fake = init_fake(fake_key, batch) if init_fake else copied(teacher_params)
        if teacher is None:
            _require_same_form(student, teacher_params, "init_params")
            if score is None and judge is None:
                _require_same_form(fake, teacher_params, "init_fake")
        return {"model": student, "fake": fake}, {"teacher": copied(teacher_params)}

    def samples(params, x0, cond, key):
        """x0 of the generator at the start, or at a state of its own sampler, drawn for each example."""
        noise_key, walk_key, index_key, network_key = jax.random.split(key, 4)
        grid = jnp.asarray(sampling_times(form, num_steps), x0.dtype)
        noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
        x_t, t = start(noise, grid), jnp.full(x0.shape[:1], grid[0])
        if num_steps > 1:
            frozen = denoise_by(network, jax.lax.stop_gradient(params), cond)
            _, walk = integrate(solver, frozen, walk_key, x_t, grid, return_trajectory=True)
            index = jax.random.randint(index_key, x0.shape[:1], 0, num_steps)
            states = jnp.concatenate([x_t[None], walk.x])
            x_t, t = states[index, jnp.arange(x0.shape[0])], grid[index]
        out = denoise_by(network, params, cond, train=True, key=network_key)(x_t, t).x0
        return _like(out, x0, "the generator")

    def start(noise, grid):
        level = level_like(form.schedule, grid[:1], noise)
        return form.prior(level)[0] * noise

    def judged(judge: Network, params, x, cond, key):
        index_key, eps_key, network_key = jax.random.split(key, 3)
        t = form.time(jax.random.randint(index_key, x.shape[:1], judge_low, judge_high).astype(x.dtype))
        level = level_like(form.schedule, t, x)
        x_t = process.q_sample(x, jax.random.normal(eps_key, x.shape, x.dtype), level)
        x_in = expand(form.parameterization.coefficients(level).scale_in, x) * x_t
        return judge(params, x_in, form.parameterization.net_time(t), cond, train=True, key=network_key), level

    def fake_objective(params, aux, batch, key, step):
        del aux, step
        x0, cond = read_batch(batch, "dmd2")
        sample_key, index_key, eps_key, network_key, real_key, fake_key = jax.random.split(key, 6)
        x = jax.lax.stop_gradient(samples(params["model"], x0, cond, sample_key))
        index = jax.random.randint(index_key, x.shape[:1], 0, form.num_levels).astype(x.dtype)
        denoise = denoise_by(fake_score, params["fake"], cond, train=True, key=network_key)
        error = score_loss(form, denoise, x, index, jax.random.normal(eps_key, x.shape, x.dtype))
        if judge is None:
            return error.mean(), {"loss_score": error}
        real, real_level = judged(judge, params["fake"], x0, cond, real_key)
        fake, fake_level = judged(judge, params["fake"], x, cond, fake_key)
        loss = error.mean() + judge_weight * adversarial.discriminator(real, fake).mean()
        logits = health.by_level({"logit_real": losses.mean_flat(real)}, real_level)
        logits |= health.by_level({"logit_fake": losses.mean_flat(fake)}, fake_level)
        return loss, {"loss_score": error} | logits

    def objective(params, aux, batch, key, step):
        del step
        x0, cond = read_batch(batch, "dmd2")
        sample_key, index_key, eps_key, judge_key = jax.random.split(key, 4)
        x = samples(params["model"], x0, cond, sample_key)
        index = jax.random.randint(index_key, x.shape[:1], low, min(high + 1, form.num_levels)).astype(x.dtype)
        t = form.time(index)
        held = jax.lax.stop_gradient(x)
        eps = jax.random.normal(eps_key, x.shape, x.dtype)
        x_t = process.q_sample(held, eps, level_like(form.schedule, t, x))
        real = _like(teach(aux["teacher"], cond)(x_t, t).x0, x, "the teacher")
        fake = _like(denoise_by(fake_score, params["fake"], cond)(x_t, t).x0, x, "the fake score")
        matching = matching_loss(x, jax.lax.stop_gradient(matching_gradient(held, real, fake)))
        metrics = {"loss_matching": matching, "diversity": health.diversity(x, x0)}
        if judge is None:
            return matching.mean(), metrics
        logits, _ = judged(judge, params["fake"], x, cond, judge_key)
        fooled = losses.mean_flat(adversarial.generator(logits, logits))
        return matching.mean() + gan_weight * fooled.mean(), metrics | {"loss_gan": fooled}

    def generate(params, aux, key, noise, cond, sampling: Sampling):
        del aux
        if sampling.guidance_scale is not None:
            raise ValueError("dmd2: the student takes no guidance_scale; guide the teacher it is distilled from")
        n = num_steps if sampling.num_steps is None else sampling.num_steps
        grid = jnp.asarray(sampling_times(form, n) if sampling.times is None else sampling.times, noise.dtype)
        make = sampling.solver or stochastic_iterative
        denoise = denoise_by(network, params["model"], cond)
        return sample(make(form.schedule), denoise, key, start(noise, grid), grid)

    return Method(init, (Objective("fake", fake_objective), Objective("model", objective, every)), generate)


def sampling_times(form: Form, num_steps: int) -> Float[np.ndarray, " n"]:
    """Times of a student with num_steps steps: indices 999, 749, 499, 249 of 1000 for four.

    Raises:
      ValueError: for a count below 1 or above the number of levels.

    Source: Yin et al. 2024 section 4.4, the release.
    """
    if not 1 <= num_steps <= form.num_levels:
        raise ValueError(f"dmd2: num_steps must be 1 to {form.num_levels}, got {num_steps}")
    indices = times.trailing(form.num_levels, num_steps)
    with jax.ensure_compile_time_eval():
        return np.asarray(form.time(jnp.asarray(indices, jnp.float32)))


def _require_safe(form: Form, t: float, max_gain: float) -> None:
    with jax.ensure_compile_time_eval():
        level = form.schedule.level(jnp.full([1], t, jnp.float32))
        gain = abs(float(form.parameterization.coefficients(level).out[0]))
    if not gain <= max_gain:
        raise ValueError(
            f"dmd2: at t = {t:g} this output (eps?) determines x0 only up to {gain:.3g} times its own error, at most "
            f"{max_gain:g} is allowed; use a network that predicts v or x0, which one_step.from_diffusion with an "
            "earlier last_time makes of this one, or raise max_gain"
        )


def _require_same_form(params: Params, teacher_params: Params, source: str) -> None:
    try:
        one_step.require_same_form(params, teacher_params)
    except ValueError as error:
        raise ValueError(f"dmd2: {source}: {error}") from None


def _indices(share: tuple[float, float], form: Form, name: str) -> tuple[int, int]:
    if not 0 <= share[0] < share[1] <= 1:
        raise ValueError(f"dmd2: {name} is (low, high) in [0, 1], low below high, got {share}")
    return int(share[0] * form.num_levels), int(share[1] * form.num_levels)


def _like(answer: Array, x: Array, who: str) -> Array:
    if answer.shape != x.shape:
        raise ValueError(f"dmd2: {who} answers in shape {answer.shape}, the data have {x.shape}; they must agree")
    return answer

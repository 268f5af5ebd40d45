"""Adversarial distillation: a few-step student of a diffusion model, judged on the frozen model's own features.

From one of a few levels the student predicts x0. Prediction and data are noised to a random level, the frozen
diffusion model turns both into features, and small heads, the only part of the discriminator that learns, tell them
apart (LADD). A second loss pulls the prediction to what the teacher says when it is noised again (ADD). ADD itself
reads features of DINOv2 from clean pixels, which is not here. The training code of both was not released.

Source: Sauer et al. 2023 (arXiv:2311.17042), ADD; Sauer et al. 2024 (arXiv:2403.12015), LADD.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff import health, losses, one_step, process, times
from jaxdiff.denoiser import denoiser
from jaxdiff.losses import Adversarial
from jaxdiff.methods.base import Batch, Method, Objective, Sampling, copied, read_batch
from jaxdiff.parameterization import Parameterization
from jaxdiff.schedules import Schedule
from jaxdiff.solvers.base import level_like, sample
from jaxdiff.solvers.stochastic_iterative import stochastic_iterative
from jaxdiff.times import TimeSampler
from jaxdiff.types import Cond, Denoiser, Key, Level, Network, Params
from jaxdiff.weighting import Weighting

Taps = Sequence[Array]
Features = Callable[[Params, Array, Array, Cond], Taps]
Heads = Callable[[Params, Taps, Array, Cond], Array]


def logit_normal_share(schedule: Schedule, mean: float = 1.0, std: float = 1.0) -> TimeSampler:
    """Times whose sigma / (alpha + sigma), a flow's t, is logit-normal. A larger mean judges structure, not detail.

    Source: Sauer et al. 2024 section 3.2; mean and std are not verified.
    """
    draw = times.logit_normal(mean, std)
    return lambda key, n: one_step.time_of_share(schedule, draw(key, n))


def uniform_share(schedule: Schedule) -> TimeSampler:
    """Times whose sigma / (alpha + sigma), a flow's t, is uniform."""
    draw = times.uniform(0.0, 1.0)
    return lambda key, n: one_step.time_of_share(schedule, draw(key, n))


def exponential(level: Level) -> Float[Array, " b"]:
    """alpha_t of a chain: noisier levels count less in the distillation; elsewhere that of the level scaled to one.

    Source: Sauer et al. 2023 section 3.3.
    """
    return level.alpha / jnp.sqrt(level.alpha**2 + level.sigma**2)


def head_r1(heads: Callable[[Taps], Array], taps: Taps) -> Float[Array, " b"]:
    """|d sum(logits) / d features|^2 of each example, over all features: R1 at the heads' inputs, not at the pixels.

    Source: Sauer et al. 2023 eq. 3.
    """
    slopes = jax.grad(lambda taps: heads(taps).astype(jnp.float32).sum())(list(taps))
    return sum((jnp.square(s.astype(jnp.float32)).reshape(s.shape[0], -1).sum(axis=1) for s in slopes), jnp.zeros(()))


def over_heads(terms: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """The sum over heads of each one's mean over its tokens.

    Args:
      terms: [B] of one head, or [B, K, ...] of K heads and their tokens.

    Source: Sauer et al. 2023 eq. 2-3 for the sum.
    """
    num_heads = 1 if terms.ndim == 1 else terms.shape[1]
    return terms.reshape(terms.shape[0], num_heads, -1).mean(axis=2).sum(axis=1)


def distillation(
    prediction: Float[Array, "b ..."], teacher: Denoiser, t: Float[Array, " b"], level: Level, noise: Array
) -> Float[Array, " b"]:
    """Mean squared distance from a prediction to what the teacher makes of it, noised to `level`.

    The gradient enters the prediction as the teacher's x0 were a constant.

    Args:
      prediction: [B, ...] of x0.
      teacher: (x_t, t) -> x0.
      t, level: [B] where the teacher is asked.
      noise: [B, ...] unit normal.

    Source: Sauer et al. 2023 eq. 5.
    """
    x_t = process.q_sample(jax.lax.stop_gradient(prediction), noise, level)
    return losses.mse(prediction, jax.lax.stop_gradient(teacher(x_t, t).x0))


def adversarial_distillation(
    network: Network,
    schedule: Schedule,
    *,
    parameterization: Parameterization,
    teacher_params: Params,
    features: Features,
    heads: Heads,
    init_heads: Callable[[Key, Batch], Params],
    levels: Sequence[float],
    init_params: Callable[[Key, Batch], Params] | None = None,
    judge_times: TimeSampler | None = None,
    teacher_times: TimeSampler | None = None,
    adversarial: Adversarial | None = None,
    distillation_weight: float = 2.5,
    weighting: Weighting = exponential,
    r1_weight: float = 0.0,
    num_steps: int = 1,
) -> Method:
    """ADD and LADD with the diffusion model as judge. Batches are {"x0": [B, ...], further arrays as conditioning}.

    Data may be the teacher's own samples, as LADD has them. The papers' heads are conditioned by projection: ADD's on
    embeddings of text and image, LADD's on noise level and text; `t` and `cond` are there for such heads, of which we
    have none. `FeatureHeads`, APT's, is one head on all features that sees neither.

    Args:
      network: teacher and student, (params, x_t, t, cond) -> [B, ...].
      schedule: of both; at its t_max the student learns from noise alone.
      parameterization: what the output means; it must determine x0 at the last level.
      teacher_params: of the teacher, frozen; a copy is held in aux["teacher"].
      features: (teacher_params, x, t, cond) -> [B, N, D] features of the network, x and t as it takes them.
      heads: (params, features, t, cond) -> logits [B] of one head, or [B, K] of K, or [B, K, ...] with one for every
        token; t as `features` has it. Losses are means over an example's tokens and sums over its heads.
      init_heads: (key, batch) -> parameters of the heads.
      levels: decreasing times that the student is asked at, the first t_max; drawn uniformly.
      init_params: (key, batch) -> the student's parameters; None for a copy of the teacher's.
      judge_times: levels that the discriminator sees; None for `logit_normal_share(schedule)`.
      teacher_times: levels that the teacher is asked at; None for `uniform_share(schedule)`. ADD draws an index of
        its chain, `times.uniform_index(1000)`.
      adversarial: None for `losses.hinge()`.
      distillation_weight: 2.5 in ADD; 0 leaves the student to its adversary.
      weighting: of the distillation, by the teacher's level.
      r1_weight: of `head_r1` on data; 1e-5 in ADD.
      num_steps: default number of sampling steps.

    Returns:
      Method with the players "disc" (the heads) and "model". n steps go through the first n of `levels`. Logits in
        the metrics are means over heads, too.

    Raises:
      ValueError: for an output that does not determine x0 at the last level, levels out of order, negative weights;
        from `init`, for a student of another form than the teacher.

    Source: Sauer et al. 2023 (arXiv:2311.17042) section 3; Sauer et al. 2024 (arXiv:2403.12015) section 3.
    """
    one_step.require_safe(schedule, parameterization)
    grid = _checked(levels, schedule, num_steps, distillation_weight, r1_weight)
    adversarial = losses.hinge() if adversarial is None else adversarial
    judge_times = logit_normal_share(schedule) if judge_times is None else judge_times
    teacher_times = uniform_share(schedule) if teacher_times is None else teacher_times

    as_trained = one_step.as_trained(schedule, parameterization)

    def init(key, batch):
        student_key, heads_key = jax.random.split(key)
        params = copied(teacher_params) if init_params is None else init_params(student_key, batch)
        one_step.require_same_form(params, teacher_params)
        return {"model": params, "disc": init_heads(heads_key, batch)}, {"teacher": copied(teacher_params)}

    def level_of(t, x0):
        return level_like(schedule, t, x0)

    def played(params, aux, batch, key):
        """What both objectives begin with, and functions for what only one of them needs.

        Returns:
          The prediction and its level; the judge's level; () -> features of the data; x -> those of samples, noised
          apart; (parameters of the heads, features) -> logits.
        """
        x0, cond = read_batch(batch, "adversarial_distillation")
        index_key, eps_key, time_key, real_key, fake_key, network_key = jax.random.split(key, 6)
        s = jnp.asarray(grid, x0.dtype)[jax.random.randint(index_key, x0.shape[:1], 0, len(grid))]
        start = one_step.ending_in_noise(schedule, s, level_of(s, x0))
        x_s = process.q_sample(x0, jax.random.normal(eps_key, x0.shape, x0.dtype), start)
        denoise = denoiser(network, params["model"], schedule, parameterization, cond, train=True, key=network_key)
        prediction = denoise(x_s, s).x0
        t = judge_times(time_key, x0.shape[0]).astype(x0.dtype)
        looked = level_of(t, x0)
        _, net_time = as_trained(x0, t)

        def seen(x, key):
            noised = process.q_sample(x, jax.random.normal(key, x0.shape, x0.dtype), looked)
            return features(aux["teacher"], *as_trained(noised, t), cond)

        def judge(params, taps):
            return heads(params, taps, net_time, cond)

        return (prediction, start), looked, lambda: seen(x0, real_key), lambda x: seen(x, fake_key), judge

    def disc_objective(params, aux, batch, key, step):
        del step
        (prediction, _), level, seen_real, seen_fake, judge = played(params, aux, batch, key)
        real, fake = seen_real(), seen_fake(jax.lax.stop_gradient(prediction))
        on_real, on_fake = judge(params["disc"], real), judge(params["disc"], fake)
        loss = over_heads(adversarial.discriminator(on_real, on_fake)).mean()
        logits = {"logit_real": losses.mean_flat(on_real), "logit_fake": losses.mean_flat(on_fake)}
        metrics = health.by_level(logits, level)
        if not r1_weight:
            return loss, metrics
        r1 = head_r1(lambda taps: judge(params["disc"], taps), real)
        return loss + r1_weight * r1.mean(), metrics | {"r1": r1}

    def student_objective(params, aux, batch, key, step):
        del step
        key, time_key, noise_key = jax.random.split(key, 3)
        (prediction, start), _, seen_real, seen_fake, judge = played(params, aux, batch, key)
        x0, cond = read_batch(batch, "adversarial_distillation")
        on_fake = judge(params["disc"], seen_fake(prediction))
        on_real = jax.lax.stop_gradient(judge(params["disc"], seen_real()))  # few losses look at it
        loss = over_heads(adversarial.generator(on_real, on_fake)).mean()
        metrics = {"logit_generated": losses.mean_flat(on_fake), "diversity": health.diversity(prediction, x0, start)}
        if not distillation_weight:
            return loss, metrics
        t = teacher_times(time_key, prediction.shape[0]).astype(prediction.dtype)
        level = level_of(t, prediction)
        teacher = denoiser(network, aux["teacher"], schedule, parameterization, cond)
        noise = jax.random.normal(noise_key, prediction.shape, prediction.dtype)
        error = weighting(level) * distillation(prediction, teacher, t, level, noise)
        return loss + distillation_weight * error.mean(), metrics | {"distillation": error}

    def generate(params, aux, key, noise, cond, sampling: Sampling):
        del aux
        if sampling.guidance_scale is not None:
            raise ValueError("adversarial_distillation takes no guidance_scale; guide the teacher, or leave it out")
        points = sampling.times
        if points is None:
            points = _first(grid, num_steps if sampling.num_steps is None else sampling.num_steps)
        points = jnp.asarray(points, noise.dtype)
        solver = (sampling.solver or stochastic_iterative)(schedule)
        denoise = denoiser(network, params["model"], schedule, parameterization, cond)
        start = level_like(schedule, jnp.broadcast_to(points[0], noise.shape[:1]), noise)
        return sample(solver, denoise, key, one_step.pure_noise(noise, start), points)

    return Method(init, (Objective("disc", disc_objective), Objective("model", student_objective)), generate)


def _checked(levels, schedule, num_steps, distillation_weight, r1_weight) -> np.ndarray:
    grid = np.asarray(levels, np.float64)
    if grid.ndim != 1 or grid.size < 1 or (np.diff(grid) >= 0).any() or grid[0] != schedule.t_max:
        raise ValueError(
            f"adversarial_distillation: levels must decrease from t_max {schedule.t_max:g}, got {list(levels)}"
        )
    _first(grid, num_steps)
    for name, value in (("distillation_weight", distillation_weight), ("r1_weight", r1_weight)):
        if not value >= 0:
            raise ValueError(f"adversarial_distillation: {name} must not be negative, got {value}; 0 leaves it out")
    return grid


def _first(grid: np.ndarray, n: int) -> np.ndarray:
    if not 1 <= n <= grid.size:
        raise ValueError(
            f"adversarial_distillation: the student knows {grid.size} levels, got num_steps {n}; "
            "take fewer steps, or give times"
        )
    return grid[:n]

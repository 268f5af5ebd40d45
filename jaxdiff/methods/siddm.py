"""Semi-implicit denoising diffusion (SIDDM): few denoising steps, the law of (x_s, x_t) matched in two parts.

The marginal law of x_s by a GAN whose discriminator does not see x_t; the conditional law of x_t given x_s by its known
Gaussian form, "auxiliary forward diffusion": x_t must look like noise added to the generated x_s. A regressor C, a head
of the discriminator, estimates the entropy that this divergence needs. The discriminator is also asked to denoise real
x_s, which is its only regulariser. Sampling in any number of steps is `ancestral` on n equal parts of the schedule's
time. Networks are arguments.

Source: Xu et al. 2023 (arXiv:2306.12511). The public code is a toy in the plane and has other losses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxdiff import health, losses, one_step, schedules
from jaxdiff import parameterization as parameterizations
from jaxdiff.denoiser import denoiser
from jaxdiff.methods.base import Batch, Method, Objective, Sampling, read_batch
from jaxdiff.parameterization import Parameterization
from jaxdiff.process import transition
from jaxdiff.schedules import Schedule
from jaxdiff.solvers.posterior import Shown, draw, generate_with, show
from jaxdiff.times import TimeSampler
from jaxdiff.types import Cond, Denoiser, Key, Level, Metrics, Network, Params

Discriminator = Callable[..., Any]
Judge = Callable[[Array], Any]


class Verdict(NamedTuple):
    """What a discriminator says. `Judgement` of the library's `UNetDiscriminator` has the same fields.

    Attributes:
      sample: [B] logits, positive for "real".
      pixel: [B, ...] further logits, or None.
      image: [B, ...] estimate of x0 from x_s, or None.
      regression: [B, ...] the regressor's estimate of x_t from x_s, or None.
    """

    sample: Array
    pixel: Array | None = None
    image: Array | None = None
    regression: Array | None = None


def logits_only(network: Network) -> Discriminator:
    """A discriminator of logits alone, [B] or [B, ...], which neither denoises nor regresses."""

    def judge(params, x_s, t, cond, *, train=False, key=None):
        return Verdict(network(params, x_s, t, cond, train=train, key=key))

    return judge


def equal_times(num_steps: int, t_max: float = 1.0) -> TimeSampler:
    """t uniform over t_max k / T, k = 1 .. T: training on T states only."""

    def draw_t(key, n):
        return t_max * jax.random.randint(key, (n,), 1, num_steps + 1).astype(float) / num_steps

    return draw_t


def forward_loss(
    x_t: Float[Array, "b ..."], x_s: Float[Array, "b ..."], t: Level, s: Level, regression: Array | None = None
) -> Float[Array, " b"]:
    """How far x_t given x_s is from the forward process: (|x_t - r x_s|^2 - |x_t - C(x_s)|^2) / (2 beta).

    r = alpha_t / alpha_s, and beta is the variance added from s to t. Means over an example instead of sums keep its
    weight independent of the resolution, which is ours.

    Args:
      x_t: [B, ...] noisier state.
      x_s: [B, ...] generated less noisy state.
      t, s: their levels.
      regression: C(x_s) [B, ...]; None leaves the entropy out, so that a cross-entropy remains.

    Source: Xu et al. 2023 section 3.
    """
    forward = transition(x_s, t, s)
    error = losses.mse(forward.mean, x_t)
    if regression is not None:
        error = error - losses.mse(regression, x_t)
    return error / (2 * forward.variance.reshape(-1))


def discriminator_loss(
    judge: Judge, shown: Shown, *, adversarial: losses.Adversarial, denoise_weight: float = 1.0, regressor: bool = True
) -> tuple[Array, Metrics]:
    """The loss of the discriminator and its heads; no gradient reaches the generator.

    Args:
      judge: x_s -> `Verdict`.
      shown: from `solvers.posterior.show`.
      adversarial: loss of the logits.
      denoise_weight: of the squared error of x0 estimated from the real x_s; 0 asks for none.
      regressor: whether C learns x_t from the generated x_s.

    Returns:
      The loss, and metrics [B]: logit_real, logit_fake, also by level, and the squared errors denoised and regressed.

    Raises:
      ValueError: while tracing, if the discriminator lacks a head that is asked for.
    """
    shown = jax.lax.stop_gradient(shown)
    real, fake = judge(shown.real), judge(shown.fake)
    loss = _over_heads(adversarial.discriminator, real, fake)
    metrics = health.by_level({"logit_real": _logit(real), "logit_fake": _logit(fake)}, shown.s)
    if denoise_weight:
        metrics["denoised"] = losses.mse(_head(real, "image", shown.x0, "denoise_weight=0"), shown.x0)
        loss = loss + denoise_weight * metrics["denoised"].mean()
    if regressor:
        metrics["regressed"] = losses.mse(_head(fake, "regression", shown.x_t, "regressor=False"), shown.x_t)
        loss = loss + metrics["regressed"].mean()
    return loss, metrics


def generator_loss(
    judge: Judge, shown: Shown, *, adversarial: losses.Adversarial, forward_weight: float = 1.0, regressor: bool = True
) -> tuple[Array, Metrics]:
    """The generator's loss: to deceive on x_s, and `forward_loss`, differentiated through both of its terms.

    Args: as for `discriminator_loss`, with forward_weight that of `forward_loss` and regressor whether C is in it.

    Returns:
      The loss, and metrics: logit_generated [B], forward [B], the divergence, and diversity.
    """
    real, fake = judge(shown.real), judge(shown.fake)
    regression = _head(fake, "regression", shown.x_t, "regressor=False") if regressor else None
    forward = forward_loss(shown.x_t, shown.fake, shown.t, shown.s, regression)
    loss = _over_heads(adversarial.generator, real, fake) + forward_weight * forward.mean()
    varied = health.diversity(shown.prediction, shown.x0, shown.t)
    return loss, {"logit_generated": _logit(fake), "forward": forward, "diversity": varied}


def siddm(
    network: Network,
    discriminator: Discriminator,
    *,
    init_params: Callable[[Key, Batch], Params],
    init_disc_params: Callable[[Key, Batch], Params],
    schedule: Schedule | None = None,
    num_steps: int = 4,
    time_sampler: TimeSampler | None = None,
    latent_dim: int | None = None,
    parameterization: Parameterization | None = None,
    adversarial: losses.Adversarial | None = None,
    forward_weight: float = 1.0,
    regressor: bool = True,
    denoise_weight: float = 1.0,
) -> Method:
    """Semi-implicit denoising diffusion. Batches are {"x0": [B, ...], further arrays as conditioning of both networks}.

    Args:
      network: the generator, (params, x_t, t, cond) -> [B, ...].
      discriminator: (params, x_s, t, cond) -> `Verdict` or anything with its fields, such as `as_judge` gives; t is the
        time of the noisier state. `logits_only` makes one of a Network. Where there are sample and pixel logits, each
        kind has half of the loss, which is ours.
      init_params: (key, batch) -> the generator's parameters.
      init_disc_params: (key, batch) -> the discriminator's.
      schedule: clean data below its t_min, noise at t_max; None for `schedules.vp_linear()`. The public toy has
        `schedules.squared_cosine()`.
      num_steps: T; a training step goes from t to t - t_max / T. Also the default of `generate`.
      time_sampler: draws t; None for `equal_times(T)`. `times.uniform(0.1, 1.0)` trains for other grids, too.
      latent_dim: width of cond["z"], drawn anew in each step; None for none.
      parameterization: what the generator's output means; None for x0, with times in thousandths.
      adversarial: loss of the logits; None for `losses.non_saturating()`.
      forward_weight: of auxiliary forward diffusion.
      regressor: whether the divergence has its entropy, for which the discriminator needs `regression`.
      denoise_weight: of the discriminator's denoising, for which it needs `image`.

    Returns:
      Method with the players "disc" and "model", updated in this order. `generate` makes n equal steps of time, or
      goes along `Sampling.times`.

    Raises:
      ValueError: for numbers out of range, or an output that says too little about x0 at the noisiest level; while
        tracing, for a head that the discriminator lacks; for a guidance_scale when sampling.

    Source: Xu et al. 2023 (arXiv:2306.12511); the weight 1 of the forward diffusion is the paper's.
    """
    _check(num_steps, latent_dim, forward_weight, denoise_weight)
    schedule = schedules.vp_linear() if schedule is None else schedule
    in_thousandths = parameterizations.scaled_time(1000.0)
    meaning = parameterizations.x0(in_thousandths) if parameterization is None else parameterization
    adversarial = losses.non_saturating() if adversarial is None else adversarial
    time_sampler = equal_times(num_steps, schedule.t_max) if time_sampler is None else time_sampler
    one_step.require_safe(schedule, meaning)

    def generator(params: Params, cond: Cond, **training) -> Denoiser:
        return denoiser(network, params, schedule, meaning, cond, **training)

    def play(params, batch, key) -> tuple[Judge, Shown]:
        x0, cond = read_batch(batch, "siddm")
        draw_key, generator_key, judge_key = jax.random.split(key, 3)
        draws = draw(draw_key, time_sampler, x0, latent_dim)
        z = {} if draws.z is None else {"z": draws.z}
        denoise = generator(params["model"], cond | z, train=True, key=generator_key)
        shown = show(denoise, x0, draws, draws.t - schedule.t_max / num_steps, schedule)
        return lambda x_s: discriminator(params["disc"], x_s, draws.t, cond, train=True, key=judge_key), shown

    def disc_objective(params, aux, batch, key, step):
        del aux, step
        judge, shown = play(params, batch, key)
        return discriminator_loss(
            judge, shown, adversarial=adversarial, denoise_weight=denoise_weight, regressor=regressor
        )

    def model_objective(params, aux, batch, key, step):
        del aux, step
        judge, shown = play(params | {"disc": jax.lax.stop_gradient(params["disc"])}, batch, key)
        return generator_loss(judge, shown, adversarial=adversarial, forward_weight=forward_weight, regressor=regressor)

    def init(key, batch):
        model_key, disc_key = jax.random.split(key)
        return {"model": init_params(model_key, batch), "disc": init_disc_params(disc_key, batch)}, {}

    def generate(params, aux, key, noise, cond, sampling: Sampling):
        del aux
        if sampling.guidance_scale is not None:
            raise ValueError("siddm: a generator takes no guidance_scale; leave it out")
        n = num_steps if sampling.num_steps is None else sampling.num_steps
        if n < 1:
            raise ValueError(f"siddm: num_steps must be at least 1, got {n}")
        grid = schedule.t_max * np.arange(n, 0, -1) / n if sampling.times is None else sampling.times
        return generate_with(
            lambda cond: generator(params["model"], cond), schedule, key, noise, cond, grid, latent_dim=latent_dim,
            solver=sampling.solver,
        )  # fmt: skip

    return Method(init, (Objective("disc", disc_objective), Objective("model", model_objective)), generate)


def _over_heads(loss: Callable[[Array, Array], Array], real: Any, fake: Any) -> Array:
    total = loss(real.sample, fake.sample).mean()
    return total if fake.pixel is None else (total + loss(real.pixel, fake.pixel).mean()) / 2


def _logit(verdict: Any) -> Array:
    logit = losses.mean_flat(verdict.sample)
    return logit if verdict.pixel is None else (logit + losses.mean_flat(verdict.pixel)) / 2


def _head(verdict: Any, name: str, like: Array, remedy: str) -> Array:
    found = getattr(verdict, name)
    if found is None or found.shape != like.shape:
        got = "it has none" if found is None else f"got {found.shape}"
        raise ValueError(f"siddm: the discriminator's {name} must be {like.shape}, {got}; add the head or set {remedy}")
    return found


def _check(num_steps, latent_dim, forward_weight, denoise_weight):
    if num_steps < 1:
        raise ValueError(f"siddm: num_steps must be at least 1, got {num_steps}")
    if latent_dim is not None and latent_dim < 1:
        raise ValueError(
            f"siddm: latent_dim must be at least 1, got {latent_dim}; None is a generator without a latent"
        )
    if not (forward_weight >= 0 and denoise_weight >= 0):
        raise ValueError(f"siddm: weights must not be negative, got {forward_weight} and {denoise_weight}")

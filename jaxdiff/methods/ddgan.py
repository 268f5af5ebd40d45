"""Denoising diffusion GANs: a few big denoising steps, each of them drawn by a conditional GAN.

A generator sees x_t and a latent z and predicts x0; x_s is drawn from the posterior q(x_s | x_t, x0). A discriminator
that sees the noisier x_t beside it tells it from an x_s of the forward process. Xiao et al. 2022 (arXiv:2112.07804)
eq. 4-6 and 8, with the release's lazy R1 penalty. Sampling is `ancestral`, with a new z in each step. Time t is the
index of the noisier state, 0 .. T-1, so that x_s is clean data at t = 0. Networks are arguments.
"""

from collections.abc import Callable

import jax
from jaxtyping import Array

from jaxdiff import health, losses, one_step, schedules, times
from jaxdiff import parameterization as parameterizations
from jaxdiff.denoiser import denoiser
from jaxdiff.methods.base import Batch, Method, Objective, Sampling, lazily, read_batch
from jaxdiff.parameterization import Parameterization
from jaxdiff.schedules import Betas
from jaxdiff.solvers.posterior import Shown, draw, generate_with, show
from jaxdiff.types import Cond, Denoiser, Key, Metrics, Network, Params

Judge = Callable[[Array, Array, Array], Array]


def discriminator_loss(
    judge: Judge,
    shown: Shown,
    step: Array,
    *,
    adversarial: losses.Adversarial,
    r1_gamma: float = 0.0,
    r1_every: int = 1,
    r1_sigma: float | None = None,
    key: Key | None = None,
) -> tuple[Array, Metrics]:
    """The discriminator's loss; no gradient reaches the generator.

    Args:
      judge: (x_s, x_t, t) -> logits [B], or several an example.
      shown: from `solvers.posterior.show`.
      step: of training; the penalty is there when r1_every divides it.
      adversarial: loss of the logits.
      r1_gamma: the penalty is r1_gamma / 2 times the squared gradient in the real x_s, with x_t held, averaged over
        the logits of an example; 0 for none.
      r1_every: the penalty is not multiplied by it, unlike StyleGAN2's.
      r1_sigma: None for the gradient itself, a backward pass for every logit of an example; else its estimate to
        first order by a step of that deviation, drawn from `key`. r1_gamma means the same.

    Returns:
      The loss, and metrics: logit_real and logit_fake [B], also by level; with a penalty r1, the mean squared
      gradient, 0 between.

    Source: Xiao et al. 2022 eq. 4; Mescheder et al. 2018 (arXiv:1801.04406) eq. 9 for the penalty.
    """
    shown = jax.lax.stop_gradient(shown)
    real, fake = (judge(x_s, shown.x_t, shown.time) for x_s in (shown.real, shown.fake))
    loss = adversarial.discriminator(real, fake).mean()
    logits = {"logit_real": losses.mean_flat(real), "logit_fake": losses.mean_flat(fake)}
    metrics = health.by_level(logits, shown.s)
    if r1_gamma == 0:
        return loss, metrics

    def squared_gradient():
        def judged(x_s):
            return judge(x_s, shown.x_t, shown.time)

        return losses.r1_or_estimate(judged, shown.real, key, r1_sigma).mean()

    r1 = lazily(step, r1_every, squared_gradient)
    return loss + 0.5 * r1_gamma * r1, metrics | {"r1": r1}


def generator_loss(judge: Judge, shown: Shown, *, adversarial: losses.Adversarial) -> tuple[Array, Metrics]:
    """The generator's loss. Its gradient comes through the posterior alone, so it is small at the noisiest steps.

    Args: as for `discriminator_loss`.

    Returns:
      The loss, and metrics: logit_generated [B] and diversity.

    Source: Xiao et al. 2022 eq. 5.
    """
    real, fake = (judge(x_s, shown.x_t, shown.time) for x_s in (shown.real, shown.fake))
    varied = health.diversity(shown.prediction, shown.x0, shown.t)
    return adversarial.generator(real, fake).mean(), {"logit_generated": losses.mean_flat(fake), "diversity": varied}


def ddgan(
    network: Network,
    discriminator: Network,
    *,
    init_params: Callable[[Key, Batch], Params],
    init_disc_params: Callable[[Key, Batch], Params],
    betas: Betas | None = None,
    latent_dim: int | None = 100,
    parameterization: Parameterization | None = None,
    adversarial: losses.Adversarial | None = None,
    r1_gamma: float = 0.02,
    r1_every: int = 15,
    r1_sigma: float | None = None,
) -> Method:
    """A denoising diffusion GAN. Batches are {"x0": [B, ...], further arrays as conditioning of both networks}.

    Args:
      network: the generator, (params, x_t, t, cond) -> [B, ...]; cond has "z" [B, latent_dim] besides the batch's.
      discriminator: (params, x_s, t, cond) -> logits [B], or several an example; cond has "x_t" besides the batch's,
        and t is the generator's, the time of x_t.
      init_params: (key, batch) -> the generator's parameters.
      init_disc_params: (key, batch) -> the discriminator's.
      betas: [T] of the chain; None for `schedules.vp_betas(4)`, the paper's.
      latent_dim: D of z; None for a generator without a latent, much worse in the paper.
      parameterization: what the generator's output means; None for x0 with t as it is.
      adversarial: loss of the logits; None for `losses.non_saturating()`.
      r1_gamma, r1_every, r1_sigma: see `discriminator_loss`; the defaults are CIFAR-10's.

    Returns:
      Method with the players "disc" and "model", updated in this order. `generate` takes all T steps, or n of them
      spaced by `times.trailing` (longer steps than those it was trained for), or `Sampling.times`.

    Raises:
      ValueError: for numbers out of range, or an output that says too little about x0 at the noisiest level; for a
        guidance_scale or more than T steps when sampling.

    Source: Xiao et al. 2022 (arXiv:2112.07804) algorithms 1-2.
    """
    _check(latent_dim, r1_gamma, r1_every, r1_sigma)
    betas = schedules.vp_betas(4) if betas is None else betas
    schedule, time_sampler = schedules.discrete(betas), times.uniform_index(len(betas))
    meaning = parameterizations.x0() if parameterization is None else parameterization
    adversarial = losses.non_saturating() if adversarial is None else adversarial
    one_step.require_safe(schedule, meaning)

    def generator(params: Params, cond: Cond, **training) -> Denoiser:
        return denoiser(network, params, schedule, meaning, cond, **training)

    def play(params, batch, key) -> tuple[Judge, Shown]:
        x0, cond = read_batch(batch, "ddgan")
        draw_key, generator_key, judge_key = jax.random.split(key, 3)
        draws = draw(draw_key, time_sampler, x0, latent_dim)
        z = {} if draws.z is None else {"z": draws.z}

        def judge(x_s, x_t, t):
            return discriminator(params["disc"], x_s, t, cond | {"x_t": x_t}, train=True, key=judge_key)

        denoise = generator(params["model"], cond | z, train=True, key=generator_key)
        return judge, show(denoise, x0, draws, draws.t - 1, schedule)

    def disc_objective(params, aux, batch, key, step):
        del aux
        judge, shown = play(params, batch, key)
        return discriminator_loss(
            judge, shown, step, adversarial=adversarial, r1_gamma=r1_gamma, r1_every=r1_every, r1_sigma=r1_sigma,
            key=jax.random.fold_in(key, 3),
        )  # fmt: skip

    def model_objective(params, aux, batch, key, step):
        del aux, step
        judge, shown = play(params | {"disc": jax.lax.stop_gradient(params["disc"])}, batch, key)
        return generator_loss(judge, shown, adversarial=adversarial)

    def init(key, batch):
        model_key, disc_key = jax.random.split(key)
        return {"model": init_params(model_key, batch), "disc": init_disc_params(disc_key, batch)}, {}

    def generate(params, aux, key, noise, cond, sampling: Sampling):
        del aux
        if sampling.guidance_scale is not None:
            raise ValueError("ddgan: a generator takes no guidance_scale; leave it out")
        n = len(betas) if sampling.num_steps is None else sampling.num_steps
        grid = times.trailing(len(betas), n) if sampling.times is None else sampling.times
        return generate_with(
            lambda cond: generator(params["model"], cond), schedule, key, noise, cond, grid, latent_dim=latent_dim,
            solver=sampling.solver,
        )  # fmt: skip

    return Method(init, (Objective("disc", disc_objective), Objective("model", model_objective)), generate)


def _check(latent_dim, r1_gamma, r1_every, r1_sigma):
    if latent_dim is not None and latent_dim < 1:
        raise ValueError(
            f"ddgan: latent_dim must be at least 1, got {latent_dim}; None is a generator without a latent"
        )
    if not r1_gamma >= 0:
        raise ValueError(f"ddgan: r1_gamma must not be negative, got {r1_gamma}; 0 is no penalty")
    if r1_every < 1:
        raise ValueError(f"ddgan: r1_every must be at least 1 step, got {r1_every}")
    if r1_sigma is not None and not r1_sigma > 0:
        raise ValueError(f"ddgan: r1_sigma must be positive, got {r1_sigma}; None takes the gradient itself")

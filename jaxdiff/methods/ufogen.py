"""UFOGen: a diffusion model made into a one-step generator by an adversary that compares noised data.

From x_t the generator predicts x0; noised afresh to a less noisy level s, the prediction must look like data at s to a
discriminator that knows s but not x_t, and it must be near the x0 that x_t came from. As both sides go through the same
Gaussian, equal laws at s are equal laws of x0, for pure noise too. In diffusion GANs the sample at s is the posterior's
given x_t, which ties the chain and not x0: here an option, to show the failure. The exact settings of the paper
are not published; what stands for them is marked as ours. Networks come as arguments; `one_step.from_diffusion` makes
the generator.

Source: Xu et al. 2023 (arXiv:2311.09257); the public code named UFO_DiT, which differs from the paper.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from jaxdiff import health, losses, one_step, process
from jaxdiff.denoiser import denoiser
from jaxdiff.losses import Adversarial, Logits
from jaxdiff.methods.base import Batch, Method, Objective, Sampling, lazily, read_batch
from jaxdiff.parameterization import Parameterization
from jaxdiff.schedules import Schedule
from jaxdiff.solvers.ancestral import ancestral
from jaxdiff.solvers.base import level_like, sample
from jaxdiff.solvers.stochastic_iterative import stochastic_iterative
from jaxdiff.types import Key, Level, Network, Params
from jaxdiff.weighting import Weighting

Gamma = Callable[[Level, Level], Array]
SIGNAL = 0.1
"""alpha / sigma of the last level above which a generator trained there is lost on pure noise. Ours."""


class Jumps(NamedTuple):
    """Which pairs of levels are trained, and where samplers stop.

    Attributes:
      draw: (key, n) -> times t and s of each example, t the noisier one.
      times: number of sampling steps -> decreasing times to sample at, from the noisiest.
    """

    draw: Callable[[Key, int], tuple[Array, Array]]
    times: Callable[[int], Float64[np.ndarray, " n"]]


def stride_times(num_times: int, n: int) -> Float64[np.ndarray, " n"]:
    """floor((i + 1) (N - 1) / n) for i = n - 1 .. 0: 999; 999, 499; 999, 749, 499, 249 of N = 1000.

    Raises:
      ValueError: unless n is 1 to N.

    Source: the public code.
    """
    if not 1 <= n <= num_times:
        raise ValueError(f"stride_times: n must be 1 to {num_times}, the number of times, got {n}")
    return np.floor(np.arange(n, 0, -1) * (num_times - 1) / n)


def jumped(t: Float[Array, " b"], jump: int) -> Float[Array, " b"]:
    """max(t - jump, 0) on a chain, [B]. For t up to the jump, s is index 0: almost clean. Source: the public code."""
    return jnp.maximum(t - jump, 0)


def chain_jumps(num_times: int = 1000, jump: int = 250, last_share: float = 0.0) -> Jumps:
    """t uniform over 1 .. N - 1 of a chain, s = `jumped(t, jump)`.

    Args:
      num_times: length N of the chain.
      jump: 250 of 1000 is said to be the paper's.
      last_share: share of the examples whose t is N - 1. Uniform draws show pure noise to one in N. Ours.

    Raises:
      ValueError: for a jump or a share out of range.

    Source: Xu et al. 2023 section 4.2; the public code.
    """
    if not 1 <= jump < num_times:
        raise ValueError(f"chain_jumps: jump must be 1 to {num_times - 1} on a chain of {num_times}, got {jump}")
    if not 0 <= last_share <= 1:
        raise ValueError(f"chain_jumps: last_share must lie in [0, 1], got {last_share}")

    def draw(key, n):
        index_key, share_key = jax.random.split(key)
        t = jax.random.randint(index_key, (n,), 1, num_times)
        t = jnp.where(jax.random.uniform(share_key, (n,)) < last_share, num_times - 1, t).astype(jnp.float32)
        return t, jumped(t, jump)

    return Jumps(draw, lambda n: stride_times(num_times, n))


def pair_jumps(pairs: Sequence[tuple[float, float]], shares: Sequence[float] | None = None) -> Jumps:
    """One of a few pairs (t, s). Samplers stop at the times t.

    Args:
      pairs: times of the schedule, t the noisier one; one t may come with several s.
      shares: of the examples, adding up to 1; None for all alike.

    Raises:
      ValueError: for pairs out of order, or shares that are none.
    """
    table = np.asarray(pairs, np.float64).reshape(-1, 2)
    if not len(table) or (table[:, 0] <= table[:, 1]).any():
        raise ValueError(f"pair_jumps: pairs are (t, s) with t above s, got {[tuple(pair) for pair in pairs]}")
    p = np.full(len(table), 1 / len(table)) if shares is None else np.asarray(shares, np.float64)
    if p.shape != (len(table),) or (p < 0).any() or abs(p.sum() - 1) > 1e-6:
        raise ValueError(f"pair_jumps: shares must be {len(table)} numbers that add up to 1, got {p.tolist()}")
    known = np.unique(table[:, 0])

    def draw(key, n):
        index = jax.random.choice(key, len(table), (n,), p=jnp.asarray(p, jnp.float32))
        t, s = jnp.asarray(table.T, jnp.float32)[:, index]
        return t, s

    return Jumps(draw, lambda n: known[stride_times(len(known), n).astype(np.int64)])


def level_jumps(levels: Sequence[float], last_share: float | None = None) -> Jumps:
    """t one of a few levels after the first, s the level before it. Samplers may stop at all of them.

    Args:
      levels: increasing times of the schedule, at least two, the last the level of pure noise.
      last_share: share of the examples at the last level; None for all alike.

    Raises:
      ValueError: for levels that do not increase, or a share out of range.
    """
    if len(levels) < 2 or list(levels) != sorted(set(levels)):
        raise ValueError(f"level_jumps: levels must be two or more increasing times, got {list(levels)}")
    if last_share is not None and not 0 <= last_share <= 1:
        raise ValueError(f"level_jumps: last_share must lie in [0, 1], got {last_share}")
    known, lower = np.asarray(levels, np.float64), len(levels) - 2
    last = 1 / (lower + 1) if last_share is None or not lower else last_share
    pairs = pair_jumps(list(zip(levels[1:], levels, strict=False)), [(1 - last) / max(lower, 1)] * lower + [last])
    return pairs._replace(times=lambda n: known[stride_times(len(known), n).astype(np.int64)])


def kl(t: Level, s: Level) -> Float[Array, " b"]:
    """alpha_t^2 / (2 w), w the variance added from s to t; on a chain abar_t / (2 beta), beta = 1 - abar_t / abar_s.

    The weight of |x0 - prediction|^2 in KL(q(x_t | x_s) || q(x_t | x'_s)) of samples at s that share their noise.
    """
    return t.alpha**2 / (2 * process.bridge(t, s).added)


def at_t(weighting: Weighting) -> Gamma:
    """A weight of the noisier level alone: `signal_share` is abar, `weighting.snr` the public code's eps error."""

    def gamma(t, s):
        del s
        return weighting(t)

    return gamma


def signal_share(level: Level) -> Float[Array, " b"]:
    """alpha^2 / (alpha^2 + sigma^2), a chain's abar. 1 / (1 + sigma^2) where alpha is 1."""
    return level.alpha**2 / (level.alpha**2 + level.sigma**2)


def fresh(x0: Array, x_t: Array, t: Level, s: Level, noise: Array) -> Float[Array, "b ..."]:
    """A sample at s of q(x_s | x0): alpha_s x0 + sigma_s noise, whatever x_t was. Source: Xu et al. 2023 eq. 6."""
    del x_t, t
    return process.q_sample(x0, noise, s)


def from_posterior(x0: Array, x_t: Array, t: Level, s: Level, noise: Array) -> Float[Array, "b ..."]:
    """A sample at s of q(x_s | x_t, x0), as diffusion GANs have it. One step then stays blurred."""
    mean, variance = process.posterior(x0, x_t, t, s)
    return mean + jnp.sqrt(variance) * noise


def discriminator_loss(
    judge: Logits, real: Float[Array, "b ..."], fake: Float[Array, "b ..."], adversarial: Adversarial
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean loss of the discriminator over all logits, and mean logits [B]. No gradient enters `fake`."""
    on_real, on_fake = judge(real), judge(jax.lax.stop_gradient(fake))
    seen = {"logit_real": losses.mean_flat(on_real), "logit_fake": losses.mean_flat(on_fake)}
    return adversarial.discriminator(on_real, on_fake).mean(), seen


def reconstruction(
    prediction: Float[Array, "b ..."], x0: Float[Array, "b ..."], t: Level, s: Level, gamma: Gamma
) -> Float[Array, " b"]:
    """gamma(t, s) times the mean squared error of x0 [B, ...]."""
    return gamma(t, s) * losses.mse(prediction, x0)


def ufogen(
    network: Network,
    discriminator: Network,
    schedule: Schedule,
    *,
    parameterization: Parameterization,
    init_params: Callable[[Key, Batch], Params],
    init_discriminator: Callable[[Key, Batch], Params],
    jumps: Jumps,
    adversarial: Adversarial | None = None,
    reconstruction_weight: float = 1.0,
    gamma: Gamma = kl,
    r1_weight: float = 0.0,
    r1_every: int = 1,
    r1_sigma: float | None = None,
    disc_every: int = 1,
    pure_noise: bool = True,
    posterior: bool = False,
    num_steps: int = 1,
) -> Method:
    """Adversarial fine-tuning of a diffusion model. Batches are {"x0": [B, ...], further arrays as conditioning}.

    Args:
      network: the generator, safe at the last level: a network of v, flow, x0 or EDM's output, or
        `one_step.from_diffusion`'s.
      discriminator: (params, x, t, cond) -> logits [B] or [B, ...], positive for "real", as `as_network` of a
        UNetDiscriminator. It gets x_s and s scaled like the generator gets x_t and t.
      schedule: of both.
      parameterization: what the generator's output means, and how inputs are scaled.
      init_params: (key, batch) -> the generator's parameters: copies of the diffusion model's.
      init_discriminator: (key, batch) -> the discriminator's: `from_backbone`, with heads that start at zero.
      jumps: which pairs of levels, `chain_jumps`, `level_jumps` or `pair_jumps`.
      adversarial: None for `losses.non_saturating()`; the public code has `losses.clamped()`.
      reconstruction_weight: lambda; 0 leaves the generator to its adversary.
      gamma: weight of a pair, on the mean squared error of x0. `kl` is derived, the paper's is not known.
      r1_weight: of half the mean squared gradient norm of the logit at real x_s; 0 for none. Ours.
      r1_every: on every n-th step only, not multiplied by n.
      r1_sigma: None for the gradient itself; else the approximation by a step of that deviation, over sigma^2, so
        that r1_weight means the same. Adversarial post-training's weight is r1_weight / (2 sigma^2).
      disc_every: the discriminator learns on every n-th step; 2 in the public code.
      pure_noise: at the schedule's t_max the generator learns from noise alone, as it will sample. Ours.
      posterior: fakes are samples of the posterior, as in diffusion GANs: the failure that the paper mends.
      num_steps: default number of sampling steps.

    Returns:
      Method with the players "disc" and "model". Sampling starts at the first of `jumps.times(n)`, and between steps
      noises the prediction afresh.

    Raises:
      ValueError: for an output that does not determine x0 at the last level, a schedule that does not end in noise,
        or numbers out of range.

    Source: Xu et al. 2023 (arXiv:2311.09257) algorithm 1.
    """
    one_step.require_safe(schedule, parameterization)
    first = float(jumps.times(num_steps)[0])  # refuses a bad count now, not when sampling
    _check(schedule, first, reconstruction_weight, r1_weight, r1_every, r1_sigma, pure_noise)
    adversarial = losses.non_saturating() if adversarial is None else adversarial
    to_s = from_posterior if posterior else fresh
    looking = one_step.judge_from_diffusion(discriminator, schedule, parameterization)

    def init(key, batch):
        generator_key, disc_key = jax.random.split(key)
        return {"model": init_params(generator_key, batch), "disc": init_discriminator(disc_key, batch)}, {}

    def played(params, batch, key):
        """The levels of a batch, the prediction of x0, real and fake samples at s, and the discriminator at s."""
        x0, cond = read_batch(batch, "ufogen")
        jump_key, eps_key, real_key, fake_key, generator_key, disc_key = jax.random.split(key, 6)
        t, s = (a.astype(x0.dtype) for a in jumps.draw(jump_key, x0.shape[0]))
        levels = level_like(schedule, t, x0), level_like(schedule, s, x0)
        eps, real_noise, fake_noise = (
            jax.random.normal(k, x0.shape, x0.dtype) for k in (eps_key, real_key, fake_key)
        )  # fmt: skip
        start = one_step.ending_in_noise(schedule, t, levels[0]) if pure_noise else levels[0]
        x_t = process.q_sample(x0, eps, start)
        denoise = denoiser(network, params["model"], schedule, parameterization, cond, train=True, key=generator_key)
        prediction = denoise(x_t, t).x0
        real, fake = process.q_sample(x0, real_noise, levels[1]), to_s(prediction, x_t, *levels, fake_noise)

        def judge(x_s):
            return looking(params["disc"], x_s, s, cond, train=True, key=disc_key)

        return x0, levels, prediction, real, fake, judge

    def disc_objective(params, aux, batch, key, step):
        del aux
        key, penalty_key = jax.random.split(key)
        _, levels, _, real, fake, judge = played(params, batch, key)
        loss, logits = discriminator_loss(judge, real, fake, adversarial)
        metrics = health.by_level(logits, levels[1])
        if not r1_weight:
            return loss, metrics

        r1 = lazily(step, r1_every, lambda: losses.r1_or_estimate(judge, real, penalty_key, r1_sigma).mean())
        return loss + 0.5 * r1_weight * r1, metrics | {"r1": r1}

    def generator_objective(params, aux, batch, key, step):
        del aux, step
        x0, levels, prediction, real, fake, judge = played(params, batch, key)
        on_fake = judge(fake)
        # most losses do not look at the real logits, which then are not computed
        loss = adversarial.generator(jax.lax.stop_gradient(judge(real)), on_fake).mean()
        error = reconstruction(prediction, x0, *levels, gamma)
        metrics = {"logit_generated": losses.mean_flat(on_fake), "reconstruction": error}
        metrics["diversity"] = health.diversity(prediction, x0, levels[0])
        return loss + reconstruction_weight * error.mean(), metrics

    def generate(params, aux, key, noise, cond, sampling: Sampling):
        del aux
        if sampling.guidance_scale is not None:
            raise ValueError("ufogen takes no guidance_scale; guide the model that it starts from, or leave it out")
        grid = sampling.times
        if grid is None:
            grid = jumps.times(num_steps if sampling.num_steps is None else sampling.num_steps)
        grid = jnp.asarray(grid, noise.dtype)
        solver = (sampling.solver or (ancestral if posterior else stochastic_iterative))(schedule)
        denoise = denoiser(network, params["model"], schedule, parameterization, cond)
        start = level_like(schedule, jnp.broadcast_to(grid[0], noise.shape[:1]), noise)
        return sample(solver, denoise, key, one_step.pure_noise(noise, start), grid)

    return Method(
        init, (Objective("disc", disc_objective, disc_every), Objective("model", generator_objective)), generate
    )


def _check(schedule, first, reconstruction_weight, r1_weight, r1_every, r1_sigma, pure_noise):
    for name, value in (("reconstruction_weight", reconstruction_weight), ("r1_weight", r1_weight)):
        if not value >= 0:
            raise ValueError(f"ufogen: {name} must not be negative, got {value}; 0 leaves the term out")
    if r1_every < 1:
        raise ValueError(f"ufogen: r1_every must be at least 1, got {r1_every}; r1_weight 0 leaves R1 out")
    if r1_sigma is not None and not r1_sigma > 0:
        raise ValueError(f"ufogen: r1_sigma must be positive, got {r1_sigma}; None takes the gradient itself")
    if first > schedule.t_max:
        raise ValueError(
            f"ufogen: the jumps begin at t = {first:g}, the schedule's last level is t = {schedule.t_max:g}"
        )
    with jax.ensure_compile_time_eval():
        end = schedule.level(jnp.full([1], first, jnp.float32))
        signal = float((end.alpha / end.sigma)[0])
    if signal <= SIGNAL:
        return
    if first < schedule.t_max:
        raise ValueError(
            f"ufogen: sampling would start at t = {first:g}, which holds signal, alpha / sigma = {signal:.2g}, and "
            f"noise does not; the jumps must reach the schedule's last level, t = {schedule.t_max:g}"
        )
    if not pure_noise:
        raise ValueError(
            f"ufogen: the last level holds signal, alpha / sigma = {signal:.2g}, which sampling from noise lacks; "
            "use pure_noise=True, or a schedule of zero_terminal_snr"
        )

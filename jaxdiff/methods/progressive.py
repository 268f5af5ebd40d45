"""Progressive distillation: a student learns to do in one DDIM step what its teacher does in two, and becomes the next.

The student's target is the x0 for which one DDIM step from x_t to x_s lands where two steps of the teacher do. On a
variance-preserving path (`vp_path`) the last step ends in clean data, on the path in sigma (`ve_path`) at sigma_min.
One round is one method with `num_steps` fixed: start the next with this round's parameters as its teacher. With
`round_length` one run halves by itself, without compiling again, and without restarting the optimiser. Stage two of
guided distillation is this method with a `guidance_range`.

Source: Salimans & Ho 2022 (arXiv:2202.00512); Song et al. 2023 (arXiv:2303.01469), the release, for the path in sigma.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxdiff import parameterization as parameterizations
from jaxdiff import process, schedules, times, weighting
from jaxdiff.denoiser import clip_x0, denoiser
from jaxdiff.guidance import check_label_dropout, drop_labels, label_guided, with_guidance
from jaxdiff.losses import mse
from jaxdiff.methods.base import Batch, Method, Objective, Sampling, copied, keep, read_batch
from jaxdiff.parameterization import Parameterization, same_time
from jaxdiff.schedules import Schedule
from jaxdiff.solvers.base import integrate, level_like, sample
from jaxdiff.solvers.ddim import ddim
from jaxdiff.types import Cond, Denoised, Denoiser, Key, Network, Params, expand


@runtime_checkable
class Head(Protocol):
    """Makes a denoiser of a network, of which the output means one thing (`single`) or two (`both`)."""

    def __call__(
        self, network: Network, params: Params, schedule: Schedule, cond: Cond, *, train: bool = False,
        key: Key | None = None,
    ) -> Denoiser: ...  # fmt: skip


class Path(NamedTuple):
    """From clean data (u = 0) to noise (u = 1), divided into equal steps of u.

    Attributes:
      schedule: gives the levels.
      time: u [B] in [0, 1] -> t [B].
      to_clean: whether u = 0 stands for clean data; otherwise it is the least noisy level.
    """

    schedule: Schedule
    time: Callable[[Array], Array]
    to_clean: bool


def vp_path(schedule: Schedule | None = None) -> Path:
    """Equal steps of t in [0, 1], ending in clean data; None for `schedules.cosine()`, the paper's."""
    return Path(schedules.cosine() if schedule is None else schedule, same_time, True)


def ve_path(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Path:
    """Equal steps of sigma^(1/rho), ending at sigma_min. Source: Song et al. 2023, the release."""

    def time(u):
        return times.karras_time(1 - u, 2, sigma_min, sigma_max, rho)

    return Path(schedules.ve(sigma_min, sigma_max), time, False)


def single(parameterization: Parameterization) -> Head:
    """The output means x0, eps, v or anything else that is affine."""

    def head(network, params, schedule, cond, *, train=False, key=None):
        return denoiser(network, params, schedule, parameterization, cond, train=train, key=key)

    return head


def both(net_time: Callable[[Array], Array] = same_time) -> Head:
    """The output is x0 and eps side by side; x0 = sigma^2 x0_out + alpha (x_t - sigma eps_out). Source: the release."""
    plain = parameterizations.x0(net_time)

    def head(network, params, schedule, cond, *, train=False, key=None):
        halves = denoiser(network, params, schedule, plain, cond, learned_variance=True, train=train, key=key)

        def denoise(x_t, t):
            d = halves(x_t, t)
            x0, eps = d.x0, jnp.asarray(d.variance_out)
            alpha, sigma = (expand(a, x_t) for a in level_like(schedule, t, x_t))
            return Denoised(sigma**2 * x0 + alpha * (x_t - sigma * eps))

        return denoise

    return head


class Taught(NamedTuple):
    """Where a teacher's two steps went: x at the middle and at the end, and the student's target x0. Each [B, ...]."""

    middle: Array
    end: Array
    target: Array


def teach(
    denoise: Denoiser, schedule: Schedule, x_t: Array, t: Array, middle: Array, s: Array, last: Bool[Array, " b"]
) -> Taught:
    """Two DDIM steps of a teacher, t -> middle -> s, and what a student must predict to do the same in one.

    That x0, (x_s - r x_t) / (alpha_s - r alpha_t) with r = sigma_s / sigma_t, is computed as the mean of the teacher's
    two predictions that it is, which loses no digits where x_t is large or s close to t.

    Args:
      denoise: the teacher.
      schedule: gives the levels.
      x_t: [B, ...] at t.
      t, middle, s: [B] times, the noisiest first.
      last: [B] whether s stands for clean data; then the target is the second prediction.

    Source: Salimans & Ho 2022 algorithm 2 and appendix G.
    """
    step = ddim(schedule).step
    x_middle, _, x0_t = step(x_t, None, x_t, t, middle, denoise)
    x_s, _, x0_middle = step(x_t, None, x_middle, middle, s, denoise)
    a, b, c = (level_like(schedule, time, x_t) for time in (t, middle, s))
    share = (c.alpha - c.sigma / b.sigma * b.alpha) / (c.alpha - c.sigma / a.sigma * a.alpha)
    share = expand(jnp.where(last, jnp.ones_like(share), share), x_t)
    return Taught(x_middle, x_s, (1 - share) * x0_t + share * x0_middle)


def student_steps(step: Int[Array, ""], first: int, round_length: int | None) -> Int[Array, ""]:
    """The student's steps N at a training step: halved every `round_length`; the rounds of 2 and 1 are twice as long.

    Args:
      step: training step, may be traced.
      first: N of the first round, a power of two if there are rounds.
      round_length: None for a single round.

    Source: Song et al. 2023, the release; Salimans & Ho 2022 section 5.3 for the longer rounds.
    """
    if round_length is None:
        return jnp.asarray(first, jnp.int32)
    before_two = max(first.bit_length() - 2, 0)
    early = jnp.minimum(step // round_length, before_two)
    late = jnp.clip((step - before_two * round_length) // (2 * round_length), 0, min(1, first - 1))
    return jnp.right_shift(first, early + late).astype(jnp.int32)


def progressive(
    network: Network,
    *,
    teacher_params: Params,
    num_steps: int,
    init_params: Callable[[Key, Batch], Params] | None = None,
    round_length: int | None = None,
    teacher: Network | None = None,
    head: Head | None = None,
    path: Path | None = None,
    weight: weighting.Weighting = weighting.truncated_snr,
    guidance_range: tuple[float, float] | None = None,
    clip: float | None = 1.0,
) -> Method:
    """One round of progressive distillation, or all. Batches are {"x0": [B, ...], further arrays as conditioning}.

    Args:
      network: (params, x_t, t, cond) -> output, what `head` makes a denoiser of.
      teacher_params: of the teacher that takes 2 num_steps steps; a copy is held in aux["teacher"].
      num_steps: N, the steps of the (first) student.
      init_params: (key, batch) -> the student's parameters; None for a copy of the teacher's.
      round_length: training steps after which N halves and the student's parameters become the teacher's, down to
        N = 1; see `student_steps`. None for one round.
      teacher: the teacher's network, None for the same. With round_length it must be the same.
      head: what the output means; None for `single(parameterization.v())`. eps alone is poor where SNR is near 0.
      path: `vp_path` or `ve_path`, None for the first. With `ve_path` take `single(parameterization.edm(...))`.
      weight: on the x0 error: `weighting.uniform`, `snr` (eps error), `truncated_snr` or `snr_plus_one` (v error).
      guidance_range: (low, high) of w = guidance_scale - 1, given as cond["guidance"] to student and teacher, which has
        learnt it in stage one of guided distillation; None without.
      clip: bound of |x0| in sampling, not in training; None for latents.

    Returns:
      Method with the player "model". Without `Sampling.num_steps`, `generate` takes the steps of the last round.

    Raises:
      ValueError: for numbers out of range or arguments that exclude each other.

    Source: Salimans & Ho 2022 algorithm 2; Meng et al. 2023 (arXiv:2210.03142) for guidance.
    """
    _check(num_steps, round_length, teacher, guidance_range)
    head = single(parameterizations.v()) if head is None else head
    path = vp_path() if path is None else path

    def init(key, batch):
        params = init_params(key, batch) if init_params else copied(teacher_params)
        return {"model": params}, {"teacher": copied(teacher_params)}

    def objective(params, aux, batch, key, step):
        x0, cond = read_batch(batch, "progressive")
        time_key, eps_key, guidance_key, network_key = jax.random.split(key, 4)
        if guidance_range is not None:
            cond = cond | {"guidance": jax.random.uniform(guidance_key, x0.shape[:1], x0.dtype, *guidance_range)}
        n = student_steps(step, num_steps, round_length).astype(x0.dtype)
        i = jnp.minimum(jnp.floor(jax.random.uniform(time_key, x0.shape[:1], x0.dtype) * n), n - 1)
        t, middle, s = (path.time(u / n) for u in (i + 1, i + 0.5, i))
        level = level_like(path.schedule, t, x0)
        x_t = process.q_sample(x0, jax.random.normal(eps_key, x0.shape, x0.dtype), level)
        old = head(teacher or network, aux["teacher"], path.schedule, cond)
        target = jax.lax.stop_gradient(teach(old, path.schedule, x_t, t, middle, s, (i == 0) & path.to_clean).target)
        denoise = head(network, params["model"], path.schedule, cond, train=True, key=network_key)
        error = mse(denoise(x_t, t).x0, target)
        return (weight(level) * error).mean(), {"mse": error, "num_steps": n}

    def advance(aux, params, step, metrics):
        del metrics
        now, then = (student_steps(k, num_steps, round_length) for k in (step, step + 1))
        return {"teacher": jax.tree.map(lambda a, b: jnp.where(then < now, b, a), aux["teacher"], params["model"])}

    def build(params, cond, scale, like):
        if guidance_range is not None:
            cond = with_guidance(cond, scale, guidance_range, like)
        elif scale is not None:
            raise ValueError("progressive: guidance_scale needs a student trained with guidance_range; leave it out")
        return head(network, params, path.schedule, cond)

    generate = _generate(build, path, clip, 1 if round_length else num_steps)
    return Method(init, (Objective("model", objective),), generate, advance if round_length else keep)


def first_teacher(
    network: Network,
    *,
    init_params: Callable[[Key, Batch], Params],
    head: Head | None = None,
    path: Path | None = None,
    weight: weighting.Weighting = weighting.truncated_snr,
    label_dropout: float = 0.0,
    null_label: int | None = None,
    clip: float | None = 1.0,
    num_steps: int = 1024,
) -> Method:
    """The diffusion model that the first round distils: the weighted x0 error at u uniform in [0, 1].

    Args:
      network, init_params, head, path, weight, clip: as for `progressive`.
      label_dropout: share of cond["label"] replaced by null_label in training, as guided distillation needs.
      null_label: label of "no class", for dropout and guidance.
      num_steps: of DDIM in `generate`.

    Raises:
      ValueError: for label_dropout without null_label.

    Source: Salimans & Ho 2022 algorithm 1.
    """
    check_label_dropout(label_dropout, null_label)
    head = single(parameterizations.v()) if head is None else head
    path = vp_path() if path is None else path

    def objective(params, aux, batch, key, step):
        del aux, step
        x0, cond = read_batch(batch, "progressive")
        time_key, eps_key, label_key, network_key = jax.random.split(key, 4)
        cond = drop_labels(label_key, cond, label_dropout, null_label)
        t = path.time(jax.random.uniform(time_key, x0.shape[:1], x0.dtype))
        level = level_like(path.schedule, t, x0)
        x_t = process.q_sample(x0, jax.random.normal(eps_key, x0.shape, x0.dtype), level)
        denoise = head(network, params["model"], path.schedule, cond, train=True, key=network_key)
        error = mse(denoise(x_t, t).x0, x0)
        return (weight(level) * error).mean(), {"mse": error}

    def build(params, cond, scale, like):
        if null_label is not None and "label" not in cond:
            cond = cond | {"label": jnp.full(like.shape[:1], null_label, jnp.int32)}
        return label_guided(lambda c: head(network, params, path.schedule, c), cond, null_label, scale)

    generate = _generate(build, path, clip, num_steps)
    return Method(
        lambda key, batch: ({"model": init_params(key, batch)}, {}), (Objective("model", objective),), generate
    )


def _generate(build, path, clip, num_steps):
    def generate(params, aux, key, noise, cond, sampling: Sampling):
        del aux
        denoise = build(params["model"], cond, sampling.guidance_scale, noise)
        denoise = denoise if clip is None else clip_x0(denoise, clip)
        n = num_steps if sampling.num_steps is None else sampling.num_steps
        grid = sampling.times
        if grid is None:
            if n < 1:
                raise ValueError(f"progressive: num_steps must be at least 1, got {n}")
            u = np.linspace(1.0, 0.0, n + 1)
            grid = path.time(jnp.asarray(u[:-1] if path.to_clean else u, noise.dtype))
        grid = jnp.asarray(grid, noise.dtype)
        x = path.schedule.level(grid[:1]).sigma[0] * noise
        solver = (sampling.solver or ddim)(path.schedule)
        return (sample if path.to_clean else integrate)(solver, denoise, key, x, grid)

    return generate


def _check(num_steps, round_length, teacher, guidance_range):
    if num_steps < 1 or (round_length is not None and num_steps & (num_steps - 1)):
        raise ValueError(f"progressive: num_steps must be at least 1, a power of two to be halved, got {num_steps}")
    if round_length is not None and round_length < 1:
        raise ValueError(f"progressive: round_length must be at least 1 training step, got {round_length}")
    if round_length is not None and teacher is not None:
        raise ValueError("progressive: with round_length the student becomes the teacher; leave `teacher` out")
    if guidance_range is not None and not guidance_range[0] <= guidance_range[1]:
        raise ValueError(f"progressive: guidance_range is (low, high) of guidance_scale - 1, got {guidance_range}")

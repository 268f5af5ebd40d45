"""Consistency models: one network maps every point of a probability flow path to the path's clean end.

Consistency distillation (a teacher's ODE step joins neighbouring levels) and consistency training (the data do),
algorithms 2 and 3 of Song et al. 2023 (arXiv:2303.01469), with their schedules N(k) and mu(k), and the continuous-time
losses of appendix B. Sampling is `solvers.stochastic_iterative`. The teacher's own training is `edm`; zero-shot
editing is `editing`; the later recipes without a target network have files of their own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdiff import losses, parameterization, process, schedules, times, weighting
from jaxdiff.denoiser import clip_x0, denoiser
from jaxdiff.methods.base import Batch, Method, Objective, Sampling, copied, read_batch
from jaxdiff.schedules import Schedule
from jaxdiff.solvers.base import Solver, sample
from jaxdiff.solvers.heun import heun
from jaxdiff.solvers.stochastic_iterative import stochastic_iterative
from jaxdiff.types import Cond, Denoised, Denoiser, Key, Level, Network, Params

ParamsFn = Callable[[Key, Batch], Params]
Teacher = Callable[[Params, Cond], Denoiser]
RateLoss = Callable[[Array, Array], Array]


class Curriculum(NamedTuple):
    """What changes with the step k: num_levels, N(k) int32 >= 2, and target_ema, mu(k) in [0, 1], both traced.

    last_levels is the N that training ends with: samples are drawn at times of that grid.
    """

    num_levels: Callable[[Array], Array]
    target_ema: Callable[[Array], Array]
    last_levels: int


def fixed(num_levels: int, target_ema: float) -> Curriculum:
    """The same N and mu always. mu = 0 makes the target the student itself, with its gradient stopped."""
    if num_levels < 2:
        raise ValueError(f"num_levels must be at least 2, got {num_levels}: a step needs two levels")
    return Curriculum(lambda step: jnp.full_like(step, num_levels), _constant(target_ema), num_levels)


def progressive(start_levels: int, end_levels: int, total_steps: int, target_ema: float) -> Curriculum:
    """N(k) = ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 with a fixed mu.

    Args:
      start_levels: s0; N(0) = max(s0, 2).
      end_levels: s1; N(K) = s1 + 1.
      total_steps: K. Later steps continue the same curve, up to N = 2 (s1 + 1).
      target_ema: mu.

    Raises:
      ValueError: for counts out of order, or mu outside [0, 1].

    Source: Song et al. 2023 (arXiv:2303.01469) appendix C.
    """
    return Curriculum(_progressive_levels(start_levels, end_levels, total_steps), _constant(target_ema), end_levels + 1)


def adaptive(start_levels: int, end_levels: int, total_steps: int, start_ema: float) -> Curriculum:
    """N(k) of `progressive`, and mu(k) = exp(s0 ln(mu0) / (N(k) - 1)), nearer to 1 the finer the grid.

    Args: as for `progressive`, with start_ema mu0 in (0, 1). The releases divide by N(k) - 1, the paper writes N(k).

    Raises:
      ValueError: as `progressive`.
    """
    num_levels = _progressive_levels(start_levels, end_levels, total_steps)
    if not 0 < start_ema < 1:
        raise ValueError(f"start_ema must lie in (0, 1), got {start_ema}; use `progressive` for a fixed target")
    decay = start_levels * float(np.log(start_ema))
    return Curriculum(num_levels, lambda k: jnp.exp(decay / (num_levels(k) - 1).astype(float)), end_levels + 1)


def consistency_loss(
    student: Denoiser, target: Denoiser, x_t: Array, t: Array, x_s: Array, s: Array, distance: losses.Distance
) -> Float[Array, " b"]:
    """distance(f(x_t, t), f_target(x_s, s)): two points of one path must have one end.

    Args:
      student, target: consistency functions; no gradient passes through the target or x_s.
      x_t, t: [B, ...] and [B], the noisier point.
      x_s, s: the next point of its path towards the data.
      distance: (prediction, target) -> [B].

    Source: Song et al. 2023 eq. 7 and 10.
    """
    end = jax.lax.stop_gradient(target(jax.lax.stop_gradient(x_s), s).x0)
    return distance(student(x_t, t).x0, end)


def ode_step(solver: Solver, denoise: Denoiser, x_t: Array, t: Array, s: Array) -> Float[Array, "b ..."]:
    """One step of a deterministic single-step solver from times t [B] to s [B], each example at its own."""
    x_s, _, _ = solver.step(jnp.zeros_like(x_t), solver.init(x_t, t), x_t, t, s, denoise)
    return x_s


def consistency_distillation(
    network: Network,
    *,
    teacher_params: Params,
    teacher: Teacher | None = None,
    init_params: ParamsFn | None = None,
    curriculum: Curriculum | None = None,
    distance: losses.Distance = losses.mse,
    weight: weighting.Weighting = weighting.uniform,
    solver: Callable[[Schedule], Solver] = heun,
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    clip: float | None = 1.0,
    num_steps: int = 1,
) -> Method:
    """Consistency distillation. Batches are {"x0": [B, ...], further arrays as conditioning}.

    Args:
      network: (params, x_t, t, cond) -> [B, ...]; x_t has unit variance, t is ln(sigma) / 4.
      teacher_params: the teacher's parameters, usually a moving average. aux holds a copy.
      teacher: (teacher_params, cond) -> Denoiser in times of `schedules.ve`, with any guidance inside; None for
        `network` under `parameterization.edm`.
      init_params: (key, batch) -> the student's parameters; None starts from a copy of the teacher's.
      curriculum: N(k) and mu(k); None for `fixed(18, 0.0)`, CIFAR-10's.
      distance: (prediction, target) -> [B]: `losses.mse`, `l1`, `linf`, `resized(mse, (32, 32))`, or a perceptual one.
      weight: of the noisier level.
      solver: schedule -> deterministic single-step Solver for the teacher's step: `heun` or `euler`.
      sigma_data: standard deviation of the data.
      sigma_min, sigma_max, rho: of the Karras grid. The result at sigma_min is x_t itself.
      clip: bound of |f| at every step of sampling, as the release's sampler has it; None for latents.
      num_steps: default of `generate`.

    Returns:
      Method with the player "model" and aux {"target", "teacher"}. `generate` makes n steps at nearly evenly
      spaced points of the last training grid, or at `Sampling.times`, which should be of that grid: between its points
      the function is not trained. Metrics: num_levels and target_ema.

    Raises:
      ValueError: for a scale that is not positive or num_steps below 1; for a guidance_scale when sampling.

    Source: Song et al. 2023 algorithm 2.
    """
    grid = _Karras(sigma_min, sigma_max, rho)
    step = solver(schedules.ve(sigma_min, sigma_max))
    teacher = teacher or _teacher_of(network, sigma_data)

    def next_point(aux, x0, eps, x_t, t, s, cond):
        del x0, eps
        return ode_step(step, teacher(aux["teacher"], cond), x_t, t, s)

    def init(key, batch):
        student = init_params(key, batch) if init_params else copied(teacher_params)
        return {"model": student}, {"target": copied(student), "teacher": copied(teacher_params)}

    curriculum = fixed(18, 0.0) if curriculum is None else curriculum
    function = _function(network, sigma_data, grid)
    generate = _generate(function, grid, clip, num_steps, curriculum.last_levels)
    return _discrete(function, generate, grid, init, next_point, curriculum, distance, weight)


def consistency_training(
    network: Network,
    *,
    init_params: ParamsFn,
    curriculum: Curriculum,
    distance: losses.Distance = losses.mse,
    weight: weighting.Weighting = weighting.uniform,
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    clip: float | None = 1.0,
    num_steps: int = 1,
) -> Method:
    """Consistency training: no teacher, x_s = x0 + s eps with the eps of x_t. aux is {"target"}.

    Args, Returns and Raises: as for `consistency_distillation`. CIFAR-10 has `adaptive(2, 150, 800_000, 0.9)`. Random
    init_params are the paper's; the image release's launch lines start from a diffusion model.

    Source: Song et al. 2023 algorithm 3.
    """
    grid = _Karras(sigma_min, sigma_max, rho)

    def next_point(aux, x0, eps, x_t, t, s, cond):
        del aux, x_t, t, cond
        return process.q_sample(x0, eps, Level(jnp.ones_like(s), s))

    def init(key, batch):
        student = init_params(key, batch)
        return {"model": student}, {"target": copied(student)}

    function = _function(network, sigma_data, grid)
    generate = _generate(function, grid, clip, num_steps, curriculum.last_levels)
    return _discrete(function, generate, grid, init, next_point, curriculum, distance, weight)


def continuous_time_consistency(
    network: Network,
    *,
    loss: RateLoss,
    teacher_params: Params | None = None,
    teacher: Teacher | None = None,
    init_params: ParamsFn | None = None,
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    clip: float | None = 1.0,
    num_steps: int = 1,
) -> Method:
    """The limit N -> infinity: the rate at which f changes along the path must be zero.

    Args:
      network: as for `consistency_distillation`; `jax.jvp` goes through it, so Flax modules need
        `networks.base.as_network(module, forward_mode=True)`.
      loss: (f [B, ...], change [B, ...]) -> [B]: `rate(losses.l1)`, `rate_in(distance)`, or, with the target's
        gradient stopped, `pseudo_l2` and `pseudo_in(distance)`.
      teacher_params: gives the direction of the path; None takes it from the data (consistency training).
      teacher, init_params: as for `consistency_distillation`; without a teacher init_params is needed.
      sigma_data, sigma_min, sigma_max, rho, clip, num_steps: as for `consistency_distillation`; t^(1/rho) is uniform.

    Returns:
      Method with the player "model"; aux is {"teacher"}, or empty.

    Raises:
      ValueError: as `consistency_distillation`, and with neither teacher_params nor init_params.

    Source: Song et al. 2023 appendix B.
    """
    if teacher_params is None and init_params is None:
        raise ValueError("continuous_time_consistency: without teacher_params the student needs init_params")
    grid = _Karras(sigma_min, sigma_max, rho)
    function = _function(network, sigma_data, grid)
    teacher = teacher or _teacher_of(network, sigma_data)

    def init(key, batch):
        student = init_params(key, batch) if init_params else copied(teacher_params)
        return {"model": student}, {} if teacher_params is None else {"teacher": copied(teacher_params)}

    def objective(params, aux, batch, key, step):
        del step
        x0, cond = read_batch(batch, "consistency")
        time_key, eps_key, network_key = jax.random.split(key, 3)
        t = times.karras_time(jax.random.uniform(time_key, x0.shape[:1], x0.dtype), 2, *grid)
        x_t = process.q_sample(x0, jax.random.normal(eps_key, x0.shape, x0.dtype), Level(jnp.ones_like(t), t))
        known = teacher(aux["teacher"], cond) if "teacher" in aux else lambda x_t, t: Denoised(x0)
        student = function(params["model"], cond, train=True, key=network_key)
        return loss(*rate_of_change(student, known, x_t, t)).mean(), {}

    return Method(init, (Objective("model", objective),), _generate(function, grid, clip, num_steps, None))


def rate_of_change(student: Denoiser, known: Denoiser, x_t: Array, t: Array) -> tuple[Array, Array]:
    """f(x_t, t), and how fast it changes when x_t follows the path towards the data: -(df/dx dx/dt + df/dt).

    Args:
      student: the consistency function f.
      known: the denoiser whose path is followed, dx/dt = (x_t - x0) / t; no gradient passes through it.
      x_t, t: [B, ...] and [B], t of `schedules.ve`.
    """
    level = Level(jnp.ones_like(t), t)
    velocity = process.eps_from_x0(jax.lax.stop_gradient(known(x_t, t).x0), x_t, level)
    return jax.jvp(lambda x, t: student(x, t).x0, (x_t, t), (-velocity, -jnp.ones_like(t)))


def rate(distance: losses.Distance) -> RateLoss:
    """The rate itself, by its distance from 0: `losses.l1`, `linf`, or `euclidean` for the paper's l2 (a norm here)."""
    return lambda f, change: distance(change, jnp.zeros_like(f))


def rate_in(distance: losses.Distance) -> RateLoss:
    """The rate measured by a smooth distance: change^T H change, H its second derivative where both arguments are f."""

    def loss(f, change):
        bent = jax.jvp(jax.grad(lambda y: distance(f, y).sum()), (f,), (change,))[1]
        return (bent * change).reshape(f.shape[0], -1).sum(axis=1)

    return loss


def pseudo_l2(f: Float[Array, "b ..."], change: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """-sum(change f) with `change` held: the value means nothing, the gradient is that of the squared error."""
    return -(jax.lax.stop_gradient(change) * f).reshape(f.shape[0], -1).sum(axis=1)


def pseudo_in(distance: losses.Distance) -> RateLoss:
    """As `pseudo_l2` for a smooth distance: -f^T H change with H and change held."""

    def loss(f, change):
        here, held = jax.lax.stop_gradient((f, change))
        bent = jax.jvp(jax.grad(lambda y: distance(y, here).sum()), (here,), (held,))[1]
        return -(bent * f).reshape(f.shape[0], -1).sum(axis=1)

    return loss


class _Karras(NamedTuple):
    sigma_min: float
    sigma_max: float
    rho: float


def _function(network: Network, sigma_data: float, grid: _Karras) -> Callable[..., Denoiser]:
    """(params, cond, train=, key=) -> the consistency function."""
    schedule = schedules.ve(grid.sigma_min, grid.sigma_max)
    meaning = parameterization.consistency(sigma_data, grid.sigma_min)
    return lambda params, cond, **training: denoiser(network, params, schedule, meaning, cond, **training)


def _generate(function, grid: _Karras, clip: float | None, num_steps: int, levels: int | None) -> Callable:
    def points_of(n):
        """n of the training grid's points above sigma_min, or of any if it has no end."""
        last = n if levels is None else levels - 1
        if not 1 <= n <= last:
            raise ValueError(f"consistency: num_steps must be 1 to {last}, the levels above sigma_min, got {n}")
        return times.karras(last + 1, *grid)[np.arange(n) * last // n]

    points_of(num_steps)  # refuses now, not when sampling
    schedule = schedules.ve(grid.sigma_min, grid.sigma_max)

    def generate(params, aux, key, noise, cond, sampling: Sampling):
        del aux
        if sampling.guidance_scale is not None:
            raise ValueError("a consistency model takes no guidance_scale; guide the teacher it is distilled from")
        n = num_steps if sampling.num_steps is None else sampling.num_steps
        points = jnp.asarray(points_of(n) if sampling.times is None else sampling.times, noise.dtype)
        make = sampling.solver or (lambda schedule: stochastic_iterative(schedule, grid.sigma_min))
        f = function(params["model"], cond)
        f = f if clip is None else clip_x0(f, clip)
        return sample(make(schedule), f, key, points[0] * noise, points)

    return generate


def _discrete(function, generate, grid: _Karras, init, next_point, curriculum: Curriculum, distance, weight) -> Method:
    def objective(params, aux, batch, key, step):
        x0, cond = read_batch(batch, "consistency")
        index_key, eps_key, network_key = jax.random.split(key, 3)
        num_levels = curriculum.num_levels(step)
        index = jax.random.randint(index_key, x0.shape[:1], 0, num_levels - 1).astype(x0.dtype)
        t, s = (times.karras_time(i, num_levels, *grid) for i in (index, index + 1))
        level, eps = Level(jnp.ones_like(t), t), jax.random.normal(eps_key, x0.shape, x0.dtype)
        x_t = process.q_sample(x0, eps, level)
        x_s = next_point(aux, x0, eps, x_t, t, s, cond)
        # one key for both: independent dropout masks would be a distance of their own
        student, target = (function(p, cond, train=True, key=network_key) for p in (params["model"], aux["target"]))
        loss = (weight(level) * consistency_loss(student, target, x_t, t, x_s, s, distance)).mean()
        seen = {"num_levels": num_levels, "target_ema": curriculum.target_ema(step)}
        return loss, {name: value.astype(loss.dtype) for name, value in seen.items()}

    def advance(aux, params, step, metrics):
        del metrics
        mu = curriculum.target_ema(step)
        moved = jax.tree.map(
            lambda old, new: mu.astype(new.dtype) * old + (1 - mu).astype(new.dtype) * new,
            aux["target"],
            params["model"],
        )
        return aux | {"target": moved}

    return Method(init, (Objective("model", objective),), generate, advance)


def _teacher_of(network: Network, sigma_data: float) -> Teacher:
    meaning, schedule = parameterization.edm(sigma_data), schedules.ve()  # t is sigma itself, whatever the ends
    return lambda params, cond: denoiser(network, params, schedule, meaning, cond)


def _progressive_levels(start: int, end: int, total_steps: int) -> Callable[[Int[Array, ""]], Int[Array, ""]]:
    if not 1 <= start <= end:
        raise ValueError(f"need 1 <= start_levels <= end_levels, got {start} and {end}; swap them")
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    # N exceeds m from step starts[m - start] on: the square root in closed form would lose a step here and there in
    # float32, and these integers are exact.
    m = np.arange(start, 2 * (end + 1), dtype=np.int64)
    starts = (m**2 - start**2) * total_steps // ((end + 1) ** 2 - start**2) + 1
    starts = np.minimum(starts, np.iinfo(np.int32).max).astype(np.int32)

    def num_levels(step):
        passed = jnp.searchsorted(jnp.asarray(starts), jnp.asarray(step, jnp.int32), side="right")
        return jnp.maximum(start + passed.astype(jnp.int32), 2)

    return num_levels


def _constant(target_ema: float) -> Callable[[Array], Array]:
    if not 0 <= target_ema <= 1:
        raise ValueError(f"target_ema must lie in [0, 1], got {target_ema}; 0 makes the target the student")
    return lambda step: jnp.full(jnp.shape(step), target_ema, float)

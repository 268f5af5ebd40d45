"""Rectified flow: a velocity learnt along straight lines, straightened by reflow until one step is enough.

In the papers time runs from noise (0) to data (1) and the network predicts the velocity data - noise. Here t is 1 minus
their time, as everywhere: x_t = (1 - t) x0 + t eps on `schedules.rectified_flow`. The conversion is `velocity` (what
the network's output and time mean) and `line_time` (where training draws and solvers evaluate), nowhere else.
`rectified_flow` couples data with fresh noise. `reflow` couples each noise with the data that a flow made of it, from
stored or online pairs; with `noise_end` it distils a flow into one step, with InstaFlow's settings one of images from
text. Making and storing pairs is `data.pairs`; networks and perceptual distances are arguments.

Source: Liu et al. 2022 (arXiv:2209.03003); Liu et al. 2023 (arXiv:2309.06380) for InstaFlow.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff import losses, process, schedules, times
from jaxdiff import parameterization as parameterizations
from jaxdiff.guidance import classifier_free
from jaxdiff.methods.base import Aux, Batch, Method, Objective, Sampling, copied, read_batch
from jaxdiff.parameterization import Affine, Parameterization
from jaxdiff.schedules import Schedule
from jaxdiff.solvers.base import Solver, level_like, no_state, sample
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.rk45 import rk45
from jaxdiff.types import Cond, Denoised, Denoiser, Key, Network, Params, expand

Velocity = Callable[[Array, Array], Array]
ParamsFn = Callable[[Key, Batch], Params]
Ends = Callable[[Params, Array, Cond], Array]
START = 1e-3
SCHEDULE = schedules.rectified_flow()


def velocity(net_time: Callable[[Array], Array] = lambda t: 999 * (1 - t)) -> Parameterization:
    """f predicts x0 - eps, the direction from noise to data: minus `parameterization.flow`.

    net_time defaults to the first paper's, 0.999 near noise and 999 at the data. InstaFlow's network sees
    `parameterization.scaled_time(1000.0)`, 1000 at noise, as Stable Diffusion did.
    """

    def coefficients(level):
        total, one = level.alpha + level.sigma, jnp.ones_like(level.alpha)
        return Affine(1 / total, level.sigma / total, one, one, -one)

    return Parameterization(coefficients, net_time)


def line_time(progress: float | Array, start: float = START) -> Any:
    """t where a line was followed for `progress` in [0, 1]: 1 - start at noise, 0 at the data.

    The release starts at its time 1e-3, in training and where a sampler calls the network; InstaFlow at 0.
    """
    return (1 - start) * (1 - progress)


def uniform(start: float = START) -> times.TimeSampler:
    """t uniform along the line: rectified flow and reflow."""
    return lambda key, n: line_time(jax.random.uniform(key, (n,)), start)


def noise_end(start: float = START) -> times.TimeSampler:
    """The noisy end for every example: distillation into one step."""
    return lambda key, n: line_time(jnp.zeros(n), start)


def data_end() -> times.TimeSampler:
    """t = 0 for every example: one step from data to noise."""
    return lambda key, n: jnp.zeros(n)


def step_starts(num_steps: int, start: float = START) -> times.TimeSampler:
    """The times at which Euler's method with num_steps steps calls the network: distillation into num_steps steps."""
    if num_steps < 1:
        raise ValueError(f"step_starts: num_steps must be at least 1, got {num_steps}")
    return lambda key, n: line_time(jax.random.randint(key, (n,), 0, num_steps).astype(float) / num_steps, start)


def velocity_of(
    network: Network,
    params: Params,
    parameterization: Parameterization,
    cond: Cond | None = None,
    *,
    train: bool = False,
    key: Key | None = None,
) -> Velocity:
    """(x_t, t) -> x0 - eps of a network whose output may mean anything affine; finite at both ends of the line.

    With the output f = on_x0 x0 + on_eps eps and x_t = alpha x0 + sigma eps, both unknowns follow from a 2 x 2 system.

    Args:
      network, params, cond, train, key: as for `denoiser.denoiser`.
      parameterization: meaning of the output on `schedules.rectified_flow`.
    """

    def follow(x_t, t):
        level = level_like(SCHEDULE, t, x_t)
        c = parameterization.coefficients(level)
        f = network(
            params, expand(c.scale_in, x_t) * x_t, parameterization.net_time(t), cond or {}, train=train, key=key
        )
        determinant = level.alpha * c.on_eps - level.sigma * c.on_x0
        on_x_t, on_f = (c.on_x0 + c.on_eps) / determinant, -(level.alpha + level.sigma) / determinant
        return expand(on_x_t, x_t) * x_t + expand(on_f, f) * f

    return follow


def euler_times(num_steps: int) -> times.Grid:
    """1, 1 - 1/n, ..., 1/n: Euler's steps of 1 / n from noise to data.

    Raises:
      ValueError: if n is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"rectified_flow: num_steps must be at least 1, got {num_steps}; None is adaptive")
    return np.linspace(1.0, 0.0, num_steps, endpoint=False)


def flow_denoiser(follow: Velocity, start: float = START) -> Denoiser:
    """x0 = x_t + t v, for solvers on `schedules.rectified_flow`; v is taken at (1 - start) t, as `line_time` has it.

    DDIM from t to s is then x_t + (t - s) v: n steps from t = 1 are Euler's with steps of 1 / n, as in the release.
    """
    return lambda x_t, t: Denoised(x_t + expand(t.astype(x_t.dtype), x_t) * follow(x_t, (1 - start) * t))


def flow_loss(
    follow: Velocity,
    x0: Float[Array, "b ..."],
    noise: Float[Array, "b ..."],
    t: Float[Array, " b"],
    distance: losses.Distance = losses.mse,
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """distance(noise + v, x0) between the ends that the velocity and the pair give to a line, and the straightness.

    For `losses.mse` it is |v - (x0 - noise)|^2, the paper's; perceptual distances are meant for the noisy end.

    Args:
      follow: (x_t, t) -> v.
      x0, noise: [B, ...], ends of the line that belong to each other.
      t: [B] in [0, 1].
      distance: (prediction, target) -> [B].

    Returns:
      The loss [B], and the mean square of v - (x0 - noise) [B], whose mean over t is 0 for a straight flow.

    Source: Liu et al. 2022 eq. 1 and section 3.
    """
    v = follow(process.q_sample(x0, noise, level_like(SCHEDULE, t, x0)), t)
    return distance(noise + v, x0), losses.mse(v, x0 - noise)


def straightness(
    follow: Velocity, noise: Float[Array, "b ..."], num_steps: int = 100, start: float = START
) -> Float[Array, " b"]:
    """How far the flow's own paths Z are from straight: the mean over time of |(Z_1 - Z_0) - v(Z_t, t)|^2 / values.

    Args:
      follow: (x_t, t) -> v.
      noise: [B, ...] starts.
      num_steps: of Euler's method; a single one is always straight.
      start: see `line_time`.

    Source: Liu et al. 2022 section 2.2.
    """

    def step(x, progress):
        v = follow(x, jnp.full(x.shape[:1], line_time(progress, start)))
        return x + v / num_steps, v

    end, followed = jax.lax.scan(step, noise, jnp.arange(num_steps, dtype=noise.dtype) / num_steps)
    return jax.vmap(lambda v: losses.mse(v, end - noise))(followed).mean(axis=0)


def flow_sde(schedule: Schedule, sigma: float, *, noise_scale: float = 1.0, start: float = START) -> Solver:
    """The release's stochastic sampler: Euler with noise sigma t sqrt(h), h the step, and the drift that it asks for.

    With u = 1 - t, the drift is v + sigma^2 / (2 noise_scale^2) (u (1 - u) v / 2 - (2 - u) x / 2). Noise is also added
    by the last step, to clean data.

    Args:
      schedule: `schedules.rectified_flow`, by which the denoiser's x0 is v again.
      sigma: of the noise; 0 is Euler's method.
      noise_scale: deviation of the noise that the flow starts from.
      start: see `line_time`.
    """
    del schedule

    def move(noise, x, t, h, denoise):
        x0 = denoise(x, t).x0
        v = (x0 - x) / expand(t, x)
        u = expand(1 - (1 - start) * t, x)
        drift = v + sigma**2 / (2 * noise_scale**2) * (0.5 * u * (1 - u) * v - 0.5 * (2 - u) * x)
        h = expand(h, x)
        return x + h * drift + (1 - u) * sigma * jnp.sqrt(h) * noise, x0

    def step(noise, state, x, t, s, denoise):
        t, s = t.astype(x.dtype), s.astype(x.dtype)
        x, x0 = move(noise, x, t, t - s, denoise)
        return x, state, x0

    def finish(noise, state, x, t, denoise):
        del state
        t = t.astype(x.dtype)
        return move(noise, x, t, t, denoise)[0]

    return Solver(no_state, step, finish)


def rectified_flow(
    network: Network,
    *,
    init_params: ParamsFn,
    parameterization: Parameterization | None = None,
    time_sampler: times.TimeSampler | None = None,
    distance: losses.Distance = losses.mse,
    null_cond: Callable[[Cond], Cond] | None = None,
    cond_dropout: float = 0.0,
    start: float = START,
    num_steps: int | None = None,
) -> Method:
    """The first flow: data and fresh noise. Batches are {"x0": [B, ...], further arrays [B, ...] as conditioning}.

    Args:
      network: (params, x_t, t, cond) -> [B, ...].
      init_params: (key, batch) -> parameters of the network.
      parameterization: what its output and its time mean; None for `velocity()`.
      time_sampler: (key, B) -> t [B]; None for `uniform(start)`.
      distance: of the ends, see `flow_loss`.
      null_cond: cond -> the same without a condition, for guidance and cond_dropout; None without.
      cond_dropout: share of examples that train with null_cond.
      start: of the release 1e-3, of InstaFlow 0; see `line_time`.
      num_steps: of Euler's method in `generate`; None for adaptive RK45 with tolerance 1e-5, the paper's.

    Returns:
      Method with the player "model". `Sampling.num_steps`, `times` and `solver` (default DDIM, here Euler) work on
      `schedules.rectified_flow` from t = 1; `guidance_scale` a gives a v(cond) + (1 - a) v(null). Metric: straightness.

    Raises:
      ValueError: for numbers out of range, an output that says nothing at t = 1, dropout without null_cond; while
        tracing, for a batch with pairs, or guidance without null_cond.

    Source: Liu et al. 2022 (arXiv:2209.03003) algorithm 1.
    """

    def couple(aux, batch, key):
        del aux
        x0, cond = read_batch(batch, "rectified_flow")
        if "noise" in cond:
            raise ValueError("rectified_flow draws its own noise, got a batch of pairs with 'noise'; use reflow")
        return x0, jax.random.normal(key, x0.shape, x0.dtype), cond

    def init(key, batch):
        return {"model": init_params(key, batch)}, {}

    return _flow(
        network, init, couple, parameterization, time_sampler, distance, null_cond, cond_dropout, start, num_steps
    )


def reflow(
    network: Network,
    *,
    teacher_params: Params,
    init_params: ParamsFn | None = None,
    online: Ends | None = None,
    parameterization: Parameterization | None = None,
    time_sampler: times.TimeSampler | None = None,
    distance: losses.Distance = losses.mse,
    null_cond: Callable[[Cond], Cond] | None = None,
    cond_dropout: float = 0.0,
    start: float = START,
    num_steps: int | None = None,
) -> Method:
    """The next flow from the pairs of the last one, or its distillation: {"x0", "noise": [B, ...], conditioning}.

    Each x0 must be what the last flow makes of its noise; nothing here parts them. For distillation into one step take
    `time_sampler=noise_end(start)` and num_steps 1, first with `losses.mse`, then with a perceptual distance; for
    latents that distance decodes both. InstaFlow has `parameterization=velocity(scaled_time(1000.0))` and start 0.

    Args:
      network and all not named here: as for `rectified_flow`.
      teacher_params: of the last flow, from which this one starts.
      init_params: (key, batch) -> parameters to start from instead, for a network of another form.
      online: (teacher_params, noise, cond) -> x0, to make pairs while training; then batches need no "noise", their x0
        gives only the shape, and aux is {"teacher"}. None reads pairs from the batch.

    Returns, Raises: as `rectified_flow`; also ValueError for a batch without "noise", or ends of different shapes.

    Source: Liu et al. 2022 section 2.1; Liu et al. 2023 (arXiv:2309.06380) section 3.
    """

    def couple(aux, batch, key):
        if online is None:
            x0, cond = read_batch(batch, "reflow", ("x0", "noise"))
            noise = cond["noise"]
            cond = {name: value for name, value in cond.items() if name != "noise"}
        else:
            like, cond = read_batch(batch, "reflow")
            noise = jax.random.normal(key, like.shape, like.dtype)
            x0 = jax.lax.stop_gradient(online(aux["teacher"], noise, cond))
        if x0.shape != noise.shape:
            raise ValueError(
                f"reflow: data {x0.shape} and noise {noise.shape} are ends of one line; a pair must have one shape"
            )
        return x0, noise, cond

    def init(key, batch):
        params = init_params(key, batch) if init_params else copied(teacher_params)
        return {"model": params}, {} if online is None else {"teacher": copied(teacher_params)}

    return _flow(
        network, init, couple, parameterization, time_sampler, distance, null_cond, cond_dropout, start, num_steps
    )


def _flow(
    network: Network,
    init: Callable,
    couple: Callable[[Aux, Batch, Key], tuple[Array, Array, Cond]],
    parameterization: Parameterization | None,
    time_sampler: times.TimeSampler | None,
    distance: losses.Distance,
    null_cond: Callable[[Cond], Cond] | None,
    cond_dropout: float,
    start: float,
    num_steps: int | None,
) -> Method:
    _check(null_cond, cond_dropout, start, num_steps)
    meaning = velocity() if parameterization is None else parameterization
    parameterizations.require_defined(SCHEDULE, meaning)
    draw_t = uniform(start) if time_sampler is None else time_sampler

    def objective(params, aux, batch, key, step):
        del step
        pair_key, time_key, drop_key, network_key = jax.random.split(key, 4)
        x0, noise, cond = couple(aux, batch, pair_key)
        t = draw_t(time_key, x0.shape[0]).astype(x0.dtype)
        if null_cond is not None and cond_dropout:
            cond = _dropped(jax.random.bernoulli(drop_key, cond_dropout, t.shape), cond, null_cond(cond))
        follow = velocity_of(network, params["model"], meaning, cond, train=True, key=network_key)
        loss, straight = flow_loss(follow, x0, noise, t, distance)
        return loss.mean(), {"straightness": straight}

    def guided(params, cond, scale) -> Velocity:
        def build(cond):
            follow = velocity_of(network, params, meaning, cond)
            return lambda x_t, t: Denoised(follow(x_t, t))  # guidance is linear: it acts on v as on x0

        if scale is not None and null_cond is None:
            raise ValueError("rectified_flow: guidance_scale needs null_cond, got None; leave the scale out")
        denoise = build(cond) if null_cond is None else classifier_free(build, cond, null_cond(cond), scale)
        return lambda x_t, t: denoise(x_t, t).x0

    def generate(params, aux, key, noise, cond, sampling: Sampling):
        del aux
        follow = guided(params["model"], cond, sampling.guidance_scale)
        n = num_steps if sampling.num_steps is None else sampling.num_steps
        grid = sampling.times
        if grid is None and n is None and sampling.solver is None:
            return rk45(lambda x, t: -follow(x, t), noise, line_time(0.0, start), line_time(1.0, start))[0]
        if grid is None:
            if n is None:
                raise ValueError("rectified_flow: this flow is solved adaptively; a solver by name needs num_steps")
            grid = euler_times(n)
        grid = jnp.asarray(grid, noise.dtype)
        return sample((sampling.solver or ddim)(SCHEDULE), flow_denoiser(follow, start), key, noise, grid)

    return Method(init, (Objective("model", objective),), generate)


def _dropped(dropped, cond: Cond, null: Cond) -> Cond:
    return {name: jnp.where(dropped.reshape(-1, *[1] * (a.ndim - 1)), null[name], a) for name, a in cond.items()}


def _check(null_cond, cond_dropout, start, num_steps):
    if not 0 <= cond_dropout <= 1:
        raise ValueError(f"rectified_flow: cond_dropout is a probability in [0, 1], got {cond_dropout}")
    if cond_dropout and null_cond is None:
        raise ValueError("rectified_flow: cond_dropout needs null_cond, what an example is trained with instead")
    if not 0 <= start < 1:
        raise ValueError(f"rectified_flow: start must lie in [0, 1), got {start}; 0.001 is the release's")
    if num_steps is not None:
        euler_times(num_steps)

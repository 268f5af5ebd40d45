"""sCM: consistency models in continuous time, trained from data (sCT) or distilled from a TrigFlow teacher (sCD).

x_t = cos(t) x0 + sin(t) sd eps with t an angle and sd the data's deviation; here u_t = x_t / sd, which has variance 1.
The consistency function is f = cos(t) u_t - sin(t) F(u_t, t), the same as a v-prediction, with f = u_t at t = 0. Its
loss needs dF/dt along the ODE, which one forward-mode derivative gives: build the network with
`as_network(module, forward_mode=True)`. The network should take t itself in smooth, low-frequency features. `trigflow`
trains the teacher, `from_edm` turns an EDM network into one. The discrete-time variant is not here.

Source: Lu & Song 2024 (arXiv:2410.11081).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff import parameterization, process, schedules, times
from jaxdiff.denoiser import denoiser
from jaxdiff.guidance import check_label_dropout, drop_labels, guided, label_guided, with_guidance
from jaxdiff.losses import mse
from jaxdiff.methods.base import Batch, Method, Objective, Sampling, copied, read_batch
from jaxdiff.solvers.base import sample
from jaxdiff.solvers.heun import heun
from jaxdiff.solvers.stochastic_iterative import stochastic_iterative
from jaxdiff.types import Cond, Key, Network, Params, expand

NUM_FREQUENCIES = 8  # of the features that the adaptive weight is linear in


class Form(NamedTuple):
    """How the tangent is tamed, and what multiplies the squared error besides the learned weight.

    Attributes:
      normalize: g [B, ...] -> g of bounded size.
      weight: (t [B], values of an example, sigma_data) -> [B].
    """

    normalize: Callable[[Array], Array]
    weight: Callable[[Array, int, float], Array]


def unit_norm(c: float = 0.1) -> Callable[[Array], Array]:
    """g / (|g| + c), with the Euclidean norm of a whole example. Source: Lu & Song 2024 section 4.1."""

    def normalize(g):
        return g / expand(jnp.sqrt(jnp.sum(g.reshape(g.shape[0], -1) ** 2, axis=1)) + c, g)

    return normalize


def unit_rms(c: float = 0.1) -> Callable[[Array], Array]:
    """g / (rms(g) + c), with the root mean square of an example."""

    def normalize(g):
        return g / expand(jnp.sqrt(jnp.mean(g.reshape(g.shape[0], -1) ** 2, axis=1)) + c, g)

    return normalize


def clipped(bound: float = 1.0) -> Callable[[Array], Array]:
    """Every value of g cut to [-bound, bound], the paper's alternative to the norm. Source: Lu & Song 2024 sec. 4.1."""
    return lambda g: jnp.clip(g, -bound, bound)


def no_weight(t: Array, num_values: int, sigma_data: float) -> Float[Array, " b"]:
    """1: the tangent already holds the prior weight 1 / (sd tan t)."""
    del num_values, sigma_data
    return jnp.ones_like(t)


def prior_weight(t: Array, num_values: int, sigma_data: float) -> Float[Array, " b"]:
    """1 / (sd tan t), a second time: what public ports of the paper do."""
    del num_values
    return 1 / (sigma_data * jnp.tan(t))


def fastgen_weight(t: Array, num_values: int, sigma_data: float) -> Float[Array, " b"]:
    """1 / (D sd tan t) with D the values of an example, by which the mean square has been divided before."""
    return 1 / (num_values * sigma_data * jnp.tan(t))


PAPER = Form(unit_norm(), no_weight)
EXTRA_PRIOR = Form(unit_norm(), prior_weight)
FASTGEN = Form(unit_rms(), fastgen_weight)


def network_jvp(
    network: Network, params: Params, u_t: Array, t: Array, velocity: Array, cond: Cond, *,
    train: bool = False, key: Key | None = None,
) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:  # fmt: skip
    """F and J = cos(t) sin(t) dF/dt along du/dt = velocity, with no gradient to the parameters.

    The factor goes into the tangents, so that nothing grows near t = pi/2.

    Source: Lu & Song 2024 section 4.2, "JVP rearrangement".
    """
    params = jax.lax.stop_gradient(params)
    speed = jnp.cos(t) * jnp.sin(t)

    def output(u_t, t):
        return network(params, u_t, t, cond, train=train, key=key)

    return jax.jvp(output, (u_t, t), (expand(speed, u_t) * velocity, speed))


def tangent(
    f: Array, jvp: Array, velocity: Array, u_t: Array, t: Array, ratio: float | Array = 1.0
) -> Float[Array, "b ..."]:
    """g = -cos^2(t) (F - du/dt) - r (cos(t) sin(t) u_t + J), cos(t) times df/dt at r = 1; times sd in the paper.

    Args:
      f, jvp: [B, ...] from `network_jvp`.
      velocity: [B, ...] du/dt: cos(t) eps - sin(t) u_0 in training from data, the teacher's F in distillation.
      u_t, t: [B, ...] and [B].
      ratio: r in [0, 1], how far the warm-up has come.

    Source: Lu & Song 2024 algorithm 1.
    """
    cos, sin = expand(jnp.cos(t), u_t), expand(jnp.sin(t), u_t)
    return -(cos**2) * (f - velocity) - jnp.asarray(ratio, u_t.dtype) * (cos * sin * u_t + jvp)


def scm_loss(
    f: Float[Array, "b ..."],
    frozen: Float[Array, "b ..."],
    g: Float[Array, "b ..."],
    t: Float[Array, " b"],
    log_weight: Float[Array, " b"],
    *,
    form: Form = PAPER,
    sigma_data: float = 0.5,
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """exp(w) |F - F_frozen - g|^2 / D - w of every example, and the mean square in it alone.

    Args:
      f: [B, ...] the network's output, through which the gradient goes.
      frozen: [B, ...] the same output without a gradient.
      g: [B, ...] tangent, not normalised, from `tangent`.
      t: [B].
      log_weight: [B] w, the learned weight.
      form: see `Form`.
      sigma_data: the data's deviation.

    Source: Lu & Song 2024 eq. 8 and algorithm 1.
    """
    g = form.normalize(sigma_data * g)
    error = mse(f, jax.lax.stop_gradient(frozen + g))
    weight = form.weight(t, f.size // f.shape[0], sigma_data)
    return jnp.exp(log_weight) * weight * error - log_weight, error


def from_edm(network: Network, sigma_data: float = 0.5) -> Network:
    """An EDM network (x_t of unit variance, ln(sigma) / 4) as a TrigFlow one: minus its output at sigma = sd tan t.

    Source: Lu & Song 2024 appendix B.
    """

    def trig(params: Params, x_t: Array, t: Array, cond: Cond, *, train: bool = False, key: Key | None = None) -> Array:
        return -network(params, x_t, jnp.log(sigma_data * jnp.tan(t)) / 4, cond, train=train, key=key)

    return trig


def trigflow(
    network: Network,
    *,
    init_params: Callable[[Key, Batch], Params],
    sigma_data: float = 0.5,
    log_mean: float = -1.0,
    log_std: float = 1.4,
    sigma_max: float = 80.0,
    label_dropout: float = 0.0,
    null_label: int | None = None,
    num_steps: int = 18,
) -> Method:
    """Diffusion in TrigFlow's form, |F - (cos(t) eps - sin(t) u_0)|^2: a teacher for sCD. Batches as for `scm`.

    Args:
      network, init_params, sigma_data, log_mean, log_std, sigma_max: as for `scm`.
      label_dropout: share of cond["label"] replaced by null_label in training.
      null_label: label of "no class", for dropout and guidance.
      num_steps: of the default sampling grid, of which the solver is Heun's.

    Raises:
      ValueError: for numbers out of range, or label_dropout without null_label.

    Source: Lu & Song 2024 section 3.
    """
    check_label_dropout(label_dropout, null_label)
    schedule, v = _schedule(sigma_data, sigma_max, log_std), parameterization.v()

    def objective(params, aux, batch, key, step):
        del aux, step
        label_key, key = jax.random.split(key)
        u_t, t, velocity, cond, network_key = _noised(batch, key, schedule, sigma_data, log_mean, log_std)
        cond = drop_labels(label_key, cond, label_dropout, null_label)
        error = mse(network(params["model"], u_t, t, cond, train=True, key=network_key), velocity)
        return error.mean(), {"mse": error}

    def generate(params, aux, key, noise, cond, sampling: Sampling):
        del aux
        grid = sampling.times
        if grid is None:
            grid = times.karras_times(schedule, num_steps if sampling.num_steps is None else sampling.num_steps)
        if null_label is not None and "label" not in cond:
            cond = cond | {"label": jnp.full(noise.shape[:1], null_label, jnp.int32)}

        def build(cond):
            return denoiser(network, params["model"], schedule, v, cond)

        denoise = label_guided(build, cond, null_label, sampling.guidance_scale)
        solver = (sampling.solver or heun)(schedule)
        return sigma_data * sample(solver, denoise, key, noise, jnp.asarray(grid, noise.dtype))

    return Method(
        lambda key, batch: ({"model": init_params(key, batch)}, {}), (Objective("model", objective),), generate
    )


def scm(
    network: Network,
    *,
    init_params: Callable[[Key, Batch], Params] | None = None,
    teacher: Network | None = None,
    teacher_params: Params | None = None,
    guidance_range: tuple[float, float] | None = None,
    null_cond: Callable[[Cond], Cond] | None = None,
    sigma_data: float = 0.5,
    log_mean: float = -1.0,
    log_std: float = 1.4,
    sigma_max: float = 80.0,
    warmup_steps: int = 10_000,
    form: Form = PAPER,
    adaptive_weight: bool = True,
    second_time: float = 1.1,
    num_steps: int = 2,
) -> Method:
    """sCT, or sCD with a teacher. Batches are {"x0": [B, ...], further arrays [B, ...] as conditioning}.

    Args:
      network: (params, u_t, t, cond) -> F [B, ...]; it must allow `jax.jvp`, see `as_network(..., forward_mode=True)`.
      init_params: (key, batch) -> parameters of the network; None for a copy of the teacher's. sCT, too, is best
        started from a diffusion model.
      teacher: TrigFlow network of the teacher, or None to train from data.
      teacher_params: its parameters; a copy is held in aux["teacher"].
      guidance_range: (low, high) of w = guidance_scale - 1, drawn uniformly; the teacher is guided with it and the
        network sees it as cond["guidance"] [B]. None for no guidance.
      null_cond: cond -> the same without a condition, for guidance.
      sigma_data: standard deviation of the data.
      log_mean, log_std: of ln(sd tan t) in training.
      sigma_max: sampling starts at t = arctan(sigma_max / sd).
      warmup_steps: the second part of the tangent grows linearly over this many steps.
      form: normalisation and weight; see `PAPER`, `EXTRA_PRIOR`, `FASTGEN`.
      adaptive_weight: whether the weight w(t) is learned; False leaves it at 0, better where g has few values.
      second_time: t of the second sampling step.
      num_steps: number of sampling steps without `Sampling.num_steps`; more than two are spread below second_time.

    Returns:
      Method with the player "model", whose tree is {"network": its parameters, "weight": those of the learned weight}.

    Raises:
      ValueError: for arguments that exclude each other, or numbers out of range.

    Source: Lu & Song 2024 algorithm 1.
    """
    _check(init_params, teacher, teacher_params, guidance_range, null_cond, warmup_steps)
    schedule, v = _schedule(sigma_data, sigma_max, log_std), parameterization.v()

    def init(key, batch):
        weight = {"kernel": jnp.zeros(2 * NUM_FREQUENCIES), "bias": jnp.zeros(())}
        student = init_params(key, batch) if init_params else copied(teacher_params)
        aux = {} if teacher is None else {"teacher": copied(teacher_params)}
        return {"model": {"network": student, "weight": weight}}, aux

    def objective(params, aux, batch, key, step):
        params = params["model"]
        guidance_key, key = jax.random.split(key)
        u_t, t, velocity, cond, network_key = _noised(batch, key, schedule, sigma_data, log_mean, log_std)
        if teacher is not None:
            velocity = teacher(aux["teacher"], u_t, t, cond)
            if guidance_range is not None and null_cond is not None:
                w = jax.random.uniform(guidance_key, t.shape, t.dtype, *guidance_range)
                velocity = guided(teacher(aux["teacher"], u_t, t, null_cond(cond)), velocity, 1 + w)
                cond = cond | {"guidance": w}
            velocity = jax.lax.stop_gradient(velocity)
        about = {"train": True, "key": network_key}  # the same dropout in both calls
        frozen, jvp = network_jvp(network, params["network"], u_t, t, velocity, cond, **about)
        ratio = jnp.minimum(jnp.asarray(step, t.dtype) / warmup_steps, 1)
        g = tangent(frozen, jvp, velocity, u_t, t, ratio)
        f = network(params["network"], u_t, t, cond, **about)
        w = learned_weight(params["weight"], t, sigma_data) if adaptive_weight else jnp.zeros_like(t)
        loss, error = scm_loss(f, frozen, g, t, w, form=form, sigma_data=sigma_data)
        return loss.mean(), {"mse": error, "tangent": jnp.sqrt(mse(g, jnp.zeros_like(g)))}

    def generate(params, aux, key, noise, cond, sampling: Sampling):
        del aux
        if guidance_range is not None:
            cond = with_guidance(cond, sampling.guidance_scale, guidance_range, noise)
        elif sampling.guidance_scale is not None:
            raise ValueError("scm: guidance_scale needs a student trained with guidance_range; leave it out")
        grid = sampling.times
        if grid is None:
            n = num_steps if sampling.num_steps is None else sampling.num_steps
            if n < 1:
                raise ValueError(f"scm: num_steps must be at least 1, got {n}")
            grid = np.append(schedule.t_max, np.linspace(second_time, 0.0, n - 1, endpoint=False))
        denoise = denoiser(network, params["model"]["network"], schedule, v, cond)
        solver = (sampling.solver or stochastic_iterative)(schedule)
        return sigma_data * sample(solver, denoise, key, noise, jnp.asarray(grid, noise.dtype))

    return Method(init, (Objective("model", objective),), generate)


def learned_weight(params: Params, t: Float[Array, " b"], sigma_data: float = 0.5) -> Float[Array, " b"]:
    """w(t), linear in waves of ln(sd tan t) / 4; 0 before training."""
    angle = jnp.log(sigma_data * jnp.tan(t))[:, None] * np.arange(1, NUM_FREQUENCIES + 1, dtype=np.float32)[None, :] / 4
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1) @ params["kernel"] + params["bias"]


def _schedule(sigma_data: float, sigma_max: float, log_std: float) -> schedules.Schedule:
    for name, value in (("sigma_data", sigma_data), ("sigma_max", sigma_max), ("log_std", log_std)):
        if not value > 0:
            raise ValueError(f"scm: {name} must be positive, got {value}")
    return schedules.trigonometric(sigma_data, min(0.002, sigma_max / 2), sigma_max)


def _noised(batch, key, schedule, sigma_data, log_mean, log_std):
    """u_t, t, du/dt of the data, cond and a key for the network."""
    x0, cond = read_batch(batch, "scm")
    u0 = x0 / sigma_data
    time_key, eps_key, network_key = jax.random.split(key, 3)
    tau = log_mean + log_std * jax.random.normal(time_key, u0.shape[:1], u0.dtype)
    t = jnp.arctan(jnp.exp(tau) / sigma_data)
    eps, level = jax.random.normal(eps_key, u0.shape, u0.dtype), schedule.level(t)
    velocity = parameterization.target(parameterization.v(), u0, eps, level)
    return process.q_sample(u0, eps, level), t, velocity, cond, network_key


def _check(init_params, teacher, teacher_params, guidance_range, null_cond, warmup_steps):
    if init_params is None and teacher is None:
        raise ValueError("scm: without a teacher the student needs init_params")
    if (teacher is None) != (teacher_params is None):
        raise ValueError("scm: teacher and teacher_params belong together; give both for sCD, neither for sCT")
    if guidance_range is not None and (teacher is None or null_cond is None):
        raise ValueError("scm: guidance_range needs a teacher and null_cond; leave it out, or give both")
    if guidance_range is not None and not guidance_range[0] <= guidance_range[1]:
        raise ValueError(f"scm: guidance_range is (low, high) of guidance_scale - 1, got {guidance_range}")
    if not warmup_steps >= 1:
        raise ValueError(f"scm: warmup_steps must be at least 1, got {warmup_steps}")

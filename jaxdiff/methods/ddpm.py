"""DDPM and improved DDPM: a network trained to undo one step of a discrete noising chain.

The simple loss (Ho et al. 2020 eq. 14), the variational bound (eq. 5) and the hybrid of both for learned variances
(Nichol & Dhariwal 2021 eq. 16), for every meaning of the network's output and every reverse variance of the releases;
importance sampling of t by past losses; label dropout for classifier-free guidance; sampling by the ancestral chain
or by any solver. Coefficients of the losses come from float64 tables. Latents and likelihood evaluation are elsewhere
(`methods.latent`, `metrics.bits_per_dim`).
"""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff import losses, process, schedules, times
from jaxdiff import parameterization as parameterizations
from jaxdiff import weighting as weightings
from jaxdiff.denoiser import clip_x0, denoiser
from jaxdiff.guidance import check_label_dropout, drop_labels, label_guided
from jaxdiff.methods.base import Batch, Method, Objective, Sampling, keep, read_batch
from jaxdiff.parameterization import Affine, Parameterization
from jaxdiff.schedules import Betas, Schedule, Tables
from jaxdiff.solvers.ancestral import ancestral
from jaxdiff.solvers.base import sample
from jaxdiff.types import Cond, Denoiser, Key, Level, Metrics, Network, Params, expand

LEARNED = (process.learned, process.learned_range)


class Loss(enum.Enum):
    """What is minimised. The bound's terms are in bits per dimension.

    MSE: distance of the network's output from its target, plus the bound's term for a learned variance (hybrid).
    RESCALED_MSE: the same with the bound's term multiplied by T / 1000, as improved DDPM does.
    KL: the bound's term of one t. RESCALED_KL: the same times T, an unbiased estimate of the whole bound.
    """

    MSE = "mse"
    RESCALED_MSE = "rescaled_mse"
    KL = "kl"
    RESCALED_KL = "rescaled_kl"


class Chain(NamedTuple):
    """A discrete chain and a meaning of the network's output, tabulated in float64. Built by `tabulate`.

    Attributes:
      schedule: the chain as a schedule, t in [0, T - 1].
      parameterization: what the output means at any level.
      tables: the chain's own coefficients, each [T].
      affine: the parameterisation's coefficients at the chain's levels, each [T].
    """

    schedule: Schedule
    parameterization: Parameterization
    tables: Tables
    affine: Affine


def tabulate(betas: Betas, parameterization: Parameterization) -> Chain:
    """Tabulates a chain.

    Raises:
      ValueError: if a beta is outside (0, 1], or the output says nothing about x0 at the noisiest level.
    """
    schedule, tables = schedules.discrete(betas), schedules.tables(betas)
    parameterizations.require_defined(schedule, parameterization)
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        affine = parameterization.coefficients(_level(tables, jnp.arange(betas.size), jnp.float64))
        affine = jax.tree.map(jax.device_get, affine)
    return Chain(schedule, parameterization, tables, affine)


def chain_loss(
    chain: Chain,
    output: Float[Array, "b ..."],
    x0: Float[Array, "b ..."],
    eps: Float[Array, "b ..."],
    t: Int[Array, " b"],
    *,
    variance: process.VarianceRule = process.fixed_large,
    loss: Loss = Loss.MSE,
    distance: losses.Distance = losses.mse,
) -> Metrics:
    """The loss of every example for a network output.

    Args:
      chain: from `tabulate`.
      output: [B, ..., C], what the network gave at x_t, or [B, ..., 2C] for a learned variance.
      x0: [B, ..., C] clean data in [-1, 1].
      eps: [B, ..., C] the noise in x_t.
      t: [B] indices.
      variance: reverse variance; it only matters for the bound's terms.
      loss: what is minimised.
      distance: of output and target, for the two MSE losses.

    Returns:
      {"total": [B], and its parts "mse" and "vb" as far as they exist}. In the hybrid loss the bound's term has no
      gradient in the first C channels, and its x0 is not clipped.

    Raises:
      ValueError: while tracing, if the output's channels do not fit the variance.

    Source: Ho et al. 2020 eq. 5 and 14; Nichol & Dhariwal 2021 eq. 16.
    """
    check_channels(output, x0, variance)
    output = output.astype(x0.dtype)
    f, variance_out = jnp.split(output, 2, axis=-1) if variance in LEARNED else (output, None)
    x_t = process.q_sample(x0, eps, _level(chain.tables, t, x0.dtype))
    skip, out, _, on_x0, on_eps = (expand(jnp.asarray(a, x0.dtype)[t], x0) for a in chain.affine)
    between = process.chain_bridge(chain.tables, t, x0.dtype)

    def bound(f):
        return losses.vlb_term(x0, x_t, skip * x_t + out * f, between, variance(between, x0, variance_out), t == 0)

    num_steps = chain.tables.betas.size
    if loss in (Loss.KL, Loss.RESCALED_KL):
        vb = bound(f)
        return {"total": vb * num_steps if loss is Loss.RESCALED_KL else vb, "vb": vb}
    mse = distance(f, on_x0 * x0 + on_eps * eps)
    if variance not in LEARNED:
        return {"total": mse, "mse": mse}
    vb = bound(jax.lax.stop_gradient(f)) * (num_steps / 1000 if loss is Loss.RESCALED_MSE else 1.0)
    return {"total": mse + vb, "mse": mse, "vb": vb}


def check_channels(output: Array, x0: Array, variance: process.VarianceRule) -> None:
    """Refuses an output that is not as wide as the data, or twice as wide for a learned variance."""
    channels = x0.shape[-1] * (2 if variance in LEARNED else 1)
    if output.shape != (*x0.shape[:-1], channels):
        raise ValueError(
            f"ddpm: the network's output is {output.shape}, expected {(*x0.shape[:-1], channels)} for data of "
            f"{x0.shape[-1]} channels and this variance; build it with {channels} output channels"
        )


def chain_denoiser(
    network: Network,
    params: Params,
    schedule: Schedule,
    parameterization: Parameterization,
    cond: Cond | None = None,
    *,
    variance: process.VarianceRule = process.fixed_large,
    clip: float | None = 1.0,
    null_label: int | None = None,
    guidance_scale: Array | float | None = None,
) -> Denoiser:
    """The denoiser of a trained chain, guided and clipped.

    Args:
      network, params, schedule, parameterization: as for `denoiser`.
      cond: conditioning, {"label": int [B]} or empty.
      variance: reverse variance of the training; a learned one splits the output.
      clip: bound of |x0|, after guidance; None for latents.
      null_label: label of "no class".
      guidance_scale: 1 is no guidance; None leaves the unconditional pass out.

    Raises:
      ValueError: for a guidance_scale without a label and null_label.
    """
    cond = cond or {}

    def checked(params, x_t, t, cond, *, train=False, key=None):
        output = network(params, x_t, t, cond, train=train, key=key)
        check_channels(output, x_t, variance)
        return output

    def build(cond):
        return denoiser(checked, params, schedule, parameterization, cond, learned_variance=variance in LEARNED)

    denoise = label_guided(build, cond, null_label, guidance_scale)
    return denoise if clip is None else clip_x0(denoise, clip)


def ddpm(
    network: Network,
    betas: Betas,
    *,
    init_params: Callable[[Key, Batch], Params],
    parameterization: Parameterization | None = None,
    variance: process.VarianceRule = process.fixed_large,
    loss: Loss = Loss.MSE,
    distance: losses.Distance = losses.mse,
    weighting: weightings.Weighting = weightings.uniform,
    time_sampler: times.TimeSampler | None = None,
    loss_history: int | None = None,
    label_dropout: float = 0.0,
    null_label: int | None = None,
    clip: float | None = 1.0,
) -> Method:
    """Denoising diffusion on the chain of these betas. Batches are {"x0": [B, ..., C], "label": int32 [B] if any}.

    Args:
      network: (params, x_t, t, cond) -> [B, ..., C], or 2C for a learned variance. cond is {"label"} if the batch has
        labels. t is what `parameterization.net_time` makes of the index: pass
        `eps(net_time=scaled_time(1000 / T))` for the releases' rescaled timesteps.
      betas: [T] float64, from `schedules`.
      init_params: (key, batch) -> parameters of the network.
      parameterization: what the output means; None for eps. Where the release's previous_x sampler clips x0 for
        display only, this one takes the step with the clipped x0.
      variance: `process.fixed_small`, `fixed_large`, `learned` or `learned_range`.
      loss: see `Loss`.
      distance: of output and target; `losses.l1` for latent diffusion's.
      weighting: of each level in the loss, on the output's error; see `jaxdiff.weighting`.
      time_sampler: draws indices; None for uniform ones.
      loss_history: number of past losses kept per step to draw t by importance (10 in the paper, for RESCALED_KL);
        None to use time_sampler. The history lives in aux["history"].
      label_dropout: share of labels replaced by null_label in training.
      null_label: label of "no class", for dropout and guidance.
      clip: bound of |x0| while sampling; None for latents.

    Returns:
      Method with the player "model". `generate` runs the ancestral sampler over all T steps; `Sampling.num_steps`
      takes `times.evenly`, so that one step starts at the noisiest level, too. Without a label it uses null_label if
      there is one.

    Raises:
      ValueError: for a chain on which the output is undefined (eps at zero terminal SNR), and for arguments that
        exclude each other.

    Source: Ho et al. 2020 (arXiv:2006.11239) algorithms 1-2; Nichol & Dhariwal 2021 (arXiv:2102.09672); Ho & Salimans
    2022 (arXiv:2207.12598) for label dropout.
    """
    _check(loss, distance, time_sampler, loss_history, label_dropout, null_label)
    if parameterization is None:
        parameterization = parameterizations.eps()
    tabulated = tabulate(betas, parameterization)
    schedule, num_steps = tabulated.schedule, len(betas)
    if time_sampler is None:
        time_sampler = times.uniform_index(num_steps)

    def init(key, batch):
        aux = {} if loss_history is None else {"history": times.init_history(num_steps, loss_history)}
        return {"model": init_params(key, batch)}, aux

    def objective(params, aux, batch, key, step):
        del step
        x0, cond = read_batch(batch, "ddpm", ("x0", "label") if label_dropout else ("x0",))
        time_key, eps_key, label_key, network_key = jax.random.split(key, 4)
        if loss_history is None:
            t, importance = time_sampler(time_key, x0.shape[0]), None
        else:
            t, importance = times.draw(time_key, aux["history"], x0.shape[0])
        index = t.astype(jnp.int32)
        cond = drop_labels(label_key, cond, label_dropout, null_label)
        eps = jax.random.normal(eps_key, x0.shape, x0.dtype)
        level = _level(tabulated.tables, index, x0.dtype)
        x_t = process.q_sample(x0, eps, level)
        scale_in = expand(jnp.asarray(tabulated.affine.scale_in, x0.dtype)[index], x0)
        net_time = parameterization.net_time(t.astype(x0.dtype))
        output = network(params["model"], scale_in * x_t, net_time, cond, train=True, key=network_key)
        terms = chain_loss(tabulated, output, x0, eps, index, variance=variance, loss=loss, distance=distance)
        total = terms.pop("total")
        weighted = weighting(level) * total
        if importance is None:
            return weighted.mean(), terms
        return (importance * weighted).mean(), terms | {"t": index, "unweighted": jax.lax.stop_gradient(total)}

    def advance(aux, params, step, metrics):
        del params, step
        return aux | {"history": times.update_history(aux["history"], metrics["t"], metrics["unweighted"])}

    def generate(params, aux, key, noise, cond, sampling: Sampling):
        del aux
        if null_label is not None and "label" not in cond:
            cond = cond | {"label": jnp.full([noise.shape[0]], null_label, jnp.int32)}
        denoise = chain_denoiser(
            network, params["model"], schedule, parameterization, cond, variance=variance, clip=clip,
            null_label=null_label, guidance_scale=sampling.guidance_scale,
        )  # fmt: skip
        grid = sampling.times
        if grid is None:
            grid = times.evenly(num_steps, num_steps if sampling.num_steps is None else sampling.num_steps)
        grid = jnp.asarray(grid, noise.dtype)
        solver = ancestral(schedule, variance) if sampling.solver is None else sampling.solver(schedule)
        return sample(solver, denoise, key, schedule.level(grid[:1]).sigma[0] * noise, grid)

    return Method(init, (Objective("model", objective),), generate, keep if loss_history is None else advance)


def _level(tables: Tables, t: Array, dtype: Any) -> Level:
    """The chain's level at indices t, from the float64 tables."""
    return Level(
        jnp.asarray(tables.sqrt_alphas_cumprod, dtype)[t], jnp.asarray(tables.sqrt_one_minus_alphas_cumprod, dtype)[t]
    )


def _check(loss, distance, time_sampler, loss_history, label_dropout, null_label):
    if not isinstance(loss, Loss):
        raise ValueError(f"ddpm: loss must be one of {', '.join(map(str, Loss))}, got {loss!r}")
    if distance is not losses.mse and loss in (Loss.KL, Loss.RESCALED_KL):
        raise ValueError(f"ddpm: {loss} has no use for a distance; leave it out or use Loss.MSE")
    if time_sampler is not None and loss_history is not None:
        raise ValueError("ddpm: got time_sampler and loss_history, which both draw t; give one of them")
    check_label_dropout(label_dropout, null_label)

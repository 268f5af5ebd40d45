"""EDM: denoising at noise levels sigma, with inputs, outputs and loss scaled to unit variance.

The loss of Karras et al. 2022 (arXiv:2206.00364) eq. 8 and their stochastic sampler on the Karras grid, by default
its deterministic Heun form (18 steps, 35 network calls). Any parameterisation whose t is sigma can be trained, the
paper's VP, VE and iDDPM wrappers included. The release's augmentation and its treatment of infinite gradients are
not here.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff import parameterization as parameterizations
from jaxdiff import process, schedules, times, weighting
from jaxdiff.denoiser import denoiser
from jaxdiff.guidance import check_label_dropout, drop_labels, label_guided
from jaxdiff.losses import mean_flat
from jaxdiff.methods.base import Batch, Method, Objective, Sampling, read_batch
from jaxdiff.parameterization import Parameterization
from jaxdiff.schedules import Schedule
from jaxdiff.solvers.base import Solver, sample
from jaxdiff.solvers.heun import heun
from jaxdiff.types import Cond, Denoiser, Key, Level, Network, Params, expand


def edm_loss(
    denoised: Float[Array, "b ..."], x0: Float[Array, "b ..."], level: Level, sigma_data: float = 0.5
) -> Float[Array, "b ..."]:
    """The weighted squared error of every value, lambda(sigma) (D - x0)^2, lambda = 1/sigma^2 + 1/sigma_data^2.

    The release adds these up over an example and averages over the batch. `edm` averages over both, so that the
    learning rate of a clipped or plain gradient step does not depend on the resolution; multiply by the number of
    values of an example for the release's number.

    Args:
      denoised: [B, ...] the prediction of x0.
      x0: [B, ...] clean data.
      level: noise level, [B].
      sigma_data: standard deviation of the data.

    Source: Karras et al. 2022 eq. 2 and table 1.
    """
    return expand(weighting.edm(sigma_data)(level), x0) * (denoised - x0) ** 2


def edm_denoiser(
    network: Network,
    params: Params,
    schedule: Schedule,
    parameterization: Parameterization,
    cond: Cond | None = None,
    *,
    null_label: int | None = None,
    guidance_scale: Array | float | None = None,
) -> Denoiser:
    """The denoiser of a trained network, guided if guidance_scale is given (1 is no guidance). t is sigma.

    Raises:
      ValueError: for a guidance_scale without a label and null_label.
    """
    cond = cond or {}

    def build(cond):
        return denoiser(network, params, schedule, parameterization, cond)

    return label_guided(build, cond, null_label, guidance_scale)


def edm(
    network: Network,
    *,
    init_params: Callable[[Key, Batch], Params],
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    log_mean: float = -1.2,
    log_std: float = 1.2,
    parameterization: Parameterization | None = None,
    label_dropout: float = 0.0,
    null_label: int | None = None,
    num_steps: int = 18,
    rho: float = 7.0,
    solver: Callable[[Schedule], Solver] | None = None,
) -> Method:
    """EDM training and sampling. Batches are {"x0": [B, ...], "label": int32 [B] if any}.

    Args:
      network: (params, x_t, t, cond) -> [B, ...]; x_t has unit variance, t is ln(sigma) / 4, cond is {"label"} if the
        batch has labels.
      init_params: (key, batch) -> parameters of the network.
      sigma_data: standard deviation of the data (0.5 for images in [-1, 1]).
      sigma_min, sigma_max: range of the sampling grid; training draws are not cut to it.
      log_mean, log_std: of ln(sigma) in training.
      parameterization: what the output means; None for `parameterization.edm(sigma_data)`.
      label_dropout: share of labels replaced by null_label in training.
      null_label: label of "no class", for dropout and guidance.
      num_steps: of the default sampling grid; n steps of Heun are 2n - 1 network calls.
      rho: of the sampling grid, `times.karras`.
      solver: schedule -> Solver; None for deterministic Heun. With churn:
        `functools.partial(heun, churn=40.0, churn_min=0.05, churn_max=50.0, churn_noise=1.003)`.

    Returns:
      Method with the player "model". `generate` does not clip. Without a label it uses null_label if there is one.

    Raises:
      ValueError: for a scale that is not positive, or label_dropout without null_label.

    Source: Karras et al. 2022 eq. 8, algorithm 2 and table 1.
    """
    check_label_dropout(label_dropout, null_label)
    if parameterization is None:
        parameterization = parameterizations.edm(sigma_data)
    schedule = schedules.ve(sigma_min, sigma_max)
    time_sampler = times.log_normal(log_mean, log_std)
    times.karras(num_steps, sigma_min, sigma_max, rho)  # refuses a bad grid now, not when sampling

    def init(key, batch):
        return {"model": init_params(key, batch)}, {}

    def objective(params, aux, batch, key, step):
        del aux, step
        x0, cond = read_batch(batch, "edm", ("x0", "label") if label_dropout else ("x0",))
        time_key, eps_key, label_key, network_key = jax.random.split(key, 4)
        cond = drop_labels(label_key, cond, label_dropout, null_label)
        t = time_sampler(time_key, x0.shape[0]).astype(x0.dtype)
        level = schedule.level(t)
        x_t = process.q_sample(x0, jax.random.normal(eps_key, x0.shape, x0.dtype), level)
        denoise = denoiser(network, params["model"], schedule, parameterization, cond, train=True, key=network_key)
        return mean_flat(edm_loss(denoise(x_t, t).x0, x0, level, sigma_data)).mean(), {}

    def generate(params, aux, key, noise, cond, sampling: Sampling):
        del aux
        if null_label is not None and "label" not in cond:
            cond = cond | {"label": jnp.full([noise.shape[0]], null_label, jnp.int32)}
        denoise = edm_denoiser(
            network, params["model"], schedule, parameterization, cond, null_label=null_label,
            guidance_scale=sampling.guidance_scale,
        )  # fmt: skip
        grid = sampling.times
        if grid is None:
            n = num_steps if sampling.num_steps is None else sampling.num_steps
            grid = times.karras(n, sigma_min, sigma_max, rho)
        grid = jnp.asarray(grid, noise.dtype)
        make = sampling.solver or solver or heun
        return sample(make(schedule), denoise, key, grid[0] * noise, grid)

    return Method(init, (Objective("model", objective),), generate)

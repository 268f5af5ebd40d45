"""Golden topic of the samplers of OpenAI's consistency release, on an analytic denoiser and on a network.

The release draws noise in every step, also in those that add none; so do ours. `ks_*` clip every prediction and the
result.
"""

import jax
import jax.numpy as jnp
import numpy as np
from golden_consistency_denoise import CONSISTENCY, EDM, SIGMA_DATA, SIGMA_MAX, SIGMA_MIN, VE, arrays, net_of
from golden_harness import topic

from jaxdiff import times
from jaxdiff.denoiser import clip_x0
from jaxdiff.solvers.base import integrate, sample
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.heun import euler, heun
from jaxdiff.solvers.midpoint import midpoint
from jaxdiff.solvers.stochastic_iterative import stochastic_iterative
from jaxdiff.types import Denoised, expand

KEY = jax.random.key(0)
ATOL = 2e-4  # of states that end at order 1


def normal_denoiser(mean):
    """The best denoiser of N(mean, SIGMA_DATA^2)."""

    def denoise(x, t):
        s, v = expand(t, x) ** 2, SIGMA_DATA**2
        return Denoised((v * x + s * jnp.broadcast_to(mean, x.shape)) / (v + s))

    return denoise


def float_grid(grid):
    return jnp.asarray(grid, jnp.float32)


def points(indices, n):
    return float_grid(times.karras(n, SIGMA_MIN, SIGMA_MAX)[indices])


@topic("consistency/samplers")
def consistency_samplers(file):
    mean, x, noise = arrays(file, "mean", "x_T", "noises")
    steps, train_steps = int(file.input("steps")), int(file.input("multistep_train_steps"))
    ts = file.input("ts")
    grid, one_more = (times.karras(n, SIGMA_MIN, SIGMA_MAX) for n in (steps, steps + 1))
    file.compare("sigmas", np.append(grid, 0.0), rtol=1e-5)
    file.compare("progdist_sigmas", np.append(one_more, 0.0), rtol=1e-5)
    visited = points(ts, train_steps)
    file.compare("multistep_t", visited, rtol=1e-5)

    churn, low, high, scale = (float(file.input(name)) for name in ("s_churn", "s_tmin", "s_tmax", "s_noise"))
    churned = {"churn": churn, "churn_min": low, "churn_max": high, "churn_noise": scale}
    solvers = {
        "heun": heun(VE),
        "heun_churn": heun(VE, **churned),
        "dpm": midpoint(VE),
        "dpm_churn": midpoint(VE, **churned),
        "euler": euler(VE),
        "ancestral": ddim(VE, 1.0),
    }
    consistent = stochastic_iterative(VE, SIGMA_MIN)

    def run(name, denoise, x, noise):
        if name == "onestep":
            return denoise(x, jnp.full(x.shape[:1], SIGMA_MAX)).x0
        if name == "multistep":  # the last of the times is the grid's end, reached with the noise that is left there
            return integrate(consistent, denoise, KEY, x, visited, noise=noise)
        if name == "progdist":
            return integrate(euler(VE), denoise, KEY, x, float_grid(one_more), noise=noise)
        return sample(solvers[name], denoise, KEY, x, float_grid(grid), noise=noise)

    for name in (*solvers, "onestep", "progdist", "multistep"):
        file.compare(name, run(name, normal_denoiser(mean), x, noise), atol=ATOL)

    abc = jnp.asarray(file.input("ks_net_abc"))
    for key in file.keys("ks_*_*"):
        if key == "ks_net_abc":
            continue
        _, kind, name = key.split("_")
        denoise = clip_x0(net_of(abc, {"cm": CONSISTENCY, "edm": EDM}[kind]))
        file.compare(key, jnp.clip(run(name, denoise, x, noise), -1, 1), atol=ATOL)

"""Golden topic of rectified flow and InstaFlow: losses, network times, samplers, of analytic velocity networks.

The release's time runs from noise to data; its draws become ours through `line_time`. Arrays are NCHW: the networks
are elementwise. Samplers start from z0 as it is; only the losses draw noise, which `noise_scale` multiplies.
"""

import jax
import jax.numpy as jnp
from golden_harness import topic

from jaxdiff import losses, schedules
from jaxdiff.guidance import classifier_free
from jaxdiff.methods.rectified_flow import (
    data_end,
    euler_times,
    flow_denoiser,
    flow_loss,
    flow_sde,
    line_time,
    noise_end,
    velocity,
    velocity_of,
)
from jaxdiff.parameterization import scaled_time
from jaxdiff.solvers.base import sample
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.rk45 import rk45
from jaxdiff.types import Denoised, expand

KEY = jax.random.key(0)
SCHEDULE = schedules.rectified_flow()
MEANING = velocity()


def network(params, x_t, label, cond, *, train=False, key=None):
    """w0 tanh(x) (1 - t) + w1 x + w2 t, t = label / 999."""
    del cond, train, key
    t = expand(label / 999, x_t)
    return params[0] * jnp.tanh(x_t) * (1 - t) + params[1] * x_t + params[2] * t


def text_network(params, x_t, u, cond, *, train=False, key=None):
    """InstaFlow's: tanh(x) u / 1000 - 0.3 x + c."""
    del params, train, key
    return jnp.tanh(x_t) * expand(u / 1000, x_t) - 0.3 * x_t + expand(cond["c"], x_t)


def half_sum(prediction, target):
    """Half the squared error, added up over an example: the release's loss without `reduce_mean`."""
    return 0.5 * (prediction.size // prediction.shape[0]) * losses.mse(prediction, target)


def read(file, name):
    return jnp.asarray(file.input(name), jnp.float32)


def drawn(file, prefix):
    """Our times of the release's draws: uniform numbers, or indices of the starts of Euler's steps."""
    for key in file.keys(f"{prefix}_[0-9]*_rand*"):
        if key.endswith("_rand"):
            return line_time(read(file, key))
        if key.endswith("_randint"):
            return line_time(read(file, key) / int(prefix.split("_")[1]))
    batch = file.arrays["data"].shape[0]
    return {"reflow_t0": noise_end(), "reflow_t1": data_end()}[prefix](KEY, batch)


@topic("gan/rectflow")
def rectflow(file):
    x0, z0, w = read(file, "data"), read(file, "z0"), read(file, "model_w")
    scale = float(file.input("noise_scale"))

    def loss(w, noise, t, distance):
        return flow_loss(velocity_of(network, w, MEANING), x0, noise, t, distance)[0].mean()

    for prefix, distance in (("rf_mean", losses.mse), ("rf_sum", half_sum)):
        noise, t = scale * read(file, f"{prefix}_0_randn"), drawn(file, prefix)
        value, gradient = jax.value_and_grad(loss)(w, noise, t, distance)
        file.compare(f"{prefix}_loss", value, rtol=1e-5)
        file.compare(f"{prefix}_grad_w", gradient, rtol=1e-4)
        file.compare(f"{prefix}_labels", MEANING.net_time(t), rtol=1e-6, atol=1e-4)
    for key in file.keys("reflow_*_loss"):
        prefix = key.removesuffix("_loss")
        t = drawn(file, prefix)
        file.compare(key, loss(w, z0, t, losses.mse), rtol=1e-5)
        file.compare(f"{prefix}_labels", MEANING.net_time(t), rtol=1e-6, atol=1e-4)

    follow = velocity_of(network, w, MEANING)
    for key in [key for key in file.keys("euler*_out") if key.removesuffix("_out")[5:].isdigit()]:
        n = int(key.removesuffix("_out")[5:])
        grid = jnp.asarray(euler_times(n), jnp.float32)
        file.compare(key, sample(ddim(SCHEDULE), flow_denoiser(follow), KEY, z0, grid), atol=2e-5)
        file.compare(f"euler{n}_labels", MEANING.net_time(line_time(1 - grid)), rtol=1e-6, atol=1e-4)
    for key in file.keys("sde*_out"):
        sde(file, follow, z0, scale, key.removesuffix("_out"))
    adaptive(file, follow, z0)
    instaflow(file, z0)


def sde(file, follow, x, scale, name):
    noise = jnp.stack([read(file, key) for key in file.keys(f"{name}_*_randn_like")])
    grid = jnp.asarray(euler_times(len(noise)), jnp.float32)
    solver = flow_sde(SCHEDULE, float(file.input(f"{name}_sigma_var")), noise_scale=scale)
    file.compare(f"{name}_out", sample(solver, flow_denoiser(follow), KEY, x, grid, noise=noise), atol=2e-5)


def adaptive(file, follow, z0):
    def slope(x, t):
        return -follow(x, t)

    noisy, clean = line_time(0.0), line_time(1.0)
    forward, calls = rk45(slope, z0, noisy, clean)
    file.compare("ode_rk45_fwd", forward, atol=2e-5)
    back, _ = rk45(slope, read(file, "ode_rk45_fwd"), clean, noisy)
    file.compare("ode_rk45_rev", back, atol=1e-4)
    for key in file.keys("euler_ode_N*"):
        grid = jnp.asarray(euler_times(int(key.split("_N")[1])), jnp.float32)
        file.compare(key, sample(ddim(SCHEDULE), flow_denoiser(follow), KEY, z0, grid), atol=2e-5)
    file.compare("rk45_out", forward, atol=2e-5)
    file.compare("rk45_nfe", calls, atol=6)  # one step: float32 here, SciPy's float64 there


def instaflow(file, z0):
    meaning, batch = velocity(scaled_time(1000.0)), z0.shape[:1]

    def build(cond):
        follow = velocity_of(text_network, {}, meaning, cond)
        return lambda x_t, t: Denoised(follow(x_t, t))

    for key in file.keys("instaflow_N*_out"):
        name = key.removesuffix("_out")
        n, guidance = name.removeprefix("instaflow_N").split("_g")
        grid = jnp.asarray(euler_times(int(n)), jnp.float32)
        cond, null = ({"c": jnp.full(batch, c)} for c in (0.2, -0.1))
        guided = classifier_free(build, cond, null, float(guidance) if float(guidance) > 1 else None)
        denoise = flow_denoiser(lambda x, t, guided=guided: guided(x, t).x0, start=0.0)
        file.compare(key, sample(ddim(SCHEDULE), denoise, KEY, z0, grid), atol=2e-5)
        file.compare(f"{name}_ts", meaning.net_time(grid), rtol=1e-6, atol=1e-3)

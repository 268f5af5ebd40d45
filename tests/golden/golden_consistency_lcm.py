"""Latent consistency: boundary, teacher steps, both losses, the released scheduler, and diffusers' consistency sampler.

Net C is e(x, t) = a tanh(b x) + c sin(t / 200) + a scalar. Arrays are NCHW, all formulas elementwise. For a
v-prediction the release takes the guided v for the guided eps, which only a test repeats. Tolerance: 2e-4 of the
value, and the same share of the largest one for arrays.
"""

import jax
import jax.numpy as jnp
import numpy as np
from golden_harness import topic

from jaxdiff import guidance, parameterization, process, schedules, times
from jaxdiff.denoiser import clip_x0, denoiser
from jaxdiff.losses import mse
from jaxdiff.methods import lcm
from jaxdiff.networks.layers import sinusoidal_embedding
from jaxdiff.solvers.base import sample
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.stochastic_iterative import stochastic_iterative
from jaxdiff.types import expand

KEY = jax.random.key(0)
MEANINGS = {"epsilon": parameterization.eps, "v_prediction": parameterization.v, "sample": parameterization.x0}
BETAS = schedules.scaled_linear_betas(1000)
CHAIN = schedules.discrete(BETAS)


def net_c(params, x_t, t, cond, *, train=False, key=None):
    del train, key
    a, b, c = params
    e = a * jnp.tanh(b * x_t) + c * jnp.sin(expand(t, x_t) / 200)
    return e + expand(cond["scalar"], x_t) if "scalar" in cond else e


def near(golden, key, value, rtol=2e-4):
    """Allows the share rtol of each value, and of the largest one."""
    golden.compare(key, value, rtol=rtol, atol=rtol * float(np.abs(golden.arrays[key]).max()))


def check_tables(golden):
    t = jnp.asarray(golden.input("scal_t"), jnp.float32)
    for key, value in zip(("scal_c_skip", "scal_c_out"), lcm.boundary_scalings(t), strict=True):
        golden.compare(key, value, rtol=1e-5)
    golden.compare("alphas_cumprod", schedules.tables(BETAS).alphas_cumprod, rtol=1e-4)
    n = int(golden.input("num_ddim_timesteps"))
    t, s = lcm.skipping_indices(jnp.arange(n), 1000, n)
    golden.compare("ddim_timesteps", t)
    golden.compare("ddim_alpha_cumprods", CHAIN.level(t).alpha ** 2, rtol=1e-4)
    golden.compare("ddim_alpha_cumprods_prev", CHAIN.level(s).alpha ** 2, rtol=1e-4)
    for key in golden.keys("w_emb_*"):
        # 1000 w is up to 15000: the angle of the fastest wave has a last bit of 0.001 in float32.
        features = sinusoidal_embedding(
            1000 * jnp.asarray(golden.input("w")), int(key.removeprefix("w_emb_")), sin_first=True, frequency_shift=1
        )
        golden.compare(key, features, atol=4e-3)
    return n


def teacher_step(golden, build, z, t, s, w, raw):
    """The guided x0, "noise" and end of a step; `raw` combines outputs, as the release does, whatever they mean."""
    cond, null = ({"scalar": jnp.full_like(w, golden.input(f"teacher_{name}_scalar"))} for name in ("cond", "uncond"))
    guided = guidance.classifier_free(build, cond, null, 1 + w)
    x0 = guided(z, t).x0
    if raw is None:
        return x0, process.eps_from_x0(x0, z, CHAIN.level(t)), ddim(CHAIN).step(z, None, z, t, s, guided)[0]
    eps = guidance.guided(raw(z, t, null), raw(z, t, cond), 1 + w)
    return x0, eps, process.q_sample(x0, eps, CHAIN.level(s))


def check_loss(golden, n):
    x0, noise, index, w, student, target, teacher = (
        jnp.asarray(golden.input(key))
        for key in ("latents", "noise", "index", "w", "student_abc", "target_abc", "teacher_abc")
    )
    kind = str(golden.input("prediction_type"))
    meaning = MEANINGS[kind]()
    t, s = lcm.skipping_indices(index, 1000, n)
    golden.compare("start_timesteps", t)
    golden.compare("timesteps", s)
    z = process.q_sample(x0, noise, CHAIN.level(t))
    near(golden, "z_start", z)

    def build(cond):
        return denoiser(net_c, teacher, CHAIN, meaning, cond)

    def raw(z, t, cond):
        return net_c(teacher, z, t, cond)

    guided_x0, eps, z_s = teacher_step(golden, build, z, t, s, w, None if kind == "epsilon" else raw)
    near(golden, "pred_x0_cfg", guided_x0)
    near(golden, "pred_noise_cfg", eps)
    near(golden, "x_prev", z_s)
    embedding = sinusoidal_embedding(1000 * w, 256, sin_first=True, frequency_shift=1)[:, 3]
    golden.compare("econd", embedding, atol=4e-3)
    cond = {"scalar": jnp.asarray(golden.input("econd"))}

    def function(params, z, t):
        return lcm.with_boundary(denoiser(net_c, params, CHAIN, meaning, cond))(z, t).x0

    goal = function(target, z_s, s)
    near(golden, "target", goal)
    near(golden, "model_pred", function(student, z, t))
    for name, distance in (("l2", mse), ("huber", lcm.elementwise_huber(float(golden.input("huber_c"))))):
        loss, grad = jax.value_and_grad(lambda p, d=distance: d(function(p, z, t), goal).mean())(student)
        golden.compare(f"loss_{name}", loss, rtol=2e-4)
        near(golden, f"grad_{name}", grad)


def check_scheduler(golden):
    student = jnp.asarray(golden.arrays["student_abc"])
    for key in golden.keys("sched_*_timesteps"):
        name = key.removesuffix("_timesteps")
        n, origin, strength, kind = name.removeprefix("sched_").split("_", 3)
        grid = lcm.lcm_times(1000, int(n[1:]), original_steps=int(origin[1:]), strength=int(strength[1:]) / 100)
        golden.compare(key, grid)
        x, noises = (jnp.asarray(golden.input(f"{name}_{what}")) for what in ("x", "noises"))
        denoise = lcm.with_boundary(denoiser(net_c, student, CHAIN, MEANINGS[kind](), {}))
        grid = jnp.asarray(grid, jnp.float32)
        _, seen = sample(
            stochastic_iterative(CHAIN), denoise, KEY, x, grid, noise=noises, return_trajectory=True
        )  # fmt: skip
        near(golden, f"{name}_prev", seen.x)
        near(golden, f"{name}_denoised", seen.x0)


def check_consistency_scheduler(golden):
    """diffusers' CMStochasticIterativeScheduler of 40 train steps: a grid of indices, and a last level sigma_min."""
    student = jnp.asarray(golden.arrays["student_abc"])
    meaning = parameterization.consistency(net_time=lambda sigma: 250 * jnp.log(sigma))
    schedule = schedules.ve()
    for key in golden.keys("cmsched_*_sigmas"):
        name = key.removesuffix("_sigmas")
        # The indices are not stored; they follow from the levels, which are compared after rounding to them.
        fine = times.karras(40)
        index = [int(np.abs(fine - sigma).argmin()) for sigma in golden.arrays[key][:-1]]
        sigmas = jnp.asarray(fine[index], jnp.float32)
        golden.compare(key, jnp.append(sigmas, 0.002), rtol=1e-5)
        golden.compare(f"{name}_timesteps", meaning.net_time(sigmas), rtol=1e-5)
        x, noises = (jnp.asarray(golden.input(f"{name}_{what}")) for what in ("x", "noises"))
        denoise = denoiser(net_c, student, schedule, meaning, {})
        out = sample(stochastic_iterative(schedule, 0.002), clip_x0(denoise), KEY, x, sigmas, noise=noises)
        golden.compare(f"{name}_out", out, atol=1e-4)


@topic("consistency/lcm")
def latent_consistency(golden):
    n = check_tables(golden)
    check_loss(golden, n)
    check_scheduler(golden)
    check_consistency_scheduler(golden)

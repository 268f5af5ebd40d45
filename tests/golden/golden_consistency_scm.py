"""sCM: tangent, three forms of the loss with their gradients, few-step sampling and EDM teachers.

The release works with x_t and z of deviation sd and calls minus the learned weight `logvar`. Arrays are NCHW; all
formulas are elementwise but for the norm of an example. Tolerance: 2e-4 of the value, and the same share of the
largest one where a sum of terms of both signs is compared.
"""

import jax
import jax.numpy as jnp
import numpy as np
from golden_harness import topic

from jaxdiff import parameterization, process, schedules
from jaxdiff.denoiser import denoiser
from jaxdiff.methods import continuous_consistency as scm
from jaxdiff.solvers.base import sample
from jaxdiff.solvers.stochastic_iterative import stochastic_iterative
from jaxdiff.types import expand

SD = 0.5


def net_d(params, x_t, t, cond, *, train=False, key=None):
    del cond, train, key
    a, b, c, d = params
    t = expand(t, x_t)
    return a * jnp.tanh(b * x_t) + c * jnp.sin(3 * t) + d * x_t * t


def forms(c):
    return {
        "alg1": scm.Form(scm.unit_norm(c), scm.no_weight),
        "extraprior": scm.Form(scm.unit_norm(c), scm.prior_weight),
        "fastgen": scm.Form(scm.unit_rms(c), scm.fastgen_weight),
    }


@topic("consistency/scm")
def continuous_consistency(golden):
    x0, z, x_t, tau, student, teacher, logvar, noise0, noise1 = (
        jnp.asarray(golden.input(key))
        for key in ("x0", "z", "x_t", "tau", "student_abcd", "teacher_abcd", "logvar", "sample_noise0", "sample_noise1")
    )
    t = jnp.arctan(jnp.exp(tau) / SD)
    golden.compare("t", t, rtol=1e-6)
    level = schedules.trigonometric(SD).level(t)
    eps, v = z / SD, parameterization.v()
    u_t = process.q_sample(x0 / SD, eps, level)
    golden.compare("x_t", SD * u_t, atol=1e-6)
    u_t = x_t / SD
    golden.leave("P_*", "settings of the draw of tau, which is given")
    warmup, known = int(golden.input("tangent_warmup_steps")), forms(float(golden.input("c")))

    velocities = {"sct": parameterization.target(v, x0 / SD, eps, level), "scd": net_d(teacher, u_t, t, {})}
    for name, velocity in velocities.items():
        golden.compare(f"{name}_dxdt", SD * velocity, atol=2e-6)
        frozen, jvp = scm.network_jvp(net_d, student, u_t, t, velocity, {})
        golden.compare(f"{name}_F", frozen, atol=2e-6)
        golden.compare(f"{name}_jvp", jvp, atol=5e-6)
        golden.compare(f"{name}_f_theta", SD * parameterization.to_x0(v, frozen, u_t, level), atol=2e-6)
        golden.compare(f"{name}_g_raw_r1", SD * scm.tangent(frozen, jvp, velocity, u_t, t), atol=5e-6)
        for key in golden.keys(f"{name}_it*_loss"):
            _, at, form, _ = key.split("_")
            ratio = min(1.0, int(at.removeprefix("it")) / warmup)
            g = scm.tangent(frozen, jvp, velocity, u_t, t, ratio)

            def mean_loss(student, logvar, g=g, form=known[form]):
                f = net_d(student, u_t, t, {})
                loss, error = scm.scm_loss(f, jax.lax.stop_gradient(f), g, t, -logvar, form=form, sigma_data=SD)
                return loss.mean(), (loss, error)

            grads, (loss, error) = jax.grad(mean_loss, argnums=(0, 1), has_aux=True)(student, logvar)
            golden.compare(key, loss, rtol=2e-4, atol=2e-6)
            golden.compare(f"{name}_{at}_{form}_unweighted", error, rtol=2e-4)
            largest = np.abs(golden.arrays[f"{name}_{at}_{form}_grad_abcd"]).max()
            golden.compare(f"{name}_{at}_{form}_grad_abcd", grads[0], rtol=2e-4, atol=2e-4 * largest)
            golden.compare(f"{name}_{at}_{form}_grad_logvar", grads[1], rtol=2e-4)

    schedule = schedules.trigonometric(SD)
    golden.compare("sample_tmax", schedule.t_max, rtol=1e-6)
    grid = jnp.array([schedule.t_max, golden.input("sample_tmid")], jnp.float32)
    denoise = denoiser(net_d, student, schedule, v)
    solver = stochastic_iterative(schedule)
    key, noises = jax.random.key(0), jnp.stack([noise1, noise1]) / SD
    golden.compare("sample_1step", SD * sample(solver, denoise, key, noise0 / SD, grid[:1]), atol=5e-6)
    two = sample(solver, denoise, key, noise0 / SD, grid, noise=noises)
    golden.compare("sample_2step", SD * two, atol=5e-6)

    sigma, edm_x, edm_denoised = (jnp.asarray(golden.input(key)) for key in ("edm_sigma", "edm_x", "edm_D"))
    angle = schedules.trigonometric(SD).time(-jnp.log(sigma / SD))
    level = schedule.level(angle)
    output = parameterization.from_x0(v, edm_denoised / SD, expand(level.alpha, edm_x) * edm_x / SD, level)
    golden.compare("trig_F_from_edm", output, atol=2e-5)

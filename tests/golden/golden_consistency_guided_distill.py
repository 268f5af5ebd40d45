"""Guided distillation, re-derived from the paper in float64: the guided target, both losses and stage two's steps.

Net B predicts x0 and gets a scalar added: the teacher's condition, or 0.05 sin(w) for the student. Its time is the log
SNR. Tolerance: 2e-4 of the value, and the same share of the largest one for arrays.
"""

import jax.numpy as jnp
import numpy as np
from golden_harness import topic

from jaxdiff import parameterization, process, weighting
from jaxdiff.denoiser import denoiser
from jaxdiff.guidance import classifier_free
from jaxdiff.losses import mse
from jaxdiff.methods import progressive
from jaxdiff.types import expand


def net_b(params, x_t, t, cond, *, train=False, key=None):
    del train, key
    a, b, c = params
    shift = cond["scalar"] if "scalar" in cond else 0.05 * jnp.sin(cond["guidance"])
    return a * jnp.tanh(b * x_t) + c * jnp.sin(expand(t, x_t) / 2) + expand(shift, x_t)


@topic("consistency/guided_distill")
def guided_distill(golden):
    x0, eps, w, u, student, teacher = (
        jnp.asarray(golden.input(key)) for key in ("x", "eps", "w", "u", "student_abc", "teacher_abc")
    )
    schedule = progressive.vp_path().schedule
    level = schedule.level(u)
    golden.compare("logsnr", 2 * process.half_log_snr(level), rtol=2e-5, atol=2e-5)
    x_t = process.q_sample(x0, eps, level)
    golden.compare("z", x_t, atol=5e-6)
    meaning = parameterization.x0(lambda t: 2 * process.half_log_snr(schedule.level(t)))

    def near(key, value):
        golden.compare(key, value, rtol=2e-4, atol=2e-4 * float(np.abs(golden.arrays[key]).max()))

    def build(cond):
        return denoiser(net_b, teacher, schedule, meaning, cond)

    cond, uncond = ({"scalar": jnp.full_like(u, golden.input(key))} for key in ("cond_scalar", "uncond_scalar"))
    near("teacher_cond", build(cond)(x_t, u).x0)
    near("teacher_uncond", build(uncond)(x_t, u).x0)
    target = classifier_free(build, cond, uncond, 1 + w)(x_t, u).x0
    near("guided_target", target)
    denoise = denoiser(net_b, student, schedule, meaning, {"guidance": w})
    x = denoise(x_t, u).x0
    near("student_out", x)
    golden.compare("stage1_loss_unweighted", mse(x, target), rtol=2e-4)
    golden.compare("stage1_loss_snr_trunc", weighting.truncated_snr(level) * mse(x, target), rtol=2e-4)

    n = int(golden.input("stage2_N"))
    t = jnp.asarray(golden.input("stage2_t"))
    x_t = process.q_sample(x0, eps, schedule.level(t))
    near("stage2_z_t", x_t)
    never = jnp.zeros(t.shape, bool)
    taught = progressive.teach(denoise, schedule, x_t, t, t - 0.5 / n, t - 1 / n, never)
    near("stage2_z_mid", taught.middle)
    near("stage2_z_s", taught.end)
    near("stage2_target", taught.target)
    near("stage2_final_x", denoise(taught.middle, t - 0.5 / n).x0)

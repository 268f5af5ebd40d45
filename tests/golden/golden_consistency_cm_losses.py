"""Golden topic of the losses of OpenAI's image release: consistency and progressive distillation, one draw replayed.

Student and target are consistency functions, the teacher an EDM denoiser, all around one analytic network. Arrays are
NCHW; resizing needs NHWC, so images are turned for it.
"""

import jax.numpy as jnp
from golden_consistency_denoise import (
    CONSISTENCY,
    EDM,
    SIGMA_MAX,
    SIGMA_MIN,
    VE,
    WEIGHTS,
    arrays,
    compare_gradient,
    net_of,
    ve_level,
    with_gradient,
)
from golden_harness import topic

from jaxdiff import losses, times
from jaxdiff.methods.consistency import consistency_loss, ode_step
from jaxdiff.methods.progressive import teach, ve_path
from jaxdiff.process import q_sample
from jaxdiff.solvers.heun import heun

DISTANCES = {"l1": losses.l1, "l2": losses.mse, "l2_32": losses.resized(losses.mse, (32, 32)), "linf": losses.linf}
PATH = ve_path(SIGMA_MIN, SIGMA_MAX)


def pair(file, indices, num_levels):
    """Times t and s of a step of the training grid."""
    index = jnp.asarray(file.input(indices), jnp.float32)
    n = jnp.int32(file.input(num_levels))
    return (times.karras_time(i, n, SIGMA_MIN, SIGMA_MAX, 7.0) for i in (index, index + 1))


def progressive_lesson(x0, noise, teacher, indices, num_steps):
    """t, the middle time, x_t and what the teacher makes of it, for the release's indices: 0 is the noisiest step."""
    i = num_steps - 1 - jnp.asarray(indices, jnp.float32)
    t, middle, s = (PATH.time(u / num_steps) for u in (i + 1, i + 0.5, i))
    x_t = q_sample(x0, noise, ve_level(t))
    return t, middle, x_t, teach(net_of(teacher, EDM), VE, x_t, t, middle, s, jnp.zeros(t.shape, bool))


def progressive_loss(abc, t, x_t, target, weight, distance):
    return weight(ve_level(t)) * distance(net_of(abc, EDM)(x_t, t).x0, target)


def nhwc(x):
    return jnp.transpose(x, (0, 2, 3, 1))


@topic("consistency/cm_losses")
def cm_losses(file):
    x0, noise, student, target, teacher = (
        nhwc(a) if a.ndim == 4 else a
        for a in arrays(file, "x_start", "noise", "student_abc", "target_abc", "teacher_abc")
    )
    t, s = pair(file, "indices", "num_scales")
    file.compare("t", t, rtol=1e-5)
    file.compare("t2", s, rtol=1e-5)
    x_t = q_sample(x0, noise, ve_level(t))
    x_s = {
        "cd": ode_step(heun(VE), net_of(teacher, EDM), x_t, t, s),
        "ct": q_sample(x0, noise, ve_level(s)),
    }
    nchw = (0, 3, 1, 2)
    file.compare("x_t", x_t.transpose(nchw), rtol=1e-5, atol=1e-4)
    for mode, x in x_s.items():
        file.compare(f"{mode}_x_t2", x.transpose(nchw), rtol=1e-5, atol=1e-4)

    for key in file.keys("c[dt]_*_loss"):
        name = key.removesuffix("_loss")
        mode, rest = name.split("_", 1)
        metric = max((metric for metric in DISTANCES if rest.startswith(f"{metric}_")), key=len)
        weight = rest.removeprefix(f"{metric}_")

        def loss(abc, mode=mode, weight=WEIGHTS[weight], distance=DISTANCES[metric]):
            f, f_target = net_of(abc, CONSISTENCY), net_of(target, CONSISTENCY)
            return weight(ve_level(t)) * consistency_loss(f, f_target, x_t, t, x_s[mode], s, distance)

        value, gradient = with_gradient(loss, student)
        file.compare(key, value, rtol=2e-4)
        compare_gradient(file, f"{name}_grad_student_abc", gradient)

    n = int(file.input("num_scales"))
    t, middle, x_t, lesson = progressive_lesson(x0, noise, teacher, file.input("progdist_indices"), n)
    file.compare("progdist_t", t, rtol=1e-5)
    file.compare("progdist_t2", middle, rtol=1e-5)
    file.compare("progdist_x_t2", lesson.middle.transpose(nchw), rtol=1e-5, atol=1e-4)
    for key in file.keys("progdist_*_loss"):
        metric, weight = key.removeprefix("progdist_").removesuffix("_loss").split("_", 1)

        def loss(abc, weight=WEIGHTS[weight], distance=DISTANCES[metric]):
            return progressive_loss(abc, t, x_t, lesson.target, weight, distance)

        value, gradient = with_gradient(loss, student)
        file.compare(key, value, rtol=2e-4)
        compare_gradient(file, key.replace("_loss", "_grad_student_abc"), gradient)

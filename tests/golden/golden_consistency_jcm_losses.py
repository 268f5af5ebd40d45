"""Golden topic of the losses of OpenAI's CIFAR-10 release: discrete, continuous, progressive, EDM; and its wrappers.

The same analytic network as in `golden_consistency_denoise`, which the release gives ln(sigma) / 4. Scalars are means
over the examples that a mask keeps.
"""

import jax
from golden_consistency_cm_losses import DISTANCES, pair, progressive_lesson, progressive_loss
from golden_consistency_denoise import CONSISTENCY, EDM, VE, WEIGHTS, arrays, compare_gradient, net_of, ve_level
from golden_harness import topic

from jaxdiff import losses
from jaxdiff.losses import mean_flat
from jaxdiff.methods.consistency import (
    consistency_loss,
    ode_step,
    pseudo_l2,
    rate,
    rate_of_change,
)
from jaxdiff.methods.edm import edm_loss
from jaxdiff.process import eps_from_x0, q_sample
from jaxdiff.solvers.heun import euler, heun
from jaxdiff.types import Denoised, expand

SOLVERS = {"heun": heun, "euler": euler}
RATES = {
    "l1_nograd_stop": rate(losses.l1),
    "l2_nograd_stop": rate(losses.euclidean),
    "linf_nograd_stop": rate(losses.linf),
    "l2_stopgrad": pseudo_l2,
}


@topic("consistency/jcm_losses")
def jcm_losses(file):
    x0, mask, noise = arrays(file, "image_nhwc", "mask", "noise")
    student, target, teacher = arrays(file, "student_abc", "target_abc", "teacher_abc")

    def compare(name, loss):
        """loss: (abc, masked mean) -> scalar, compared with its gradient."""

        def kept(per_example):
            return (per_example * mask).sum() / mask.sum()

        value, gradient = jax.value_and_grad(lambda abc: kept(loss(abc)))(student)
        file.compare(f"{name}_loss", value, rtol=2e-4, atol=1e-5)
        compare_gradient(file, f"{name}_grad", gradient)

    t, s = pair(file, "indices", "num_scales")
    x_t = q_sample(x0, noise, ve_level(t))
    known = {"cd": net_of(teacher, EDM), "ct": lambda x, t: Denoised(x0)}
    for key in file.keys("c[dt]_*_loss"):
        mode, solver, metric, weight = key.removesuffix("_loss").split("_", 3)
        x_s = ode_step(SOLVERS[solver](VE), known[mode], x_t, t, s)

        def loss(abc, x_s=x_s, distance=DISTANCES[metric], weight=WEIGHTS[weight]):
            f, f_target = net_of(abc, CONSISTENCY), net_of(target, CONSISTENCY)
            return weight(ve_level(t)) * consistency_loss(f, f_target, x_t, t, x_s, s, distance)

        compare(key.removesuffix("_loss"), loss)

    time, eps = arrays(file, "cont_t", "cont_noise")
    x_time = q_sample(x0, eps, ve_level(time))
    for key in file.keys("cont_*_loss"):
        _, mode, kind = key.removesuffix("_loss").split("_", 2)

        def loss(abc, mode=mode, rate_loss=RATES[kind]):
            return rate_loss(*rate_of_change(net_of(abc, CONSISTENCY), known[mode], x_time, time))

        compare(key.removesuffix("_loss"), loss)

    sigma, eps = arrays(file, "edm_t", "edm_noise")
    size = x0[0].size  # the release adds up over an example

    def edm(abc):
        x = q_sample(x0, eps, ve_level(sigma))
        return size * mean_flat(edm_loss(net_of(abc, EDM)(x, sigma).x0, x0, ve_level(sigma)))

    compare("edm", edm)

    (levels,) = arrays(file, "wrap_t")
    x_denoised = net_of(student, EDM)(x0, levels).x0
    file.compare("wrap_denoiser", x_denoised, rtol=1e-5, atol=1e-5)
    file.compare("wrap_distiller", net_of(student, CONSISTENCY)(x0, levels).x0, rtol=1e-5, atol=1e-5)
    score = -eps_from_x0(x_denoised, x0, ve_level(levels)) / expand(levels, x0)
    file.compare("wrap_score", score, rtol=2e-4, atol=1e-4)

    (noise,) = arrays(file, "pd_noise")
    n = int(file.arrays["num_scales"])
    t, _, x_t, lesson = progressive_lesson(x0, noise, teacher, file.input("pd_indices"), n)
    for key in file.keys("pd_*_loss"):
        metric, weight = key.removeprefix("pd_").removesuffix("_loss").split("_", 1)

        def loss(abc, weight=WEIGHTS[weight], distance=DISTANCES[metric]):
            return progressive_loss(abc, t, x_t, lesson.target, weight, distance)

        compare(key.removesuffix("_loss"), loss)

"""Progressive distillation's Flax release: the cosine path, two teacher steps, targets, losses, gradients and sampling.

Net B is elementwise; its time is the log SNR, so the schedule here is a function of log SNR as well. Levels near pure
noise have alpha = 5e-5, by which x0 is divided when the output is eps: arrays that follow are compared with the same
share of their largest value. Tolerance: 2e-4 of the value.
"""

import jax
import jax.numpy as jnp
import numpy as np
from golden_harness import topic

from jaxdiff import parameterization, process, schedules, weighting
from jaxdiff.losses import mse
from jaxdiff.methods import progressive
from jaxdiff.methods.base import Sampling
from jaxdiff.types import expand

KEY = jax.random.key(0)
RTOL = 2e-4
WEIGHTS = {
    "constant": weighting.uniform,
    "snr": weighting.snr,
    "snr_trunc": weighting.truncated_snr,
    "v_mse": weighting.snr_plus_one,
}


def net_b(outputs):
    """f(z, l), and for two heads the same with a and c exchanged beside it; l is the log SNR."""

    def network(params, x_t, t, cond, *, train=False, key=None):
        del cond, train, key
        a, b, c = params
        wave = jnp.sin(expand(t, x_t) / 2)
        f = a * jnp.tanh(b * x_t) + c * wave
        return f if outputs == 1 else jnp.concatenate([f, c * jnp.tanh(b * x_t) + a * wave], axis=-1)

    return network


def log_snr_of(schedule):
    return lambda t: 2 * process.half_log_snr(schedule.level(t))


def heads(net_time):
    single = {name: getattr(parameterization, name if name != "x" else "x0") for name in ("x", "eps", "v")}
    heads = {name: (net_b(1), progressive.single(make(net_time))) for name, make in single.items()}
    return heads | {"both": (net_b(2), progressive.both(net_time))}


def near(golden, key, value, rtol=RTOL):
    """Allows the share rtol of each value, and of the largest one."""
    golden.compare(key, value, rtol=rtol, atol=rtol * float(np.abs(golden.arrays[key]).max()))


@topic("consistency/progdist")
def progdist(golden):
    x0, eps, i, student, teacher, init_z = (
        jnp.asarray(golden.input(key)) for key in ("x_nhwc", "eps", "i", "student_abc", "teacher_abc", "init_z")
    )
    n = int(golden.input("num_steps"))
    low, high = (float(value) for value in golden.input("logsnr_minmax"))
    path = progressive.vp_path(schedules.cosine(low, high))
    log_snr = log_snr_of(path.schedule)
    # At the ends of the float32 tangent the last bit of its argument shows in the fifth digit of the log SNR.
    golden.compare("logsnr_grid", log_snr(jnp.asarray(golden.input("u_grid"))), rtol=1e-5, atol=2e-3)
    u = i.astype(jnp.float32)
    t, middle, s = ((u + 1) / n, (u + 0.5) / n, u / n)
    for key, time in (("logsnr_t", t), ("logsnr_mid", middle), ("logsnr_s", s)):
        golden.compare(key, log_snr(time), rtol=1e-5, atol=2e-3)
    level = path.schedule.level(t)
    x_t = process.q_sample(x0, eps, level)
    golden.compare("z_t", x_t, atol=2e-6)

    for name, (network, head) in heads(log_snr).items():
        # For two heads the release weights the eps one by 1 - sigmoid(-log SNR), which is 0 in float32 at pure noise.
        rtol = 1e-3 if name == "both" else RTOL
        denoise_of = lambda params, network=network, head=head: head(network, params, path.schedule, {})  # noqa: E731
        taught = progressive.teach(denoise_of(teacher), path.schedule, x_t, t, middle, s, i == 0)
        near(golden, f"{name}_z_mid", taught.middle, rtol)
        near(golden, f"{name}_z_teacher", taught.end, rtol)
        near(golden, f"{name}_x_target", taught.target, rtol)
        x = denoise_of(student)(x_t, t).x0
        near(golden, f"{name}_student_model_x", x, rtol)
        alpha, sigma = (expand(a, x) for a in level)
        near(golden, f"{name}_student_model_eps", (x_t - alpha * x) / sigma, rtol)
        near(golden, f"{name}_student_model_v", (alpha * x_t - x) / sigma, rtol)
        for kind, target in (("distill", taught.target), ("data", x0)):
            for what, weight in WEIGHTS.items():

                def mean_loss(params, denoise_of=denoise_of, target=target, weight=weight):
                    loss = weight(level) * mse(denoise_of(params)(x_t, t).x0, target)
                    return loss.mean(), loss

                grad, loss = jax.grad(mean_loss, has_aux=True)(student)
                golden.compare(f"{kind}_{name}_{what}_loss", loss, rtol=rtol, atol=2e-6)
                near(golden, f"{kind}_{name}_{what}_grad_abc", grad, rtol)
        for clip, key in ((None, "noclip"), (1.0, "clip")):
            method = progressive.progressive(
                network, init_params=lambda key, batch: None, teacher_params=teacher, num_steps=n, head=head, path=path,
                clip=clip,
            )  # fmt: skip
            out = method.generate({"model": student}, {}, KEY, init_z, {}, Sampling())
            near(golden, f"{name}_ddim_{key}", out, rtol)

    s, t = (jnp.full(i.shape, value) for value in golden.input("reverse_logsnr_s_t"))
    between = process.bridge(*(schedules.from_half_log_snr(level / 2) for level in (t, s)))
    for key in golden.keys("reverse_*_mean"):
        golden.compare(key, process.posterior_mean(x0, x_t, between), atol=2e-6)
        name = key.removesuffix("_mean")
        share = {"reverse_small": 0.0, "reverse_large": 1.0}.get(name)
        share = float(name.split("_")[-1].replace("p", ".")) if share is None else share
        variance = process.learned_range(between, x0, jnp.full_like(x0, 2 * share - 1))
        golden.compare(f"{name}_logvar", variance.log, atol=5e-6)

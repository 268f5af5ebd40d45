"""Golden topic of the consistency releases' tables: Karras grids, scalings, weights, N(k), mu(k), ancestral steps.

The release computes grids, scalings and weights in float32, N and mu in float64.
"""

import jax.numpy as jnp
import numpy as np
from golden_consistency_denoise import CONSISTENCY, EDM, WEIGHTS, ve_level
from golden_harness import topic

from jaxdiff import times, weighting
from jaxdiff.methods.consistency import adaptive, fixed, progressive
from jaxdiff.methods.progressive import student_steps
from jaxdiff.process import bridge
from jaxdiff.types import Level

RTOL = 2e-5


def curriculum(target_ema_mode, scale_mode, start_ema, start_levels, end_levels, total_steps):
    if (target_ema_mode, scale_mode) == ("fixed", "fixed"):
        return fixed(start_levels, start_ema)
    make = {"fixed": progressive, "adaptive": adaptive}[target_ema_mode]
    return make(start_levels, end_levels, total_steps, start_ema)


@topic("consistency/schedules")
def consistency_schedules(file):
    for key in file.keys("karras*_args"):
        n, low, high, rho = (float(np.format_float_positional(a)) for a in file.input(key))
        grid = times.karras(int(n), low, high, rho)
        name = key.replace("args", "sigmas")
        file.compare(name, np.append(grid, 0.0), rtol=RTOL)
        if n > 1:
            closed = times.karras_time(jnp.arange(n), jnp.int32(n), low, high, rho)
            file.compare(name, np.append(closed, 0.0), rtol=RTOL)

    sigma = jnp.asarray(file.input("sigmas"))
    level = ve_level(sigma)
    for name, meaning in {"edm": EDM, "cm": CONSISTENCY}.items():
        c = meaning.coefficients(level)
        for field, value in {"c_skip": c.skip, "c_out": c.out, "c_in": c.scale_in}.items():
            file.compare(f"{name}_{field}", value, rtol=RTOL)
    file.compare("snr", weighting.snr(level), rtol=RTOL)
    for name, weight in WEIGHTS.items():
        file.compare(f"weight_{name}", weight(level), rtol=RTOL)
    file.compare("rescaled_t", EDM.net_time(sigma), rtol=RTOL, atol=1e-4)

    # up is the posterior's deviation, which DDIM with eta = 1 adds; down is what it leaves to eps.
    sigmas = file.arrays["karras0_sigmas"].astype(np.float64)
    t, s = sigmas[:-1], sigmas[1:]
    added = bridge(Level(np.ones_like(t), t), Level(np.ones_like(s), s)).variance
    file.compare("ancestral_sigma_up", np.sqrt(added), rtol=RTOL)
    file.compare("ancestral_sigma_down", np.sqrt(s**2 - added), rtol=RTOL)

    steps = jnp.asarray(file.input("steps"), jnp.int32)
    for key in file.keys("ema*_args"):
        name = key.removesuffix("_args")
        modes = [str(file.input(f"{name}_{mode}_mode")) for mode in ("target_ema", "scale")]
        start_ema, *counts = (float(np.format_float_positional(a)) for a in file.input(key))
        start, end, total, round_length = (int(count) for count in counts)
        if modes[1] == "progdist":
            made = [student_steps(step, start, round_length) for step in steps]
            file.compare(f"{name}_N", np.asarray(made))
            file.leave(f"{name}_mu", "always 1: the teacher of a round stays, which is not an average of ours")
            continue
        made = curriculum(*modes, start_ema, start, end, total)
        file.compare(f"{name}_N", made.num_levels(steps))
        file.compare(f"{name}_mu", made.target_ema(steps), rtol=RTOL)

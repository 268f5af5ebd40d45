"""Golden topic of improved consistency training: curriculum, grid, shares of the steps, one replayed loss.

There is no official code; the arrays were derived from the paper in float64, on an increasing grid. Ours decreases.
"""

import jax.numpy as jnp
import numpy as np
from golden_consistency_denoise import (
    CONSISTENCY,
    SIGMA_MAX,
    SIGMA_MIN,
    arrays,
    compare_gradient,
    net_of,
    ve_level,
    with_gradient,
)
from golden_harness import topic

from jaxdiff import losses, times, weighting
from jaxdiff.methods.improved_consistency import doubling_levels, log_normal_shares, pair_loss
from jaxdiff.process import q_sample


@topic("consistency/ict")
def ict(file):
    total, start, end = (int(file.input(name)) for name in ("K", "s0", "s1"))
    num_levels = doubling_levels(start, end, total)
    file.compare("N_of_k", num_levels(jnp.asarray(file.input("steps"), jnp.int32)))
    # N changes for the first time at step K', if it changes at all
    length = int(file.input("K_prime"))
    assert int(num_levels(jnp.int32(length - 1))) == start + 1
    assert int(num_levels(jnp.int32(length))) == min(2 * start, end) + 1

    for key in file.keys("sigmas_N*"):
        n = int(key.removeprefix("sigmas_N"))
        grid = times.karras(n, SIGMA_MIN, SIGMA_MAX)
        file.compare(key, grid[::-1], rtol=1e-5)
        file.compare(f"p_N{n}", log_normal_shares(grid)[::-1], rtol=1e-5)
        t, s = (ve_level(jnp.asarray(a, jnp.float32)) for a in (grid[:-1], grid[1:]))
        file.compare(f"lambda_N{n}", weighting.inverse_gap(t, s)[::-1], rtol=1e-4)

    x0, noise, abc = arrays(file, "x", "noise", "abc")
    n = int(file.input("num_scales"))
    step = jnp.asarray(n - 2 - file.input("index"), jnp.float32)
    t, s = (times.karras_time(i, jnp.int32(n), SIGMA_MIN, SIGMA_MAX) for i in (step, step + 1))
    file.compare("sigma_hi", t, rtol=1e-5)
    file.compare("sigma_lo", s, rtol=1e-5)
    f = net_of(abc, CONSISTENCY)
    for name, level in {"hi": t, "lo": s}.items():
        file.compare(f"f_{name}", f(q_sample(x0, noise, ve_level(level)), level).x0, rtol=1e-5, atol=2e-5)
    file.compare("huber_c", 0.00054 * np.sqrt(x0[0].size), rtol=1e-6)

    distance = losses.pseudo_huber()
    weight = weighting.inverse_gap(ve_level(t), ve_level(s))
    file.compare("weight", weight, rtol=1e-4)

    def loss(abc):
        return pair_loss(net_of(abc, CONSISTENCY), x0, noise, t, s, distance)

    value, gradient = with_gradient(loss, abc)
    file.compare("per_example", value / weight, rtol=2e-4)
    file.compare("loss", value.mean(), rtol=2e-4)
    compare_gradient(file, "grad_abc", gradient)

"""Data N(0.3, 0.7^2): the denoiser and the probability flow path are known exactly for every schedule."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import schedules
from jaxdiff.solvers import base
from jaxdiff.types import Denoised, expand

MEAN, STD = 0.3, 0.7
KEY = jax.random.key(0)
SCHEDULES = {
    "vp": (schedules.vp_linear(), 0.8, 0.05),
    "ve": (schedules.ve(), 10.0, 0.1),
    "flow": (schedules.rectified_flow(), 0.95, 0.05),
}


def as_one_program(method):
    """`integrate` or `sample`, compiled whole: called as it is, each operation around its scan compiles by itself."""

    def run(solver, denoise, key, x, times, **options):
        return jax.jit(lambda key, x, times: method(solver, denoise, key, x, times, **options))(key, x, times)

    return run


integrate, sample = as_one_program(base.integrate), as_one_program(base.sample)


def spread(level):
    return jnp.sqrt(level.alpha**2 * STD**2 + level.sigma**2)


def best_denoiser(schedule):
    """The mean of x0 given x_t."""

    def denoise(x, t):
        level = schedule.level(t)
        gain = level.alpha * STD**2 / spread(level) ** 2
        return Denoised(MEAN + expand(gain, x) * (x - expand(level.alpha, x) * MEAN))

    return denoise


def path(schedule, x, t, s):
    """Where the probability flow takes x [B] from time t to time s."""
    a, b = (schedule.level(jnp.asarray([time], x.dtype)) for time in (t, s))
    return b.alpha * MEAN + spread(b) / spread(a) * (x - a.alpha * MEAN)


def linear_chain(schedule, times, eta, mean, variance):
    """Mean and variance of x at times[-1], for Gaussian x at times[0] and DDIM's steps, which are linear in x."""
    alpha, sigma = (np.asarray(a, np.float64) for a in schedule.level(times))
    for i in range(len(alpha) - 1):
        gain = alpha[i] * STD**2 / (alpha[i] ** 2 * STD**2 + sigma[i] ** 2)
        beta = sigma[i] ** 2 - (alpha[i] / alpha[i + 1] * sigma[i + 1]) ** 2
        fresh = eta**2 * beta * sigma[i + 1] ** 2 / sigma[i] ** 2
        rest = np.sqrt(sigma[i + 1] ** 2 - fresh) / sigma[i]
        from_x, from_x0 = rest, alpha[i + 1] - rest * alpha[i]
        variance = (from_x + from_x0 * gain) ** 2 * variance + fresh
        mean = from_x * mean + from_x0 * (MEAN + gain * (mean - alpha[i] * MEAN))
    return mean, variance


def even(start, end, n, dtype=jnp.float32):
    return jnp.linspace(start, end, n, dtype=dtype)

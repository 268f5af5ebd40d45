"""Golden topic of the two preconditionings around one network: D of EDM and the consistency function f.

Arrays are NCHW as the release has them: the network is elementwise. It is given 250 ln(sigma).
"""

import jax
import jax.numpy as jnp
import numpy as np
from golden_harness import topic

from jaxdiff import parameterization, schedules, weighting
from jaxdiff.denoiser import denoiser
from jaxdiff.losses import mean_flat, mse
from jaxdiff.process import q_sample
from jaxdiff.types import Level, expand

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX = 0.5, 0.002, 80.0
VE = schedules.ve(SIGMA_MIN, SIGMA_MAX)
EDM = parameterization.edm(SIGMA_DATA, parameterization.log_time(250.0))
CONSISTENCY = parameterization.consistency(SIGMA_DATA, SIGMA_MIN, parameterization.log_time(250.0))
WEIGHTS = {
    "karras": weighting.edm(SIGMA_DATA),
    "snr": weighting.snr,
    "snrp1": weighting.snr_plus_one,
    "truncated_snr": weighting.truncated_snr,
    "uniform": weighting.uniform,
}


def net_a(abc, x_t, t, cond, *, train=False, key=None):
    """a tanh(b x) + c sin(t / 100), t = 250 ln(sigma)."""
    del cond, train, key
    a, b, c = abc
    return a * jnp.tanh(b * x_t) + c * jnp.sin(expand(t, x_t) / 100)


def net_of(abc, meaning):
    return denoiser(net_a, abc, VE, meaning)


def arrays(file, *names):
    return [jnp.asarray(file.input(name), jnp.float32) for name in names]


def ve_level(t):
    return Level(jnp.ones_like(t), t)


def with_gradient(loss, abc):
    """(loss [B], gradient of its mean) of loss: abc -> [B]."""
    gradient, value = jax.grad(lambda p: (lambda v: (v.mean(), v))(loss(p)), has_aux=True)(abc)
    return value, gradient


def compare_gradient(file, key, value):
    """2e-4 of each component, or of a tenth of the largest: small ones are differences of large terms in float32."""
    file.compare(key, value, rtol=2e-4, atol=2e-5 * float(np.abs(file.arrays[key]).max()))


@topic("consistency/denoise")
def denoise(file):
    x, x0, noise, sigma, abc = arrays(file, "x", "x0", "noise", "sigmas", "net_abc")
    x_t = q_sample(x0, x, ve_level(sigma))
    file.compare("x_t", x_t, rtol=1e-6, atol=1e-6)
    for name, meaning in {"edm": EDM, "cm": CONSISTENCY}.items():
        scaled = expand(meaning.coefficients(ve_level(sigma)).scale_in, x_t) * x_t
        file.compare(f"{name}_model_output", net_a(abc, scaled, meaning.net_time(sigma), {}), rtol=1e-5, atol=2e-6)
        file.compare(f"{name}_denoised", net_of(abc, meaning)(x_t, sigma).x0, rtol=1e-5, atol=2e-6)

    x_t = q_sample(x0, noise, ve_level(sigma))
    for name, weight in WEIGHTS.items():

        def loss(abc, weight=weight):
            error = (net_of(abc, EDM)(x_t, sigma).x0 - x0) ** 2
            return mean_flat(expand(weight(ve_level(sigma)), x0) * error)

        file.compare(f"edmtrain_{name}_xs_mse", mse(net_of(abc, EDM)(x_t, sigma).x0, x0), rtol=2e-4)
        value, gradient = with_gradient(loss, abc)
        file.compare(f"edmtrain_{name}_loss", value, rtol=2e-4)
        compare_gradient(file, f"edmtrain_{name}_grad_abc", gradient)

"""Golden topic of DMD2's guidance on the Karras grid, with analytic denoisers in the place of the two scores.

The release keeps its levels from the least noisy to the noisiest and draws indices of them. Arrays are NCHW: the
denoisers are elementwise.
"""

import jax
import jax.numpy as jnp
from golden_harness import topic

from jaxdiff import losses
from jaxdiff.methods.dmd2 import edm_form, matching_gradient, matching_loss, score_loss
from jaxdiff.process import q_sample
from jaxdiff.types import Denoised, Level, expand


def score(variance, on_sine):
    """x variance / (sigma^2 + variance) + on_sine sin(x / (1 + sigma))."""

    def denoise(x_t, t):
        sigma = expand(t, x_t)
        return Denoised(x_t * variance / (sigma**2 + variance) + on_sine * jnp.sin(x_t / (1 + sigma)))

    return denoise


REAL, FAKE = score(0.25, 0.1), score(0.30, -0.05)


def read(file, name):
    return jnp.asarray(file.input(name), jnp.float32)


def of_kind(file, prefix, kind):
    return read(file, next(key for key in file.keys(f"{prefix}_[0-9]*_{kind}")))


@topic("gan/dmd2")
def dmd2(file):
    low, high, num_levels = (int(n) for n in file.input("config"))
    form = edm_form(num_levels=num_levels)
    file.compare("karras_sigmas", form.time(read(file, "karras_idx")), rtol=1e-5)
    x = read(file, "x")

    drawn = of_kind(file, "dm", "randint")
    assert (low <= drawn).all() and (drawn <= high).all()
    file.compare("timesteps", drawn)
    sigma = form.time(drawn.reshape(-1))
    file.compare("sigma", sigma, rtol=1e-5)
    noisy = q_sample(x, of_kind(file, "dm", "randn_like"), Level(jnp.ones_like(sigma), sigma))
    file.compare("noisy", noisy, rtol=1e-5, atol=1e-6)
    real, fake = REAL(noisy, sigma).x0, FAKE(noisy, sigma).x0
    file.compare("pred_real", real, rtol=1e-5, atol=1e-6)
    file.compare("pred_fake", fake, rtol=1e-5, atol=1e-6)
    gradient = matching_gradient(x, real, fake)
    file.compare("dm_grad", gradient, rtol=1e-5, atol=2e-6)
    value, on_x = jax.value_and_grad(lambda x: matching_loss(x, gradient).mean())(x)
    file.compare("loss_dm", value, rtol=1e-5)
    file.compare("grad_x", on_x, rtol=1e-4, atol=1e-8)

    index = of_kind(file, "fake", "randint").reshape(-1)
    eps = of_kind(file, "fake", "randn_like")
    file.compare("loss_fake", score_loss(form, FAKE, x, index, eps).mean(), rtol=5e-5)
    sigma = form.time(index)
    found = FAKE(q_sample(x, eps, Level(jnp.ones_like(sigma), sigma)), sigma).x0
    file.compare("fake_x0", found, rtol=1e-5, atol=1e-6)

    adversarial = losses.non_saturating()
    logits = read(file, "gan_real"), read(file, "gan_fake")
    file.compare("guidance_cls_loss", adversarial.discriminator(*logits).mean(), rtol=1e-6)
    file.compare("gen_cls_loss", adversarial.generator(*logits).mean(), rtol=1e-6)

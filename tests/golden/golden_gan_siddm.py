"""SIDDM's public toy: cosine levels, forward and posterior draws, networks, losses, and sampling in 1, 2 and 4 steps.

The toy's losses are not the paper's (binary cross-entropy of two sigmoids, its discriminator shown x0 in the place of
x_s, forward diffusion by re-noising), so they are put together here from the library's parts; "paper" arrays show the
discriminator the posterior draw. Its discriminator's time is that of x_s. Tolerance: 3e-5 on data up to 8; the release
takes 1 - alpha^2 in float32, an error that the posterior divides by sigma^2.
"""

import jax
import jax.numpy as jnp
import numpy as np
from golden_harness import topic

from jaxdiff import losses, parameterization, process, schedules
from jaxdiff.denoiser import denoiser
from jaxdiff.methods import siddm
from jaxdiff.networks.layers import sinusoidal_embedding
from jaxdiff.solvers.ancestral import ancestral
from jaxdiff.solvers.base import sample
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.posterior import Draws, show, with_latents
from jaxdiff.types import Denoised

KEY = jax.random.key(0)
SCHEDULE = schedules.squared_cosine()
ATOL = 3e-5


def linear(params, name, x):
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"][None]


def time_embedding(params, t):
    emb = sinusoidal_embedding(t, params["t_embed.main.0.weight"].shape[1], sin_first=True, frequency_shift=1)
    h = jax.nn.leaky_relu(linear(params, "t_embed.main.0", emb), 0.2)
    return jax.nn.leaky_relu(linear(params, "t_embed.main.2", h), 0.2)


def through(params, name, h):
    layers = sorted(key for key in params if key.startswith(f"{name}.") and key.endswith("weight"))
    for i, layer in enumerate(layers):
        h = linear(params, layer.removesuffix(".weight"), h)
        h = h if name == "decode" and i == len(layers) - 1 else jax.nn.silu(h)
    return h


def generator(params, x_t, t, cond, *, train=False, key=None):
    h = through(params, "decode", jnp.concatenate([x_t, time_embedding(params, t), cond["z"]], axis=1))
    return linear(params, "out", jnp.concatenate([h, x_t], axis=1))


def discriminator(params, x_s, s, cond, *, train=False, key=None):
    """Logits [B, 2]; without cond["x_t"] it judges x_s alone."""
    x_t = cond.get("x_t", jnp.zeros_like(x_s))
    h = through(params, "encode", jnp.concatenate([x_s, time_embedding(params, 1000 * s), x_t], axis=1))
    return linear(params, "gan_linear", h)


def build(params):
    meaning = parameterization.x0(parameterization.scaled_time(1000.0))
    return lambda cond: denoiser(generator, params, SCHEDULE, meaning, cond)


@topic("gan/siddm")
def toy(golden):
    arrays = {
        name: jnp.asarray(golden.input(name))
        for name in ("x0", "t", "t_p1", "get_z_t_eps", "fwd_0_randn_like", "post_0_randn_like", "x0_pred")
    }
    nets = {name: {key[2:]: jnp.asarray(golden.input(key)) for key in golden.keys(f"{name}/*")} for name in ("G", "D")}
    check_diffusion(golden, arrays)
    check_networks_and_losses(golden, arrays, nets)
    check_chain(golden, arrays)
    check_sampling(golden, nets["G"])


def posterior_atol(shown):
    return ATOL + 1e-6 / float(shown.t.sigma.min()) ** 2


def shown_with(arrays, denoise, eps_fake, z=None):
    draws = Draws(arrays["t_p1"], arrays["get_z_t_eps"], arrays["fwd_0_randn_like"], eps_fake, z)
    return show(denoise, arrays["x0"], draws, arrays["t"], SCHEDULE)


def check_diffusion(golden, arrays):
    golden.compare("alpha_cum", SCHEDULE.level(jnp.asarray(golden.input("alpha_t"))).alpha ** 2, atol=1e-6)
    prediction = arrays["x0_pred"]
    shown = shown_with(arrays, lambda x_t, t: Denoised(prediction), arrays["post_0_randn_like"])
    golden.compare("get_z_t", shown.real, atol=ATOL)
    golden.compare("get_z_t_mean", shown.s.alpha[:, None] * arrays["x0"], atol=ATOL)
    golden.compare("get_z_tp1_via_z_t", shown.x_t, atol=ATOL)
    golden.compare("get_z_t_via_z_tp1", shown.fake, atol=posterior_atol(shown))
    # the toy's mean has the alpha of t + 1 where the posterior has that of t; nothing there calls it
    on_x0 = process.bridge(shown.t, shown.s).on_x0 * shown.t.alpha / shown.s.alpha
    golden.compare("get_mu_posterior", on_x0[:, None] * arrays["x0"], atol=posterior_atol(shown))
    eps = process.eps_from_x0(arrays["x0"], shown.x_t, shown.t)
    golden.compare("get_eps_x_t", eps, atol=ATOL / float(shown.t.sigma.min()))
    exact = lambda x_t, t: Denoised(arrays["x0"])  # noqa: E731
    step, _, _ = ddim(SCHEDULE).step(shown.x_t, None, shown.x_t, arrays["t_p1"], arrays["t"], exact)
    golden.compare("ddim_sample", step, atol=1e-4 + ATOL / float(shown.t.sigma.min()))


def check_networks_and_losses(golden, arrays, nets):
    z, eps_fake, eps_again = (
        jnp.asarray(golden.input(key)) for key in ("net_z", "gstep_0_randn_like", "gstep_1_randn_like")
    )
    shown = shown_with(arrays, build(nets["G"])({"z": z}), eps_fake, z)
    golden.compare("net_G", shown.prediction, atol=ATOL)
    golden.compare("x_pos_sample", shown.fake, atol=posterior_atol(shown))
    s = arrays["t"]
    for key, cond in (("net_D", {}), ("net_D_joint", {"x_t": shown.x_t})):
        golden.compare(key, jax.nn.sigmoid(discriminator(nets["D"], shown.real, s, cond)), atol=5e-6)
    forward = process.transition(shown.fake, shown.t, shown.s)
    again = forward.mean + jnp.sqrt(forward.variance) * eps_again
    golden.compare("x_tp1_fake", again, atol=posterior_atol(shown))
    afd = losses.mse(again, shown.x_t).mean()
    golden.compare("loss_afd", afd, rtol=2e-5)

    def judge(x):
        return siddm.Verdict(discriminator(nets["D"], x, s, {}))

    adversarial = losses.non_saturating()
    for name, fake in (("script", shown.prediction), ("paper", shown.fake)):
        both = shown._replace(fake=fake)
        d_loss, _ = siddm.discriminator_loss(judge, both, adversarial=adversarial, denoise_weight=0.0, regressor=False)
        g_loss, _ = siddm.generator_loss(judge, both, adversarial=adversarial, forward_weight=0.0, regressor=False)
        golden.compare(f"{name}_D_loss", d_loss, rtol=1e-5)
        golden.compare(f"{name}_G_loss", g_loss, rtol=1e-5)
        golden.compare(f"{name}_total_G", g_loss + float(golden.input("ac_w")) * afd, rtol=2e-5)


def check_chain(golden, arrays):
    schedule = schedules.discrete(schedules.vp_betas(int(golden.input("num_timesteps"))))
    eps_t, eps_s, eps_fake = (
        jnp.asarray(golden.input(key)) for key in ("disc_0_randn_like", "disc_1_randn_like", "discpost_0_randn_like")
    )
    t = jnp.asarray(golden.input("disc_t")).astype(jnp.float32)
    prediction = arrays["x0_pred"]
    draws = Draws(t, eps_s, eps_t, eps_fake, None)
    shown = show(lambda x_t, t: Denoised(prediction), arrays["x0"], draws, t - 1, schedule)
    golden.compare("disc_x_t", shown.real, atol=ATOL)
    golden.compare("disc_x_tp1", shown.x_t, atol=ATOL)
    forward = process.transition(shown.real, shown.t, shown.s)
    golden.compare("disc_mu", forward.mean, atol=ATOL)
    golden.compare("disc_sigma", jnp.sqrt(forward.variance), atol=1e-6)
    golden.compare("disc_sample_posterior", shown.fake, atol=ATOL)


def check_sampling(golden, params):
    x = jnp.asarray(golden.input("loop_x_init"))
    for key in golden.keys("loop*_out"):
        name = key.removesuffix("_out")
        n = int(name.removeprefix("loop"))
        z = jnp.stack([jnp.asarray(golden.input(f"{name}_{2 * i}_rand_like")) for i in range(n)])
        noise = [jnp.asarray(golden.input(f"{name}_{2 * i + 1}_randn_like")) for i in range(n - 1)]
        grid = np.arange(n, 0, -1, dtype=np.float32) / n
        denoise = with_latents(build(params), {}, lambda t, z=z, n=n: z[jnp.round(n * (1 - t[0])).astype(jnp.int32)])
        noise = jnp.stack([*noise, x])  # the last is not used
        golden.compare(key, sample(ancestral(SCHEDULE), denoise, KEY, x, jnp.asarray(grid), noise=noise), atol=ATOL)

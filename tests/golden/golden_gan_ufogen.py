"""UFOGen's public code on DiT: times, both players' losses and gradients, and samplers; then the paper's own forms.

Weights and gradients go through importer and exporter of the released DiT, so they are compared under its names. The
code's reconstruction is DDPM's error of eps with a variance term, of which the first is the x0 error with SNR for a
weight. The sampler's model is eps = sin(1.3 x) + 0.01 y - 0.2 t / 1000, elementwise. At t near 1000, x0 from eps is
157 times as large as eps, so errors are held to a share of an array's largest value.
"""

import jax
import jax.numpy as jnp
import numpy as np
from golden_core_networks import nchw, nhwc
from golden_harness import topic

from jaxdiff import losses, parameterization, process, schedules, weighting
from jaxdiff.denoiser import denoiser
from jaxdiff.methods import ufogen
from jaxdiff.networks.base import as_network
from jaxdiff.networks.dit import DiT
from jaxdiff.pretrained.dit import export_dit, import_dit
from jaxdiff.process import q_sample
from jaxdiff.solvers.base import sample
from jaxdiff.solvers.stochastic_iterative import stochastic_iterative
from jaxdiff.types import Denoised, expand

SHARE = 2e-5
GRADIENT_SHARE = 1e-3
GRADIENT_FLOOR = 1e-6
KEY = jax.random.key(0)


def near(golden, key, value, share=SHARE, floor=0.0):
    """Allows a share of the array's largest value."""
    golden.compare(key, value, atol=floor + share * float(np.abs(golden.arrays[key]).max()))


def dit_of(golden):
    size, patch, channels, width, depth, heads, classes = golden.input("dit_config").tolist()
    return DiT(
        in_channels=channels, out_channels=2 * channels, input_size=size, patch_size=patch, width=width, depth=depth,
        num_heads=heads, num_classes=classes,
    )  # fmt: skip


def params_of(golden, player, dit):
    state = {key.removeprefix(f"{player}/"): golden.input(key) for key in golden.keys(f"{player}/*")}
    return import_dit(state, dit)


def check_tables(golden, betas, num_times):
    tables, index = schedules.tables(betas), golden.input("sched_idx")
    names = {
        "betas": tables.betas,
        "alphas_cumprod": tables.alphas_cumprod,
        "sqrt_ac": tables.sqrt_alphas_cumprod,
        "sqrt_1mac": tables.sqrt_one_minus_alphas_cumprod,
        "post_logvar_clipped": tables.posterior_log_variance_clipped,
        "post_c1": tables.posterior_mean_coef1,
        "post_c2": tables.posterior_mean_coef2,
    }
    for key, table in names.items():
        golden.compare(key, table[index], rtol=1e-5)
    t = jnp.asarray(golden.input("tm_table_t").astype(np.float32))
    golden.compare("tm_table", ufogen.jumped(t, len(betas) // num_times))


def check_clamp(golden):
    clamped, logits = losses.clamped(), jnp.asarray(golden.input("cl_logits"))
    golden.compare("cl_real", clamped.generator(logits, logits), rtol=1e-6, atol=1e-7)
    at_zero = clamped.generator(logits, jnp.zeros_like(logits))
    golden.compare("cl_fake", clamped.discriminator(jnp.zeros_like(logits), logits) - at_zero, rtol=1e-5, atol=1e-6)


def check_discriminator(golden, chain, meaning, dit, params, x0, levels, t, s, cond):
    noises = [nhwc(golden.input(f"dstep_{i}_randn_like")) for i in range(3)]
    x_t, real = (q_sample(x0, eps, level) for eps, level in zip(noises, levels, strict=False))
    golden.compare("x_t", nchw(x_t), atol=1e-5)
    golden.compare("x_t_minus", nchw(real), atol=1e-5)
    network = as_network(dit)
    near(golden, "G_out", nchw(network(params["G"], x_t, t, cond)))
    denoise = denoiser(network, params["G"], chain, meaning, cond, learned_variance=True)
    prediction = denoise(x_t, t).x0
    near(golden, "pred_xstart", nchw(prediction))
    fake = ufogen.fresh(prediction, x_t, levels[0], levels[1], noises[2])
    near(golden, "fake_x_t_minus", nchw(fake))

    logits = {}

    def judge(x):
        out = network(params["D"], x, s, cond)
        logits[len(logits)] = out
        return out

    loss, _ = ufogen.discriminator_loss(judge, real, fake, losses.clamped())
    near(golden, "D_real", nchw(logits[0]))
    near(golden, "D_fake", nchw(logits[1]))
    golden.compare("loss_dis", loss, rtol=1e-5)
    # the public code's clamp cuts the right side of each, so each half is seen with the other one's logits at 0
    zero = jnp.zeros_like(logits[0])
    half = losses.clamped().discriminator(zero, zero).mean() / 2
    golden.compare("loss_dis_real", losses.clamped().discriminator(logits[0], zero).mean() - half, rtol=1e-5)
    golden.compare("loss_dis_fake", losses.clamped().discriminator(zero, logits[1]).mean() - half, rtol=1e-5)
    plain, _ = ufogen.discriminator_loss(judge, real, fake, losses.non_saturating())
    golden.compare("unclamped_loss_dis", plain, rtol=1e-5)


def check_generator(golden, betas, chain, meaning, dit, params, x0, levels, t, s, cond):
    noises = [nhwc(golden.input(f"gstep_{i}_randn_like")) for i in range(2)]
    network, tables, index = as_network(dit), schedules.tables(betas), t.astype(jnp.int32)
    x_t = q_sample(x0, noises[0], levels[0])
    golden.compare("g_x_t", nchw(x_t), atol=1e-5)

    def total(generator):
        denoise = denoiser(network, generator, chain, meaning, cond, learned_variance=True)
        prediction, variance_out = denoise(x_t, t)
        eps = process.eps_from_x0(prediction, x_t, levels[0])
        between = process.chain_bridge(tables, index)
        variance = process.learned_range(between, x0, variance_out)
        vb = losses.vlb_term(x0, x_t, jax.lax.stop_gradient(prediction), between, variance, index == 0)
        error = losses.mse(eps, noises[0])
        fake = ufogen.fresh(prediction, x_t, levels[0], levels[1], noises[1])
        logits = network(params["D"], fake, s, cond)
        own = losses.clamped().generator(logits, logits).mean()
        return own + (error + vb).mean(), (prediction, fake, logits, error, vb, own)

    (loss, (prediction, fake, logits, error, vb, own)), gradient = jax.value_and_grad(total, has_aux=True)(params["G"])
    near(golden, "g_pred_xstart", nchw(prediction))
    near(golden, "g_fake_x_t_minus", nchw(fake))
    near(golden, "D_gfake", nchw(logits))
    golden.compare("g_mse", error, rtol=2e-4)
    golden.compare("g_vb", vb, rtol=2e-3, atol=2e-5)  # at index 1 two nearly equal variances are compared
    golden.compare("loss_c", (error + vb).mean(), rtol=2e-4)
    golden.compare("loss_gen", own, rtol=1e-5)
    golden.compare("total_G", loss, rtol=2e-4)

    gradient = export_dit(gradient, dit)
    names = golden.input("G_grad_names").tolist()
    floor = GRADIENT_FLOOR * float(golden.arrays["G_grad_norms"].max())
    norms = np.array([np.linalg.norm(gradient[name].ravel()) for name in names])
    near(golden, "G_grad_norms", norms, GRADIENT_SHARE)
    for key in golden.keys("gG/*"):
        near(golden, key, gradient[key.removeprefix("gG/")], GRADIENT_SHARE, floor)

    t_level, s_level = levels
    golden.compare("paper_sqerr_x0", losses.mse(prediction, x0), rtol=2e-4)
    golden.compare("paper_gamma_ac", ufogen.at_t(ufogen.signal_share)(t_level, s_level), rtol=1e-5)
    golden.compare("eps_equiv_weight", ufogen.at_t(weighting.snr)(t_level, s_level), rtol=5e-4)
    for key, gamma in (("paper_rec_gamma_ac", ufogen.signal_share), ("paper_rec_gamma1", weighting.uniform)):
        weighted = ufogen.reconstruction(prediction, x0, t_level, s_level, ufogen.at_t(gamma))
        golden.compare(key, weighted.mean(), rtol=2e-4)
    as_eps = ufogen.reconstruction(prediction, x0, t_level, s_level, ufogen.at_t(weighting.snr))
    golden.compare("eps_mse_from_x0", as_eps, rtol=5e-4)


def check_samplers(golden, chain, meaning, dit, params, cond):
    x, labels = nhwc(golden.input("s_x_init")), cond["label"].astype(jnp.float32)

    def eps_model(params, x_t, t, cond, *, train=False, key=None):
        del params, train, key
        return jnp.sin(1.3 * x_t) + 0.01 * expand(cond["label"], x_t) - 0.2 * expand(t, x_t) / 1000

    plain = denoiser(eps_model, {}, chain, meaning, {"label": labels})
    by_dit = denoiser(as_network(dit), params["G"], chain, meaning, cond, learned_variance=True)

    def predicted(x_t, t):
        return Denoised(by_dit(x_t, t).x0)

    for key in golden.keys("s*_out"):
        name = key.removesuffix("_out")
        n = int(name.lstrip("sG"))
        grid = ufogen.stride_times(int(chain.t_max) + 1, n)
        if f"{name}_t" in golden.arrays:
            golden.compare(f"{name}_t", grid)
            golden.compare(f"{name}_t_minus", np.append(grid[1:], 0))
        noise = jnp.stack([nhwc(golden.input(f"{name}_{i}_randn_like")) for i in range(n)])
        model = predicted if name.startswith("sG") else plain
        out = sample(stochastic_iterative(chain), model, KEY, x, jnp.asarray(grid, jnp.float32), noise=noise)
        near(golden, key, nchw(out), 1e-4)


@topic("gan/ufogen")
def ufo_dit(golden):
    num_train, num_times = int(golden.input("N")), int(golden.input("num_times"))
    betas = schedules.linear_betas(num_train)
    chain, meaning, dit = schedules.discrete(betas), parameterization.eps(), dit_of(golden)
    check_tables(golden, betas, num_times)
    check_clamp(golden)
    params = {player: params_of(golden, player, dit) for player in "GD"}
    x0, cond = nhwc(golden.input("x")), {"label": jnp.asarray(golden.input("y"))}
    t = jnp.asarray(golden.input("t").astype(np.float32))
    s = ufogen.jumped(t, num_train // num_times)
    golden.compare("t_minus", s)
    levels = chain.level(t), chain.level(s)
    with jax.default_matmul_precision("highest"):
        check_discriminator(golden, chain, meaning, dit, params, x0, levels, t, s, cond)
        check_generator(golden, betas, chain, meaning, dit, params, x0, levels, t, s, cond)
        check_samplers(golden, chain, meaning, dit, params, cond)

"""DDGAN's release: coefficients, diffusion and sampling, losses with R1, EMA and learning rate, and a whole train step.

The release counts a chain's states 0 .. T, clean data first; our chain's index t is its state t + 1. A state 0 with
beta = 1e-8, which is clean data in float32, stands before the betas. Arrays are NCHW; what is elementwise is computed
so. Gradients are held to 1e-3 of the largest one, parameters after Adam to what such an error does to its first step.
"""

import ast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from golden_gan_ncsnpp import nchw, nhwc
from golden_harness import topic

from jaxdiff import losses, parameterization, process, schedules, times
from jaxdiff.denoiser import denoiser
from jaxdiff.methods import ddgan
from jaxdiff.methods.base import Method, Objective
from jaxdiff.networks.base import as_network
from jaxdiff.networks.ddgan_discriminators import ddgan_small_discriminator
from jaxdiff.pretrained.ddgan import export_generator, generator_from_config, import_generator
from jaxdiff.pretrained.ddgan_discriminators import export_discriminator, import_discriminator
from jaxdiff.solvers.ancestral import ancestral
from jaxdiff.solvers.base import sample
from jaxdiff.solvers.posterior import Draws, Shown, show, with_latents
from jaxdiff.training import ema
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step
from jaxdiff.types import Denoised, expand

KEY = jax.random.key(0)
CLEAN = 1e-8  # beta of the release's state 0
COPIED = "in this file all of these hold the parameters after the last step: they were saved without a copy"


def near(golden, key, value, share=1e-5):
    golden.compare(key, value, atol=share * float(np.abs(golden.arrays[key]).max()))


@topic("gan/ddgan_coeffs")
def coefficients(golden):
    for key in golden.keys("*/config"):
        name = key.removesuffix("/config")
        num_steps, geometric, low, high = golden.input(key).tolist()
        make = schedules.geometric_betas if geometric else schedules.vp_betas
        betas = make(int(num_steps), low, high)
        golden.compare(f"{name}/time_schedule", 1e-3 + (1 - 1e-3) * np.arange(num_steps + 1) / num_steps, rtol=1e-6)
        golden.compare(f"{name}/betas", np.append(CLEAN, betas), rtol=2e-6)
        check_forward(golden, f"{name}/coeff", betas)
        check_posterior(golden, f"{name}/post", betas)


def check_forward(golden, name, betas):
    level = schedules.discrete(betas).level(jnp.arange(len(betas)).astype(jnp.float32))
    forward = np.sqrt(1 - betas)
    values = {
        "sigmas": np.sqrt(np.append(CLEAN, betas)),
        "a_s": np.append(1, forward),
        "a_s_prev": np.append(np.append(1, forward)[:-1], 1),
        "a_s_cum": np.append(1, level.alpha),
        "sigmas_cum": np.append(0, level.sigma),
    }
    for key, value in values.items():
        golden.compare(f"{name}.{key}", value, rtol=3e-6 + lost(betas), atol=1e-6 if key == "sigmas_cum" else 0.0)


def check_posterior(golden, name, betas):
    table = schedules.tables(betas)
    index = jnp.arange(len(betas))
    # float32 levels of ours, as a sampler has them
    level = schedules.discrete(betas).level(index.astype(jnp.float32))
    before = jax.tree.map(lambda a, clean: jnp.append(clean[:1], a[:-1]), level, process.clean_like(level))
    between = process.bridge(level, before)
    values = {
        "betas": between.added,
        "alphas": 1 - betas,
        "alphas_cumprod": table.alphas_cumprod,
        "alphas_cumprod_prev": table.alphas_cumprod_prev,
        "posterior_variance": between.variance,
        "sqrt_alphas_cumprod": level.alpha,
        "sqrt_recip_alphas_cumprod": 1 / level.alpha,
        "sqrt_recipm1_alphas_cumprod": level.sigma / level.alpha,
        "posterior_mean_coef1": between.on_x0,
        "posterior_mean_coef2": between.on_x_t,
        "posterior_log_variance_clipped": between.log_variance,
    }
    for key, value in values.items():
        golden.compare(f"{name}.{key}", value, rtol=5e-6 + lost(betas), atol=1e-6)


def lost(betas):
    """Relative error that 1 - beta has in the release, which takes it in float32."""
    return 2e-7 / (1 - betas.max())


@topic("gan/ddgan_diffusion")
def diffusion(golden):
    betas = schedules.vp_betas(int(golden.input("num_timesteps")))
    schedule = schedules.discrete(betas)
    x0, t, eps, eps_t, eps_s, eps_fake = (
        jnp.asarray(golden.input(key))
        for key in ("x0", "t", "q_eps", "pairs_0_randn_like", "pairs_1_randn_like", "post_0_randn_like")
    )
    levels = schedule.level(jnp.maximum(t - 1, 0).astype(jnp.float32))
    level = jax.tree.map(lambda a, clean: jnp.where(t == 0, clean, a), levels, process.clean_like(levels))
    golden.compare("q_sample", process.q_sample(x0, eps, level), atol=2e-6)

    def predict(x_t, t):
        return Denoised(jnp.asarray(golden.input("post_x0_pred")))

    draws = Draws(t.astype(jnp.float32), eps_s, eps_t, eps_fake, None)
    shown = show(predict, x0, draws, draws.t - 1, schedule)
    golden.compare("pairs_x_t", shown.real, atol=2e-6)
    golden.compare("pairs_x_tp1", shown.x_t, atol=2e-6)
    golden.compare("post_sample", shown.fake, atol=2e-6)
    mean = process.posterior(shown.prediction, shown.x_t, shown.t, shown.s).mean
    golden.compare("post_mean", mean, atol=2e-6)
    check_sampling(golden, betas)


def check_sampling(golden, betas):
    schedule, num_steps = schedules.discrete(betas), len(betas)
    draws = sorted(golden.keys("loop_[0-9]*"), key=lambda key: int(key.split("_")[1]))
    z, noise = (jnp.stack([jnp.asarray(golden.input(key)) for key in draws[i::2]]) for i in (0, 1))

    def generator(params, x_t, t, cond, *, train=False, key=None):
        del params, train, key
        shift = 0.05 * (t + 1) + 0.1 * cond["z"].mean(axis=1)
        return jnp.tanh(0.8 * x_t + expand(shift, x_t))

    def build(cond):
        return denoiser(generator, {}, schedule, parameterization.x0(), cond)

    denoise = with_latents(build, {}, lambda t: z[num_steps - 1 - t[0].astype(jnp.int32)])
    grid = jnp.asarray(times.trailing(num_steps, num_steps), jnp.float32)
    x = jnp.asarray(golden.input("loop_x_init"))
    golden.compare("loop_out", sample(ancestral(schedule), denoise, KEY, x, grid, noise=noise), atol=5e-6)


@topic("gan/ddgan_losses")
def loss_terms(golden):
    check_logits(golden)
    check_penalty(golden)
    check_averages(golden)


def check_logits(golden):
    adversarial = losses.non_saturating()
    real, fake = jnp.asarray(golden.input("real_logits")), jnp.asarray(golden.input("fake_logits"))
    nothing = jnp.full_like(real, -jnp.inf)  # a logit without a loss of its own
    golden.compare("errD_real", adversarial.discriminator(real, nothing).mean(), rtol=1e-6)
    golden.compare("errD_fake", adversarial.discriminator(-nothing, fake).mean(), rtol=1e-6)

    def d_loss(real, fake):
        return adversarial.discriminator(real, fake).mean()

    def g_loss(fake):
        return adversarial.generator(real, fake).mean()

    golden.compare("errD", d_loss(real, fake), rtol=1e-6)
    golden.compare("errG", g_loss(fake), rtol=1e-6)
    for key, value in zip(("real", "fake"), jax.grad(d_loss, (0, 1))(real, fake), strict=True):
        golden.compare(f"d_errD_d_{key}", value, atol=1e-7)
    golden.compare("d_errG_d_fake", jax.grad(g_loss)(fake), atol=1e-7)


def check_penalty(golden):
    x, x_t, weight = (jnp.asarray(golden.input(key)) for key in ("r1_x", "r1_xt", "r1_w"))
    gamma = float(golden.input("r1_gamma"))

    def judge(x_s, x_t, t):
        wave = (weight[None] * jnp.sin(x_s)).sum((1, 2, 3))
        return wave + 0.05 * jnp.square(x_s * x_t).sum((1, 2, 3))

    t = jnp.zeros(x.shape[0])
    golden.compare("r1_D", judge(x, x_t, t), rtol=2e-5, atol=1e-5)
    golden.compare("r1_grad", jax.grad(lambda x: judge(x, x_t, t).sum())(x), atol=1e-5)
    level = schedules.discrete(schedules.vp_betas(4)).level(t)
    shown = Shown(x, x_t, t, x, x, x, level, level)
    zero = losses.Adversarial(lambda real, fake: 0 * real, lambda real, fake: 0 * fake)
    loss, metrics = ddgan.discriminator_loss(judge, shown, jnp.int32(0), adversarial=zero, r1_gamma=gamma)
    golden.compare("r1_penalty", metrics["r1"], rtol=1e-5)
    golden.compare("r1_loss", loss, rtol=1e-5)


def check_averages(golden):
    """Adam under the cosine rate, and an average that starts as the parameters after the first step."""
    epochs, decay = int(golden.input("lr_num_epoch")), float(golden.input("ema_decay"))
    lr = float(golden.arrays["lr_per_step"][0])
    rate = cosine_rate(lr, epochs)
    steps = len(golden.arrays["lr_per_step"])
    golden.compare("lr_per_step", np.asarray([rate(epoch) for epoch in range(steps)]), rtol=1e-5)
    names = [key.removesuffix("_init") for key in golden.keys("ema_p*_init")]
    grads = {name: jnp.asarray(golden.input(name.replace("ema_p", "ema_p_grads"))) for name in names}
    adam = optax.adam(rate, b1=0.5, b2=0.9)
    average = from_first_update("ema", decay)

    def run(params):
        opt_state, ends = adam.init(params), []
        averages = ema.start([average], {"model": params})
        for step in range(steps):
            gradient = {name: grads[name][step] for name in names}
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = adam.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
            averages = ema.update([average], averages, {"model": params}, jnp.int32(step), 1)
            ends.append((params, averages["ema"]["model"]))
        return ends

    # Adam's updates do not depend on the parameters: the first ones follow from the last.
    last = {name: jnp.asarray(golden.input(f"{name}_step{steps - 1}")) for name in names}
    moved = run(jax.tree.map(jnp.zeros_like, last))[-1][0]
    ends = run(jax.tree.map(lambda end, move: end - move, last, moved))
    golden.leave("ema_p[0-9]*_init", COPIED)
    golden.leave("ema_p[0-9]*_step*", COPIED)
    for step, (_, averaged) in enumerate(ends):
        for name in names:
            golden.compare(f"{name.replace('ema_p', 'ema_e')}_step{step}", averaged[name], atol=1e-6)
    for name in names:
        np.testing.assert_allclose(ends[-1][0][name], last[name], atol=1e-6)


def cosine_rate(lr, epochs, lowest=1e-5):
    """The release's rate by epochs; it rises again after the last."""
    return lambda epoch: lowest + (lr - lowest) * (1 + jnp.cos(jnp.pi * epoch / epochs)) / 2


def from_first_update(name, decay):
    def rate(step, batch_size):
        del batch_size
        return jnp.where(step == 0, 1.0, jnp.float32(1 - decay))

    return ema.EMA(name, rate, "as released")


@topic("gan/ddgan_trainstep")
def train_step(golden):
    generator = generator_from_config(ast.literal_eval(str(golden.input("config_json"))))
    base_channels, time_features = golden.input("disc_config").tolist()
    disc = ddgan_small_discriminator().clone(base_channels=base_channels, time_features=time_features)
    state = {
        name: {key.removeprefix(name): golden.input(key) for key in golden.keys(f"{name}*")} for name in ("G0/", "D0/")
    }
    start = {"model": import_generator(state["G0/"], generator), "disc": import_discriminator(state["D0/"], disc)}
    x0, gamma = nhwc(golden.input("real")), float(golden.input("r1_gamma"))
    draws = [recorded(golden, 0), recorded(golden, 5)]
    method = replaying(generator, disc, start, x0, draws, int(golden.input("num_timesteps")), gamma)
    optimizers = {
        player: optax.adam(float(golden.input(key)), b1=0.5, b2=0.9)
        for player, key in (("disc", "lr_d"), ("model", "lr_g"))
    }
    begun = create_state(method, optimizers, (), KEY, {"x0": x0})
    with jax.default_matmul_precision("highest"):
        ended, logs = jax.jit(make_train_step(method, optimizers))(begun, {"x0": x0})
    check_step(golden, ended, logs, gamma)
    for player, letter, export, net in (
        ("disc", "D", export_discriminator, disc),
        ("model", "G", export_generator, generator),
    ):
        # after one update Adam's first moment is (1 - b1) times the gradient
        gradient = export(jax.tree.map(lambda m: 2 * m, ended.opt_state[player][0].mu), net)
        check_update(golden, letter, gradient, export(ended.params[player], net))


def recorded(golden, first):
    kinds = ("randint", "randn_like", "randn_like", "randn", "randn_like")
    t, eps_t, eps_s, z, eps_fake = (golden.input(f"draw_{first + i}_{kind}") for i, kind in enumerate(kinds))
    t = jnp.asarray(t.astype(np.float32))
    return Draws(t, nhwc(eps_s), nhwc(eps_t), nhwc(eps_fake), jnp.asarray(z))


def replaying(generator, disc, start, x0, draws, num_steps, gamma):
    """Our losses with the recorded draws in the place of random ones; aux keeps what the two objectives saw."""
    schedule, adversarial = schedules.discrete(schedules.vp_betas(num_steps)), losses.non_saturating()
    network, judge_network = as_network(generator), as_network(disc)

    def play(params, x0, draws):
        meaning = parameterization.x0()
        denoise = denoiser(network, params["model"], schedule, meaning, {"z": draws.z}, train=True)

        def judge(x_s, x_t, t):
            return judge_network(params["disc"], x_s, t, {"x_t": x_t}, train=True)

        return judge, show(denoise, x0, draws, draws.t - 1, schedule)

    def disc_objective(params, aux, batch, key, step):
        judge, shown = play(params, batch["x0"], draws[0])
        loss, metrics = ddgan.discriminator_loss(judge, shown, step, adversarial=adversarial, r1_gamma=gamma)
        return loss, metrics | {f"D_{name}": getattr(shown, name) for name in ("x_t", "real", "fake", "prediction")}

    def model_objective(params, aux, batch, key, step):
        judge, shown = play(params, batch["x0"], draws[1])
        loss, metrics = ddgan.generator_loss(judge, shown, adversarial=adversarial)
        return loss, metrics | {"G_x_t": shown.x_t}

    shapes = {"logit_real": x0[:, 0, 0, 0], "logit_fake": x0[:, 0, 0, 0], "logit_generated": x0[:, 0, 0, 0]}
    shapes |= dict.fromkeys(("D_x_t", "D_real", "D_fake", "D_prediction", "G_x_t"), x0)
    return Method(
        lambda key, batch: (start, jax.tree.map(jnp.zeros_like, shapes)),
        (Objective("disc", disc_objective), Objective("model", model_objective)),
        generate=lambda *args: x0,
        advance=lambda aux, params, step, metrics: {name: metrics[name] for name in aux},
    )


def check_step(golden, ended, logs, gamma):
    seen, adversarial = ended.aux, losses.non_saturating()
    golden.compare("D_t", golden.input("draw_0_randint"))
    golden.compare("G_t", golden.input("draw_5_randint"))
    for key, name in (
        ("D_x_t", "D_real"), ("D_x_tp1", "D_x_t"), ("D_x0_pred", "D_prediction"), ("D_x_pos", "D_fake"),
        ("G_x_tp1", "G_x_t"),
    ):  # fmt: skip
        golden.compare(key, nchw(seen[name]), atol=2e-5)
    for key, name in (
        ("D_logits_real", "logit_real"), ("D_logits_fake", "logit_fake"), ("G_logits_fake", "logit_generated"),
    ):  # fmt: skip
        golden.compare(key, seen[name], atol=1e-4)
    sure = jnp.full_like(seen["logit_real"], jnp.inf)
    golden.compare("errD_real", adversarial.discriminator(seen["logit_real"], -sure).mean(), rtol=1e-4)
    golden.compare("errD_fake", adversarial.discriminator(sure, seen["logit_fake"]).mean(), rtol=1e-4)
    golden.compare("errG", logs["model/loss"], rtol=1e-4)
    golden.compare("r1_raw", logs["r1"], rtol=1e-3)
    golden.compare("r1_loss", logs["disc/loss"] - golden.arrays["errD_real"] - golden.arrays["errD_fake"], atol=2e-5)
    golden.compare("r1_loss", gamma / 2 * logs["r1"], rtol=1e-3)


def check_update(golden, letter, gradient, params):
    names = golden.input(f"{letter}_param_names").tolist()
    norms = np.asarray([np.linalg.norm(gradient[name].ravel()) for name in names])
    near(golden, f"{letter}_grad_norms", norms, 1e-3)
    floor = 1e-7 * float(norms.max())
    for key in golden.keys(f"g{letter}/*"):
        golden.compare(key, gradient[key[3:]], atol=floor + 1e-3 * float(np.abs(golden.arrays[key]).max()))
        after = golden.arrays[f"{letter}1/{key[3:]}"]
        # Adam's first step is lr times the gradient's sign, which rounding decides where the gradient is nearly 0.
        clear = np.abs(golden.arrays[key]) > max(1e-6, 1e-3 * float(np.abs(golden.arrays[key]).max()))
        golden.compare(f"{letter}1/{key[3:]}", np.where(clear, params[key[3:]], after), atol=1e-6)

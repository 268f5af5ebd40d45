"""Golden topics of the floor: schedules, respacing, reverse moments, DDPM losses, bits/dim, resampling, LDM's loss."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from golden_harness import topic

from jaxdiff import losses, parameterization, process, schedules, times, weighting
from jaxdiff.denoiser import clip_x0, denoiser
from jaxdiff.methods import ddpm
from jaxdiff.metrics import bits_per_dim
from jaxdiff.networks.layers import sinusoidal_embedding
from jaxdiff.types import Level

NAMED_BETAS = {"linear": schedules.linear_betas, "cosine": schedules.cosine_betas}
VARIANCES = {
    "FIXED_SMALL": process.fixed_small,
    "FIXED_LARGE": process.fixed_large,
    "LEARNED": process.learned,
    "LEARNED_RANGE": process.learned_range,
}
# Two distribution functions, each rounded to 6e-8 and computed to within an ulp or two.
CDF_ROUNDING = 2.4e-7


def mean_types(betas):
    return {
        "EPSILON": parameterization.eps(),
        "START_X": parameterization.x0(),
        "PREVIOUS_X": parameterization.previous_x(schedules.discrete(betas)),
    }


def channels_last(a):
    """[B, C, H, W] -> [B, H, W, C]."""
    return jnp.asarray(np.moveaxis(a, 1, -1))


def channels_first(a):
    return np.moveaxis(np.asarray(a), -1, 1)


def decoder_rounding(x0, mean, log_variance):
    """What float32 leaves open in the decoder's likelihood, where a probability is a difference of numbers near 1.

    Returns the exact probabilities [B, ...], and the width [B, ...] in nats of the logarithms that probabilities within
    `CDF_ROUNDING` of them have. Whether tanh rounds to 1 far out depends on the compiler.
    """
    x, mean, std = (np.asarray(a, np.float64) for a in (x0, mean, np.exp(0.5 * log_variance)))
    x, mean, std = np.broadcast_arrays(x, mean, std)
    edges = [(x - mean + h / 255) / std for h in (1, -1)]
    upper, lower = (0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) for z in edges)
    exact = np.where(x < -0.999, upper, np.where(x > 0.999, 1 - lower, upper - lower))
    width = np.log(exact + CDF_ROUNDING) - np.log(np.maximum(exact - CDF_ROUNDING, 1e-12))
    return exact, width


def bits(nats):
    return nats.reshape(len(nats), -1).mean(axis=1) / np.log(2)


def settle(file, key, value, allowed):
    """value, with the release's number wherever the two differ by no more than `allowed`, an array."""
    golden, value = file.arrays[key].astype(np.float64), np.asarray(value, np.float64)
    return np.where(np.abs(value - golden) <= allowed, golden, value)


@topic("core/schedules")
def core_schedules(file):
    tabulated = {}
    for key in file.keys("f64/*"):
        _, chain, name = key.split("/")
        if chain not in tabulated:
            kind, num_steps = chain.split("_")
            tabulated[chain] = schedules.tables(NAMED_BETAS[kind](int(num_steps)))
        # 1 - alphas_cumprod loses the digits of alphas_cumprod that are near 1, in the release as well
        file.compare(key, getattr(tabulated[chain], name), rtol=1e-12)


@topic("core/respace")
def core_respace(file):
    for num_steps, sections, outcome in file.meta["errors"]:
        try:
            times.respace(num_steps, sections)
            got = "ok"
        except ValueError:
            got = "ValueError"
        assert got == outcome, f"respace({num_steps}, {sections!r}): {got}, the release has {outcome}"
    for key in file.keys():
        num_steps, sections, name = key.removeprefix("f64/").split("/")
        num_steps = int(num_steps)
        kept = times.respace(num_steps, sections)
        if name in ("timesteps", "timestep_map"):
            file.compare(key, kept)
        elif name == "model_timesteps_rescaled":
            net_time = parameterization.scaled_time(1000 / num_steps)
            file.compare(key, net_time(jnp.asarray(kept, jnp.float32)), rtol=1e-7)
        elif name == "betas":
            betas = NAMED_BETAS["linear" if num_steps >= 300 else "cosine"](num_steps)
            # differences of alphas_cumprod near 1: rounding of 1 bit is 1e-12 of the smallest beta
            file.compare(key, times.respace_betas(betas, kept), rtol=1e-12, atol=1e-16)


@topic("core/p_mean_variance")
def core_p_mean_variance(file):
    betas = file.input("f64/betas")
    tables = schedules.tables(betas)
    file.compare("f64/betas", NAMED_BETAS[file.meta["schedule"]](file.meta["T"]), rtol=1e-12)
    x0, eps, output = (channels_last(file.input(k)) for k in ("x_start", "noise", "model_output"))
    t = jnp.asarray(file.input("t"), jnp.int32)
    channels = x0.shape[-1]
    chains = {name: ddpm.tabulate(betas, p) for name, p in mean_types(betas).items()}

    def at(table):
        return jnp.asarray(table, jnp.float32)[t]

    def full(a):
        return channels_first(jnp.broadcast_to(a, x0.shape))

    level = Level(at(tables.sqrt_alphas_cumprod), at(tables.sqrt_one_minus_alphas_cumprod))
    x_t = process.q_sample(x0, eps, level)
    file.compare("x_t", channels_first(x_t), atol=1e-6)
    none = jnp.zeros_like(x0)
    file.compare("q_mean_variance/mean", channels_first(process.q_sample(x0, none, level)), atol=1e-6)
    wide = [a.reshape(-1, 1, 1, 1) for a in (level.sigma**2, at(tables.log_one_minus_alphas_cumprod))]
    file.compare("q_mean_variance/variance", full(wide[0]), rtol=1e-6)
    file.compare("q_mean_variance/log_variance", full(wide[1]), rtol=1e-6)
    between = process.chain_bridge(tables, t)
    small = process.fixed_small(between, x0)
    file.compare("q_posterior/mean", channels_first(process.posterior_mean(x0, x_t, between)), atol=1e-6)
    file.compare("q_posterior/variance", full(small.value), rtol=1e-6)
    file.compare("q_posterior/log_variance_clipped", full(small.log), rtol=1e-6)
    file.compare("prior_bpd", bits_per_dim.prior_bits(tables, x0), rtol=1e-5, atol=1e-7)

    def reverse(mean_type, f, clip):
        skip, out, *_ = (at(a).reshape(-1, 1, 1, 1) for a in chains[mean_type].affine)
        predicted = skip * x_t + out * f
        return jnp.clip(predicted, -1, 1) if clip else predicted

    for key in file.keys("pmv/*") + file.keys("vb/*"):
        kind, mean_type, variance_type, clip, name = key.split("/")
        f, variance_out = output[..., :channels], output[..., channels:]
        predicted = reverse(mean_type, f, clip == "clip1")
        # the release's PREVIOUS_X mean is the output itself, whether or not the displayed x0 is clipped
        used = reverse(mean_type, f, clip == "clip1" and mean_type != "PREVIOUS_X")
        variance = VARIANCES[variance_type](between, x0, variance_out)
        scale = np.abs(file.arrays[key]).max()
        if kind == "vb":
            value = losses.vlb_term(x0, x_t, used, between, variance, t == 0)
            _, width = decoder_rounding(x0, process.posterior_mean(used, x_t, between), variance.log)
            file.compare(key, settle(file, key, value, np.where(t == 0, bits(width), 0)), rtol=2e-5, atol=1e-6)
        elif name == "mean":
            file.compare(key, channels_first(process.posterior_mean(used, x_t, between)), atol=2e-6 * max(scale, 1))
        elif name == "pred_xstart":
            file.compare(key, channels_first(predicted), rtol=1e-5, atol=1e-6 * max(scale, 1))
        else:
            value = variance.value if name == "variance" else variance.log
            # a logarithm near 0 is known as well as its variance is, relatively
            file.compare(key, full(value), rtol=1e-5, atol=1e-6 if name == "log_variance" else 0)

    x, mean, log_std = (jnp.asarray(file.input(f"dll/{k}")) for k in ("x", "means", "log_scales"))
    log_p = -losses.discretized_gaussian_nll(x, mean, log_std)
    _, width = decoder_rounding(x, mean, 2 * log_std)
    file.compare("dll/log_probs", settle(file, "dll/log_probs", log_p, width), rtol=1e-5, atol=1e-5)
    kl = losses.gaussian_kl(*(jnp.asarray(file.input(f"kl/{k}")) for k in ("mean1", "logvar1", "mean2", "logvar2")))
    file.compare("kl/out", kl, rtol=1e-5, atol=1e-6)


@topic("core/training_losses")
def core_training_losses(file):
    betas = file.input("f64/betas")
    file.compare("f64/betas", NAMED_BETAS[file.meta["schedule"]](file.meta["T"]), rtol=1e-12)
    x0, eps, output = (channels_last(file.input(k)) for k in ("x_start", "noise", "model_output"))
    t = jnp.asarray(file.input("t"), jnp.int32)
    net_time = parameterization.scaled_time(1000 / betas.size) if file.meta["rescale_timesteps"] else lambda t: t
    file.compare("model_timesteps_rescaled", net_time(t.astype(jnp.float32)), rtol=1e-7)
    chains = {name: ddpm.tabulate(betas, p) for name, p in mean_types(betas).items()}
    tables = schedules.tables(betas)
    between = process.chain_bridge(tables, t)
    x_t = process.q_sample(x0, eps, Level(*(jnp.asarray(a, jnp.float32)[t] for a in (
        tables.sqrt_alphas_cumprod, tables.sqrt_one_minus_alphas_cumprod))))  # fmt: skip

    def decoder(chain, variance, f):
        f, variance_out = jnp.split(f, 2, axis=-1) if variance in ddpm.LEARNED else (f, None)
        skip, out, *_ = (jnp.asarray(a, jnp.float32)[t].reshape(-1, 1, 1, 1) for a in chain.affine)
        mean = process.posterior_mean(skip * x_t + out * f, x_t, between)
        return decoder_rounding(x0, mean, variance(between, x0, variance_out).log)

    cases = sorted({tuple(key.split("/")[:3]) for key in file.keys("*/*/*/loss")})
    for mean_type, variance_type, loss_type in cases:
        variance, prefix = VARIANCES[variance_type], f"{mean_type}/{variance_type}/{loss_type}"
        f = output if variance in ddpm.LEARNED else output[..., : x0.shape[-1]]

        def total(f, mean_type=mean_type, variance=variance, loss_type=loss_type):
            terms = ddpm.chain_loss(
                chains[mean_type], f, x0, eps, t, variance=variance, loss=ddpm.Loss[loss_type]
            )  # fmt: skip
            return terms["total"].mean(), terms

        grad, terms = jax.grad(total, has_aux=True)(f)
        p, width = decoder(chains[mean_type], variance, f)
        times_t = betas.size if loss_type == "RESCALED_KL" else 1
        allowed = {"loss": bits(width) * times_t, "vb": bits(width), "mse": 0.0}
        names = {"loss": terms["total"], "mse": terms.get("mse"), "vb": terms.get("vb")}
        for key in file.keys(f"{prefix}/*"):
            name = key.split("/")[-1]
            if name == "grad_model_output":
                golden, ours = np.moveaxis(file.arrays[key], 1, -1), np.asarray(grad)
                share = np.where((t == 0).reshape(-1, 1, 1, 1), 10 * CDF_ROUNDING / np.maximum(p, CDF_ROUNDING), 0)
                share = np.concatenate([share] * (f.shape[-1] // x0.shape[-1]), axis=-1)
                open_to = channels_first(share * np.maximum(np.abs(golden), np.abs(ours)))
                value = settle(file, key, channels_first(ours), open_to)
                # learned_range multiplies by log beta - log beta_tilde, which long chains know to 6e-8 only
                file.compare(key, value, rtol=2e-5, atol=1e-5 * np.abs(golden).max())
            else:
                value = settle(file, key, names[name], np.where(t == 0, allowed[name], 0))
                file.compare(key, value, rtol=2e-5, atol=1e-6 * times_t)


@topic("core/bpd")
def core_bpd(file):
    betas, x0 = file.input("f64/betas"), channels_last(file.input("x_start"))
    noise = jnp.asarray(np.moveaxis(file.input("noise"), 2, -1))
    assert betas.size == file.meta["T"]

    def network(params, x_t, t, cond, *, train=False, key=None):
        eps = 0.3 * x_t + 0.05 * jnp.sin(x_t) + 0.01 * t.reshape(-1, 1, 1, 1)
        return jnp.concatenate([eps, jnp.tanh(x_t)], axis=-1) if params["learned"] else eps

    for variance_type in sorted({key.split("/")[0] for key in file.keys("*/total_bpd")}):
        variance = VARIANCES[variance_type]
        learned = variance in ddpm.LEARNED
        schedule = schedules.discrete(betas)
        denoise = denoiser(
            network, {"learned": learned}, schedule, parameterization.eps(), learned_variance=learned
        )  # fmt: skip
        result = bits_per_dim.bits_per_dim(clip_x0(denoise), betas, variance, jax.random.key(0), x0, noise=noise)
        names = dict(total_bpd="total", prior_bpd="prior", vb="vb", xstart_mse="x0_mse", mse="eps_mse")
        for name, ours in names.items():
            file.compare(f"{variance_type}/{name}", getattr(result, ours), rtol=2e-5, atol=1e-6)


@topic("core/misc_gd")
def core_misc_gd(file):
    t = jnp.asarray(file.input("timestep_embedding/t"))
    for key in file.keys("timestep_embedding/[0-9]*"):
        # an angle of 1000 radians is known to 6e-5 in float32
        file.compare(key, sinusoidal_embedding(t, int(key.split("/")[1])), atol=1e-4)
    length = int(re.search(r"history_per_term=(\d+)", file.meta["source"]).group(1))
    num_steps = file.meta["num_timesteps"]
    with jax.enable_x64(True):
        state = times.init_history(num_steps, length, jnp.float64)
        update = jax.jit(times.update_history)
        weights = []
        for ts, values in zip(file.input("resampler/ts"), file.input("f64/resampler/losses"), strict=True):
            state = update(state, jnp.asarray(ts), jnp.asarray(values))
            p = np.asarray(times.probabilities(state))
            # until every step is full the release's weights are ones, and normalised only when drawn from
            weights.append(p if (np.asarray(state.counts) >= length).all() else p * num_steps)
    file.compare("f64/resampler/weights_after_update", np.stack(weights), rtol=1e-12)
    file.compare("resampler/warmed", (np.asarray(state.counts) >= length).all())
    file.compare("f64/resampler/importance_weight_per_t", 1 / (num_steps * p), rtol=1e-12)


@topic("core/ldm_loss")
def core_ldm_loss(file):
    meta = file.meta
    if meta["sched"] == "cosine":
        betas = schedules.cosine_betas(meta["T"])
    else:
        betas = schedules.scaled_linear_betas(meta["T"], meta["linear_start"], meta["linear_end"])
    x0, eps, cond = channels_last(file.input("z")), channels_last(file.input("noise")), jnp.asarray(file.input("cond"))
    t = jnp.asarray(file.input("t"), jnp.int32)
    distance = {"l1": losses.l1, "l2": losses.mse}[meta["loss_type"]]
    start, stop, count = (float(v) for v in re.search(r"linspace\((.*)\)", meta["logvar"]).group(1).split(","))
    log_variance = jnp.asarray(np.linspace(start, stop, int(count)), jnp.float32)[t]
    share = meta["v_posterior"]
    variance = weighting.posterior_variance(betas, share)
    schedule = schedules.discrete(betas)
    tables = schedules.tables(betas)
    level = Level(*(jnp.asarray(a, jnp.float32)[t] for a in (
        tables.sqrt_alphas_cumprod, tables.sqrt_one_minus_alphas_cumprod)))  # fmt: skip
    output = 0.5 * process.q_sample(x0, eps, level) + cond.reshape(-1, 1, 1, 1)
    elbo = {"eps": weighting.elbo_eps(betas, share), "x0": weighting.release_elbo_x0(betas)}
    for name, meaning in {"eps": parameterization.eps(), "x0": parameterization.x0()}.items():
        file.compare(f"{name}/lvlb_weights", elbo[name], rtol=2e-5)
        file.compare(f"{name}/posterior_variance", variance, rtol=1e-6)
        file.compare(f"{name}/posterior_log_variance_clipped", np.log(np.maximum(variance, 1e-20)), rtol=1e-6)
        chain = ddpm.tabulate(betas, meaning)
        simple = ddpm.chain_loss(chain, output, x0, eps, t, distance=distance)["total"]
        vlb = (weighting.by_index(schedule, elbo[name])(level) * simple).mean()
        loss = losses.with_log_variance(simple, log_variance).mean() + meta["original_elbo_weight"] * vlb
        values = {"train/loss_simple": simple.mean(), "train/loss_vlb": vlb, "train/loss": loss, "loss": loss}
        for key, value in values.items():
            file.compare(f"{name}/{key}", value, rtol=2e-5)

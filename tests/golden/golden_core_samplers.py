"""Golden topics of the samplers: guided-diffusion, the DDIM release, EDM and latent diffusion.

The models are elementwise formulas, given in each file's metadata, so arrays keep the releases' axis order: no solver
looks at it. Trajectories are float32 on both sides, except for EDM, whose state is float64 around a float32 network.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from golden_harness import topic

from jaxdiff import editing, guidance, parameterization, process, schedules, times
from jaxdiff.denoiser import clip_x0, denoiser
from jaxdiff.solvers.ancestral import ancestral
from jaxdiff.solvers.base import integrate, sample
from jaxdiff.solvers.ddim import ddim, ddim_inversion
from jaxdiff.solvers.heun import euler_in_time, heun, heun_in_time
from jaxdiff.solvers.pndm import plms
from jaxdiff.types import Denoised, Level, expand

KEY = jax.random.key(0)
NAMED_BETAS = {"linear": schedules.linear_betas, "cosine": schedules.cosine_betas}
VARIANCES = {
    "FIXED_SMALL": process.fixed_small,
    "FIXED_LARGE": process.fixed_large,
    "LEARNED_RANGE": process.learned_range,
}


def model(formula):
    """A Network from (x, t broadcast to x, cond) -> output."""

    def network(params, x_t, t, cond, *, train=False, key=None):
        del params, train, key
        return formula(x_t, expand(t, x_t), cond)

    return network


def grid(ascending):
    return jnp.asarray(np.asarray(ascending)[::-1], jnp.float32)


def compare_states(file, key, x):
    """2e-5 for states of order 1. Larger ones, up to 1e3, feed the models' sines with their own rounding."""
    largest = np.abs(file.arrays[key]).max()
    file.compare(key, x, atol=2e-5 if largest <= 10 else 1e-5 * largest)


def compare_predictions(file, key, x0, x, level):
    """2e-5, and the rounding of (x - sigma eps) / alpha at the first level [1], where alpha may be 5e-5."""
    rounding = 2e-7 * float(np.abs(x).max() / level.alpha[0])
    file.compare(key, x0, atol=2e-5 + rounding)


def with_last_x0(trajectory, denoise, last_time):
    """Every x0 prediction. A trajectory ends with the clean data, which the releases may guide after predicting it."""
    x = trajectory.x[-2]
    last = denoise(x, jnp.full(x.shape[:1], last_time, jnp.float32)).x0
    return jnp.concatenate([trajectory.x0[:-1], last[None]])


@topic("core/samplers_gd")
def samplers_gd(file):
    betas = NAMED_BETAS[file.meta["schedule"]](file.meta["T"])
    schedule = schedules.discrete(betas)
    kept = times.respace(file.meta["T"], file.meta["respacing"])
    file.compare("timestep_map", kept)
    file.compare("f64/spaced_betas", times.respace_betas(betas, kept), rtol=1e-12, atol=1e-15)
    x, noise, y = (jnp.asarray(file.input(key)) for key in ("x_T", "noise", "y"))
    cond = {"y": y.astype(jnp.float32)}

    def formula(x, t, cond):
        eps = 0.9 * x + 0.1 * jnp.cos(x) + 2e-4 * t + 0.05 * expand(cond["y"], x)
        return jnp.concatenate([eps, jnp.sin(x + 1e-3 * t)], axis=-1)

    def gradient(x, t):
        return 0.3 * (0.5 * expand(cond["y"], x) - x) * jnp.exp(-1e-3 * expand(t, x))

    raw = denoiser(model(formula), {}, schedule, parameterization.eps(), cond, learned_variance=True)
    first = schedule.level(grid(kept)[:1])
    for key in file.keys("ancestral/*/sample"):
        _, variance, guide, clip, _ = key.split("/")
        solver = ancestral(schedule, VARIANCES[variance], classifier_gradient=gradient if guide == "cond1" else None)
        denoise = clip_x0(raw) if clip == "clip1" else raw
        _, path = sample(solver, denoise, KEY, x, grid(kept), noise=noise, return_trajectory=True)
        compare_states(file, key, path.x)
        predictions = with_last_x0(path, denoise, kept[0])
        compare_predictions(file, key.replace("sample", "pred_xstart"), predictions, x, first)
    for key in file.keys("ddim/*/sample"):
        _, eta, guide, _ = key.split("/")
        denoise = clip_x0(raw)
        if guide == "cond1":
            denoise = guidance.classifier(denoise, schedule, gradient)
        solver = ddim(schedule, float(eta.removeprefix("eta")))
        _, path = sample(solver, denoise, KEY, x, grid(kept), noise=noise, return_trajectory=True)
        compare_states(file, key, path.x)
        compare_predictions(file, key.replace("sample", "pred_xstart"), path.x0, x, first)
    x0 = jnp.asarray(file.input("encode/x0"))
    up = jnp.asarray(kept, jnp.float32)
    _, path = sample(ddim_inversion(schedule), raw, KEY, x0, up, return_trajectory=True)
    compare_states(file, "encode/trajectory", path.x)


@topic("core/ddim_ermon")
def ddim_ermon(file):
    start, end, num_steps = re.fullmatch(r"linear (\S+)\.\.(\S+), T=(\d+)", file.meta["betas"]).groups()
    schedule = schedules.discrete(schedules.linear_betas(int(num_steps), float(start), float(end), rescale=False))
    network = model(lambda x, t, cond: 0.9 * x + 0.05 * jnp.sin(x) + 1e-4 * t)
    raw = denoiser(network, {}, schedule, parameterization.eps())
    x = jnp.asarray(file.input("x_T"))
    grids = {"uniform": times.ddim_uniform, "quad": times.quadratic}
    for key in file.keys("*/xs"):
        kind, mode, _ = key.split("/")
        steps = file.arrays[f"seq/{kind}"]
        if mode == "ddpm_noisy":
            solver, denoise = ancestral(schedule, process.fixed_large), clip_x0(raw)
        else:
            solver, denoise = ddim(schedule, float(mode.removeprefix("eta"))), raw
        noise = jnp.asarray(file.input(f"noise/{kind}"))
        _, path = sample(solver, denoise, KEY, x, grid(steps), noise=noise, return_trajectory=True)
        compare_states(file, key, jnp.concatenate([x[None], path.x]))
        if mode != "ddpm_noisy":
            first = schedule.level(grid(steps)[:1])
            compare_predictions(file, key.replace("/xs", "/x0_preds"), path.x0, x, first)
    for key in file.keys("seq/*"):
        n = file.arrays[key].size
        asked = next(k for k in range(n, 0, -1) if grids[key[4:]](int(num_steps), k).size == n)
        file.compare(key, grids[key[4:]](int(num_steps), asked)[::-1])


def float32_network(wrapping, c_noise_factor):
    """EDM's convention: D(x; sigma) computed in float32, whatever the sampler's precision. t is sigma."""

    def denoise(x, sigma):
        x32, sigma32 = x.astype(jnp.float32), sigma.astype(jnp.float32)
        c = wrapping.coefficients(Level(jnp.ones_like(sigma32), sigma32))
        scaled = expand(c.scale_in, x32) * x32
        f = 0.6 * scaled + 0.2 * jnp.sin(2 * scaled) + c_noise_factor * expand(wrapping.net_time(sigma32), x32)
        x0 = expand(c.skip, x32) * x32 + expand(c.out, f) * f
        return Denoised(x0.astype(x.dtype))

    return denoise


def in_schedule(denoise, schedule):
    """A denoiser of (x / alpha, sigma / alpha) as a denoiser at the schedule's own (x, t)."""

    def wrapped(x, t):
        level = schedule.level(t)
        return denoise(x / expand(level.alpha, x), level.sigma / level.alpha)

    return wrapped


# What the file does not say was found by matching file a: the calls of `edm_sampler`, and 9 steps for the ablations.
EDM_RUNS = {
    "det18": {"grid": {"n": 18}},
    "det5_rho5": {"grid": {"n": 5, "rho": 5.0}},
    "churn": {"grid": {"n": 10}, "churn": 40.0, "churn_min": 0.05, "churn_max": 50.0, "churn_noise": 1.003},
    "churn_narrow": {
        "grid": {"n": 8, "sigma_max": 20.0},
        "churn": 40.0,
        "churn_min": 1.0,
        "churn_max": 5.0,
        "churn_noise": 1.007,
    },
}
ABLATION_STEPS = 9
ROOT_TIME = schedules.Schedule(
    lambda t: Level(jnp.ones_like(t), jnp.sqrt(t)), lambda h: jnp.exp(-2 * h), 0.02**2, 100.0**2
)


@topic("core/edm")
def edm(file):
    with jax.enable_x64(True):
        edm_in_float64(file)


def edm_in_float64(file):
    sigma_data = file.meta["sigma_data"]
    wrappers = {
        "EDMPrecond": float32_network(parameterization.edm(sigma_data), 0.05),
        "VPPrecond": float32_network(parameterization.vp_preconditioning(), 0.05e-3),
        "VEPrecond": float32_network(parameterization.ve_preconditioning(), 0.05),
        "iDDPMPrecond": float32_network(parameterization.iddpm_preconditioning(), 0.05e-3),
    }
    # the release builds this table in float32, where a level of 0.006 keeps three digits
    released = file.arrays["f64/precond/iDDPM/u"].astype(np.float64)
    file.compare("f64/precond/iDDPM/u", parameterization.iddpm_sigmas(), rtol=1e-3)
    x, sigma = (jnp.asarray(file.input(f"precond/{name}")) for name in ("x", "sigma"))
    rounded = released[np.argmin(np.abs(np.asarray(sigma)[:, None] - released), axis=1)]
    file.compare("precond/iDDPM/round_sigma", rounded, rtol=1e-7)
    for name, denoise in wrappers.items():
        at = jnp.asarray(rounded, jnp.float32) if name == "iDDPMPrecond" else sigma
        golden = file.arrays[f"precond/{name}/D"]
        file.compare(f"precond/{name}/D", denoise(x, at).x0, atol=1e-6 * np.abs(golden).max())

    latents = jnp.asarray(file.input("latents"), jnp.float64)
    for key in file.keys("f64/sampler/*"):
        run = dict(EDM_RUNS[key.rsplit("/", 1)[1]])
        levels = jnp.asarray(times.karras(**run.pop("grid")))
        noise_key = key.removeprefix("f64/") + "/noise"
        noise = jnp.asarray(file.input(noise_key), jnp.float64) if run else None
        solver = heun(schedules.ve(), **run)
        out = sample(solver, wrappers["EDMPrecond"], KEY, latents * levels[0], levels, noise=noise)
        compare_edm(file, key, out)
    for key in file.keys("f64/ablation/*"):
        discretization, schedule, _, wrapper, rule = key.rsplit("/", 1)[1].split("_")
        schedule, grid = ablation(discretization, schedule, released)
        denoise = in_schedule(wrappers[wrapper], schedule)
        solver = {"euler": euler_in_time, "heun": heun_in_time}[rule](schedule)
        x = integrate(solver, denoise, KEY, latents * schedule.level(grid[:1]).sigma[0], grid)
        # the release takes the step to clean data along t as well, which is the denoiser's x0 for sigma(t) = t only
        last, clean = (jnp.full(x.shape[:1], t) for t in (grid[-1], 0.0))
        x, _, _ = euler_in_time(schedule).step(x, None, x, last, clean, denoise)
        compare_edm(file, key, x)
    edm_losses(file, wrappers, sigma_data)


def compare_edm(file, key, out):
    """Relative, and to the largest value: Heun divides a float32 rounding of D by the next, much smaller sigma."""
    file.compare(key, out, rtol=1e-5, atol=1e-5 * np.abs(file.arrays[key]).max())


def ablation(discretization, schedule, released, n=ABLATION_STEPS):
    """The schedule and the times [n] of one configuration of EDM's ablation sampler, with its default ranges."""
    vp = schedules.vp_linear(0.1, 20.0, t_min=1e-3)
    if discretization == "vp":
        grid = times.time_uniform(1.0, 1e-3, n)
    elif discretization == "ve":
        grid = times.exponential(n, 0.02, 100.0) ** 2
    elif discretization == "iddpm":
        own = parameterization.iddpm_sigmas()
        kept = own[:-1][own[:-1] <= 81]
        chosen = kept[np.round((kept.size - 1) / (n - 1) * np.arange(n)).astype(int)]
        grid = released[np.argmin(np.abs(chosen[:, None] - released), axis=1)]
    else:
        grid = times.karras(n)
    return {"vp": vp, "ve": ROOT_TIME, "linear": schedules.ve()}[schedule], jnp.asarray(grid)


def edm_losses(file, wrappers, sigma_data):
    """Elementwise weight times squared error at the release's own draws of sigma."""
    images = jnp.asarray(file.input("loss/images"))
    uniform = jnp.asarray(file.input("loss/rnd_uniform")).reshape(-1)
    normal = jnp.asarray(file.input("loss/edm/rnd_normal")).reshape(-1)
    vp_time = 1 + uniform * (1e-5 - 1)
    vp = schedules.vp_linear(0.1, 20.0).level(vp_time)
    # VP and VE weigh by 1 / sigma^2, EDM by the SNR plus 1 / sigma_data^2
    cases = {
        "edm": ("edm", jnp.exp(normal * 1.2 - 1.2), sigma_data**-2, "EDMPrecond"),
        "vp": ("vpve", vp.sigma / vp.alpha, 0.0, "VPPrecond"),
        "ve": ("vpve", 0.02 * (100.0 / 0.02) ** uniform, 0.0, "VEPrecond"),
    }
    for name, (source, sigma, extra, wrapper) in cases.items():
        level = Level(jnp.ones_like(sigma), sigma)
        noise = jnp.asarray(file.input(f"loss/{source}/noise"))
        d = wrappers[wrapper](process.q_sample(images, noise, level), sigma).x0
        weight = process.snr(level) + extra
        file.compare(f"loss/{name}", expand(weight, d) * (d - images) ** 2, rtol=2e-5, atol=1e-6)


LDM_BETAS = {
    "linear": schedules.scaled_linear_betas,
    "cosine": lambda n, start, end: schedules.cosine_betas(n),
    "sqrt_linear": lambda n, start, end: schedules.linear_betas(n, start, end, rescale=False),
    "sqrt": schedules.sqrt_betas,
}
LDM_GRIDS = {"uniform": times.ddim_uniform, "quad": times.quadratic}


@topic("core/samplers_ldm")
def samplers_ldm(file):
    for key in file.keys("f64/betas/*"):
        kind, start, end = key.split("/")[2:]
        betas = LDM_BETAS[kind](file.arrays[key].size, float(start), float(end))
        file.compare(key, betas, rtol=1e-12, atol=1e-15)
    num_train_steps, num_steps = file.meta["T"], file.meta["S"]
    start, end = re.fullmatch(r"linear\(sqrt-space\) (\S+)\.\.(\S+)", file.meta["betas"]).groups()
    schedule = schedules.discrete(schedules.scaled_linear_betas(num_train_steps, float(start), float(end)))
    for key in file.keys("ddim_timesteps/*"):
        kind, n = key.split("/")[1:]
        file.compare(key, LDM_GRIDS[kind](num_train_steps, int(n), offset=1)[::-1])
    with jax.enable_x64(True):
        ldm_tables(file, schedule, num_train_steps, num_steps)
    cond, uncond = ({"c": jnp.asarray(file.input(name))} for name in ("cond", "uncond"))

    def formula(x, t, cond):
        return 0.85 * x + 0.1 * jnp.tanh(x) + 2e-4 * t + 0.2 * expand(cond["c"], x) * jnp.sin(x)

    def guided(guidance_scale):
        def build(c):
            return denoiser(model(formula), {}, schedule, parameterization.eps(), c)

        return guidance.classifier_free(build, cond, uncond, guidance_scale)

    def ends_at_first_level(n):
        # the release's last step goes to index 0 of the chain, not to clean data
        return jnp.asarray(np.append(times.ddim_uniform(num_train_steps, n, offset=1), 0), jnp.float32)

    x, x0, mask = (jnp.asarray(file.input(name)) for name in ("x_T", "x0", "mask"))
    for key in file.keys("*/eta*/x"):
        name, options, _ = key.split("/")
        scale = re.search(r"guidance_scale([\d.]+)", options)
        noise_key = key.replace("/x", "/noise_drawn")
        solver = plms(schedule)
        noise = None
        if name == "ddim":
            noise = jnp.asarray(file.input(noise_key))
            solver = ddim(schedule, float(re.match(r"eta([\d.]+)", options).group(1)))
        else:
            file.leave(noise_key, "PLMS runs with eta 0: the release draws this noise and multiplies it by 0")
        if options.endswith("mask_x0"):
            solver = editing.keep_before_step(solver, schedule, x0, mask, noise[0::2])
            noise = noise[1::2]
        denoise = guided(float(scale.group(1)) if scale else None)
        grid = ends_at_first_level(num_steps)
        _, path = integrate(solver, denoise, KEY, x, grid, noise=noise, return_trajectory=True)
        compare_states(file, key, jnp.concatenate([x[None], path.x]))
        predictions = jnp.concatenate([x[None], path.x0])
        compare_predictions(file, key.replace("/x", "/pred_x0"), predictions, x, schedule.level(grid[:1]))

    strength = float(str(file.input("img2img/strength")))
    start = editing.image_to_image_compvis(ends_at_first_level(20)[:-1], strength)
    file.compare("img2img/t_enc", start.times.size)
    level = schedule.level(jnp.full(x0.shape[:1], start.noise_time))
    encoded = process.q_sample(x0, jnp.asarray(file.input("img2img/noise")), level)
    compare_states(file, "img2img/encoded", encoded)
    rest = jnp.append(start.times, 0.0)
    compare_states(file, "img2img/decoded", integrate(ddim(schedule), guided(2.0), KEY, encoded, rest))


def ldm_tables(file, schedule, num_train_steps, num_steps):
    """alphas (ours squared) and alphas_prev, which the release rounds to float32, and the sigmas they lead to."""
    for key in file.keys("f64/ddim_params/*/alphas"):
        kind, eta = key.split("/")[2:4]
        grid = LDM_GRIDS[kind](num_train_steps, num_steps, offset=1)[::-1]
        rounded = []
        for name, index in ((key, grid), (key + "_prev", np.append(0.0, grid[:-1]))):
            file.compare(name, schedule.level(jnp.asarray(index.copy())).alpha ** 2, rtol=2.0**-24)
            alphas = jnp.asarray(file.arrays[name])
            rounded.append(Level(jnp.sqrt(alphas), jnp.sqrt(1 - alphas)))
        sigmas = float(eta.removeprefix("eta")) * jnp.sqrt(process.bridge(*rounded).variance)
        file.compare(key.replace("alphas", "sigmas"), sigmas, rtol=1e-12)

"""Golden topic of the diffusers schedulers: every class is one of our solvers on the class's grid.

Three habits of diffusers are spelled out here rather than offered by the library: DDIM and PNDM step to t - T // S
whatever the next time of the grid is, clip x0 after taking eps from it, and the sigma-space classes interpolate sigma
where we interpolate log alpha (so their t is sigma here). The models are elementwise.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from golden_core_samplers import KEY, compare_states, model
from golden_harness import topic

from jaxdiff import editing, guidance, parameterization, process, schedules, times, weighting
from jaxdiff.denoiser import clip_x0, denoiser, dynamic_threshold, threshold
from jaxdiff.solvers.ancestral import ancestral
from jaxdiff.solvers.base import integrate, sample
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.dpm_solver import dpm_solver
from jaxdiff.solvers.dpm_solver_singlestep import dpm_solver_singlestep
from jaxdiff.solvers.exponential import DATA_ODE, DATA_SDE, NOISE_ODE, NOISE_SDE
from jaxdiff.solvers.heun import euler, euler_ancestral, heun
from jaxdiff.solvers.pndm import pndm, pndm_prk
from jaxdiff.types import Level, expand

# the class defaults of 0.42.1 that the configurations leave unset
COMMON = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
CLIPPING = {
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
}
SIGMAS = {"timestep_spacing": "linspace", "use_karras_sigmas": False, "final_sigmas_type": "zero"}
DPM = SIGMAS | {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
DEFAULTS = {
    "DDIMScheduler": CLIPPING | {"set_alpha_to_one": True},
    "DDIMInverseScheduler": CLIPPING | {"set_alpha_to_one": True},
    "DDPMScheduler": CLIPPING | {"variance_type": "fixed_small"},
    "PNDMScheduler": {"timestep_spacing": "leading", "skip_prk_steps": False, "set_alpha_to_one": False},
    "EulerDiscreteScheduler": SIGMAS,
    "EulerAncestralDiscreteScheduler": SIGMAS,
    "HeunDiscreteScheduler": SIGMAS | {"beta_start": 0.00085, "beta_end": 0.012},
    "DPMSolverMultistepScheduler": DPM | {"lower_order_final": True},
    "DPMSolverSinglestepScheduler": DPM,
}
FORMS = {
    "dpmsolver": NOISE_ODE,
    "dpmsolver++": DATA_ODE,
    "sde-dpmsolver": NOISE_SDE,
    "sde-dpmsolver++": DATA_SDE,
}
VARIANCES = {
    "fixed_small": process.fixed_small,
    "fixed_small_log": process.fixed_small,
    "fixed_large": process.fixed_large,
    "learned_range": process.learned_range,
}
MODELS = {
    "epsilon": (parameterization.eps, lambda x, t: 0.9 * x + 0.1 * jnp.sin(x) + 1e-4 * t),
    "v_prediction": (parameterization.v, lambda x, t: 0.2 * x - 0.3 * jnp.cos(x) + 1e-4 * t),
    "sample": (parameterization.x0, lambda x, t: 0.5 * jnp.tanh(x) + 1e-4 * t),
}


def diffusers_betas(config):
    n, start, end = (config[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
    betas = {
        "linear": lambda: schedules.linear_betas(n, start, end, rescale=False),
        "scaled_linear": lambda: schedules.scaled_linear_betas(n, start, end),
        "squaredcos_cap_v2": lambda: schedules.cosine_betas(n),
    }[config["beta_schedule"]]()
    return schedules.zero_terminal_snr(betas) if config["rescale_betas_zero_snr"] else betas


def spaced(config, n):
    """Decreasing indices of `n` steps by the configuration's spacing."""
    total = config["num_train_timesteps"]
    if config["timestep_spacing"] == "leading":
        return times.leading(total, n, config["steps_offset"], one_step_at_zero=True)
    if config["timestep_spacing"] == "trailing":
        return times.trailing(total, n)
    return times.linspace(total, n, one_step_at_zero=True)


def denoiser_of(config, schedule, net_time=parameterization.same_time):
    parameterize, formula = MODELS[config["prediction_type"]]
    learned = config.get("variance_type") == "learned_range"

    def with_variance(x, t, cond):
        out = formula(x, t)
        return jnp.concatenate([out, jnp.sin(x)], axis=-1) if learned else out

    network = model(with_variance)
    return denoiser(network, {}, schedule, parameterize(net_time), learned_variance=learned)


def in_pairs(solver, denoise, x, pairs, noise=None):
    """Solver steps between given pairs (t, s), which need not join up. Returns every state."""
    state, states = solver.init(x, jnp.asarray([t for t, _ in pairs], jnp.float32)), []
    step = jax.jit(functools.partial(solver.step, denoise=denoise))
    for i, pair in enumerate(pairs):
        z = jnp.zeros_like(x) if noise is None else noise[i]
        t, s = (jnp.full(x.shape[:1], a, jnp.float32) for a in pair)
        x, state, _ = step(z, state, x, t, s)
        states.append(x)
    return states


def optional_noise(file, name):
    return jnp.asarray(file.input(f"{name}/noise")) if f"{name}/noise" in file.arrays else None


def limit(config):
    """What the class does to x0 after it has taken eps from it, or None."""
    if config["thresholding"]:
        keep, most = config["dynamic_thresholding_ratio"], config["sample_max_value"]
        return functools.partial(threshold, quantile=keep, max_value=most)
    if config["clip_sample"]:
        return lambda x0: jnp.clip(x0, -config["clip_sample_range"], config["clip_sample_range"])
    return None


def run_ddim(file, name, config, x, n, eta):
    schedule = schedules.discrete(diffusers_betas(config))
    denoise, grid = denoiser_of(config, schedule), spaced(config, n)
    file.compare(f"{name}/timesteps", grid)
    stride = config["num_train_timesteps"] // n
    solver, noise = ddim(schedule, eta, limit_x0=limit(config)), optional_noise(file, name)
    # below index 0 is clean data (alpha 1) or the first level again
    ends_clean = grid[-1] < stride and config["set_alpha_to_one"]
    pairs = [(t, max(t - stride, 0)) for t in grid]
    states = in_pairs(solver, denoise, x, pairs[: n - ends_clean], noise)
    if ends_clean:
        last = jnp.full(x.shape[:1], grid[-1], jnp.float32)
        states.append(solver.finish(x, None, states[-1], last, denoise))
    compare_states(file, f"{name}/traj", jnp.stack(states))


def run_ddim_inverse(file, name, config, x, n):
    schedule, grid = schedules.discrete(diffusers_betas(config)), spaced(config, n)
    file.compare(f"{name}/timesteps", grid[::-1])
    assert not config["set_alpha_to_one"] and not config["clip_sample"]
    # the network is told the time it goes to, not the one it is at
    levels = jnp.asarray(
        np.append(np.maximum(grid[-1] - config["num_train_timesteps"] // n, 0), grid[::-1]), jnp.float32
    )
    ahead = lambda t: levels[jnp.searchsorted(levels, t) + 1]  # noqa: E731
    denoise = denoiser_of(config, schedule, ahead)
    _, path = integrate(ddim(schedule), denoise, KEY, x, levels, return_trajectory=True)
    compare_states(file, f"{name}/traj", path.x)


def run_ddpm(file, name, config, x, n):
    schedule = schedules.discrete(diffusers_betas(config))
    denoise, grid = denoiser_of(config, schedule), jnp.asarray(spaced(config, n), jnp.float32)
    file.compare(f"{name}/timesteps", grid)
    if config["thresholding"]:
        denoise = dynamic_threshold(denoise, config["dynamic_thresholding_ratio"], config["sample_max_value"])
    elif config["clip_sample"]:
        denoise = clip_x0(denoise, config["clip_sample_range"])
    solver, noise = ancestral(schedule, VARIANCES[config["variance_type"]]), optional_noise(file, name)
    spare = jnp.concatenate([noise, jnp.zeros_like(x)[None]])
    _, path = sample(solver, denoise, KEY, x, grid, noise=spare, return_trajectory=True)
    states = path.x
    if grid[-1] > 0:
        # a grid that ends above index 0 gets noise in its step to clean data, too: a bug for a finished sample
        last = jnp.full(x.shape[:1], grid[-1])
        level = schedule.level(last)
        bridge = process.bridge(level, process.clean_like(level))
        assert config["variance_type"] == "fixed_large"
        states = states.at[-1].add(expand(jnp.sqrt(bridge.added), x) * noise[n - 1])
    compare_states(file, f"{name}/traj", states)


def run_pndm(file, name, config, x, n):
    schedule, grid = schedules.discrete(diffusers_betas(config)), spaced(config, n)
    assert not config["set_alpha_to_one"]
    stride = config["num_train_timesteps"] // n
    half = stride // 2
    if config["skip_prk_steps"]:
        solver = pndm(schedule)
        pairs = [(grid[0], grid[0] - stride), (grid[1], grid[1])]
        pairs += [(t, t - stride) for t in grid[1:]]
    else:
        # the first half step goes to t - half, where its network call is at the next grid time + half
        solver, pairs = pndm_prk(schedule), []
        for t, s in zip(grid[:3], grid[1:4], strict=True):
            middle = s + half
            pairs += [(t, t - half), (middle, middle), (middle, middle - half), (s, s)]
        pairs += [(t, t - stride) for t in grid[3:]]
    file.compare(f"{name}/timesteps", np.array([t for t, _ in pairs]))
    pairs = [(t, max(s, 0.0)) for t, s in pairs]
    states = in_pairs(solver, denoiser_of(config, schedule), x, pairs)
    compare_states(file, f"{name}/traj", jnp.stack(states))


# t is sigma / alpha itself, on the variance-preserving path
BY_SIGMA = schedules.Schedule(
    lambda t: Level(1 / jnp.sqrt(1 + t**2), t / jnp.sqrt(1 + t**2)), lambda h: jnp.exp(-h), 1e-4, 1e4
)


def chain_sigmas(config):
    cumulative = np.cumprod(1 - diffusers_betas(config))
    if config["rescale_betas_zero_snr"]:
        cumulative[-1] = 2.0**-24
    return np.sqrt((1 - cumulative) / cumulative)


def sigma_grid(file, name, config, indices, whole_chain, round_times):
    """Noise levels [n] of a sigma-space class, and the map from them to the network's time."""
    table = chain_sigmas(config)
    sigmas = np.interp(indices, np.arange(table.size), table)
    if config["use_karras_sigmas"]:
        low, high = (table[0], table[-1]) if whole_chain else (sigmas[-1], sigmas[0])
        sigmas = times.karras(len(indices), low, high)

    def to_index(sigma):
        t = np.interp(np.log(sigma), np.log(table), np.arange(table.size))
        return np.round(t) if round_times else t

    pairs = np.stack([np.log(sigmas)[::-1], to_index(sigmas)[::-1]])

    def net_time(sigma):
        return jnp.interp(jnp.log(sigma), *jnp.asarray(pairs, sigma.dtype))

    return sigmas, to_index(sigmas), net_time


def compare_sigmas(file, name, sigmas, table):
    last = 0.0 if file.arrays[f"{name}/sigmas"][-1] == 0 else table[0]
    # the release sums its chain in float32; at zero terminal SNR the largest sigma is set by hand
    file.compare(f"{name}/sigmas", np.append(sigmas, last), rtol=2e-5)
    return last


def run_euler(file, name, config, x, n, kind):
    total = config["num_train_timesteps"]
    if config["timestep_spacing"] == "linspace":
        indices = np.linspace(0, total - 1, n)[::-1]
    else:
        indices = spaced(config, n)
    sigmas, indices, net_time = sigma_grid(file, name, config, indices, False, False)
    repeat = np.repeat(np.append(sigmas, 0), 2)[1:-1] if kind == "heun" else np.append(sigmas, 0)
    repeat_t = np.repeat(indices, 2)[1:] if kind == "heun" else indices
    file.compare(f"{name}/timesteps", repeat_t, rtol=2e-5)
    file.compare(f"{name}/sigmas", repeat, rtol=2e-5)
    start = sigmas[0] if config["timestep_spacing"] != "leading" else np.sqrt(sigmas[0] ** 2 + 1)
    file.compare(f"{name}/init_noise_sigma", start, rtol=2e-5)
    grid = jnp.asarray(sigmas, jnp.float32)
    denoise = denoiser_of(config, BY_SIGMA, net_time)
    alpha = BY_SIGMA.level(grid).alpha
    x = x * jnp.asarray(start, jnp.float32) * alpha[0]
    solver = {"euler": euler, "ancestral": euler_ancestral, "heun": heun}[kind](BY_SIGMA)
    noise = optional_noise(file, name)
    _, path = sample(solver, denoise, KEY, x, grid, noise=noise, return_trajectory=True)
    # their x is ours over alpha
    after = jnp.append(alpha[1:], 1.0).reshape(-1, *(1,) * x.ndim)
    states = path.x / after
    if kind == "heun":
        # the Euler half of every step but the last, all steps as one batch
        before = jnp.concatenate([x[None], path.x[:-2]])
        t, s = (jnp.repeat(a, x.shape[0]) for a in (grid[:-1], grid[1:]))
        tried, _, _ = euler(BY_SIGMA).step(None, None, before.reshape(-1, *x.shape[1:]), t, s, denoise)
        tried = tried.reshape(before.shape) / after[:-1]
        states = jnp.concatenate([jnp.stack([tried, states[:-1]], axis=1).reshape(-1, *x.shape), states[-1:]])
    compare_states(file, f"{name}/traj", states)


def run_dpm(file, name, config, x, n, singlestep):
    total = config["num_train_timesteps"]
    if config["timestep_spacing"] == "trailing":
        indices = times.trailing(total, n)
    elif config["timestep_spacing"] == "leading":
        indices = times.leading(total, n + 1, config["steps_offset"])[:-1]
    else:
        indices = times.linspace(total, n + 1)[:-1]
    round_times = config["beta_schedule"] != "squaredcos_cap_v2"
    sigmas, indices, net_time = sigma_grid(file, name, config, indices, True, round_times)
    file.compare(f"{name}/timesteps", np.trunc(indices))
    last = compare_sigmas(file, name, sigmas, chain_sigmas(config))
    denoise = denoiser_of(config, BY_SIGMA, net_time)
    clean, order = last == 0, config["solver_order"]
    grid = jnp.asarray(sigmas if clean else np.append(sigmas, last), jnp.float32)
    form = FORMS[config["algorithm_type"]]
    if singlestep:
        assert clean and order == 2
        # the step to clean data has order 1, and so has the one before it if that leaves an odd call
        orders = (2,) * ((n - 1) // 2) + (1,) * ((n - 1) % 2)
        solver = dpm_solver_singlestep(BY_SIGMA, orders, form=form, variant=config["solver_type"])
    else:
        few = config["lower_order_final"] and n < 15
        final_order = (2 if clean else 1) if few else None
        solver = dpm_solver(
            BY_SIGMA,
            order,
            form=form,
            variant=config["solver_type"],
            final_order=final_order,
            released_third_order=True,
        )
    run = sample if clean else integrate
    noise = optional_noise(file, name)
    _, path = run(solver, denoise, KEY, x, grid, noise=noise, return_trajectory=True)
    compare_states(file, f"{name}/traj", path.x)


RUNS = {
    "DDIMScheduler": run_ddim,
    "DDIMInverseScheduler": run_ddim_inverse,
    "DDPMScheduler": run_ddpm,
    "PNDMScheduler": run_pndm,
    "EulerDiscreteScheduler": functools.partial(run_euler, kind="euler"),
    "EulerAncestralDiscreteScheduler": functools.partial(run_euler, kind="ancestral"),
    "HeunDiscreteScheduler": functools.partial(run_euler, kind="heun"),
    "DPMSolverMultistepScheduler": functools.partial(run_dpm, singlestep=False),
    "DPMSolverSinglestepScheduler": functools.partial(run_dpm, singlestep=True),
}


@topic("core/schedulers_diffusers")
def schedulers_diffusers(file):
    x = jnp.asarray(file.input("x_T"))
    for name, entry in file.meta["configs"].items():
        config = COMMON | DEFAULTS[entry["cls"]] | entry["config"]
        RUNS[entry["cls"]](file, name, config, x, entry["steps"], **entry["step"])
        if "sigmas" not in DEFAULTS[entry["cls"]] and f"{name}/init_noise_sigma" not in {c.key for c in file.compared}:
            file.compare(f"{name}/init_noise_sigma", 1.0)
    formulas(file)


def formulas(file):
    """Spacing tables, zero terminal SNR, v, min-SNR weights, guidance rescaling and image-to-image starts."""
    for key in file.keys("spacing/*"):
        spacing, offset, n = key.split("/")[1:]
        config = COMMON | {"timestep_spacing": spacing, "steps_offset": int(offset.removeprefix("offset"))}
        file.compare(key, spaced(config, int(n)))
    for key in file.keys("img2img/*"):
        strength, n = (
            part.removeprefix(word) for part, word in zip(key.split("/")[1:3], ("strength", "steps"), strict=True)
        )
        grid = times.leading(1000, int(n), 1)
        file.compare(key, editing.image_to_image(grid, float(strength)).times)
    betas = schedules.zero_terminal_snr(file.input("zsnr/betas_in").astype(np.float64))
    # float32 in the release: the last betas are ratios of small differences
    file.compare("zsnr/betas_out", betas, atol=5e-5)
    file.compare("zsnr/alphas_cumprod_out", np.cumprod(1 - betas), atol=1e-6)
    schedule = schedules.discrete(diffusers_betas(COMMON | file.meta["sd_defaults"]))
    x0, noise = (jnp.asarray(file.input(f"v/{name}")) for name in ("x0", "noise"))
    level = schedule.level(jnp.asarray(file.input("v/t"), jnp.float32))
    file.compare("v/x_t", process.q_sample(x0, noise, level), atol=1e-6)
    file.compare("v/velocity", parameterization.target(parameterization.v(), x0, noise, level), atol=1e-6)
    every = schedule.level(jnp.arange(1000, dtype=jnp.float32))
    # float32 in the release: 1 - alphas_cumprod keeps four digits where it is 1e-3
    file.compare("snr", process.snr(every), rtol=1e-4)
    for key in file.keys("minsnr/*"):
        gamma, kind = key.split("/")[1:]
        meaning = {"eps": parameterization.eps(), "v": parameterization.v(), "x0": None}[kind]
        weights = weighting.min_snr(float(gamma.removeprefix("gamma")), meaning)(every)
        file.compare(key, weights, rtol=1e-4)
    guided, cond = (jnp.asarray(file.input(f"cfg_rescale/{name}")) for name in ("cfg", "text"))
    for key in file.keys("cfg_rescale/out*"):
        file.compare(key, guidance.rescaled(guided, cond, float(key.split("out")[1])), atol=1e-5)

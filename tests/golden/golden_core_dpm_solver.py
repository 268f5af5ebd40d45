"""core/dpm_solver: the official DPM-Solver code (noise schedules, all methods, inversion, wrappers, thresholding).

That code's time is in (0, 1]; an index of our chain is t N - 1. Its float32 run differs from its own float64 run by up
to 6e-2 (large steps amplify rounding of half log SNR), so the reference is `f64/<key>` where it exists: our float64 run
must agree to 1e-6, our float32 run to 1e-4 or to three times what the official float32 run is off, whichever is larger.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from golden_harness import topic

from jaxdiff import denoiser, guidance, parameterization, process, schedules, times
from jaxdiff.solvers.base import integrate, sample
from jaxdiff.solvers.dpm_solver import dpm_solver
from jaxdiff.solvers.dpm_solver_adaptive import integrate_adaptive
from jaxdiff.solvers.dpm_solver_singlestep import dpm_solver_singlestep, singlestep_orders, stage_times
from jaxdiff.solvers.exponential import DATA_ODE, NOISE_ODE

FORMS = {"dpmsolver": NOISE_ODE, "dpmsolver++": DATA_ODE}
VARIANTS = {"dpmsolver": "midpoint", "taylor": "taylor"}
FEW_STEPS = 10  # the official code lowers the last orders below this many steps
SUFFIX = "/intermediates"


class World:
    """One noise schedule of the file, with its time unit and what its analytic model does with the time."""

    def __init__(self, betas: np.ndarray | None):
        self.discrete = betas is not None
        self.num = betas.size if self.discrete else 1000
        self.schedule = schedules.discrete(betas) if self.discrete else schedules.vp_linear(t_min=1 / self.num)
        # the network is told 1000 (t - 1/N) with the N of the truncated chain, or t itself
        self.net_scale, self.on_time = (1000 / self.num, 1e-4) if self.discrete else (1.0, 0.1)
        self.end = 1 / self.num

    def ours(self, t):
        return t * self.num - 1 if self.discrete else t

    def official(self, t):
        return (t + 1) / self.num if self.discrete else t

    @functools.cache  # noqa: B019 - lives as long as the file's test
    def grid(self, skip: str, start: float, end: float, n: int) -> np.ndarray:
        """n official times from start to end."""
        if skip == "logSNR":
            grid = times.uniform_log_snr(self.schedule, n, start=self.ours(start), end=self.ours(end))
            return self.official(grid)
        return {"time_uniform": times.time_uniform, "time_quadratic": times.time_quadratic}[skip](start, end, n)


class Runner:
    """Compiles each solver once for all schedules: which schedule it is, is an argument of the program."""

    def __init__(self, worlds: dict[str, World]):
        self.names, self.worlds, self.programs = list(worlds), list(worlds.values()), {}

    def schedule(self, i) -> schedules.Schedule:
        def of_chosen(field):
            return lambda a: jax.lax.switch(i, [getattr(w.schedule, field) for w in self.worlds], a)

        return schedules.Schedule(of_chosen("level"), of_chosen("time"), 0.0, 1.0)

    def denoise(self, i):
        def constant(field, dtype):
            return jnp.array([getattr(w, field) for w in self.worlds], dtype)[i]

        def network(params, x, t, cond, *, train=False, key=None):
            t = t.reshape(t.shape + (1,) * (x.ndim - 1))
            return 0.95 * x - 0.08 * jnp.sin(2 * x) + constant("on_time", x.dtype) * t

        meaning = parameterization.eps(lambda t: t * constant("net_scale", t.dtype))
        return denoiser.denoiser(network, {}, self.schedule(i), meaning)

    def follow(self, what, world, make, x, grid, dtype, *, to_clean=False, wrap=lambda d: d):
        """(result, states) of make(schedule) along official times. `what` names the solver and all its settings."""

        def program(i, x, t):
            method = sample if to_clean else integrate
            solver = make(self.schedule(i))
            return method(solver, wrap(self.denoise(i)), jax.random.key(0), x, t, return_trajectory=True)

        x, trajectory = self.call(what, program, world, x, grid, dtype)
        assert x.dtype == dtype
        return np.asarray(x), np.asarray(trajectory.x)

    def call(self, what, program, world, x, grid, dtype):
        program = self.programs.setdefault((what, dtype), jax.jit(program))
        index = jnp.asarray(self.worlds.index(world), jnp.int32)
        return program(index, jnp.asarray(x, dtype), jnp.asarray(world.ours(grid), dtype))


def as_built(file, name: str, pattern: str, text: str) -> np.ndarray:
    """The betas of a description such as "linear 1e-4..0.02 T=1000 float32", cut where half log SNR falls below -5.1.

    float32 betas can be rounded in several orders; the one that gives this file's f64 schedule values is used.
    """
    kind, start, end, num, dtype = re.search(pattern, text).groups()
    num, cast = int(num), np.dtype(dtype or "float64")
    if kind == "cosine":
        exact = [schedules.cosine_betas(num)]
    elif kind == "linear":
        exact = [np.linspace(float(start), float(end), num), _linspace32(float(start), float(end), num)]
    elif kind == "scaled_linear":
        roots = float(start) ** 0.5, float(end) ** 0.5
        exact = [np.linspace(*roots, num) ** 2, np.linspace(*roots, num).astype(np.float32) ** 2]
        exact.append(_linspace32(*roots, num) ** 2)
    else:
        raise ValueError(f"unknown betas {kind!r} in the file's configuration")
    candidates = [
        b.astype(dt).astype(np.float64)
        for b in exact
        for dt in dict.fromkeys((cast, np.dtype("float32"), np.dtype("float64")))
    ]
    golden, query = file.arrays[f"f64/ns/{name}/log_mean_coeff"], file.input("query_t")
    return min((schedules.truncate(b) for b in candidates), key=lambda b: _misfit(b, query, golden))


def _linspace32(start, end, num):
    """A linspace whose steps are counted from the nearer end in float32."""
    start, end = np.float32(start), np.float32(end)
    step, i = (end - start) / np.float32(num - 1), np.arange(num, dtype=np.float32)
    return np.where(i < num // 2, start + step * i, end - step * (num - 1 - i)).astype(np.float32)


def _misfit(betas, query, golden):
    table = 0.5 * np.cumsum(np.log1p(-betas))
    t = np.asarray(query, np.float64) * betas.size - 1
    low = np.clip(np.floor(t), 0, betas.size - 2).astype(int)
    return np.abs(table[low] + (t - low) * (table[low + 1] - table[low]) - golden).max()


def worlds(file) -> dict[str, World]:
    """The schedules named in the file."""
    found = {}
    parts = [part.strip() for part in file.meta["betas"].split(";")]
    names = dict.fromkeys(key.split("/")[1] for key in file.keys("ns/*"))
    for name in names:
        if name == "vp_linear":
            found[name] = World(None)
            continue
        text = next((p.split("=", 1)[1] for p in parts if p.startswith(f"{name} =")), parts[0])
        pattern = r"(\w+)(?: (\S+?)\.\.(\S+))? T=(\d+)(?: (float\d+))?"
        found[name] = World(as_built(file, name, pattern, text))
    return found


def run(runner: Runner, key: str, x, dtype) -> np.ndarray:
    """States at the ends of steps, [n, B, ...], of a `schedule/algorithm/method/orderN/stepsN/skip/type` key."""
    name, what = key.split("/", 1)
    world = runner.worlds[runner.names.index(name)]
    algorithm, method, order, steps, skip, variant = what.split("/")
    order, steps = int(order.removeprefix("order")), int(steps.removeprefix("steps"))
    common = {"form": FORMS[algorithm], "variant": VARIANTS[variant]}
    if method == "multistep":
        grid, ends = world.grid(skip, 1.0, world.end, steps + 1), np.arange(steps)
        final_order = 1 if steps < FEW_STEPS else None
        make = functools.partial(dpm_solver, order=order, final_order=final_order, released_third_order=True, **common)
    else:
        fixed = method == "singlestep_fixed"
        orders = (order,) * (steps // order) if fixed else singlestep_orders(steps, order)
        ends = np.cumsum(orders) - 1
        # equal blocks; only the mixed plan in time has blocks as long as their orders
        equal = fixed or skip == "logSNR"
        outer = world.grid(skip, 1.0, world.end, (len(orders) if equal else steps) + 1)
        outer = outer if equal else outer[np.cumsum((0, *orders))]
        grid = stage_times(outer, orders, functools.partial(world.grid, skip))
        make = functools.partial(dpm_solver_singlestep, orders=orders, **common)
    return runner.follow(what, world, make, x, grid, dtype)[1][ends]


def slack(file, key: str) -> float:
    """How far the official float32 run of a key is from its float64 run."""
    return float(np.abs(file.arrays[key] - file.arrays[f"f64/{key}"]).max())


def compare_both(file, key: str, compute) -> None:
    """compute(dtype) against the f64 key, in float64 and in float32."""
    with jax.enable_x64(True):
        file.compare(f"f64/{key}", compute(np.float64), atol=1e-6, rtol=1e-6)
    file.compare(f"f64/{key}", compute(np.float32), atol=max(1e-4, 3 * slack(file, key)), rtol=1e-5)
    file.leave(key, "the float32 run of the release, whose float64 run is compared")


@topic("core/dpm_solver")
def dpm_solver_topic(file):
    x = file.input("x_T")
    found = worlds(file)
    runner = Runner(found)
    compare_schedules(file, found)
    for name, world in found.items():
        for key in file.keys(f"{name}/*/order*/steps*/*"):
            if not key.endswith(SUFFIX):
                compare_solver(file, runner, key, x)
        for algorithm in FORMS:
            compare_extras(file, runner, world, f"{name}/{algorithm}", FORMS[algorithm], x)
        for key in file.keys(f"{name}/timesteps/*"):
            skip, n = key.split("/")[2:]
            # where lambda at 1/N is off by 6e-8 / sigma^2, so is this share of it in the times: |d lambda / dt| > 5
            atol = 2e-5 + 0.2 * 6e-8 / float(1 - np.exp(2 * file.arrays[f"f64/ns/{name}/log_mean_coeff"]).max())
            file.compare(key, world.grid(skip, 1.0, world.end, int(n) + 1), atol=atol)
    compare_wrappers(file, found["discrete"], x)
    images = file.input("dynthresh/in")
    for key in file.keys("dynthresh/out_*"):
        file.compare(key, denoiser.threshold(jnp.asarray(images), float(key.split("_")[-1])), atol=1e-6)


def compare_solver(file, runner, key, x):
    """A final sample, and its intermediate states, which only the float32 run of the release has."""
    with jax.enable_x64(True):
        path = run(runner, key, x, np.float64)
    file.compare(f"f64/{key}", path[-1], atol=1e-6, rtol=1e-6)
    if key + SUFFIX in file.arrays:
        states = np.concatenate([np.asarray(x, np.float64)[None], path]) if "/multistep/" in key else path
        file.compare(key + SUFFIX, states, atol=2e-5 + 10 * slack(file, key), rtol=1e-4)
    final = run(runner, key, x, np.float32)[-1]
    file.compare(f"f64/{key}", final, atol=max(1e-4, 3 * slack(file, key)), rtol=1e-5)
    file.leave(key, "the float32 run of the release, whose float64 run is compared")


def compare_extras(file, runner, world, prefix, form, x):
    """Denoising to zero, inversion, adaptive steps, thresholding."""
    make = functools.partial(dpm_solver, order=2, form=form, final_order=1)
    algorithm = prefix.split("/")[1]

    def follow(what, *args, **options):
        return runner.follow(f"{algorithm}/{what}", world, make, *args, **options)[0]

    if (key := f"{prefix}/denoise_to_zero") in file.arrays:
        down = world.grid("time_uniform", 1.0, world.end, 7)
        compare_both(file, key, lambda dtype: follow("to_clean", x, down, dtype, to_clean=True))
    if (key := f"{prefix}/inverse") in file.arrays:
        up = world.grid("time_uniform", 1.0, world.end, 9)[::-1]
        compare_both(file, key, lambda dtype: follow("inverse", 0.5 * x, up, dtype))
    for order in (2, 3):
        if (key := f"{prefix}/adaptive_order{order}") in file.arrays:
            compare_both(file, key, functools.partial(adaptive, runner, world, form, algorithm, order, x))
    for key in file.keys(f"{prefix}/dynthresh*/multistep2x*"):
        quantile, steps = float(key.split("/")[2].removeprefix("dynthresh")), int(key.rsplit("x", 1)[1])
        threshold = functools.partial(denoiser.dynamic_threshold, quantile=quantile)
        down = world.grid("time_uniform", 1.0, world.end, steps + 1)
        with jax.enable_x64(True):
            # there is no float64 run of the release to compare with
            file.compare(key, follow(f"threshold{quantile}", 2 * x, down, np.float64, wrap=threshold), atol=1e-4)


def adaptive(runner, world, form, algorithm, order, x, dtype):
    def program(i, x, ends):
        denoise = runner.denoise(i)
        return integrate_adaptive(runner.schedule(i), denoise, x, ends[0], ends[1], order=order, form=form)[0]

    return np.asarray(runner.call((algorithm, order), program, world, x, np.array([1.0, world.end]), dtype))


def compare_schedules(file, found):
    """The schedule's functions. The release has sigma^2 = 1 - exp(2 log alpha) in float32: wrong by 6e-8 or two."""
    query = np.asarray(file.input("query_t"), np.float64)
    for name, world in found.items():
        with jax.enable_x64(True):
            t = jnp.asarray(world.ours(query))
            level = world.schedule.level(t)
            half_log_snr = process.half_log_snr(level)
            back = world.official(world.schedule.time(half_log_snr))
        lowest = np.asarray(level.sigma).min()
        file.compare(f"f64/ns/{name}/log_mean_coeff", np.log(level.alpha), atol=1e-12, rtol=1e-9)
        file.compare(f"f64/ns/{name}/lambda", half_log_snr, atol=1e-9, rtol=1e-9)
        file.compare(f"ns/{name}/log_mean_coeff", np.log(level.alpha), atol=2e-7, rtol=2e-6)
        file.compare(f"ns/{name}/std", level.sigma, atol=6e-8 / lowest)
        file.compare(f"ns/{name}/lambda", half_log_snr, atol=6e-8 / lowest**2, rtol=1e-5)
        file.compare(f"ns/{name}/inverse_lambda_of_lambda", back, atol=2e-6)
        file.compare(f"ns/{name}/total_N", round(1 / world.official(world.schedule.t_min)))


def compare_wrappers(file, world, x):
    """What the release's wrapper makes of other network outputs, as noise: through our x0."""
    meanings = {
        "x_start": parameterization.x0(),
        "v": parameterization.v(),
        # f is the score: x0 = (x + sigma^2 f) / alpha
        "score": parameterization.Parameterization(
            lambda c: parameterization.Affine(
                1 / c.alpha, c.sigma**2 / c.alpha, jnp.ones_like(c.alpha), jnp.zeros_like(c.alpha), -1 / c.sigma
            ),
            parameterization.same_time,
        ),
    }
    for key in file.keys("wrapper/*"):
        kind, t = key.split("/")[1], float(key.rsplit("_", 1)[1])
        x = jnp.asarray(x)
        t = jnp.full([x.shape[0]], world.ours(t), x.dtype)
        level, net_time = world.schedule.level(t), (world.net_scale * t).reshape(-1, *(1,) * (x.ndim - 1))
        if kind in meanings:
            x0 = parameterization.to_x0(meanings[kind], 0.4 * x + 1e-4 * net_time, x, level)
        elif kind.startswith("cfg"):
            x0 = guided(world, float(kind.removeprefix("cfg")))(x, t).x0
        else:
            x0 = classified(world, float(kind.removeprefix("classifier")))(x, t).x0
        file.compare(key, process.eps_from_x0(x0, x, level), atol=2e-6, rtol=2e-6)


def guided(world, scale):
    """Classifier-free guidance of the model 0.9 x + c cos(x), c = 0.5 and -0.5, null condition 0."""

    def network(params, x, t, cond, *, train=False, key=None):
        return 0.9 * x + cond["c"].reshape(-1, *(1,) * (x.ndim - 1)) * jnp.cos(x)

    def build(cond):
        return denoiser.denoiser(network, {}, world.schedule, parameterization.eps(), cond)

    return guidance.classifier_free(build, {"c": jnp.array([0.5, -0.5])}, {"c": jnp.zeros(2)}, scale)


def classified(world, scale):
    """Classifier guidance of the model 0.9 x, log p = -sum((x - c)^2) / 2 with c = 0.5 and -0.5."""

    def network(params, x, t, cond, *, train=False, key=None):
        return 0.9 * x

    def gradient(x, t):
        return jnp.array([0.5, -0.5]).reshape(-1, *(1,) * (x.ndim - 1)) - x

    plain = denoiser.denoiser(network, {}, world.schedule, parameterization.eps())
    return guidance.classifier(plain, world.schedule, gradient, scale)

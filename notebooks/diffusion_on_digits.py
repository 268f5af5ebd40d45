# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Diffusion on digits
#
# From a noise schedule to a comparison of samplers, on 8 x 8 digits that come with the library. Nothing is downloaded.
# The notebook takes about five minutes on two CPU cores.
#
# 1. Schedules as curves of signal, noise and log-SNR
# 2. q-sample: a digit at several levels of noise
# 3. A UNet, a method, and training with the library's own step
# 4. Ancestral samples, and what the model believes on the way
# 5. DDIM, DPM-Solver++ 2M and Heun at 50 to 1 network calls, judged by a Frechet distance
# 6. Guidance and eta, changed without compiling again
# 7. Where to go next
#
# **In Colab:** upload this `.ipynb`, then put the repository into the session's files as a folder named `jaxdiff`
# (clone it, or upload and unzip it). The next cell installs it; it does nothing elsewhere, where `make setup` or
# `pip install -e '.[notebooks]'` in the repository has done so already.

# %%
import os
import subprocess
import sys

if "google.colab" in sys.modules:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "./jaxdiff[plot]"], check=True)

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jaxdiff import parameterization, pictures, process, schedules, times
from jaxdiff.data.images import digits
from jaxdiff.data.pipeline import batches
from jaxdiff.denoiser import clip_x0, denoiser
from jaxdiff.evaluation import table
from jaxdiff.methods.base import Sampling
from jaxdiff.methods.ddpm import ddpm
from jaxdiff.metrics import evaluate as judge
from jaxdiff.metrics.digits import digits_extractor
from jaxdiff.networks.base import as_network, init_params, num_params
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.solvers.ancestral import ancestral
from jaxdiff.solvers.base import sample
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.dpm_solver import dpm_solver
from jaxdiff.solvers.heun import heun
from jaxdiff.training import ema
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step

print(jax.devices())

# %% [markdown]
# Sizes depend on the machine. `JAXDIFF_SMOKE=1` shrinks everything to seconds: every cell runs, the pictures are noise.

# %%
size = "smoke" if os.environ.get("JAXDIFF_SMOKE") == "1" else jax.default_backend()
chain_length, widths, batch_size, num_steps, num_samples, calls = {
    "smoke": (16, (8,), 8, 6, 40, (3, 1)),
    "cpu": (256, (16, 32), 64, 2000, 500, (50, 20, 10, 5, 1)),
}.get(size, (256, (32, 64), 128, 4000, 1000, (50, 20, 10, 5, 1)))

# %% [markdown]
# ## 1. Schedules
#
# A level of noise is a pair $(\alpha, \sigma)$, and noisy data are
#
# $$x_t = \alpha_t\, x_0 + \sigma_t\, \epsilon, \qquad \epsilon \sim \mathcal N(0, I).$$
#
# A `Schedule` maps a time to a level, and nothing else in the library knows what a time is: q-sample, posteriors and
# solvers see levels. What a schedule does to the data is in $\log \mathrm{SNR} = 2 \log(\alpha_t / \sigma_t)$.

# %%
compared = {
    "linear chain": schedules.discrete(schedules.linear_betas(chain_length, rescale=chain_length > 20)),
    "cosine chain": schedules.discrete(schedules.cosine_betas(chain_length)),
    "rectified flow": schedules.rectified_flow(),
    "VE (EDM)": schedules.ve(),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
for color, (name, schedule) in zip(("C0", "C1", "C2", "C3"), compared.items(), strict=True):
    level = schedule.level(jnp.linspace(schedule.t_min, schedule.t_max, 401))
    share = np.linspace(0, 1, 401)
    if name != "VE (EDM)":  # alpha is 1 and sigma runs up to 80
        left.plot(share, level.alpha, color, label=name)
        left.plot(share, level.sigma, color, linestyle="--")
    right.plot(share, 2 * process.half_log_snr(level), color, label=name)
left.set(title=r"$\alpha$ (solid) and $\sigma$ (dashed)", xlabel="time, from clean to noisy")
right.set(title="log SNR", xlabel="time, from clean to noisy", ylim=(-15, 15))
right.axhline(0, color="0.8", zorder=0)
right.legend()
plt.show()

# %% [markdown]
# The linear chain is close to pure noise for its last third. The cosine chain spends its steps evenly, which is why it
# suits small images (Nichol & Dhariwal 2021).
#
# ## 2. q-sample
#
# One digit, one $\epsilon$, the same shares of both chains. Above each image stands its log SNR.

# %%
x0 = digits("train").x0[7]
shares = np.linspace(0, 1, 9)
eps = jnp.broadcast_to(jax.random.normal(jax.random.key(1), x0.shape), (shares.size, *x0.shape))
clean = jnp.broadcast_to(x0, eps.shape)
figure, axes = plt.subplots(2, shares.size, figsize=(11, 3.2), layout="constrained")
for row, name in zip(axes, ("linear chain", "cosine chain"), strict=True):
    level = compared[name].level(jnp.asarray(np.rint(shares * (chain_length - 1)), jnp.float32))
    x_t = process.q_sample(clean, eps, level)
    for axis, image, log_snr in zip(row, x_t, 2 * process.half_log_snr(level), strict=True):
        axis.imshow(image[..., 0], cmap="gray", vmin=-2, vmax=2)
        axis.set(title=f"{log_snr:.1f}", xticks=[], yticks=[])
    row[0].set_ylabel(name)
plt.show()

# %% [markdown]
# ## 3. Train
#
# The network predicts $v = \alpha\,\epsilon - \sigma\, x_0$ (Salimans & Ho 2022). The loss is its mean squared error at
# a uniformly drawn step of the chain, and $\alpha^2 + \sigma^2 = 1$ gives $x_0$ back:
#
# $$
# L = \mathbb E_{x_0, \epsilon, t}\, \lVert v_\theta(x_t, t, y) - v \rVert^2, \qquad
# \hat x_0 = \alpha\, x_t - \sigma\, v_\theta(x_t, t, y).
# $$
#
# Unlike $\hat\epsilon$, it says something about $x_0$ at pure noise, so few-step samplers can start there. One label in
# ten is replaced by "no class" (label 10), for the guidance of section 6.

# %%
schedule = compared["cosine chain"]
predict_v = parameterization.v(parameterization.scaled_time(1000 / chain_length))

unet = UNet(
    in_channels=1,
    out_channels=1,
    base_channels=widths[0],
    channel_mult=[width // widths[0] for width in widths],
    num_res_blocks=1,
    norm_groups=8,
    scale_shift_norm=True,
    num_classes=10,
    null_label=True,
)
network = as_network(unet)

method = ddpm(
    network,
    schedules.cosine_betas(chain_length),
    init_params=lambda key, batch: init_params(unet, key, *example_inputs(unet)),
    parameterization=predict_v,
    variance=process.fixed_small,
    label_dropout=0.1,
    null_label=10,
)

# %% [markdown]
# `create_state` and `make_train_step` are what `jaxdiff train` uses, too: the loop below is all that training needs.
# (`jaxdiff.training.loop.train` adds checkpoints, exact resume and logs.) The state is donated, so the step updates it
# in place, and losses stay on the device until they are drawn.

# %%
rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, num_steps // 30 + 1, num_steps, 1e-4)
optimizers = {"model": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))}
averages = (ema.warmup("ema", 0.995),)

data = batches(digits("train"), batch_size=batch_size, seed=0)
state = create_state(method, optimizers, averages, jax.random.key(0), next(data))
train_step = jax.jit(make_train_step(method, optimizers, averages), donate_argnums=0)
print(f"{num_params(state.params):,} parameters")

losses = []
for step in range(1, num_steps + 1):
    state, metrics = train_step(state, next(data))
    losses.append(metrics["model/loss"])
    if step % max(1, num_steps // 5) == 0:
        print(f"step {step}: loss {losses[-1]:.4f}")

# %%
losses = np.asarray(jnp.stack(losses))
window = max(1, num_steps // 50)
smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
plt.figure(figsize=(7, 3), layout="constrained")
plt.semilogy(losses, color="0.8", label="one batch")
plt.semilogy(np.arange(smooth.size) + window - 1, smooth, "C0", label=f"mean of the last {window}")
plt.gca().set(xlabel="step", ylabel="loss", title="Loss of v")
plt.legend()
plt.show()

# %% [markdown]
# ## 4. Ancestral samples
#
# From here on, parameters are the moving average. A `Denoiser` is a network with its parameters and labels inside, and
# answers $(x_t, t)$ with $\hat x_0$. The ancestral sampler (Ho et al. 2020, algorithm 2) draws from
# $q(x_s \mid x_t, \hat x_0)$ at every step of the chain; `sample` carries it along the grid of times in one
# `lax.scan`, and takes $\hat x_0$ at the end.

# %%
params = state.ema["ema"]
labels = jnp.arange(num_samples) % 10
noise = jax.random.normal(jax.random.key(2), (num_samples, 8, 8, 1))


@jax.jit
def ancestral_samples(params, key, noise, label):
    denoise = clip_x0(denoiser(network, params["model"], schedule, predict_v, {"label": label}))
    grid = jnp.asarray(times.evenly(chain_length, chain_length), jnp.float32)
    return sample(ancestral(schedule), denoise, key, noise, grid, return_trajectory=True)


samples, path = ancestral_samples(params, jax.random.key(3), noise, labels)

plt.figure(figsize=(6, 4), layout="constrained")
plt.imshow(pictures.grid(np.asarray(samples[:60]), columns=10))
plt.gca().set(title=f"Ancestral sampling, {chain_length} network calls, a column a class", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# The path of one sample: above the noisy $x_s$, below the $\hat x_0$ that the step was made with. Where noise is all
# there is, the best guess is the mean of the class.

# %%
kept = np.unique(np.linspace(0, chain_length - 1, 10).round().astype(int))
rows = np.concatenate([np.asarray(path.x[kept, 3]), np.asarray(path.x0[kept, 3])])
plt.figure(figsize=(9, 2.2), layout="constrained")
plt.imshow(pictures.grid(rows, columns=kept.size))
plt.gca().set(title=r"$x_s$ (top) and $\hat x_0$ (bottom)", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## 5. Fewer network calls
#
# The same model, other solvers, no training. Each is a function of the schedule and works between any two levels, so
# fewer steps only need a shorter grid of times, and a grid is an argument of the compiled sampler.
#
# * **DDIM**: $x_s = \alpha_s \hat x_0 + \sigma_s \hat\epsilon$. Order 1, one call a step.
# * **DPM-Solver++ 2M**: extrapolates $\hat x_0$ from the last two steps. Order 2, one call a step.
# * **Heun**: averages the slopes $d x / d(\sigma / \alpha)$ at both ends of a step. Order 2, two calls a step, $2n - 1$
#   calls for $n$ times.
#
# Where the times lie matters as much as the solver. `times.evenly` takes every k-th step of the chain, from
# $\sigma / \alpha \approx 5000$ on. Heun's method was made for the grid of Karras et al. (2022), equally spaced in
# $(\sigma / \alpha)^{1/7}$ from 80 on; here it gets both.
#
# Quality is the Frechet distance to the held-out digits in the features of a small classifier that comes with the
# library. It has nothing in common with published Inception distances. The *floor* is what real training images score
# at the same number of images: less is not better than real.

# %%
train, held_out = digits("train"), digits("held_out")
reference = judge.reference("digits held-out", held_out.x0, digits_extractor(), train_images=train.x0)
wanted = ("frechet", "accuracy")
floor = judge.floor(reference, train.label, wanted, num_samples=num_samples)
print(floor["frechet"])


def score(samples):
    results = judge.evaluate(np.asarray(samples), np.asarray(labels), reference, wanted)
    return {name: result.value for name, result in results.items()}


def sampler(make_solver):
    def draw(params, key, noise, label, grid):
        sampling = Sampling(solver=make_solver, times=grid)
        return method.generate(params, {}, key, noise, {"label": label}, sampling)

    return jax.jit(draw)


def even(n):
    return times.evenly(chain_length, n)


def karras(n):
    start = schedule.time(jnp.log(jnp.array([1 / 80])))  # the time where sigma / alpha is 80
    return times.karras_times(schedule, n, start=float(start[0]))


# %%
draw_ddim, draw_dpm, draw_heun = sampler(ddim), sampler(dpm_solver), sampler(heun)
runs = {
    "DDIM": (draw_ddim, even, lambda calls: calls),
    "DPM-Solver++ 2M": (draw_dpm, even, lambda calls: calls),
    "Heun, Karras grid": (draw_heun, karras, lambda calls: (calls + 1) // 2),
    "Heun, even grid": (draw_heun, even, lambda calls: (calls + 1) // 2),
}
drawn, rows = {}, []
for name, (draw, make_grid, num_times) in runs.items():
    for most in calls:
        grid = make_grid(num_times(most)).astype(np.float32)
        drawn[name, most] = draw(params, jax.random.key(4), noise, labels, grid)
        used = 2 * grid.size - 1 if draw is draw_heun else grid.size
        rows.append({"sampler": name, "calls": used, **score(drawn[name, most])})
reference_rows = [
    {"sampler": "real training images", "calls": 0, **{name: floor[name].value for name in wanted}},
    {"sampler": "ancestral", "calls": chain_length, **score(samples)},
]
print(table(reference_rows + rows))

# %%
figure, axes = plt.subplots(2, 2, figsize=(11, 5.4), layout="constrained")
for axis, name in zip(axes.flat, runs, strict=True):
    strips = np.concatenate([np.asarray(drawn[name, most][:10]) for most in calls])
    axis.imshow(pictures.grid(strips, columns=10))
    middles = (np.arange(len(calls)) + 0.5) * axis.get_ylim()[0] / len(calls)
    axis.set(title=name, xticks=[], yticks=middles, yticklabels=calls)
    axis.tick_params(length=0)
figure.supylabel("network calls, at most")
plt.show()

# %%
plt.figure(figsize=(9, 3.6), layout="constrained")
for name in runs:
    points = [(row["calls"], row["frechet"]) for row in rows if row["sampler"] == name]
    plt.loglog(*zip(*points, strict=True), "o:" if name == "Heun, even grid" else "o-", label=name)
plt.axhline(reference_rows[1]["frechet"], color="0.5", linestyle=":", label=f"ancestral, {chain_length} calls")
plt.axhline(floor["frechet"].value, color="k", linestyle="--", label="floor: real images")
plt.xticks(calls, calls)
plt.yticks([0.5, 1, 2, 5, 10], [0.5, 1, 2, 5, 10])
plt.gca().set(xlabel="network calls", ylabel="Frechet distance")
plt.minorticks_off()
plt.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# DPM-Solver++ needs the fewest calls. Heun fails on the even grid, whose first step alone goes from
# $\sigma / \alpha \approx 5000$ to 6 (at 19 calls): two slopes that far apart have no useful mean. One call is
# $\hat x_0$ at nearly pure noise, close to the mean image of the class. The classifier names these blurs without a
# mistake, so accuracy alone would call them the best samples of the table.
#
# ## 6. Guidance and eta
#
# Classifier-free guidance (Ho & Salimans 2022) moves the prediction away from the unconditional one,
# $\hat x_0 = \hat x_0(\varnothing) + w\,(\hat x_0(y) - \hat x_0(\varnothing))$, and $\eta$ gives DDIM a share of the
# ancestral noise. Both are arguments of the compiled program, not part of it: the function below is traced once.

# %%
num_traces = 0


@jax.jit
def guided_samples(params, key, noise, label, guidance_scale, eta):
    global num_traces
    num_traces += 1  # Python runs only while JAX traces
    sampling = Sampling(num_steps=min(20, chain_length), solver=lambda s: ddim(s, eta), guidance_scale=guidance_scale)
    return method.generate(params, {}, key, noise, {"label": label}, sampling)


settings = [(1.0, 0.0), (2.0, 0.0), (4.0, 0.0), (1.0, 0.5), (1.0, 1.0)]
guided, rows = {}, []
for scale, eta in settings:
    dials = jnp.float32(scale), jnp.float32(eta)
    guided[scale, eta] = guided_samples(params, jax.random.key(5), noise, labels, *dials)
    rows.append({"guidance": scale, "eta": eta, **score(guided[scale, eta])})
print(table(rows))
print(f"{len(settings)} settings, traced {num_traces} time(s)")

# %%
figure, axes = plt.subplots(1, len(settings), figsize=(12, 2.4), layout="constrained")
for axis, (scale, eta) in zip(axes, settings, strict=True):
    axis.imshow(pictures.grid(np.asarray(guided[scale, eta][:20]), columns=5))
    axis.set(title=rf"guidance {scale:g}, $\eta$ = {eta:g}", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# Guidance makes each digit more like its class and all of them more alike: accuracy rises while the distance to the
# real digits grows.
#
# ## 7. Where to go next
#
# * The same model as a run that can be stopped and resumed, with a table of solvers at the end:
#   `jaxdiff train experiments/digits_ddpm.py --workdir runs/digits`, then `jaxdiff compare runs/digits`.
# * Other starting points: in section 3, change the chain (`schedules`), what the network predicts (`parameterization`),
#   the weight of each level (`weighting`), or the method (`methods.edm`). The loop stays as it is.
# * Your own data: any object with `len` and `[i]` that gives `{"x0": ..., "label": ...}` is a source for `batches`;
#   image folders, `.npz` files and TFDS sets are in `jaxdiff.data`.
# * How it fits together: `docs/design.md`. How to add a method in four files: `CONTRIBUTING.md`.

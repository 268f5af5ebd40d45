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
# # Digits in one step
#
# A diffusion model takes dozens of network calls for an image. Here it becomes a consistency model, which takes one.
# The images are 8 x 8 digits that come with the library. The notebook takes about five minutes on one CPU core.
#
# 1. The teacher: EDM
# 2. Consistency distillation
# 3. The loss, and what it does not say
# 4. One, two and four calls beside the teacher's fifty
# 5. A run that collapsed
# 6. Editing without training: inpainting and super-resolution
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
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jaxdiff import editing, losses, parameterization, pictures, schedules, times
from jaxdiff.data.images import digits
from jaxdiff.data.pipeline import batches
from jaxdiff.denoiser import clip_x0, denoiser
from jaxdiff.evaluation import table
from jaxdiff.methods.base import Sampling
from jaxdiff.methods.consistency import consistency_distillation, fixed
from jaxdiff.methods.edm import edm
from jaxdiff.metrics import evaluate as judge
from jaxdiff.metrics.digits import digits_extractor
from jaxdiff.networks.base import as_network, num_params
from jaxdiff.networks.base import init_params as fresh_params
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.solvers.ddim import ddim
from jaxdiff.training import ema
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step

# %% [markdown]
# Sizes: `JAXDIFF_SMOKE=1` shrinks everything to seconds, and the pictures are noise.

# %%
smoke = os.environ.get("JAXDIFF_SMOKE") == "1"
width, batch_size, num_samples = (8, 8, 40) if smoke else (16, 64, 500)
teacher_steps, student_steps, collapsed_steps = (4, 4, 4) if smoke else (1200, 600, 300)
SIGMA_DATA, SIGMA_MIN, SIGMA_MAX = 0.752, 0.002, 80.0  # the first is the standard deviation of these images

# %% [markdown]
# ## 1. The teacher
#
# EDM (Karras et al. 2022) adds noise of deviation $\sigma$ up to 80 and learns the denoiser $D(x, \sigma)$, the mean of
# all clean images that could have become $x$. The denoiser gives the direction of a path from noise to data,
#
# $$\frac{d x}{d \sigma} = \frac{x - D(x, \sigma)}{\sigma},$$
#
# and to sample is to follow it in small steps. `train` below is all that training needs, for teacher and student.

# %%
unet = UNet(
    in_channels=1,
    out_channels=1,
    base_channels=width,
    channel_mult=(1, 2),
    num_res_blocks=1,
    norm_groups=8,
    scale_shift_norm=True,
    num_classes=10,
    null_label=True,
)
network = as_network(unet)


def init_params(key, batch):
    return fresh_params(unet, key, *example_inputs(unet))


def train(method, num_steps, peak, decay, watch=lambda params: None):
    """Parameters (a moving average), losses [num_steps], and {step: watch(params)} at eight steps."""
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, min(100, num_steps // 4 + 1), max(num_steps, 2), peak / 20)
    optimizers = {"model": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))}
    averages = (ema.warmup("ema", decay),)
    data = batches(digits("train"), batch_size=batch_size, seed=0)
    state = create_state(method, optimizers, averages, jax.random.key(0), next(data))
    step = jax.jit(make_train_step(method, optimizers, averages), donate_argnums=0)
    seen, watched = [], {}
    for k in range(1, num_steps + 1):
        state, metrics = step(state, next(data))
        seen.append(metrics["model/loss"])
        if k % max(1, num_steps // 8) == 0:
            watched[k] = watch(state.ema["ema"])
    return state.ema["ema"], np.asarray(jnp.stack(seen)), watched


edm_method = edm(
    network, init_params=init_params, sigma_data=SIGMA_DATA, log_mean=-0.8, label_dropout=0.1, null_label=10
)
teacher, teacher_losses, _ = train(edm_method, teacher_steps, 2e-3, 0.995)
print(f"{num_params(teacher):,} parameters, last loss {teacher_losses[-1]:.3f}")

# %% [markdown]
# Quality is the Frechet distance to the held-out digits in the features of a small classifier that comes with the
# library, as in the first notebook. The *floor* is what real training images score at the same number of images.
# *Spread* is the standard deviation of a pixel over the samples of a class: 0 if they are all the same.

# %%
train_set, held_out = digits("train"), digits("held_out")
reference = judge.reference("digits held-out", held_out.x0, digits_extractor(), train_images=train_set.x0)
wanted = ("frechet", "accuracy")
floor = judge.floor(reference, train_set.label, wanted, num_samples=num_samples)
labels = jnp.arange(num_samples) % 10
noise = jax.random.normal(jax.random.key(1), (num_samples, 8, 8, 1))


def score(samples, label=labels):
    samples, label = np.clip(np.asarray(samples), -1, 1), np.asarray(label)
    results = judge.evaluate(samples, label, reference, wanted)
    spread = np.mean([samples[label == c].std(axis=0).mean() for c in range(10)])
    return {name: result.value for name, result in results.items()} | {"spread": float(spread)}


@functools.partial(jax.jit, static_argnames="calls")
def teacher_samples(params, calls):
    sampling = Sampling(num_steps=calls, solver=ddim)
    return edm_method.generate(params, {}, jax.random.key(2), noise, {"label": labels}, sampling)


many = 8 if smoke else 50
drawn = {f"teacher, {calls}": teacher_samples(teacher, calls) for calls in (many, 4, 1)}

# %% [markdown]
# ## 2. Consistency distillation
#
# All points of one path end in the same image. A *consistency function* names that end from any point of the path,
# so that $f(x_\sigma, \sigma)$ is the same all along it, and $f(x, \sigma_{\min}) = x$ (Song et al. 2023). The second
# condition is built into the parameterisation:
#
# $$f(x, \sigma) = c_{\mathrm{skip}}(\sigma)\, x + c_{\mathrm{out}}(\sigma)\, F_\theta(c_{\mathrm{in}}(\sigma)\, x),
# \qquad c_{\mathrm{skip}}(\sigma_{\min}) = 1,\quad c_{\mathrm{out}}(\sigma_{\min}) = 0.$$
#
# The first is the loss. Cut the levels into $N - 1$ steps, take a noisy image at level $\sigma_{n+1}$, and let one
# Heun step of the teacher carry it to level $\sigma_n$:
#
# $$L = d\big(f_\theta(x_{n+1}, \sigma_{n+1}),\; f_{\theta^-}(\hat x_n, \sigma_n)\big).$$
#
# The target $\theta^-$ is a slow average of $\theta$, and no gradient passes through it. The student starts as a copy
# of the teacher, on eight levels; $d$ is the pseudo-Huber distance.


# %%
def distillation(num_levels, init_params=None):
    return consistency_distillation(
        network,
        teacher_params=teacher["model"],
        init_params=init_params,  # None: a copy of the teacher's
        curriculum=fixed(num_levels, 0.95),
        distance=losses.pseudo_huber(0.1),
        sigma_data=SIGMA_DATA,
        sigma_min=SIGMA_MIN,
        sigma_max=SIGMA_MAX,
    )


NUM_LEVELS = 8
method = distillation(NUM_LEVELS)


@functools.partial(jax.jit, static_argnames="calls")
def student_samples(params, calls):
    return method.generate(params, {}, jax.random.key(2), noise, {"label": labels}, Sampling(num_steps=calls))


def one_call(params):
    return score(student_samples(params, 1))


student, student_losses, watched = train(method, student_steps, 5e-4, 0.99, one_call)

# %% [markdown]
# ## 3. The loss, and what it does not say
#
# Left, the loss; right, the distance of one-call samples on the way. The two do not go together. The loss compares the
# student with a target that moves along with it: early it rises for a while, when the samples improve most, and later
# it falls when they no longer do. Section 5 shows the worse case. Judge samples, not losses.


# %%
def smooth(values):
    window = max(1, values.size // 30)
    return np.arange(values.size - window + 1) + window, np.convolve(values, np.ones(window) / window, mode="valid")


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
left.semilogy(student_losses, color="0.85")
left.semilogy(*smooth(student_losses), "C0")
left.set(title="Loss of consistency distillation", xlabel="step")
right.semilogy(list(watched), [row["frechet"] for row in watched.values()], "o-")
right.axhline(floor["frechet"].value, color="k", linestyle="--", label="floor: real images")
right.set(title="Frechet distance of one call", xlabel="step")
right.legend()
plt.show()

# %% [markdown]
# ## 4. One, two and four calls
#
# One call is $f$ at $\sigma = 80$. More calls take noise back up to a lower level and jump again (algorithm 1 of the
# paper), at levels of the training grid.

# %%
drawn |= {f"student, {calls}": student_samples(student, calls) for calls in (4, 2, 1)}
real = score(train_set.x0, jnp.asarray(train_set.label)) | {name: floor[name].value for name in wanted}
real = {"sampler, calls": "real training images"} | real
print(table([real, *({"sampler, calls": name, **score(samples)} for name, samples in drawn.items())]))

# %%
figure, axes = plt.subplots(2, 3, figsize=(11, 4.6), layout="constrained")
for axis, (name, samples) in zip(axes.flat, drawn.items(), strict=True):
    axis.imshow(pictures.grid(np.asarray(samples[:40]), columns=10))
    axis.set(title=name, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# In one call the teacher gives the mean image of a class, hence no spread; from the same noise the student gives a
# digit. In a run this short, more calls gain nothing: each jump brings the student's own errors in again.
#
# ## 5. A run that collapsed
#
# Only the clean end ties $f$ to the data. From there the truth must travel upwards level by level, while in between
# it is enough to agree with one's neighbour, and nothing agrees as well as a constant. The next run makes that easy:
# random parameters instead of the teacher's, and 640 levels, so that neighbours are nearly the same and the truth has
# far to go.

# %%
random_start = distillation(640, init_params)
collapsed, collapsed_losses, collapsed_watched = train(random_start, collapsed_steps, 5e-4, 0.99, one_call)
drawn["collapsed, 1"] = student_samples(collapsed, 1)
print(table([{"run": name, **score(drawn[f"{name}, 1"])} for name in ("student", "collapsed")]))

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.2), layout="constrained")
for name, values in (("student", student_losses), ("collapsed", collapsed_losses)):
    left.semilogy(*smooth(values), label=name)
left.set(title="Loss", xlabel="step")
left.legend()
for name, seen in (("student", watched), ("collapsed", collapsed_watched)):
    middle.plot(list(seen), [row["spread"] for row in seen.values()], "o-", label=name)
middle.set(title="Spread of one-call samples", xlabel="step", ylim=(0, None))
right.imshow(pictures.grid(np.asarray(drawn["collapsed, 1"][:40]), columns=10))
right.set(title="Collapsed, one call", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# By its loss this is the better run. The signs of collapse are in the samples: no spread, and a distance that does not
# fall. What helps: start from the teacher, begin with few levels and add more later (`adaptive`, and
# `methods.improved_consistency`), and look at samples from the first hundred steps on.
#
# ## 6. Editing without training
#
# A model that reaches clean images in one call can fill in what a picture does not show (algorithm 4 of the paper):
# jump to the data, put back what is known, add noise of the next level, jump again. `editing.zero_shot` does it for
# every `View`, which says what is known: `region` a part of the pixels, `patch_means` a smaller picture.

# %%
num_edited = 40 if smoke else 200
truth, given = jnp.asarray(held_out.x0)[:num_edited], jnp.asarray(held_out.label)[:num_edited]
views = {
    "inpainting": editing.region(jnp.ones((1, 8, 8, 1)).at[:, 4:].set(0)),
    "super-resolution": editing.patch_means(2),
}
schedule = schedules.ve(SIGMA_MIN, SIGMA_MAX)
grid = jnp.asarray(times.karras(NUM_LEVELS, SIGMA_MIN, SIGMA_MAX)[:-1], jnp.float32)


def edit(view, params, key):
    meaning = parameterization.consistency(SIGMA_DATA, SIGMA_MIN)
    f = clip_x0(denoiser(network, params["model"], schedule, meaning, {"label": given}))
    return editing.zero_shot(f, schedule, key, truth, view, grid, sigma_min=SIGMA_MIN)


def accuracy(images):
    return judge.evaluate(np.asarray(images), np.asarray(given), reference, ("accuracy",))["accuracy"].value


rows, figures = [], {}
for name, view in views.items():
    shown = editing.replace_known(view, truth, jnp.zeros_like(truth))
    fill_in = jax.jit(functools.partial(edit, view))
    first, second = (fill_in(student, jax.random.key(seed)) for seed in (3, 4))
    known = editing.replace_known(view, first, jnp.zeros_like(first))
    changed = float(jnp.abs(known - shown).max())
    rows.append({"task": name, "accuracy, shown": accuracy(shown), "filled in": accuracy(first), "changed": changed})
    figures[name] = np.concatenate([np.asarray(images[:10]) for images in (shown, first, second, truth)])
print(table(rows))

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3), layout="constrained")
for axis, (name, images) in zip(axes, figures.items(), strict=True):
    axis.imshow(pictures.grid(images, columns=10))
    middles = (np.arange(4) + 0.5) * axis.get_ylim()[0] / 4
    axis.set(title=name, xticks=[], yticks=middles, yticklabels=["shown", "filled in", "again", "truth"])
    axis.tick_params(length=0)
plt.show()

# %% [markdown]
# What is known stays as it is (`changed` is rounding), the rest differs with the noise, and the classifier recognises
# the result more often than what was shown. One model does all of it, and none of it was trained.
#
# ## 7. Where to go next
#
# * The same two runs with checkpoints, resume and a table at the end:
#   `jaxdiff train experiments/digits_edm.py --workdir runs/ladder/teacher`, then
#   `jaxdiff train experiments/digits_consistency.py --workdir runs/ladder/cd-0`.
# * Other ways to few steps, each a file of `jaxdiff/methods` and of `experiments`: training without a teacher
#   (`consistency_training`, `improved_consistency`, `easy_consistency`), continuous time (`continuous_consistency`),
#   halving rounds (`progressive`).
# * More edits: `editing.grey_values` for colour, `editing.slerp` for a path between two digits.

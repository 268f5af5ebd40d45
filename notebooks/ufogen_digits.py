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
# # From a diffusion model to UFOGen
#
# A trained diffusion model is both a generator and a discriminator in waiting. Here one becomes UFOGen (Xu et al.
# 2023): an adversary that compares noised images turns it into a generator of one step. The images are 8 x 8 digits
# that come with the library. The notebook takes about seven minutes on one CPU core.
#
# 1. The diffusion model
# 2. A generator and a discriminator from it
# 3. Training, and what a healthy run looks like
# 4. One, two and four calls beside fifty
# 5. Without the adversary, and with the posterior of diffusion GANs
# 6. Image to image in one call
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

from jaxdiff import one_step, parameterization, pictures, schedules
from jaxdiff.data.images import digits
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import table
from jaxdiff.methods.base import Sampling
from jaxdiff.methods.edm import edm
from jaxdiff.methods.ufogen import at_t, pair_jumps, signal_share, ufogen
from jaxdiff.metrics import evaluate as judge
from jaxdiff.metrics.digits import digits_extractor
from jaxdiff.networks.base import as_network, num_params
from jaxdiff.networks.base import init_params as fresh_params
from jaxdiff.networks.unet import UNet, example_inputs, unet_plan
from jaxdiff.networks.unet_discriminator import FeatureDiscriminator, on_backbone
from jaxdiff.solvers.ddim import ddim
from jaxdiff.training import ema
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step

# %% [markdown]
# Sizes: `JAXDIFF_SMOKE=1` shrinks everything to seconds, and the pictures are noise.

# %%
smoke = os.environ.get("JAXDIFF_SMOKE") == "1"
width, batch_size, num_samples = (8, 8, 40) if smoke else (16, 64, 500)
teacher_steps, student_steps, ablated_steps = (4, 4, 4) if smoke else (1200, 600, 300)
SIGMA_DATA, SIGMA_MIN, SIGMA_MAX = 0.752, 0.002, 20.0  # the first is the standard deviation of these images

# %% [markdown]
# ## 1. The diffusion model
#
# EDM (Karras et al. 2022): a denoiser $D(x, \sigma)$ of images with noise of deviation $\sigma$. It answers with the
# mean of all clean images that could have become $x$; for pure noise that is the mean of a class, which is why one call
# of it gives a blur.

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


def train(method, optimizers, num_steps, decay=0.995):
    """Parameters of the model (a moving average), and {name: [num_steps]} of what was logged."""
    averages = (ema.warmup("ema", decay, players=("model",)),)
    data = batches(digits("train"), batch_size=batch_size, seed=0)
    state = create_state(method, optimizers, averages, jax.random.key(0), next(data))
    step = jax.jit(make_train_step(method, optimizers, averages), donate_argnums=0)
    drift, logs = jax.jit(lambda state: ema.drift(state.ema, state.params)), []
    for _ in range(num_steps):
        state, metrics = step(state, next(data))
        logs.append(metrics | drift(state))
    return state.ema["ema"], {name: np.array([float(m[name]) for m in logs]) for name in logs[0]}


diffusion = edm(
    network, init_params=init_params, sigma_data=SIGMA_DATA, log_mean=-0.8, label_dropout=0.1, null_label=10
)
rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, min(100, teacher_steps // 4), teacher_steps, 1e-4)
optimizers = {"model": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))}
teacher, logs = train(diffusion, optimizers, teacher_steps)
print(f"{num_params(teacher):,} parameters, last loss {logs['model/loss'][-1]:.3f}")

# %% [markdown]
# Quality is the Frechet distance to the held-out digits in the features of a small classifier that comes with the
# library, and how often that classifier sees the class that was asked for. Recall is the share of held-out digits that
# have a sample near by: a collapsed generator has none. The *floor* is what real training images score.

# %%
train_set, held_out = digits("train"), digits("held_out")
reference = judge.reference("digits held-out", held_out.x0, digits_extractor(), train_images=train_set.x0)
wanted = ("frechet", "accuracy", "recall")
floor = judge.floor(reference, train_set.label, wanted, num_samples=num_samples)
labels = jnp.arange(num_samples) % 10
noise = jax.random.normal(jax.random.key(1), (num_samples, 8, 8, 1))


def score(samples):
    samples = np.clip(np.asarray(samples), -1, 1)
    return {
        name: result.value for name, result in judge.evaluate(samples, np.asarray(labels), reference, wanted).items()
    }


@functools.partial(jax.jit, static_argnames="calls")
def teacher_samples(params, calls):
    sampling = Sampling(num_steps=calls, solver=ddim)
    return diffusion.generate(params, {}, jax.random.key(2), noise, {"label": labels}, sampling)


many = 8 if smoke else 50
drawn = {f"diffusion, {calls}": teacher_samples(teacher, calls) for calls in (many, 1)}

# %% [markdown]
# ## 2. A generator and a discriminator from it
#
# **The generator** must answer with an image at every level, pure noise included, where the error of the network must
# not be blown up. `one_step.from_diffusion` wraps a network so, translates schedules, and refuses what cannot work:
# an output of noise at the end of DDPM's chain, say, which leaves the image undetermined. EDM's output is safe.

# %%
schedule, meaning = schedules.ve(SIGMA_MIN, SIGMA_MAX), parameterization.edm(SIGMA_DATA)
generator = one_step.from_diffusion(network, schedule, meaning)
try:
    one_step.from_diffusion(network, schedules.discrete(schedules.linear_betas(1000)), parameterization.eps())
except ValueError as error:
    print(error)

# %% [markdown]
# **The discriminator** is the way down of the same network, with a head on its features that starts at zero: at first
# it says nothing, and so does no harm. `on_backbone` copies the weights of the diffusion model into it, and
# `judge_from_diffusion`, inside the method, shows it images as they were scaled for the diffusion model.

# %%
taps = (*(step.name for step in unet_plan(unet).down), "mid")
discriminator = FeatureDiscriminator(unet, taps)


def copied(key, batch):
    return jax.tree.map(jnp.array, teacher["model"])


# %% [markdown]
# From $x_t$ the generator predicts $x_0$. Both the prediction and the true image get fresh noise of a lower level $s$,
# and the discriminator, which knows $s$, must tell them apart. Equal laws after the same noise are equal laws before
# it, so this works for pure noise at $t$, and then one step is enough. A second term keeps the prediction near the
# image that $x_t$ came from, which matters where there is something left of it:
#
# $$L_G = \mathrm{softplus}\big({-D(G(x_t) + \sigma_s \varepsilon, s)}\big) + \lambda\, \gamma_t\, \|G(x_t) - x_0\|^2.$$
#
# The levels $s$ must suit the images. On digits this small, noise of deviation 2 hides everything there is to compare.

# %%
COMPARED, STARTS = (0.1, 0.3, 0.7), (0.3, 0.7, 2.4)
pairs = [(SIGMA_MAX, s) for s in COMPARED] + [(t, max(s for s in COMPARED if s < t)) for t in STARTS]
shares = [0.2] * 3 + [0.4 / 3] * 3


def adversarial(**changes):
    settings = {"reconstruction_weight": 4.0, "gamma": at_t(signal_share), "r1_weight": 0.0}
    return ufogen(
        generator.network,
        as_network(discriminator),
        generator.schedule,
        parameterization=generator.parameterization,
        init_params=copied,
        init_discriminator=on_backbone(discriminator, teacher["model"], *example_inputs(unet)),
        jumps=pair_jumps(pairs, shares),
        **(settings | changes),
    )


# %% [markdown]
# ## 3. Training, and what a healthy run looks like
#
# Two players, two optimisers, one train step. What to watch is not the loss of the discriminator, which stays near
# chance, $2 \log 2 = 1.386$, in good runs and in useless ones. Watch what it says at each level of noise, how much the
# samples from noise differ among each other (`diversity`, 1 for data), and how far the generator is from its average.


# %%
def players(lr=2e-4):
    return {"disc": optax.adam(2 * lr, b1=0.0, b2=0.99), "model": optax.adam(lr, b1=0.0, b2=0.99)}


method = adversarial()
student, logs = train(method, players(), student_steps)


def smooth(values):
    window = max(1, values.size // 20)
    return [np.nanmean(values[max(0, k - window) : k + 1]) for k in range(values.size)]


figure, axes = plt.subplots(1, 4, figsize=(15, 3), layout="constrained")
axes[0].plot(smooth(logs["disc/loss"]))
axes[0].axhline(2 * np.log(2), color="k", linestyle="--", label="chance")
axes[0].set(title="Loss of the discriminator", xlabel="step")
axes[0].legend()
for low in ("0.0", "0.2", "0.4"):
    axes[1].plot(smooth(logs[f"logit_real_{low}"] - logs[f"logit_fake_{low}"]), label=f"noise share from {low}")
axes[1].set(title="Logit of data less that of samples", xlabel="step")
axes[1].legend()
axes[2].plot(smooth(logs["diversity"]))
axes[2].set(title="Diversity of one-call samples", xlabel="step", ylim=(0, None))
axes[3].plot(smooth(logs["model/drift_ema"]))
axes[3].set(title="Distance from the average", xlabel="step", ylim=(0, None))
plt.show()

# %% [markdown]
# `training.alarms.collapse()` in an experiment stops a run whose diversity or gradient stays near zero, and keeps the
# last good checkpoint.
#
# ## 4. One, two and four calls
#
# More calls noise the prediction afresh to the next of the levels that were trained, and predict again.


# %%
@functools.partial(jax.jit, static_argnames="calls")
def student_samples(params, calls):
    return method.generate(params, {}, jax.random.key(2), noise, {"label": labels}, Sampling(num_steps=calls))


drawn |= {f"UFOGen, {calls}": student_samples(student, calls) for calls in (4, 2, 1)}
real = {"sampler, calls": "real training images"} | {name: floor[name].value for name in wanted}
print(table([real, *({"sampler, calls": name, **score(samples)} for name, samples in drawn.items())]))

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 2.6), layout="constrained")
for axis, name in zip(axes, (f"diffusion, {many}", "diffusion, 1", "UFOGen, 1"), strict=True):
    axis.imshow(pictures.grid(np.asarray(drawn[name][:40]), columns=10))
    axis.set(title=name, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## 5. What the parts are for
#
# Half as long, three times: as above; without the adversary, where only the reconstruction is left, which asks for a
# mean; and with samples of the posterior $q(x_s | x_t, x_0)$, as in diffusion GANs. Given pure noise $x_t$ and a much
# cleaner $s$ the posterior is nearly $x_0$ with fresh noise; close to $t$ it hardly depends on $x_0$, and nothing tells
# the generator apart from the data.

# %%
quiet = optax.set_to_zero()
variants = {
    "UFOGen": (adversarial(), players()),
    "no adversary": (adversarial(reconstruction_weight=12.8), players() | {"disc": quiet}),
    "posterior": (adversarial(posterior=True), players()),
}
rows = []
for name, (variant, optimizers) in variants.items():
    params, _ = train(variant, optimizers, ablated_steps)
    drawn[f"{name}, half as long"] = samples = student_samples(params, 1)
    rows.append({"variant, one call": name, **score(samples)})
print(table(rows))

# %% [markdown]
# ## 6. Image to image in one call
#
# `one_step.image_to_image` noises an image to a level and calls the generator there, with another class: a small
# strength keeps the strokes, a large one only their place, 1 nothing.

# %%
given = jnp.asarray(held_out.x0[:10])
target = {"label": jnp.full(10, 3)}
edited = [given]
for strength in (0.3, 0.5, 0.7, 1.0):
    denoise = generator.denoiser(student["model"], target)
    edited.append(one_step.image_to_image(denoise, generator.schedule, given, strength, noise[:10]))
figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
axis.imshow(pictures.grid(np.concatenate([np.asarray(images) for images in edited]), columns=10))
middles = (np.arange(5) + 0.5) * axis.get_ylim()[0] / 5
names = ["given", *(f"strength {s}" for s in (0.3, 0.5, 0.7, 1.0))]
axis.set(title="Towards a three", xticks=[], yticks=middles, yticklabels=names)
plt.show()

# %% [markdown]
# ## 7. Where to go next
#
# * The same with checkpoints, resume and alarms: `jaxdiff train experiments/digits_edm.py --workdir
#   runs/ladder/teacher`, then `jaxdiff train experiments/digits_ufogen.py --workdir runs/ladder/ufogen-0`.
# * `docs/ladder.md` has UFOGen beside every other way to few steps, on three seeds, and what its parts are worth.
# * Other adversaries, each a file of `jaxdiff/methods`: `ddgan`, `siddm`, `dmd2`, `adversarial_distillation`.

"""Tiny methods and an endless batch source: all that the tests of training/ train.

Two methods are written here, two distil a small network, with a curriculum and with rounds, and one is a diffusion GAN.

Run as a script it trains the first of them in a folder, for tests that send signals:
`training_toys.py WORKDIR NUM_STEPS` or `training_toys.py WORKDIR NUM_STEPS slow`.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff import losses
from jaxdiff.methods.base import Method, Objective
from jaxdiff.methods.consistency import adaptive, consistency_distillation
from jaxdiff.methods.ddgan import ddgan
from jaxdiff.methods.progressive import progressive
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.ddgan_discriminators import append_batch_deviation
from jaxdiff.networks.layers import fourier_embedding
from jaxdiff.networks.mlp import MLP
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


class Points:
    """Batch n is drawn from a generator seeded with n, so the order of the data is its own number.

    Of a global batch, host h of H gives the h-th block of rows. `bad` are the batches that have a NaN.
    """

    def __init__(self, batch_size=8, bad=(), delay=0.0, host=0, num_hosts=1):
        self.batch_size, self.bad, self.delay, self.step = batch_size, bad, delay, 0
        share = batch_size // num_hosts
        self.rows = slice(host * share, (host + 1) * share)

    def __next__(self):
        time.sleep(self.delay)
        draw = np.random.default_rng(self.step)
        x = draw.normal(size=(self.batch_size, 3)).astype(np.float32)
        if self.step in self.bad:
            x[0, 0] = np.nan
        self.step += 1
        x = x[self.rows]
        return {"x0": x, "target": x @ np.float32([1.0, -2.0, 0.5])}

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]


def generate(params, aux, key, noise, cond, sampling):
    del aux, key, cond, sampling
    return noise * params["model"]["scale"]


def regression(noise=0.1, on_trace=lambda: None):
    """Linear regression with noise on the target; aux follows the mean error."""

    def init(key, batch):
        weights = jax.random.normal(key, (batch["x0"].shape[1],))
        return {"model": {"weights": weights, "scale": jnp.ones(())}}, {"error": jnp.zeros(())}

    def loss(params, aux, batch, key, step):
        del aux, step
        on_trace()
        model = params["model"]
        error = batch["x0"] @ model["weights"] * model["scale"] - batch["target"]
        error = error + noise * jax.random.normal(key, error.shape)
        return (error**2).mean(), {"error": error**2, "scale": model["scale"]}

    def advance(aux, params, step, metrics):
        del params, step
        return {"error": 0.9 * aux["error"] + 0.1 * metrics["error"].mean()}

    return Method(init, (Objective("model", loss),), generate, advance)


def gan(every=1, on_trace=lambda: None):
    """A discriminator against a generator of shifted normals; the target network is a copy in aux."""

    def init(key, batch):
        size = batch["x0"].shape[1]
        model = {"shift": jnp.zeros(size), "scale": jnp.ones(())}
        disc = {"weights": 0.1 * jax.random.normal(key, (size,))}
        return {"model": model, "disc": disc}, {"target": model}

    def fake(model, key, like):
        return model["scale"] * jax.random.normal(key, like.shape) + model["shift"][None]

    def disc_loss(params, aux, batch, key, step):
        del aux, step
        on_trace()
        weights = params["disc"]["weights"]
        real, made = batch["x0"] @ weights, fake(params["model"], key, batch["x0"]) @ weights
        return (jax.nn.softplus(-real) + jax.nn.softplus(made)).mean(), {"logits_real": real}

    def model_loss(params, aux, batch, key, step):
        del step
        on_trace()
        made = fake(params["model"], key, batch["x0"])
        pull = ((params["model"]["shift"] - aux["target"]["shift"]) ** 2).sum()
        return jax.nn.softplus(-made @ params["disc"]["weights"]).mean() + 0.1 * pull, {}

    def advance(aux, params, step, metrics):
        del step, metrics
        return {"target": jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, aux["target"], params["model"])}

    return Method(init, (Objective("disc", disc_loss, every), Objective("model", model_loss)), generate, advance)


def distillation(rounds=False):
    """A student of a random network on points. N and mu of the consistency model change with nearly every step;
    with rounds it is progressive distillation from 4 steps, which halves after steps 3 and 9.
    """
    mlp = MLP(features=16, num_blocks=1, time_features=fourier_embedding)
    teacher_params = init_params(mlp, jax.random.key(7), jnp.zeros((1, 3)), jnp.zeros(1), {})

    def network(params, x_t, t, cond, *, train=False, key=None):
        del cond  # the points come with the target of the regression
        return as_network(mlp)(params, x_t, t, {}, train=train, key=key)

    if rounds:
        return progressive(network, teacher_params=teacher_params, num_steps=4, round_length=3)
    return consistency_distillation(
        network, teacher_params=teacher_params, curriculum=adaptive(2, 8, 12, 0.9), distance=losses.pseudo_huber(),
        sigma_data=1.0,
    )  # fmt: skip


def diffusion_gan():
    """DDGAN on points, with latents, R1, and a logit that sees how much its group of four examples varies."""
    mlp, judge = (MLP(features=16, num_blocks=1, time_features=fourier_embedding, out_features=n) for n in (3, 4))
    time = jnp.zeros(1)

    def network(params, x_t, t, cond, **training):
        return as_network(mlp)(params, jnp.concatenate([x_t, cond["z"]], axis=1), t, {}, **training)

    def discriminator(params, x_s, t, cond, **training):
        h = as_network(judge)(params["body"], jnp.concatenate([x_s, cond["x_t"]], axis=1), t, {}, **training)
        return append_batch_deviation(h[:, None, None, :])[:, 0, 0] @ params["logit"]

    def init_discriminator(key, batch):
        del batch
        return {"body": init_params(judge, key, jnp.zeros((1, 6)), time, {}), "logit": jnp.ones(5)}

    return ddgan(
        network, discriminator, init_disc_params=init_discriminator, latent_dim=2, r1_every=2,
        init_params=lambda key, batch: init_params(mlp, key, jnp.zeros((1, 5)), time, {}),
    )  # fmt: skip


def experiment(num_steps=6, *, data=Points, **changes):
    """The regression as an experiment, small in every way."""
    settings = {
        "name": "toy",
        "method": regression(),
        "data": data,
        "optimizers": {"model": optax.adam(0.05)},
        "sample_shape": (3,),
        "batch_size": 8,
        "num_steps": num_steps,
        "ema": (ema.constant("slow", 0.9), ema.half_life("edm", 100)),
        "checkpoint_every": 2,
        "log_every": 2,
        "config": {"lr": 0.05},
    }
    return Experiment(**{**settings, **changes})


def leaves(state):
    """{path: NumPy array} with keys as their words, to compare bit for bit."""

    def plain(leaf):
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    flat = jax.tree_util.tree_leaves_with_path(jax.tree.map(plain, state))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


if __name__ == "__main__":
    from jaxdiff.training.loop import train
    from jaxdiff.training.sharding import single_device

    pause = 0.05 if sys.argv[3:] == ["slow"] else 0.0
    run = experiment(int(sys.argv[2]), data=lambda: Points(delay=pause), checkpoint_every=1000)
    outcome = train(run, Path(sys.argv[1]), mesh=single_device())
    print("stopped", outcome.stopped, outcome.step)

"""DDPM on a grid of 25 Gaussians in the plane: the smallest complete run, half a minute on one core.

Paper: Ho et al. 2020 (arXiv:2006.11239), with the cosine chain of Nichol & Dhariwal 2021 and v-prediction.
Command: jaxdiff train experiments/toy_ddpm.py --workdir runs/toy_ddpm
Expected: `samples/` shows 25 separate spots; no number is claimed.
"""

import jax.numpy as jnp
import optax

from jaxdiff import parameterization, process, schedules
from jaxdiff.data import toy
from jaxdiff.data.pipeline import batches
from jaxdiff.methods.ddpm import ddpm
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.mlp import MLP
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    num_steps: int = 10_000,
    batch_size: int = 512,
    lr: float = 2e-3,
    features: int = 128,
    chain_length: int = 200,
    seed: int = 0,
    log_every: int = 500,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: features is the network's width, chain_length the number T of noise levels."""
    if smoke:
        num_steps, batch_size, features, chain_length = 4, 16, 16, 10
    network = MLP(features=features)
    method = ddpm(
        as_network(network),
        schedules.cosine_betas(chain_length),
        init_params=lambda key, batch: init_params(network, key, jnp.zeros([1, 2]), jnp.zeros([1]), {}),
        parameterization=parameterization.v(parameterization.scaled_time(1000 / chain_length)),
        variance=process.fixed_small,
        clip=None,
    )
    points = toy.source(toy.gaussian_grid(5), num_points=4096 if smoke else 65536, seed=seed)
    points.label = None
    return Experiment(
        name="toy_ddpm",
        method=method,
        data=lambda: batches(points, batch_size=batch_size, seed=seed),
        optimizers={"model": optax.adam(optax.cosine_decay_schedule(lr, num_steps))},
        ema=(ema.warmup("ema", 0.999),),
        sample_shape=(2,),
        batch_size=batch_size,
        num_steps=num_steps,
        seed=seed,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        sample_every=sample_every,
    )

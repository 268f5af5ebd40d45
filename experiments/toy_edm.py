"""EDM on a grid of 25 Gaussians in the plane.

Paper: Karras et al. 2022 (arXiv:2206.00364), with noise levels for data of deviation 0.5.
Command: jaxdiff train experiments/toy_edm.py --workdir runs/toy_edm
Expected: `samples/` shows 25 separate spots; no number is claimed.
"""

import jax.numpy as jnp
import optax

from jaxdiff.data import toy
from jaxdiff.data.pipeline import batches
from jaxdiff.methods.edm import edm
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.layers import fourier_embedding
from jaxdiff.networks.mlp import MLP
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    num_steps: int = 10_000,
    batch_size: int = 512,
    lr: float = 2e-3,
    features: int = 128,
    num_levels: int = 18,
    seed: int = 0,
    log_every: int = 500,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: features is the network's width, chain_length the number T of noise levels."""
    if smoke:
        num_steps, batch_size, features, num_levels = 4, 16, 16, 3
    network = MLP(features=features, time_features=fourier_embedding)
    method = edm(
        as_network(network),
        init_params=lambda key, batch: init_params(network, key, jnp.zeros([1, 2]), jnp.zeros([1]), {}),
        sigma_data=0.5,
        sigma_max=10.0,
        log_mean=-2.0,
        log_std=1.6,
        num_steps=num_levels,
    )
    points = toy.source(toy.gaussian_grid(5), num_points=4096 if smoke else 65536, seed=seed)
    points.label = None
    return Experiment(
        name="toy_edm",
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

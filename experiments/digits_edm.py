"""The teacher of the ladder: class-conditional EDM on the embedded 8x8 digits, two minutes of one core.

Paper: Karras et al. 2022 (arXiv:2206.00364), with noise levels and deviation measured on these images.
Command: jaxdiff train experiments/digits_edm.py --workdir runs/ladder/teacher
Expected: at 50 calls within 1.3 times the Frechet distance of real training images (docs/ladder.md).
"""

import jax.numpy as jnp
import optax

from jaxdiff.data.images import digits
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.edm import edm
from jaxdiff.metrics.digits import digits_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment

SIGMA_DATA = 0.752


def build(
    *,
    num_steps: int = 3000,
    batch_size: int = 64,
    lr: float = 2e-3,
    width: int = 16,
    label_dropout: float = 0.1,
    ema_decay: float = 0.999,
    bf16: bool = False,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 500,
    sample_every: int = 1000,
    smoke: bool = False,
) -> Experiment:
    """Settings: width is the UNet's base; the rest is usual. The students of the ladder have the same UNet."""
    if smoke:
        num_steps, batch_size, width, checkpoint_every, sample_every = 4, 8, 8, 2, 4
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
        dtype=jnp.bfloat16 if bf16 else jnp.float32,
    )
    method = edm(
        as_network(unet),
        init_params=lambda key, batch: init_params(unet, key, *example_inputs(unet)),
        sigma_data=SIGMA_DATA,
        log_mean=-0.8,
        log_std=1.2,
        label_dropout=label_dropout,
        null_label=10,
        num_steps=4 if smoke else 18,
    )
    rate = optax.warmup_cosine_decay_schedule(0.0, lr, min(100, num_steps // 4 + 1), max(num_steps, 2), lr / 20)
    return Experiment(
        name="digits_edm",
        method=method,
        networks={"model": unet},
        data=lambda: batches(digits("train"), batch_size=batch_size, seed=seed),
        optimizers={"model": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))},
        ema=(ema.warmup("ema", ema_decay),),
        partition=partition.UNET,
        sample_shape=(8, 8, 1),
        num_classes=10,
        batch_size=batch_size,
        num_steps=num_steps,
        seed=seed,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        sample_every=sample_every,
        evaluation=Evaluation(
            name="digits held-out",
            extractor=digits_extractor,
            held_out=lambda: digits("held_out"),
            train=lambda: digits("train"),
            num=40 if smoke else 1536,
            solvers=("ddim", "heun", "dpmpp_2m"),
            calls=(4, 1) if smoke else (50, 10, 4, 2, 1),
        ),
    )

"""The EDM teacher of consistency models on ImageNet at 64 pixels: their UNet of 295.899 M parameters.

Paper: Song et al. 2023 (arXiv:2303.01469): FID 2.44 at 79 network calls (40 levels, Heun). The number of steps is not
verified, flips are an assumption.
Command: jaxdiff train experiments/imagenet64_edm.py --workdir runs/imagenet64_edm
Reached: not run at scale yet.
"""

import jax.numpy as jnp
import optax

from jaxdiff import parameterization
from jaxdiff.data.augment import flip_horizontally
from jaxdiff.data.named import in_memory, open_source
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.edm import edm
from jaxdiff.metrics.pixels import pixel_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import example_inputs
from jaxdiff.networks.unet_presets import consistency_unet
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:imagenet2012",
    num_steps: int = 600_000,
    batch_size: int = 4096,
    lr: float = 1e-4,
    dropout: float = 0.1,
    ema_decays: tuple[float, ...] = (0.999, 0.9999, 0.99994321),
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: the last of ema_decays is the average that is sampled."""
    size = 64
    unet = consistency_unet(64, num_classes=1000).clone(dtype=jnp.bfloat16 if bf16 else jnp.float32, dropout=dropout)
    if smoke:
        data, size, num_steps, batch_size = "stand-in", 8, 4, 4
        unet = unet.clone(base_channels=64, channel_mult=(1,), num_res_blocks=1, attention_factors=())

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=1000)

    method = edm(
        as_network(unet),
        init_params=lambda key, batch: init_params(unet, key, *example_inputs(unet)),
        parameterization=parameterization.edm(0.5, parameterization.log_time(250.0)),
        num_steps=40,
    )
    return Experiment(
        name="imagenet64_edm",
        method=method,
        networks={"model": unet},
        data=lambda: batches(
            source("train"), batch_size=batch_size, seed=seed, augment=[flip_horizontally], prefetch=4
        ),
        optimizers={"model": optax.radam(lr)},
        ema=tuple(ema.constant(f"ema{decay}", decay) for decay in ema_decays),
        partition=partition.UNET,
        sample_shape=(size, size, 3),
        num_classes=1000,
        batch_size=batch_size,
        accumulate=accumulate,
        num_steps=num_steps,
        seed=seed,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        sample_every=sample_every,
        evaluation=Evaluation(
            name="ImageNet validation",
            extractor=pixel_extractor,
            held_out=lambda: in_memory(source("train" if data == "stand-in" else "validation"), 64 if smoke else 10000),
            train=lambda: in_memory(source("train"), 64 if smoke else 10000),
            num=16 if smoke else 10000,
            metrics=("frechet", "kernel", "nearest"),
        ),
    )

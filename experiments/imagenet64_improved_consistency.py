"""Improved consistency training on ImageNet at 64 pixels, from random weights.

Paper: Song & Dhariwal 2023 (arXiv:2310.14189): FID 4.02 in one step and 3.20 in two (levels 80 and 1.526); 3.25 and
2.77 for iCT-deep, with twice the residual blocks. Batch, dropout, average and number of steps are not verified and the
learning rate is CIFAR-10's; dropout is at every resolution here, in the paper at 16 pixels and below.
Flips of the images are an assumption.
Command: jaxdiff train experiments/imagenet64_improved_consistency.py --workdir runs/imagenet64_ict
or:      jaxdiff train experiments/imagenet64_improved_consistency.py --workdir runs/imagenet64_ict_deep
             --set num_res_blocks=6
Reached: not run at scale yet.
"""

import jax.numpy as jnp
import optax

from jaxdiff.data.augment import flip_horizontally
from jaxdiff.data.named import in_memory, open_source
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.improved_consistency import doubling_levels, improved_consistency
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
    start_levels: int = 10,
    end_levels: int = 1280,
    num_res_blocks: int = 3,
    num_steps: int = 800_000,
    batch_size: int = 4096,
    lr: float = 1e-4,
    dropout: float = 0.2,
    ema_decay: float = 0.99997,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: N doubles from start_levels to end_levels in equally long stages."""
    size = 64
    unet = consistency_unet(64, num_classes=1000).clone(
        dtype=jnp.bfloat16 if bf16 else jnp.float32, num_res_blocks=num_res_blocks, dropout=dropout
    )
    if smoke:
        data, size, num_steps, batch_size = "stand-in", 8, 4, 4
        start_levels, end_levels = 2, 4
        unet = unet.clone(base_channels=64, channel_mult=(1,), num_res_blocks=1, attention_factors=())

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=1000)

    plain = as_network(unet)

    def network(params, x_t, t, cond, **training):
        return plain(params, x_t, 1000 * t, cond, **training)  # as in the networks of consistency models: 250 ln(sigma)

    method = improved_consistency(
        network,
        init_params=lambda key, batch: init_params(unet, key, *example_inputs(unet)),
        num_levels=doubling_levels(start_levels, end_levels, num_steps),
    )
    return Experiment(
        name="imagenet64_improved_consistency",
        method=method,
        networks={"model": unet},
        data=lambda: batches(
            source("train"), batch_size=batch_size, seed=seed, augment=[flip_horizontally], prefetch=4
        ),
        optimizers={"model": optax.radam(lr)},
        ema=(ema.constant("ema", ema_decay),),
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

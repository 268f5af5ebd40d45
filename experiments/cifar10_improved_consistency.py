"""Improved consistency training on CIFAR-10, from random weights.

Paper: Song & Dhariwal 2023 (arXiv:2310.14189): FID 2.83 in one step and 2.46 in two (levels 80 and 0.821); 2.51 and
2.24 for iCT-deep, with twice the residual blocks. There is no official code; flips are an assumption.
Command: jaxdiff train experiments/cifar10_improved_consistency.py --workdir runs/cifar10_ict
or:      jaxdiff train experiments/cifar10_improved_consistency.py --workdir runs/cifar10_ict_deep
             --set num_res_blocks=8
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
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.ncsnpp import example_inputs
from jaxdiff.networks.ncsnpp_presets import consistency_ncsnpp
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:cifar10",
    start_levels: int = 10,
    end_levels: int = 1280,
    num_res_blocks: int = 4,
    num_steps: int = 400_000,
    batch_size: int = 1024,
    lr: float = 1e-4,
    dropout: float = 0.3,
    ema_decay: float = 0.99993,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: N doubles from start_levels to end_levels in equally long stages."""
    size = 32
    unet = consistency_ncsnpp().clone(
        dtype=jnp.bfloat16 if bf16 else jnp.float32, fourier_scale=0.02, num_res_blocks=num_res_blocks, dropout=dropout
    )
    if smoke:
        data, size, num_steps, batch_size = "stand-in", 8, 4, 4
        start_levels, end_levels = 2, 4
        unet = unet.clone(base_channels=32, channel_mult=(1,), num_res_blocks=1, attention_factors=())

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=None)

    method = improved_consistency(
        as_network(unet),
        init_params=lambda key, batch: init_params(unet, key, *example_inputs(unet)),
        num_levels=doubling_levels(start_levels, end_levels, num_steps),
    )
    return Experiment(
        name="cifar10_improved_consistency",
        method=method,
        networks={"model": unet},
        data=lambda: batches(
            source("train"), batch_size=batch_size, seed=seed, augment=[flip_horizontally], prefetch=4
        ),
        optimizers={"model": optax.radam(lr)},
        ema=(ema.constant("ema", ema_decay),),
        sample_shape=(size, size, 3),
        num_classes=None,
        batch_size=batch_size,
        accumulate=accumulate,
        num_steps=num_steps,
        seed=seed,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        sample_every=sample_every,
        evaluation=Evaluation(
            name="CIFAR-10 test",
            extractor=pixel_extractor,
            held_out=lambda: in_memory(source("train" if data == "stand-in" else "test"), 64 if smoke else 10000),
            train=lambda: in_memory(source("train"), 64 if smoke else 10000),
            num=16 if smoke else 10000,
            metrics=("frechet", "kernel", "nearest"),
        ),
    )

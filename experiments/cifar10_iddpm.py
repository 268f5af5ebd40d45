"""Improved DDPM on CIFAR-10: cosine chain of 4000 steps, learned variances, hybrid or variational loss.

Paper: Nichol & Dhariwal 2021 (arXiv:2102.09672): hybrid 3.17 bits/dim and FID 3.19, vlb 2.94 bits/dim and FID 11.47,
both after 500k steps with 4000-step sampling. The network is the paper's, 52.546 M parameters.
Command: jaxdiff train experiments/cifar10_iddpm.py --workdir runs/cifar10_iddpm --set objective=hybrid
Reached: not run at scale yet.
"""

from typing import Literal

import jax.numpy as jnp
import optax

from jaxdiff import parameterization, process, schedules
from jaxdiff.data.augment import flip_horizontally
from jaxdiff.data.named import in_memory, open_source
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.ddpm import Loss, chain_denoiser, ddpm
from jaxdiff.metrics.bits_per_dim import bits_per_dim
from jaxdiff.metrics.pixels import pixel_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import example_inputs
from jaxdiff.networks.unet_presets import iddpm_unet
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:cifar10",
    objective: Literal["hybrid", "vlb"] = "hybrid",
    num_steps: int = 500_000,
    batch_size: int = 128,
    lr: float = 1e-4,
    chain_length: int = 4000,
    dropout: float = 0.3,
    ema_decay: float = 0.9999,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: objective vlb draws t by importance; chain_length is T; the rest is the release's."""
    size = 32
    unet = iddpm_unet(32).clone(dtype=jnp.bfloat16 if bf16 else jnp.float32, dropout=dropout)
    if smoke:
        data, size, num_steps, batch_size, chain_length = "stand-in", 8, 2, 4, 100
        unet = unet.clone(base_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_factors=(2,))

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=None)

    betas = schedules.cosine_betas(chain_length)
    output = parameterization.eps(parameterization.scaled_time(1000 / chain_length))

    def bits(params, key, x0, cond):
        denoise = chain_denoiser(
            as_network(unet), params["model"], schedules.discrete(betas), output, cond, variance=process.learned_range
        )
        return bits_per_dim(denoise, betas, process.learned_range, key, x0)

    method = ddpm(
        as_network(unet),
        betas,
        init_params=lambda key, batch: init_params(unet, key, *example_inputs(unet)),
        parameterization=output,
        variance=process.learned_range,
        loss=Loss.RESCALED_MSE if objective == "hybrid" else Loss.RESCALED_KL,
        loss_history=None if objective == "hybrid" else 10,
    )
    return Experiment(
        name="cifar10_iddpm",
        method=method,
        networks={"model": unet},
        data=lambda: batches(
            source("train"), batch_size=batch_size, seed=seed, augment=[flip_horizontally], prefetch=4
        ),
        optimizers={"model": optax.adam(lr)},
        ema=(ema.constant("ema", ema_decay),),
        partition=partition.UNET,
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
            bits=bits,
        ),
    )

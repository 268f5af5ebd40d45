"""Improved DDPM on ImageNet 64x64, unconditional or class-conditional.

Paper: Nichol & Dhariwal 2021 (arXiv:2102.09672): unconditional (121.064 M parameters, 1.5M steps, 4000-step chain)
3.57 bits/dim and FID 19.2 with the hybrid loss; class-conditional (273.049 M, 250k steps, batch 2048, lr 3e-4) FID 2.92
at 250 steps.
Command: jaxdiff train experiments/imagenet64_iddpm.py --workdir runs/imagenet64_iddpm --set class_cond=true
Reached: not run at scale yet.
"""

import jax.numpy as jnp
import optax

from jaxdiff import parameterization, process, schedules
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
    data: str = "tfds:imagenet_resized/64x64",
    class_cond: bool = False,
    num_steps: int = 1_500_000,
    batch_size: int = 128,
    lr: float = 1e-4,
    chain_length: int = 4000,
    ema_decay: float = 0.9999,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: class_cond takes the wider network; chain_length is T."""
    size, num_classes = 64, 1000 if class_cond else None
    unet = iddpm_unet(64, num_classes=num_classes).clone(dtype=jnp.bfloat16 if bf16 else jnp.float32)
    if smoke:
        data, size, num_steps, batch_size, chain_length = "stand-in", 8, 2, 4, 100
        unet = unet.clone(base_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_factors=(2,))

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=num_classes)

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
        loss=Loss.RESCALED_MSE,
    )
    return Experiment(
        name="imagenet64_iddpm",
        method=method,
        networks={"model": unet},
        data=lambda: batches(source("train"), batch_size=batch_size, seed=seed, augment=[], prefetch=4),
        optimizers={"model": optax.adam(lr)},
        ema=(ema.constant("ema", ema_decay),),
        partition=partition.UNET,
        sample_shape=(size, size, 3),
        num_classes=num_classes,
        batch_size=batch_size,
        accumulate=accumulate,
        num_steps=num_steps,
        seed=seed,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        sample_every=sample_every,
        evaluation=Evaluation(
            name="ImageNet 64x64 validation",
            extractor=pixel_extractor,
            held_out=lambda: in_memory(source("train" if data == "stand-in" else "validation"), 64 if smoke else 10000),
            train=lambda: in_memory(source("train"), 64 if smoke else 10000),
            num=16 if smoke else 10000,
            metrics=("frechet", "kernel", "nearest"),
            bits=bits,
        ),
    )

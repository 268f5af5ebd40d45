"""DDPM on CIFAR-10.

Paper: Ho et al. 2020 (arXiv:2006.11239): FID 3.17 after 800k steps, 1000-step sampling, EMA weights. The network is the
paper's, 35.746 M parameters.
Command: jaxdiff train experiments/cifar10_ddpm.py --workdir runs/cifar10_ddpm
Reached: not run at scale yet.
"""

import jax.numpy as jnp
import optax

from jaxdiff import parameterization, process, schedules
from jaxdiff.data.augment import flip_horizontally
from jaxdiff.data.named import in_memory, open_source
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.ddpm import chain_denoiser, ddpm
from jaxdiff.metrics.bits_per_dim import bits_per_dim
from jaxdiff.metrics.pixels import pixel_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import example_inputs
from jaxdiff.networks.unet_presets import ddpm_unet
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:cifar10",
    num_steps: int = 800_000,
    batch_size: int = 128,
    lr: float = 2e-4,
    warmup: int = 5000,
    chain_length: int = 1000,
    ema_decay: float = 0.9999,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: chain_length is T; the rest is the release's."""
    size = 32
    unet = ddpm_unet(32).clone(dtype=jnp.bfloat16 if bf16 else jnp.float32)
    if smoke:
        data, size, num_steps, batch_size, chain_length = "stand-in", 8, 2, 4, 100
        unet = unet.clone(base_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_factors=(2,))

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=None)

    betas = schedules.linear_betas(chain_length)
    output = parameterization.eps()

    def bits(params, key, x0, cond):
        denoise = chain_denoiser(
            as_network(unet), params["model"], schedules.discrete(betas), output, cond, variance=process.fixed_large
        )
        return bits_per_dim(denoise, betas, process.fixed_large, key, x0)

    method = ddpm(
        as_network(unet),
        betas,
        init_params=lambda key, batch: init_params(unet, key, *example_inputs(unet)),
        parameterization=output,
        variance=process.fixed_large,
    )
    return Experiment(
        name="cifar10_ddpm",
        method=method,
        networks={"model": unet},
        data=lambda: batches(
            source("train"), batch_size=batch_size, seed=seed, augment=[flip_horizontally], prefetch=4
        ),
        optimizers={
            "model": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0.0, lr, warmup)))
        },
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

"""DDPM on LSUN at 256 pixels.

Paper: Ho et al. 2020 (arXiv:2006.11239): FID 6.36 on bedrooms (2.4M steps), 7.89 on churches, 19.75 on cats, 1000-step
sampling. The network is the paper's, 113.673 M parameters.
Command: jaxdiff train experiments/lsun_ddpm.py --workdir runs/lsun_church --set data=tfds:lsun/church_outdoor
Reached: not run at scale yet.
"""

import jax.numpy as jnp
import optax

from jaxdiff import parameterization, process, schedules
from jaxdiff.data.augment import flip_horizontally
from jaxdiff.data.named import in_memory, open_source
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.ddpm import ddpm
from jaxdiff.metrics.pixels import pixel_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import example_inputs
from jaxdiff.networks.unet_presets import ddpm_unet
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:lsun/church_outdoor",
    num_steps: int = 1_200_000,
    batch_size: int = 64,
    lr: float = 2e-5,
    warmup: int = 5000,
    ema_decay: float = 0.9999,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: data may also be folder:PATH."""
    size = 256
    unet = ddpm_unet(256).clone(dtype=jnp.bfloat16 if bf16 else jnp.float32)
    if smoke:
        data, size, num_steps, batch_size = "stand-in", 8, 2, 4
        unet = unet.clone(base_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_factors=(2,))

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=None)

    method = ddpm(
        as_network(unet),
        schedules.linear_betas(1000),
        init_params=lambda key, batch: init_params(unet, key, *example_inputs(unet)),
        parameterization=parameterization.eps(),
        variance=process.fixed_large,
    )
    return Experiment(
        name="lsun_ddpm",
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
            name="LSUN validation",
            extractor=pixel_extractor,
            held_out=lambda: in_memory(source("train" if data == "stand-in" else "validation"), 64 if smoke else 10000),
            train=lambda: in_memory(source("train"), 64 if smoke else 10000),
            num=16 if smoke else 10000,
            metrics=("frechet", "kernel", "nearest"),
        ),
    )

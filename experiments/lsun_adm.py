"""ADM on LSUN at 256 pixels, unconditional.

Paper: Dhariwal & Nichol 2021 (arXiv:2105.05233): FID 1.90 on bedrooms, 5.57 on cats, 2.57 on horses (1000 steps),
after 250k to 750k steps of batch 256. The network is the paper's, 552.814 M parameters.
Command: jaxdiff train experiments/lsun_adm.py --workdir runs/lsun_adm --set data=tfds:lsun/bedroom
Reached: not run at scale yet.
"""

import jax.numpy as jnp
import optax

from jaxdiff import parameterization, process, schedules
from jaxdiff.data.named import in_memory, open_source
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.ddpm import Loss, ddpm
from jaxdiff.metrics.pixels import pixel_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import example_inputs
from jaxdiff.networks.unet_presets import adm_unet
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:lsun/bedroom",
    num_steps: int = 750_000,
    batch_size: int = 256,
    lr: float = 1e-4,
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
    unet = adm_unet(256, num_classes=None).clone(dtype=jnp.bfloat16 if bf16 else jnp.float32, dropout=0.1)
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
        variance=process.learned_range,
        loss=Loss.MSE,
    )
    return Experiment(
        name="lsun_adm",
        method=method,
        networks={"model": unet},
        data=lambda: batches(source("train"), batch_size=batch_size, seed=seed, augment=[], prefetch=4),
        optimizers={"model": optax.adamw(lr, weight_decay=0.0)},
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

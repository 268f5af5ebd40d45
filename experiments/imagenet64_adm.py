"""ADM (guided diffusion) on ImageNet: the class-conditional UNet with BigGAN resampling, 64 to 512 pixels.

Paper: Dhariwal & Nichol 2021 (arXiv:2105.05233): FID 2.07 at 64 pixels unguided after 540k steps of batch 2048; 5.91,
10.94 and 23.24 at 128, 256 and 512 (4.36M, 1.98M, 1.94M steps of batch 256, lr 1e-4, linear chain). Parameters:
295.904, 421.530, 553.838 and 558.998 M.
Command: jaxdiff train experiments/imagenet64_adm.py --workdir runs/imagenet64_adm
Reached: not run at scale yet.
"""

import jax.numpy as jnp
import optax

from jaxdiff import parameterization, process, schedules
from jaxdiff.data.augment import flip_horizontally
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
    data: str = "tfds:imagenet2012",
    size: int = 64,
    num_steps: int = 540_000,
    batch_size: int = 2048,
    lr: float = 3e-4,
    label_dropout: float = 0.0,
    ema_decay: float = 0.9999,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: size is 64, 128, 256 or 512; label_dropout > 0 trains for classifier-free guidance and adds a label."""
    unet = adm_unet(size).clone(dtype=jnp.bfloat16 if bf16 else jnp.float32, null_label=label_dropout > 0)
    if smoke:
        data, size, num_steps, batch_size = "stand-in", 8, 2, 4
        unet = unet.clone(base_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_factors=(2,))

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=1000)

    method = ddpm(
        as_network(unet),
        schedules.cosine_betas(1000) if size == 64 or smoke else schedules.linear_betas(1000),
        init_params=lambda key, batch: init_params(unet, key, *example_inputs(unet)),
        parameterization=parameterization.eps(),
        variance=process.learned_range,
        loss=Loss.MSE,
        label_dropout=label_dropout,
        null_label=1000 if label_dropout > 0 else None,
    )
    return Experiment(
        name="imagenet64_adm",
        method=method,
        networks={"model": unet},
        data=lambda: batches(
            source("train"), batch_size=batch_size, seed=seed, augment=[flip_horizontally], prefetch=4
        ),
        optimizers={"model": optax.adamw(lr, weight_decay=0.0)},
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

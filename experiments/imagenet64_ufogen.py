"""UFOGen on ImageNet at 64 pixels, from the EDM teacher of consistency models and on its noise levels.

Paper: Xu et al. 2023 (arXiv:2311.09257); no figure for ImageNet and no settings are known to us, so all here are ours.
Command: jaxdiff import consistency-unet edm_imagenet64_ema.pt weights/edm_imagenet64
then:    jaxdiff train experiments/imagenet64_ufogen.py --workdir runs/imagenet64_ufogen
             --set teacher=weights/edm_imagenet64
Expected: no claim. Reached: not run at scale yet.
"""

import jax
import jax.numpy as jnp
import optax

from jaxdiff import parameterization, runs, schedules
from jaxdiff.data.augment import flip_horizontally
from jaxdiff.data.named import in_memory, open_source
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.ufogen import at_t, level_jumps, signal_share, ufogen
from jaxdiff.metrics.pixels import pixel_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import example_inputs
from jaxdiff.networks.unet_discriminator import UNetDiscriminator, on_backbone
from jaxdiff.networks.unet_presets import consistency_unet
from jaxdiff.training import alarms, ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:imagenet2012",
    teacher: str = "runs/imagenet64_edm",
    levels: tuple[float, ...] = (0.2, 0.6, 1.5, 80.0),
    last_share: float = 0.5,
    reconstruction_weight: float = 12.8,
    r1_weight: float = 0.05,
    r1_every: int = 15,
    num_steps: int = 100_000,
    batch_size: int = 512,
    lr: float = 4e-6,
    disc_lr: float = 8e-6,
    ema_decay: float = 0.9999,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: levels are sigmas, of which each but the last is compared; the last is pure noise."""
    size = 64
    unet = consistency_unet(64, num_classes=1000).clone(dtype=jnp.bfloat16 if bf16 else jnp.float32, dropout=0.0)
    if smoke:
        data, size, num_steps, batch_size = "stand-in", 8, 4, 4
        unet = unet.clone(base_channels=64, channel_mult=(1,), num_res_blocks=1, attention_factors=())
    discriminator = UNetDiscriminator(unet)

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=1000)

    old = init_params(unet, jax.random.key(0), *example_inputs(unet)) if smoke else runs.teacher_params(teacher)

    method = ufogen(
        as_network(unet),
        as_network(discriminator),
        schedules.ve(0.002, levels[-1]),
        parameterization=parameterization.edm(0.5, parameterization.log_time(250.0)),
        init_params=lambda key, batch: jax.tree.map(jnp.array, old),
        init_discriminator=on_backbone(discriminator, old, *example_inputs(unet)),
        jumps=level_jumps(levels, last_share),
        reconstruction_weight=reconstruction_weight,
        gamma=at_t(signal_share),
        r1_weight=r1_weight,
        r1_every=r1_every,
    )
    return Experiment(
        name="imagenet64_ufogen",
        method=method,
        networks={"model": unet, "disc": discriminator},
        data=lambda: batches(
            source("train"), batch_size=batch_size, seed=seed, augment=[flip_horizontally], prefetch=4
        ),
        optimizers={"disc": optax.adam(disc_lr, b1=0.0, b2=0.99), "model": optax.adam(lr, b1=0.0, b2=0.99)},
        ema=(ema.constant("ema", ema_decay, players=("model",)),),
        partition=partition.UNET,
        sample_shape=(size, size, 3),
        num_classes=1000,
        batch_size=batch_size,
        accumulate=accumulate,
        num_steps=num_steps,
        seed=seed,
        alarms=alarms.collapse(),
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

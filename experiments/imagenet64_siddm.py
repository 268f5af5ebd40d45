"""SIDDM on ImageNet at 64 pixels: T = 4, both networks ADM's UNet with classes.

Paper: Xu et al. 2023 (arXiv:2306.12511), where DDGAN reaches 20.63 (not verified). Of its settings the weight of the
forward diffusion and T are known; rates, batch, length, average and the other weights are ours.
Command: jaxdiff train experiments/imagenet64_siddm.py --workdir runs/imagenet64_siddm
Expected: FID 3.13 in four steps (not verified); not run at scale yet.
"""

import jax.numpy as jnp
import optax

from jaxdiff.data.augment import flip_horizontally
from jaxdiff.data.named import in_memory, open_source
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.siddm import siddm
from jaxdiff.metrics.pixels import pixel_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import example_inputs
from jaxdiff.networks.unet_discriminator import UNetDiscriminator, as_judge
from jaxdiff.networks.unet_presets import adm_unet
from jaxdiff.training import alarms, ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:imagenet2012",
    states: int = 4,
    latent_dim: int = 100,
    forward_weight: float = 1.0,
    regressor: bool = True,
    denoise_weight: float = 1.0,
    num_steps: int = 500_000,
    batch_size: int = 2048,
    lr: float = 1e-4,
    disc_lr: float = 1e-4,
    ema_decay: float = 0.9999,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: states is T; forward_weight is that of auxiliary forward diffusion, regressor whether it has its
    entropy, denoise_weight that of the discriminator's denoising.
    """
    size, num_classes = 64, 1000
    backbone = adm_unet(64, num_classes=num_classes).clone(
        out_channels=3, dropout=0.0, dtype=jnp.bfloat16 if bf16 else jnp.float32
    )
    if smoke:
        data, size, num_steps, batch_size, latent_dim = "stand-in", 8, 4, 4, 8
        backbone = backbone.clone(base_channels=64, channel_mult=(1,), num_res_blocks=1, attention_factors=())
    net, disc = backbone.clone(vector_dim=latent_dim), UNetDiscriminator(backbone, regression=regressor)
    plain, judge = as_network(net), as_judge(disc)

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=num_classes)

    def generator(params, x_t, t, cond, **training):
        cond = {("vector" if name == "z" else name): value for name, value in cond.items()}
        return jnp.tanh(plain(params, x_t, t, cond, **training))

    def discriminator(params, x_s, t, cond, **training):
        return judge(params, x_s, 1000 * t, cond, **training)

    method = siddm(
        generator,
        discriminator,
        init_params=lambda key, batch: init_params(net, key, *example_inputs(net)),
        init_disc_params=lambda key, batch: init_params(disc, key, *example_inputs(backbone)),
        num_steps=states,
        latent_dim=latent_dim,
        forward_weight=forward_weight,
        regressor=regressor,
        denoise_weight=denoise_weight,
    )
    return Experiment(
        name="imagenet64_siddm",
        method=method,
        networks={"model": net, "disc": disc},
        data=lambda: batches(
            source("train"), batch_size=batch_size, seed=seed, augment=[flip_horizontally], prefetch=4
        ),
        optimizers={
            "model": optax.adam(optax.cosine_decay_schedule(lr, num_steps), b1=0.5, b2=0.9),
            "disc": optax.adam(optax.cosine_decay_schedule(disc_lr, num_steps), b1=0.5, b2=0.9),
        },
        ema=(ema.constant("ema", ema_decay, players=("model",)),),
        partition=partition.UNET,
        sample_shape=(size, size, 3),
        num_classes=num_classes,
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

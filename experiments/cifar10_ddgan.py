"""A denoising diffusion GAN on CIFAR-10: T = 4, a generator of 48.43 M and a discriminator of 12.742 M.

Paper: Xiao et al. 2022 (arXiv:2112.07804) and its release's command lines, batches of 4 x 64; about 48 h on four V100
(not verified). The released weights are those of epoch 1200. With states=1 the paper has FID 14.6, with 2 4.08 (not
verified). The release keeps the rate of an epoch for all its steps.
Command: jaxdiff train experiments/cifar10_ddgan.py --workdir runs/cifar10_ddgan
Expected: FID 3.75, IS 9.63, recall 0.57 (50,000 samples of the average); not run at scale yet.
"""

import jax.numpy as jnp
import optax

from jaxdiff import schedules
from jaxdiff.data.augment import flip_horizontally
from jaxdiff.data.named import in_memory, open_source
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.ddgan import ddgan
from jaxdiff.metrics.pixels import pixel_extractor
from jaxdiff.networks import ddgan_discriminators, ncsnpp
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.ncsnpp_presets import ddgan_generator
from jaxdiff.training import alarms, ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:cifar10",
    states: int = 4,
    epochs: int = 1800,
    steps_per_epoch: int = 195,
    batch_size: int = 256,
    lr: float = 1.6e-4,
    disc_lr: float = 1.25e-4,
    r1_gamma: float = 0.02,
    r1_every: int = 15,
    ema_decay: float = 0.9999,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: states is T; r1_every is in steps, and the penalty is not multiplied by it."""
    size, dtype = 32, jnp.bfloat16 if bf16 else jnp.float32
    net = ddgan_generator(32).clone(dtype=dtype)
    disc = ddgan_discriminators.ddgan_small_discriminator().clone(dtype=dtype)
    if smoke:
        data, size, epochs, steps_per_epoch, batch_size = "stand-in", 8, 2, 2, 4
        small = {"base_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_factors": ()}
        net = net.clone(**small, z_dim=8, z_features=16, z_layers=1)
        disc = disc.clone(base_channels=4, channel_mult=(2, 4), halves=(True, True), time_features=16)

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=None)

    method = ddgan(
        as_network(net),
        as_network(disc),
        init_params=lambda key, batch: init_params(net, key, *ncsnpp.example_inputs(net)),
        init_disc_params=lambda key, batch: init_params(disc, key, *ddgan_discriminators.example_inputs(disc)),
        betas=schedules.vp_betas(states),
        latent_dim=net.z_dim,
        r1_gamma=r1_gamma,
        r1_every=r1_every,
    )

    def adam(lr):
        def rate(step):
            turn = jnp.floor(step / steps_per_epoch) / epochs
            return 1e-5 + (lr - 1e-5) * (1 + jnp.cos(jnp.pi * turn)) / 2

        return optax.adam(rate, b1=0.5, b2=0.9)

    return Experiment(
        name="cifar10_ddgan",
        method=method,
        networks={"model": net, "disc": disc},
        data=lambda: batches(
            source("train"), batch_size=batch_size, seed=seed, augment=[flip_horizontally], prefetch=4
        ),
        optimizers={"model": adam(lr), "disc": adam(disc_lr)},
        ema=(ema.after_first("ema", ema_decay, players=("model",)),),
        sample_shape=(size, size, 3),
        num_classes=None,
        batch_size=batch_size,
        accumulate=accumulate,
        num_steps=(epochs + 1) * steps_per_epoch,  # one more than the rate knows, as released
        seed=seed,
        alarms=alarms.collapse(),
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

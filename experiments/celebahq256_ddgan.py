"""A denoising diffusion GAN on CelebA-HQ at 256 pixels: T = 2, 39.73 M and 27.737 M parameters.

Paper: Xiao et al. 2022 (arXiv:2112.07804) and its release's command lines, batches of 8 x 4, 30,000 images; about 180 h
on eight V100 (not verified). The released weights are those of epoch 550. The paper trains on all images and compares
samples with them. TFDS has no other split, either: here its last 2000 images are held out and samples compared with
those, so distances are larger; an epoch still counts the release's steps. A folder or .npz file has one split: there
the held-out images are training images, "nearest" and the floor mean nothing.
Command: jaxdiff train experiments/celebahq256_ddgan.py --workdir runs/celebahq256_ddgan
Expected: FID 7.64 (50,000 samples of the average, against all images); not run at scale yet.
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

TRAIN, HELD_OUT = "train[:-2000]", "train[-2000:]"


def build(
    *,
    data: str = "tfds:celeb_a_hq/256",
    states: int = 2,
    epochs: int = 800,
    steps_per_epoch: int = 937,
    batch_size: int = 32,
    lr: float = 2e-4,
    disc_lr: float = 1e-4,
    r1_gamma: float = 2.0,
    r1_every: int = 10,
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
    size, dtype = 256, jnp.bfloat16 if bf16 else jnp.float32
    net = ddgan_generator(256).clone(dtype=dtype)
    disc = ddgan_discriminators.ddgan_large_discriminator().clone(dtype=dtype)
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
        name="celebahq256_ddgan",
        method=method,
        networks={"model": net, "disc": disc},
        data=lambda: batches(source(TRAIN), batch_size=batch_size, seed=seed, augment=[flip_horizontally], prefetch=4),
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
            name="CelebA-HQ held-out",
            extractor=pixel_extractor,
            held_out=lambda: in_memory(source(HELD_OUT), 64 if smoke else 2000),
            train=lambda: in_memory(source(TRAIN), 64 if smoke else 10000),
            num=16 if smoke else 10000,
            metrics=("frechet", "kernel", "nearest"),
        ),
    )

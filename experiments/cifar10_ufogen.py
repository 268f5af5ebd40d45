"""UFOGen on CIFAR-10, from the DDPM that `cifar10_ddpm.py` trains, whose eps-prediction is converted.

Paper: Xu et al. 2023 (arXiv:2311.09257); no CIFAR-10 figure and no settings are known to us, so all here are ours: at
index 999 of this chain an error of eps would be multiplied by 157, so the generator asks it at last_time at most.
Command: jaxdiff train experiments/cifar10_ufogen.py --workdir runs/cifar10_ufogen (needs cifar10_ddpm.py's run first)
Expected: no claim. Reached: not run at scale yet.
"""

import jax
import jax.numpy as jnp
import optax

from jaxdiff import one_step, parameterization, runs, schedules
from jaxdiff.data.augment import flip_horizontally
from jaxdiff.data.named import in_memory, open_source
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.ufogen import chain_jumps, ufogen
from jaxdiff.metrics.pixels import pixel_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import example_inputs
from jaxdiff.networks.unet_discriminator import UNetDiscriminator, on_backbone
from jaxdiff.networks.unet_presets import ddpm_unet
from jaxdiff.training import alarms, ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:cifar10",
    teacher: str = "runs/cifar10_ddpm",
    jump: int = 250,
    last_share: float = 0.25,
    last_time: float = 670.0,
    reconstruction_weight: float = 1.0,
    r1_weight: float = 0.05,
    r1_every: int = 15,
    num_steps: int = 100_000,
    batch_size: int = 256,
    lr: float = 1e-5,
    disc_lr: float = 2e-5,
    ema_decay: float = 0.999,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: jump is t - s; last_share of the examples are pure noise; teacher and student have no dropout."""
    size, chain_length = 32, 1000
    unet = ddpm_unet(32).clone(dtype=jnp.bfloat16 if bf16 else jnp.float32, dropout=0.0)
    if smoke:
        data, size, num_steps, batch_size = "stand-in", 8, 4, 4
        unet = unet.clone(base_channels=32, channel_mult=(1,), num_res_blocks=1, attention_factors=())
    discriminator = UNetDiscriminator(unet)

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=None)

    old = init_params(unet, jax.random.key(0), *example_inputs(unet)) if smoke else runs.teacher_params(teacher)
    betas = schedules.linear_betas(chain_length)
    trained, to_noise = schedules.discrete(betas), schedules.discrete(schedules.zero_terminal_snr(betas))
    output = parameterization.eps()
    generator = one_step.from_diffusion(as_network(unet), trained, output, onto=to_noise, last_time=last_time)

    method = ufogen(
        generator.network,
        generator.judge(as_network(discriminator)),
        generator.schedule,
        parameterization=generator.parameterization,
        init_params=lambda key, batch: jax.tree.map(jnp.array, old),
        init_discriminator=on_backbone(discriminator, old, *example_inputs(unet)),
        jumps=chain_jumps(chain_length, jump, last_share),
        reconstruction_weight=reconstruction_weight,
        r1_weight=r1_weight,
        r1_every=r1_every,
    )
    return Experiment(
        name="cifar10_ufogen",
        method=method,
        networks={"model": unet, "disc": discriminator},
        data=lambda: batches(
            source("train"), batch_size=batch_size, seed=seed, augment=[flip_horizontally], prefetch=4
        ),
        optimizers={"disc": optax.adam(disc_lr, b1=0.0, b2=0.99), "model": optax.adam(lr, b1=0.0, b2=0.99)},
        ema=(ema.constant("ema", ema_decay, players=("model",)),),
        partition=partition.UNET,
        sample_shape=(size, size, 3),
        num_classes=None,
        batch_size=batch_size,
        accumulate=accumulate,
        num_steps=num_steps,
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

"""SIDDM on the digits in four steps, generator and discriminator started from the teacher or from scratch, on one core.

Paper: Xu et al. 2023 (arXiv:2306.12511), which trains both from random weights (`scratch`); its weights of the losses.
The discriminator is the teacher's UNet, so that it denoises from the first step on.
Command: jaxdiff train experiments/digits_siddm.py --workdir runs/ladder/siddm-0 (needs digits_edm.py's run first)
Expected: at 4 calls 1.26 times the teacher's Frechet distance at 50, 1.23 to 1.47 on 3 seeds (docs/ladder.md).
"""

import math

import jax
import jax.numpy as jnp
import optax

from jaxdiff import parameterization, process, runs, schedules
from jaxdiff.data.images import digits
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.siddm import siddm
from jaxdiff.metrics.digits import digits_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, grown, init_params
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.networks.unet_discriminator import UNetDiscriminator, as_judge, from_backbone
from jaxdiff.training import alarms, ema
from jaxdiff.training.experiment import Experiment
from jaxdiff.types import Level, expand

SIGMA_DATA = 0.752
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0


def build(
    *,
    teacher: str = "runs/ladder/teacher",
    scratch: bool = False,
    states: int = 4,
    latent_dim: int = 16,
    forward_weight: float = 1.0,
    regressor: bool = True,
    denoise_weight: float = 1.0,
    num_steps: int = 1000,
    batch_size: int = 64,
    lr: float = 2e-4,
    disc_lr: float = 4e-4,
    width: int = 16,
    ema_decay: float = 0.995,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 500,
    sample_every: int = 1000,
    smoke: bool = False,
) -> Experiment:
    """Settings: scratch True leaves the teacher out; states is T; latent_dim 0 leaves the latent out; forward_weight is
    that of auxiliary forward diffusion, regressor whether it has its entropy.
    """
    if smoke:
        num_steps, batch_size, width, checkpoint_every, sample_every = 4, 8, 8, 2, 4
    backbone = UNet(
        in_channels=1,
        out_channels=1,
        base_channels=width,
        channel_mult=(1, 2),
        num_res_blocks=1,
        norm_groups=8,
        scale_shift_norm=True,
        num_classes=10,
        null_label=True,
    )
    unet, disc = backbone.clone(vector_dim=latent_dim or None), UNetDiscriminator(backbone, regression=regressor)
    start = None if scratch or smoke else runs.teacher_params(teacher)
    # The paper's quarters of `vp_linear` are so noisy that a discriminator sees nothing in images this small.
    schedule = schedules.squared_cosine()

    def net_time(t):
        """ln(sigma) / 4, as the teacher sees it, within what it was trained for."""
        return -jnp.maximum(process.half_log_snr(schedule.level(t)), -math.log(SIGMA_MAX)) / 4

    def init(key, batch):
        fresh = init_params(unet, key, *example_inputs(unet))
        if start is None:
            return fresh
        if latent_dim:
            fresh["vector_out"] = jax.tree.map(jnp.zeros_like, fresh["vector_out"])  # the teacher at first
        return grown(fresh, start)

    def init_disc(key, batch):
        fresh = init_params(disc, key, *example_inputs(backbone))
        return fresh if start is None else from_backbone(fresh, jax.tree.map(jnp.array, start))

    plain, judge = as_network(unet), as_judge(disc)
    meaning = parameterization.edm(SIGMA_DATA)

    def generator(params, x_t, t, cond, **training):
        latent = {"vector": cond["z"]} if latent_dim else {}
        return plain(params, x_t, t, {"label": cond["label"]} | latent, **training)

    def discriminator(params, x_s, t, cond, **training):
        """Judges x_s as the teacher would see it at its own level, of which clean data have the lowest."""
        level, s = schedule.level(t), t - 1 / states
        lower = schedule.level(jnp.maximum(s, schedule.t_min))
        lower = Level(lower.alpha, jnp.where(s < schedule.t_min, SIGMA_MIN, lower.sigma))
        c = meaning.coefficients(lower)
        scaled, time = expand(c.scale_in, x_s) * x_s, meaning.net_time(lower.sigma / lower.alpha)
        found = judge(params, scaled, time, cond, **training)
        image = expand(c.skip, x_s) * x_s + expand(c.out, x_s) * found.image
        if found.regression is None:
            return found._replace(image=image)
        ratio = level.alpha / lower.alpha
        return found._replace(image=image, regression=expand(ratio, x_s) * x_s + found.regression)

    method = siddm(
        generator,
        discriminator,
        init_params=init,
        init_disc_params=init_disc,
        schedule=schedule,
        num_steps=states,
        latent_dim=latent_dim or None,
        parameterization=parameterization.edm(SIGMA_DATA, net_time),
        forward_weight=forward_weight,
        regressor=regressor,
        denoise_weight=denoise_weight,
    )

    return Experiment(
        name="digits_siddm",
        method=method,
        networks={"model": unet, "disc": disc},
        data=lambda: batches(digits("train"), batch_size=batch_size, seed=seed),
        optimizers={"model": optax.adam(lr, b1=0.0, b2=0.99), "disc": optax.adam(disc_lr, b1=0.0, b2=0.99)},
        ema=(ema.warmup("ema", ema_decay, players=("model",)),),
        partition=partition.UNET,
        sample_shape=(8, 8, 1),
        num_classes=10,
        batch_size=batch_size,
        num_steps=num_steps,
        seed=seed,
        alarms=alarms.collapse(),
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        sample_every=sample_every,
        evaluation=Evaluation(
            name="digits held-out",
            extractor=digits_extractor,
            held_out=lambda: digits("held_out"),
            train=lambda: digits("train"),
            num=40 if smoke else 1536,
        ),
    )

"""DMD2 from the digits teacher: one step by the difference of two scores, with a logit head on the fake one.

Paper: Yin et al. 2024 (arXiv:2405.14867) on the teacher's own noise levels. Weights and learning rates are ours; the
judge reads the middle of the fake score's UNet, as in the release.
Command: jaxdiff train experiments/digits_dmd2.py --workdir runs/ladder/dmd2-0 (needs digits_edm.py's run first)
Expected: in one step 1.08 times the teacher's Frechet distance at 50 calls (docs/ladder.md).
"""

import jax
import jax.numpy as jnp
import optax

from jaxdiff import runs
from jaxdiff.data.images import digits
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.dmd2 import dmd2, edm_form
from jaxdiff.metrics.digits import digits_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.networks.unet_discriminator import UNetDiscriminator, as_judge, from_backbone
from jaxdiff.training import alarms, ema
from jaxdiff.training.experiment import Experiment

SIGMA_DATA = 0.752


def build(
    *,
    teacher: str = "runs/ladder/teacher",
    sigma_max: float = 20.0,
    every: int = 1,
    judge_weight: float = 0.1,
    gan_weight: float = 0.03,
    student_steps: int = 1,
    num_steps: int = 1000,
    batch_size: int = 64,
    lr: float = 2e-4,
    fake_lr: float = 1e-3,
    width: int = 16,
    ema_decay: float = 0.99,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 500,
    sample_every: int = 500,
    smoke: bool = False,
) -> Experiment:
    """Settings: the student moves on every n-th step, n = every; lr is its own, fake_lr that of fake score and judge,
    judge_weight and gan_weight the share of their adversarial terms; student_steps those of its sampler.
    """
    if smoke:
        num_steps, batch_size, width, checkpoint_every, sample_every, every = 4, 8, 8, 2, 4, 1
    unet = UNet(
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
    if smoke:
        teacher_params = init_params(unet, jax.random.key(0), *example_inputs(unet))
    else:
        teacher_params = runs.teacher_params(teacher)
    fake = UNetDiscriminator(unet)
    judge = as_judge(fake)

    def score(params, x_t, t, cond, **training):
        return judge(params, x_t, t, cond, **training).image

    def logit(params, x_t, t, cond, **training):
        return judge(params, x_t, t, cond, **training).sample

    def start_fake(key, batch):
        fresh = init_params(fake, key, *example_inputs(unet))
        return from_backbone(fresh, jax.tree.map(jnp.array, teacher_params))

    method = dmd2(
        as_network(unet),
        edm_form(SIGMA_DATA, sigma_max=sigma_max),
        teacher_params=teacher_params,
        score=score,
        judge=logit,
        init_fake=start_fake,
        judge_weight=judge_weight,
        gan_weight=gan_weight,
        every=every,
        num_steps=student_steps,
    )

    def optimizer(lr):
        rate = optax.warmup_cosine_decay_schedule(0.0, lr, min(100, num_steps // 4 + 1), max(num_steps, 2), lr / 20)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b1=0.5))

    return Experiment(
        name="digits_dmd2",
        method=method,
        networks={"model": unet, "fake": fake},
        data=lambda: batches(digits("train"), batch_size=batch_size, seed=seed),
        optimizers={"fake": optimizer(fake_lr), "model": optimizer(lr)},
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

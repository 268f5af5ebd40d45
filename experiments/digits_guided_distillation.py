"""Guided distillation of the digits teacher: a student that has learnt guidance, then half the steps again and again.

Paper: Meng et al. 2023 (arXiv:2210.03142). Stage one matches the guided teacher at every w; stage two is progressive
distillation of that student down to one step.
Command: jaxdiff train experiments/digits_guided_distillation.py --workdir runs/ladder/guided-first-0
             --set first=True --set num_steps=500 (needs digits_edm.py's run first)
then:    jaxdiff train experiments/digits_guided_distillation.py --workdir runs/ladder/guided-0
             --set teacher=runs/ladder/guided-first-0
Expected: docs/ladder.md has what was measured.
"""

import jax
import jax.numpy as jnp
import optax

from jaxdiff import parameterization, runs, schedules
from jaxdiff.data.images import digits
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.guided_distillation import guided_distillation
from jaxdiff.methods.progressive import progressive, single, vp_path
from jaxdiff.metrics.digits import digits_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, grown, init_params
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment

SIGMA_DATA = 0.752


def build(
    *,
    teacher: str = "runs/ladder/teacher",
    first: bool = False,
    max_guidance: float = 2.0,
    first_steps: int = 32,
    num_steps: int = 1600,
    batch_size: int = 64,
    lr: float = 1e-3,
    width: int = 16,
    ema_decay: float = 0.99,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 200,
    sample_every: int = 1000,
    smoke: bool = False,
) -> Experiment:
    """Settings: first True is stage one; else teacher is stage one's run. max_guidance is the largest w. A round is an
    eighth of num_steps long, and all checkpoints are kept, so that the students of the rounds can be judged.
    """
    if smoke:
        num_steps, batch_size, width, checkpoint_every, sample_every, first_steps = 4, 8, 8, 2, 4, 2
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
    guided = unet.clone(guidance_dim=2 * width)
    schedule = schedules.cosine(-12.0, 12.0)
    meaning = parameterization.edm(SIGMA_DATA, lambda t: jnp.log(schedule.level(t).sigma / schedule.level(t).alpha) / 4)

    def start(key, batch):
        return grown(init_params(guided, key, *example_inputs(guided)), teacher_params)

    def unconditional(cond):
        return cond | {"label": jnp.full_like(cond["label"], 10)}

    if first:
        method = guided_distillation(
            as_network(guided),
            teacher=as_network(unet),
            teacher_params=teacher_params,
            init_params=start,
            null_cond=unconditional,
            guidance_range=(0.0, max_guidance),
            schedule=schedule,
            parameterization=meaning,
            num_steps=50,
        )
    else:
        rounds = first_steps.bit_length() + 2  # those of two steps and of one count twice
        method = progressive(
            as_network(guided),
            teacher_params=start(jax.random.key(0), {}) if smoke else teacher_params,
            num_steps=first_steps,
            round_length=max(num_steps // rounds, 1),
            head=single(meaning),
            path=vp_path(schedule),
            guidance_range=(0.0, max_guidance),
        )
    rate = optax.warmup_cosine_decay_schedule(0.0, lr, min(100, num_steps // 4 + 1), max(num_steps, 2), lr / 20)
    return Experiment(
        name="digits_guided_distillation",
        method=method,
        networks={"model": guided},
        data=lambda: batches(digits("train"), batch_size=batch_size, seed=seed),
        optimizers={"model": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))},
        ema=(ema.warmup("ema", ema_decay),),
        partition=partition.UNET,
        sample_shape=(8, 8, 1),
        num_classes=10,
        batch_size=batch_size,
        num_steps=num_steps,
        seed=seed,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        keep_every=checkpoint_every,
        sample_every=sample_every,
        evaluation=Evaluation(
            name="digits held-out",
            extractor=digits_extractor,
            held_out=lambda: digits("held_out"),
            train=lambda: digits("train"),
            num=40 if smoke else 1536,
        ),
    )

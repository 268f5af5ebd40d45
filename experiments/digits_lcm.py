"""LCM's distillation of the digits teacher, on pixels instead of latents, in a few minutes of one core.

Paper: Luo et al. 2023 (arXiv:2310.04378): a guided teacher's DDIM step over many levels at once, w as an input.
Command: jaxdiff train experiments/digits_lcm.py --workdir runs/ladder/lcm-0 (needs digits_edm.py's run first)
Expected: docs/ladder.md has what was measured.
"""

import jax
import jax.numpy as jnp
import optax

from jaxdiff import parameterization, runs, schedules
from jaxdiff.data.images import digits
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.lcm import elementwise_huber, lcm
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
    chain_length: int = 1000,
    num_ddim_steps: int = 10,
    max_guidance: float = 0.5,
    target_ema: float = 0.95,
    huber: float = 0.03,
    num_steps: int = 1500,
    batch_size: int = 64,
    lr: float = 5e-4,
    width: int = 16,
    ema_decay: float = 0.995,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 500,
    sample_every: int = 1000,
    smoke: bool = False,
) -> Experiment:
    """Settings: num_ddim_steps divides chain_length, and is how many steps the teacher takes along the chain."""
    if smoke:
        num_steps, batch_size, width, checkpoint_every, sample_every = 4, 8, 8, 2, 4
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
    betas = schedules.cosine_betas(chain_length)
    guided = unet.clone(guidance_dim=2 * width)
    schedule = schedules.discrete(betas)
    meaning = parameterization.edm(SIGMA_DATA, lambda t: jnp.log(schedule.level(t).sigma / schedule.level(t).alpha) / 4)

    def start(key, batch):
        return grown(init_params(guided, key, *example_inputs(guided)), teacher_params)

    method = lcm(
        as_network(guided),
        betas,
        teacher=as_network(unet),
        teacher_params=teacher_params,
        init_params=start,
        null_cond=lambda cond: cond | {"label": jnp.full_like(cond["label"], 10)},
        guidance_range=(0.0, max_guidance),
        target_decay=target_ema,
        parameterization=meaning,
        distance=elementwise_huber(huber),
        num_ddim_steps=num_ddim_steps,
        sigma_data=SIGMA_DATA,
        clip=1.0,
        num_steps=1,
    )
    rate = optax.warmup_cosine_decay_schedule(0.0, lr, min(100, num_steps // 4 + 1), max(num_steps, 2), lr / 20)
    return Experiment(
        name="digits_lcm",
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
        sample_every=sample_every,
        evaluation=Evaluation(
            name="digits held-out",
            extractor=digits_extractor,
            held_out=lambda: digits("held_out"),
            train=lambda: digits("train"),
            num=40 if smoke else 1536,
        ),
    )

"""Consistency distillation of the digits teacher, or consistency training from its weights, on one core.

Paper: Song et al. 2023 (arXiv:2303.01469) algorithms 2 and 3, with a pseudo-Huber distance, which at this size is
steadier than the paper's squared one.
Command: jaxdiff train experiments/digits_consistency.py --workdir runs/ladder/cd-0 (needs digits_edm.py's run first)
Expected: docs/ladder.md has what was measured.
"""

import jax
import jax.numpy as jnp
import optax

from jaxdiff import losses, parameterization, runs, schedules
from jaxdiff.data.images import digits
from jaxdiff.data.pipeline import batches
from jaxdiff.denoiser import denoiser
from jaxdiff.evaluation import Evaluation
from jaxdiff.guidance import classifier_free
from jaxdiff.methods.consistency import adaptive, consistency_distillation, consistency_training, fixed
from jaxdiff.metrics.digits import digits_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment

SIGMA_DATA = 0.752


def build(
    *,
    teacher: str = "runs/ladder/teacher",
    distil: bool = True,
    num_levels: int = 8,
    end_levels: int = 64,
    sigma_max: float = 20.0,
    target_ema: float = 0.95,
    guidance: float = 1.15,
    huber: float = 0.1,
    num_steps: int = 1250,
    batch_size: int = 64,
    lr: float = 1e-3,
    width: int = 16,
    ema_decay: float = 0.995,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 500,
    sample_every: int = 1000,
    smoke: bool = False,
) -> Experiment:
    """Settings: distil False asks the data instead of the teacher, with N growing from num_levels to end_levels;
    teacher is the run of digits_edm.py, with a guidance that makes up for its coarse steps; huber is the c of the
    distance.
    """
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
    distance, schedule, meaning = losses.pseudo_huber(huber), schedules.ve(), parameterization.edm(SIGMA_DATA)

    def guided(params, cond):
        null = cond | {"label": jnp.full_like(cond["label"], 10)}
        return classifier_free(lambda c: denoiser(as_network(unet), params, schedule, meaning, c), cond, null, guidance)

    if distil:
        method = consistency_distillation(
            as_network(unet),
            teacher_params=teacher_params,
            teacher=guided,
            curriculum=fixed(num_levels, target_ema),
            distance=distance,
            sigma_data=SIGMA_DATA,
            sigma_max=sigma_max,
        )
    else:
        curriculum = adaptive(num_levels, end_levels, num_steps, target_ema)
        method = consistency_training(
            as_network(unet),
            init_params=lambda key, batch: jax.tree.map(jnp.array, teacher_params),
            curriculum=curriculum,
            distance=distance,
            sigma_data=SIGMA_DATA,
            sigma_max=sigma_max,
        )
    rate = optax.warmup_cosine_decay_schedule(0.0, lr, min(100, num_steps // 4 + 1), max(num_steps, 2), lr / 20)
    return Experiment(
        name="digits_consistency",
        method=method,
        networks={"model": unet},
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

"""Easy consistency tuning of the digits teacher in a few minutes of one core.

Paper: Geng et al. 2024 (arXiv:2406.14548): the teacher's weights, a gap between two levels that narrows in stages.
Command: jaxdiff train experiments/digits_easy_consistency.py --workdir runs/ladder/ect-0 (needs digits_edm.py's run)
Expected: docs/ladder.md has what was measured.
"""

import jax
import jax.numpy as jnp
import optax

from jaxdiff import losses, runs
from jaxdiff.data.images import digits
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.easy_consistency import easy_consistency
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
    num_stages: int = 8,
    huber: float = 0.1,
    num_steps: int = 4000,
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
    """Settings: num_stages is how often the gap halves; teacher is the run of digits_edm.py."""
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
    method = easy_consistency(
        as_network(unet),
        init_params=lambda key, batch: jax.tree.map(jnp.array, teacher_params),
        steps_per_stage=max(num_steps // num_stages, 1),
        distance=losses.pseudo_huber(huber),
        sigma_data=SIGMA_DATA,
    )
    rate = optax.warmup_cosine_decay_schedule(0.0, lr, min(100, num_steps // 4 + 1), max(num_steps, 2), lr / 20)
    return Experiment(
        name="digits_easy_consistency",
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

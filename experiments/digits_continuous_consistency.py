"""sCM on the digits, from the teacher's weights: continuous-time distillation, or training on the data alone.

Paper: Lu and Song 2024 (arXiv:2410.11081) algorithm 1, with a short tangent warm-up.
Command: jaxdiff train experiments/digits_continuous_consistency.py --workdir runs/ladder/scd-0 (after digits_edm.py's)
Expected: docs/ladder.md has what was measured.
"""

import jax
import jax.numpy as jnp
import optax

from jaxdiff import runs
from jaxdiff.data.images import digits
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.continuous_consistency import from_edm, scm
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
    log_mean: float = -0.8,
    log_std: float = 1.6,
    num_steps: int = 3500,
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
    """Settings: distil False is sCT; log_mean and log_std are those of ln(sigma) in training."""
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
    method = scm(
        from_edm(as_network(unet, forward_mode=True), SIGMA_DATA),
        init_params=lambda key, batch: jax.tree.map(jnp.array, teacher_params),
        teacher=from_edm(as_network(unet), SIGMA_DATA) if distil else None,
        teacher_params=teacher_params if distil else None,
        sigma_data=SIGMA_DATA,
        log_mean=log_mean,
        log_std=log_std,
        warmup_steps=max(num_steps // 4, 1),
    )
    rate = optax.warmup_cosine_decay_schedule(0.0, lr, min(100, num_steps // 4 + 1), max(num_steps, 2), lr / 20)
    return Experiment(
        name="digits_continuous_consistency",
        method=method,
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

"""Progressive distillation of the digits teacher from 64 steps to one, in one run of a few minutes of one core.

Paper: Salimans and Ho 2022 (arXiv:2202.00512) algorithm 2 on the noise levels of EDM, as in the release of consistency
models; rounds of equal length, the last two twice as long.
Command: jaxdiff train experiments/digits_progressive.py --workdir runs/ladder/pd-0 (needs digits_edm.py's run first)
Expected: docs/ladder.md has what was measured.
"""

import jax
import optax

from jaxdiff import parameterization, runs
from jaxdiff.data.images import digits
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.progressive import progressive, single, ve_path
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
    first_steps: int = 32,
    num_steps: int = 3600,
    batch_size: int = 64,
    lr: float = 1e-3,
    width: int = 16,
    ema_decay: float = 0.99,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 450,
    sample_every: int = 1000,
    smoke: bool = False,
) -> Experiment:
    """Settings: first_steps is that of the first student, a power of two. A round takes an eighth of num_steps, and all
    checkpoints are kept, so that the students of the rounds can be judged.
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
    rounds = first_steps.bit_length() + 2  # those of two steps and of one count twice
    method = progressive(
        as_network(unet),
        teacher_params=teacher_params,
        num_steps=first_steps,
        round_length=max(num_steps // rounds, 1),
        head=single(parameterization.edm(SIGMA_DATA)),
        path=ve_path(),
        clip=None,
    )
    rate = optax.warmup_cosine_decay_schedule(0.0, lr, min(100, num_steps // 4 + 1), max(num_steps, 2), lr / 20)
    return Experiment(
        name="digits_progressive",
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

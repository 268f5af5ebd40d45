"""Progressive distillation on ImageNet at 64 pixels, from 1024 DDIM steps to one, and the model it starts from.

Paper: Salimans & Ho 2022 (arXiv:2202.00512): FID 15.39 in one step and 8.95 in two (not verified). Settings are the
released configuration's; the teacher's length and the doubled last rounds are not verified. The optimiser is not
restarted between rounds.
Flips of the images are an assumption.
Command: jaxdiff train experiments/imagenet64_progressive.py --workdir runs/imagenet64_progressive_teacher
             --set first=true --set lr=3e-4
then:    jaxdiff train experiments/imagenet64_progressive.py --workdir runs/imagenet64_progressive
Reached: not run at scale yet.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff import parameterization, runs
from jaxdiff.data.augment import flip_horizontally
from jaxdiff.data.named import in_memory, open_source
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.progressive import both, first_teacher, progressive
from jaxdiff.metrics.pixels import pixel_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.progdist_unet import progdist_imagenet64_unet
from jaxdiff.networks.unet import example_inputs
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:imagenet2012",
    teacher: str = "runs/imagenet64_progressive_teacher",
    first: bool = False,
    first_steps: int = 512,
    round_length: int = 50_000,
    num_steps: int = 550_000,
    batch_size: int = 2048,
    lr: float = 1e-4,
    ema_decay: float = 0.9999,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: first True trains the teacher, for num_steps; else first_steps, a power of two, is the number of steps
    of the first student, and every round but the last two takes round_length, within which lr falls to 0.
    """
    size = 64
    unet = progdist_imagenet64_unet().clone(dtype=jnp.bfloat16 if bf16 else jnp.float32)
    if smoke:
        data, size, num_steps, batch_size = "stand-in", 8, 4, 4
        first_steps, round_length = 2, 1
        unet = unet.clone(base_channels=64, channel_mult=(1,), num_res_blocks=1, attention_factors=())

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=1000)

    head = both(parameterization.scaled_time(1000.0))
    if first:
        rate, averages = optax.linear_schedule(0.0, lr, 1000), (ema.constant("ema", ema_decay),)
        method = first_teacher(
            as_network(unet), init_params=lambda key, batch: init_params(unet, key, *example_inputs(unet)), head=head
        )
    else:
        unet = unet.clone(dropout=0.0)
        old = init_params(unet, jax.random.key(0), *example_inputs(unet)) if smoke else runs.teacher_params(teacher)
        lengths = [round_length] * (first_steps.bit_length() - 2) + [2 * round_length] * 2
        num_steps, averages = sum(lengths), ()
        rates = [optax.linear_schedule(lr, 0.0, length) for length in lengths]
        rate = optax.join_schedules(rates, np.cumsum(lengths)[:-1].tolist())
        method = progressive(
            as_network(unet),
            teacher_params=old,
            num_steps=first_steps,
            round_length=round_length,
            head=head,
        )
    return Experiment(
        name="imagenet64_progressive",
        method=method,
        networks={"model": unet},
        data=lambda: batches(
            source("train"), batch_size=batch_size, seed=seed, augment=[flip_horizontally], prefetch=4
        ),
        optimizers={"model": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))},
        ema=averages,
        partition=partition.UNET,
        sample_shape=(size, size, 3),
        num_classes=1000,
        batch_size=batch_size,
        accumulate=accumulate,
        num_steps=num_steps,
        seed=seed,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        sample_every=sample_every,
        evaluation=Evaluation(
            name="ImageNet validation",
            extractor=pixel_extractor,
            held_out=lambda: in_memory(source("train" if data == "stand-in" else "validation"), 64 if smoke else 10000),
            train=lambda: in_memory(source("train"), 64 if smoke else 10000),
            num=16 if smoke else 10000,
            metrics=("frechet", "kernel", "nearest"),
        ),
    )

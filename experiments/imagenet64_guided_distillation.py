"""Guided distillation on ImageNet at 64 pixels: a teacher, one guided network for every scale, then half the steps.

Paper: Meng et al. 2023 (arXiv:2210.03142): from four steps on about as good as the guided teacher; FID 7.54 in one step
is quoted elsewhere. The settings of training are not verified: those of progressive distillation are taken, with the
UNet of consistency models, which has room for w and for "no class", the range 0 to 4 of w and 10 % of labels dropped.
Flips of the images are an assumption.
Command: jaxdiff train experiments/imagenet64_guided_distillation.py --workdir runs/imagenet64_guided_teacher
             --set stage=teacher --set lr=3e-4
then:    jaxdiff train experiments/imagenet64_guided_distillation.py --workdir runs/imagenet64_guided_one
             --set stage=one --set teacher=runs/imagenet64_guided_teacher
then:    jaxdiff train experiments/imagenet64_guided_distillation.py --workdir runs/imagenet64_guided
             --set teacher=runs/imagenet64_guided_one
Reached: not run at scale yet.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff import parameterization, runs
from jaxdiff.data.augment import flip_horizontally
from jaxdiff.data.named import in_memory, open_source
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.guided_distillation import guided_distillation
from jaxdiff.methods.progressive import first_teacher, progressive, single
from jaxdiff.metrics.pixels import pixel_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, grown, init_params
from jaxdiff.networks.unet import example_inputs
from jaxdiff.networks.unet_presets import consistency_unet
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:imagenet2012",
    stage: Literal["teacher", "one", "two"] = "two",
    teacher: str = "runs/imagenet64_guided_one",
    max_guidance: float = 4.0,
    first_steps: int = 512,
    round_length: int = 50_000,
    num_steps: int = 550_000,
    batch_size: int = 2048,
    lr: float = 1e-4,
    label_dropout: float = 0.1,
    ema_decay: float = 0.9999,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: max_guidance is the largest w; num_steps is for the teacher and stage one. In stage two every round but
    the last two takes round_length, within which lr falls to 0.
    """
    size = 64
    unet = consistency_unet(64, num_classes=1000).clone(dtype=jnp.bfloat16 if bf16 else jnp.float32, null_label=True)
    if smoke:
        data, size, num_steps, batch_size = "stand-in", 8, 4, 4
        first_steps, round_length = 2, 1
        unet = unet.clone(base_channels=64, channel_mult=(1,), num_res_blocks=1, attention_factors=())

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=1000)

    guided = unet if stage == "teacher" else unet.clone(guidance_dim=256)
    meaning = parameterization.v(parameterization.scaled_time(1000.0))
    rate = optax.constant_schedule(lr)

    def load(network):
        if smoke:
            return init_params(network, jax.random.key(0), *example_inputs(network))
        return runs.teacher_params(teacher)

    if stage == "teacher":
        method = first_teacher(
            as_network(unet),
            init_params=lambda key, batch: init_params(unet, key, *example_inputs(unet)),
            head=single(meaning),
            label_dropout=label_dropout,
            null_label=1000,
        )
    elif stage == "one":
        old = load(unet)
        method = guided_distillation(
            as_network(guided),
            teacher=as_network(unet),
            teacher_params=old,
            init_params=lambda key, batch: grown(init_params(guided, key, *example_inputs(guided)), old),
            null_cond=lambda cond: cond | {"label": jnp.full_like(cond["label"], 1000)},
            guidance_range=(0.0, max_guidance),
            parameterization=meaning,
        )
    else:
        lengths = [round_length] * (first_steps.bit_length() - 2) + [2 * round_length] * 2
        num_steps = sum(lengths)
        rates = [optax.linear_schedule(lr, 0.0, length) for length in lengths]
        rate = optax.join_schedules(rates, np.cumsum(lengths)[:-1].tolist())
        method = progressive(
            as_network(guided),
            teacher_params=load(guided),
            num_steps=first_steps,
            round_length=round_length,
            head=single(meaning),
            guidance_range=(0.0, max_guidance),
        )
    return Experiment(
        name="imagenet64_guided_distillation",
        method=method,
        networks={"model": guided},
        data=lambda: batches(
            source("train"), batch_size=batch_size, seed=seed, augment=[flip_horizontally], prefetch=4
        ),
        optimizers={"model": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))},
        ema=(ema.constant("ema", ema_decay),),
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

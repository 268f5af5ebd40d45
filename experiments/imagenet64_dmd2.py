"""DMD2 on ImageNet at 64 pixels: one step, from an EDM network of consistency models' form (295.899 M parameters).

Paper: Yin et al. 2024 (arXiv:2405.14867): FID 1.51 after 200,000 steps of batch 280; 1.28 with 400,000 without and
then 150,000 with the adversarial terms at learning rate 5e-7. Learning rate, weight decay, weights and the ratio of
updates are the release's, which distils EDM's own ADM; its judge has convolutions on the middle of the UNet where ours
has a mean. float16 diverged there, bfloat16 did not. Flips and clipping are assumptions.
Command: jaxdiff import consistency-unet edm_imagenet64_ema.pt weights/edm_imagenet64
then:    jaxdiff train experiments/imagenet64_dmd2.py --workdir runs/imagenet64_dmd2
or in two stages:
         jaxdiff train experiments/imagenet64_dmd2.py --workdir runs/imagenet64_dmd2_first
             --set adversarial=false --set num_steps=400_000
         jaxdiff train experiments/imagenet64_dmd2.py --workdir runs/imagenet64_dmd2_second
             --set start=runs/imagenet64_dmd2_first --set num_steps=150_000 --set lr=5e-7
Reached: not run at scale yet.
"""

import jax
import jax.numpy as jnp
import optax

from jaxdiff import parameterization, runs
from jaxdiff.data.augment import flip_horizontally
from jaxdiff.data.named import in_memory, open_source
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.dmd2 import dmd2, edm_form
from jaxdiff.metrics.pixels import pixel_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import example_inputs
from jaxdiff.networks.unet_discriminator import UNetDiscriminator, as_judge, from_backbone
from jaxdiff.networks.unet_presets import consistency_unet
from jaxdiff.training import alarms, ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:imagenet2012",
    teacher: str = "weights/edm_imagenet64",
    start: str | None = None,
    adversarial: bool = True,
    every: int = 5,
    num_steps: int = 200_000,
    batch_size: int = 280,
    lr: float = 2e-6,
    ema_decay: float = 0.999,
    bf16: bool = True,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: start is the run without a judge whose generator and fake score, as trained and not averaged, this one
    begins with, None for the teacher's parameters; adversarial False leaves the judge out; the generator moves on every
    n-th step, n = every; the release samples the trained parameters themselves, ema_decay is ours.
    """
    size = 64
    unet = consistency_unet(64, num_classes=1000).clone(dtype=jnp.bfloat16 if bf16 else jnp.float32)
    if smoke:
        data, size, num_steps, batch_size, every = "stand-in", 8, 4, 4, 1
        unet = unet.clone(base_channels=64, channel_mult=(1,), num_res_blocks=1, attention_factors=())

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=1000)

    old = init_params(unet, jax.random.key(0), *example_inputs(unet)) if smoke else runs.teacher_params(teacher)
    fake = UNetDiscriminator(unet)
    judge = as_judge(fake)

    def score(params, x_t, t, cond, **training):
        return judge(params, x_t, t, cond, **training).image

    def logit(params, x_t, t, cond, **training):
        return judge(params, x_t, t, cond, **training).sample

    def start_player(player: str):
        return old if start is None else runs.player_params(start, player=player, average="raw")

    student, score_params = start_player("model"), start_player("fake")

    def start_fake(key, batch):
        params = jax.tree.map(jnp.array, score_params)
        return from_backbone(init_params(fake, key, *example_inputs(unet)), params) if adversarial else params

    method = dmd2(
        as_network(unet),
        edm_form(parameterization=parameterization.edm(0.5, parameterization.log_time(250.0))),
        teacher_params=old,
        init_params=lambda key, batch: jax.tree.map(jnp.array, student),
        score=score if adversarial else None,
        judge=logit if adversarial else None,
        init_fake=start_fake,
        every=every,
    )
    return Experiment(
        name="imagenet64_dmd2",
        method=method,
        networks={"model": unet, "fake": fake if adversarial else unet},
        data=lambda: batches(
            source("train"), batch_size=batch_size, seed=seed, augment=[flip_horizontally], prefetch=4
        ),
        optimizers={
            player: optax.chain(optax.clip_by_global_norm(10.0), optax.adamw(lr, weight_decay=0.01))
            for player in ("fake", "model")
        },
        ema=(ema.constant("ema", ema_decay, players=("model",)),),
        partition=partition.UNET,
        sample_shape=(size, size, 3),
        num_classes=1000,
        batch_size=batch_size,
        accumulate=accumulate,
        num_steps=num_steps,
        seed=seed,
        alarms=alarms.collapse(),
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

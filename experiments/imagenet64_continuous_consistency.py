"""sCM on ImageNet at 64 pixels: continuous-time consistency distillation (sCD) or training (sCT).

Paper: Lu & Song 2024 (arXiv:2410.11081): FID 2.44 in one step and 1.66 in two for sCD of size XL, 2.04 and 1.48 for
sCT; sCT of sizes S, M, L: 3.23, 2.25, 2.08 in one step. The paper's networks are EDM2's, which are not here: this one
is the UNet of consistency models, 295.899 M parameters, with t embedded as it is: these figures are not expected. The
paper's average is EDM2's, of relative width 0.05; here it is an exponential one. The settings of the teacher are
assumptions. Dropout is at every resolution here, in the paper at 16 pixels and below.
Flips of the images are an assumption.
Command: jaxdiff train experiments/imagenet64_continuous_consistency.py --workdir runs/imagenet64_trigflow
             --set first=true --set dropout=0.1
then:    jaxdiff train experiments/imagenet64_continuous_consistency.py --workdir runs/imagenet64_scd
or:      jaxdiff train experiments/imagenet64_continuous_consistency.py --workdir runs/imagenet64_sct
             --set distil=false --set dropout=0.45
Reached: not run at scale yet.
"""

import jax
import jax.numpy as jnp
import optax

from jaxdiff import runs
from jaxdiff.data.augment import flip_horizontally
from jaxdiff.data.named import in_memory, open_source
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.continuous_consistency import scm, trigflow
from jaxdiff.metrics.pixels import pixel_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import example_inputs
from jaxdiff.networks.unet_presets import consistency_unet
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:imagenet2012",
    teacher: str = "runs/imagenet64_trigflow",
    first: bool = False,
    distil: bool = True,
    num_steps: int = 400_000,
    batch_size: int = 2048,
    lr: float = 1e-4,
    decay_after: int = 35_000,
    dropout: float = 0.0,
    ema_decay: float = 0.9999,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: first True trains the teacher; distil False is sCT, which starts from the teacher, too. The learning
    rate is lr until step decay_after and falls as 1 / sqrt(step) from there.
    """
    size = 64
    unet = consistency_unet(64, num_classes=1000).clone(dtype=jnp.bfloat16 if bf16 else jnp.float32, dropout=dropout)
    if smoke:
        data, size, num_steps, batch_size = "stand-in", 8, 4, 4
        unet = unet.clone(base_channels=64, channel_mult=(1,), num_res_blocks=1, attention_factors=())

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=1000)

    if first:
        method = trigflow(
            as_network(unet), init_params=lambda key, batch: init_params(unet, key, *example_inputs(unet)), log_std=1.6
        )
    else:
        old = init_params(unet, jax.random.key(0), *example_inputs(unet)) if smoke else runs.teacher_params(teacher)
        method = scm(
            as_network(unet, forward_mode=True),
            init_params=lambda key, batch: jax.tree.map(jnp.array, old),
            teacher=as_network(unet) if distil else None,
            teacher_params=old if distil else None,
            log_std=1.6,
        )

    def rate(step):
        return lr / jnp.sqrt(jnp.maximum(step / decay_after, 1.0))

    return Experiment(
        name="imagenet64_continuous_consistency",
        method=method,
        data=lambda: batches(
            source("train"), batch_size=batch_size, seed=seed, augment=[flip_horizontally], prefetch=4
        ),
        optimizers={"model": optax.adam(rate, eps=1e-11)},
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

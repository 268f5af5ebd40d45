"""Consistency distillation and consistency training on CIFAR-10, with the paper's NCSN++ of 56.396 M parameters.

Paper: Song et al. 2023 (arXiv:2303.01469): FID 3.55 in one step and 2.93 in two for distillation, 8.70 and 5.83 for
training alone (these two not verified), with LPIPS. Settings are the released launch files'; flips are an assumption.
Command: jaxdiff import lpips vgg16-397923af.pth vgg.pth weights/lpips
then:    jaxdiff import ncsnpp edm_cifar10_ema weights/edm_cifar10 (or train experiments/cifar10_edm_ncsnpp.py)
then:    jaxdiff train experiments/cifar10_consistency.py --workdir runs/cifar10_cd --set teacher=weights/edm_cifar10
or:      jaxdiff train experiments/cifar10_consistency.py --workdir runs/cifar10_ct --set distil=false
Reached: not run at scale yet.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from jaxdiff import losses, runs
from jaxdiff.data.augment import flip_horizontally
from jaxdiff.data.named import in_memory, open_source
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.consistency import adaptive, consistency_distillation, consistency_training, fixed
from jaxdiff.metrics.pixels import pixel_extractor
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.ncsnpp import example_inputs
from jaxdiff.networks.ncsnpp_presets import consistency_ncsnpp
from jaxdiff.pretrained import folders
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:cifar10",
    teacher: str = "runs/cifar10_edm_ncsnpp",
    distil: bool = True,
    lpips: str | None = "weights/lpips",
    num_steps: int = 800_000,
    batch_size: int = 512,
    lr: float = 4e-4,
    ema_decay: float = 0.9999,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: distil False trains on the data alone; lpips is the imported network, none for the squared error."""
    size = 32
    unet = consistency_ncsnpp().clone(dtype=jnp.bfloat16 if bf16 else jnp.float32)
    if smoke:
        data, size, num_steps, batch_size = "stand-in", 8, 4, 4
        unet = unet.clone(base_channels=32, channel_mult=(1,), num_res_blocks=1, attention_factors=())

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=None)

    distance = losses.mse
    if lpips is not None and not smoke:
        _, spec, weights = folders.load(lpips)
        distance = losses.resized(partial(spec.network.apply, {"params": weights}), (224, 224))
    if distil:
        old = init_params(unet, jax.random.key(0), *example_inputs(unet)) if smoke else runs.teacher_params(teacher)
        method = consistency_distillation(
            as_network(unet),
            teacher_params=old,
            curriculum=fixed(18, 0.0),
            distance=distance,
        )
    else:
        method = consistency_training(
            as_network(unet),
            init_params=lambda key, batch: init_params(unet, key, *example_inputs(unet)),
            curriculum=adaptive(2, 150, num_steps, 0.9),
            distance=distance,
        )
    return Experiment(
        name="cifar10_consistency",
        method=method,
        networks={"model": unet},
        data=lambda: batches(
            source("train"), batch_size=batch_size, seed=seed, augment=[flip_horizontally], prefetch=4
        ),
        optimizers={"model": optax.radam(lr)},
        ema=(ema.constant("ema", ema_decay),),
        sample_shape=(size, size, 3),
        num_classes=None,
        batch_size=batch_size,
        accumulate=accumulate,
        num_steps=num_steps,
        seed=seed,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        sample_every=sample_every,
        evaluation=Evaluation(
            name="CIFAR-10 test",
            extractor=pixel_extractor,
            held_out=lambda: in_memory(source("train" if data == "stand-in" else "test"), 64 if smoke else 10000),
            train=lambda: in_memory(source("train"), 64 if smoke else 10000),
            num=16 if smoke else 10000,
            metrics=("frechet", "kernel", "nearest"),
        ),
    )

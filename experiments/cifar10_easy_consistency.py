"""Easy consistency tuning on CIFAR-10: EDM's DDPM++ of 55.7 M parameters becomes a consistency model.

Paper: Geng et al. 2024 (arXiv:2406.14548): FID 3.60 in one step and 2.11 in two after 400k steps, 3.86 and 2.15 after
200k, 4.54 and 2.20 after 100k; 2.73 in two steps after an hour of one GPU. No augmentation, as in the release. The
length of the short recipe is not verified.
Command: jaxdiff import edm edm-cifar10-32x32-uncond-vp.pkl weights/edm_vp (or train experiments/cifar10_edm.py)
then:    jaxdiff train experiments/cifar10_easy_consistency.py --workdir runs/cifar10_ect --set teacher=weights/edm_vp
or:      the same with --set q=256 --set steps_per_stage=8000 --set num_steps=8000 --set ema_decay=0.9993
Reached: not run at scale yet.
"""

import jax
import jax.numpy as jnp
import optax

from jaxdiff import runs
from jaxdiff.data.named import in_memory, open_source
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.easy_consistency import easy_consistency
from jaxdiff.metrics.pixels import pixel_extractor
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.ncsnpp import example_inputs
from jaxdiff.networks.ncsnpp_presets import edm_ddpmpp
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:cifar10",
    teacher: str = "runs/cifar10_edm",
    q: float = 2.0,
    steps_per_stage: int = 25_000,
    num_steps: int = 400_000,
    batch_size: int = 128,
    lr: float = 1e-4,
    dropout: float = 0.2,
    ema_decay: float = 0.9999,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: the gap between two levels narrows by q every steps_per_stage."""
    size = 32
    unet = edm_ddpmpp(32).clone(dtype=jnp.bfloat16 if bf16 else jnp.float32, dropout=dropout, augment_dim=None)
    if smoke:
        data, size, num_steps, batch_size = "stand-in", 8, 4, 4
        unet = unet.clone(base_channels=32, channel_mult=(1,), num_res_blocks=1, attention_factors=())

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=None)

    old = init_params(unet, jax.random.key(0), *example_inputs(unet)) if smoke else runs.teacher_params(teacher)
    method = easy_consistency(
        as_network(unet),
        init_params=lambda key, batch: jax.tree.map(jnp.array, old),
        steps_per_stage=steps_per_stage,
        q=q,
    )
    return Experiment(
        name="cifar10_easy_consistency",
        method=method,
        networks={"model": unet},
        data=lambda: batches(source("train"), batch_size=batch_size, seed=seed, prefetch=4),
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

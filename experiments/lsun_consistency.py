"""Consistency distillation and consistency training on LSUN at 256 pixels, with the paper's UNet of 526.305 M.

Paper: Song et al. 2023 (arXiv:2303.01469): on bedrooms FID 7.80 in one step and 5.22 in two for distillation, 16.0 and
7.85 for training alone; on cats 11.0, 8.84, 20.7 and 11.7 (all not verified), with LPIPS. The batch of 256 is that of
the launch files, the paper's table may have 2048. Training starts from random weights, as in the paper.
Command: jaxdiff import consistency-unet edm_bedroom256_ema.pt weights/edm_bedroom (LPIPS: cifar10_consistency.py)
then:    jaxdiff train experiments/lsun_consistency.py --workdir runs/lsun_cd --set teacher=weights/edm_bedroom
or:      jaxdiff train experiments/lsun_consistency.py --workdir runs/lsun_ct --set distil=false
             --set num_steps=1_000_000 --set lr=5e-5
Reached: not run at scale yet.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from jaxdiff import losses, runs
from jaxdiff.data.named import in_memory, open_source
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.consistency import adaptive, consistency_distillation, consistency_training, fixed
from jaxdiff.metrics.pixels import pixel_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import example_inputs
from jaxdiff.networks.unet_presets import consistency_unet
from jaxdiff.pretrained import folders
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:lsun/bedroom",
    teacher: str = "runs/lsun_edm",
    distil: bool = True,
    lpips: str | None = "weights/lpips",
    num_steps: int = 600_000,
    batch_size: int = 256,
    lr: float = 1e-5,
    ema_decays: tuple[float, ...] = (0.9999, 0.99994, 0.99994321),
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: distil False trains on the data alone; lpips is the imported network, none for the squared error."""
    size = 256
    unet = consistency_unet(256).clone(dtype=jnp.bfloat16 if bf16 else jnp.float32)
    if smoke:
        data, size, num_steps, batch_size = "stand-in", 8, 4, 4
        unet = unet.clone(base_channels=64, channel_mult=(1,), num_res_blocks=1, attention_factors=())

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=None)

    distance = losses.mse
    if lpips is not None and not smoke:
        _, spec, weights = folders.load(lpips)
        distance = partial(spec.network.apply, {"params": weights})
    plain = as_network(unet)

    def network(params, x_t, t, cond, **training):
        return plain(params, x_t, 1000 * t, cond, **training)  # the release embeds 250 ln(sigma)

    if distil:
        old = init_params(unet, jax.random.key(0), *example_inputs(unet)) if smoke else runs.teacher_params(teacher)
        method = consistency_distillation(
            network,
            teacher_params=old,
            curriculum=fixed(40, 0.95),
            distance=distance,
        )
    else:
        method = consistency_training(
            network,
            init_params=lambda key, batch: init_params(unet, key, *example_inputs(unet)),
            curriculum=adaptive(2, 150, num_steps, 0.95),
            distance=distance,
        )
    return Experiment(
        name="lsun_consistency",
        method=method,
        networks={"model": unet},
        data=lambda: batches(source("train"), batch_size=batch_size, seed=seed, prefetch=4),
        optimizers={"model": optax.radam(lr)},
        ema=tuple(ema.constant(f"ema{decay}", decay) for decay in ema_decays),
        partition=partition.UNET,
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
            name="LSUN validation",
            extractor=pixel_extractor,
            held_out=lambda: in_memory(source("train" if data == "stand-in" else "validation"), 64 if smoke else 10000),
            train=lambda: in_memory(source("train"), 64 if smoke else 10000),
            num=16 if smoke else 10000,
            metrics=("frechet", "kernel", "nearest"),
        ),
    )

"""The EDM teacher of consistency models on CIFAR-10: their NCSN++ of 56.396 M parameters.

Paper: Song et al. 2023 (arXiv:2303.01469): FID 2.04 at 35 network calls (not verified). The release adds its loss up
over the values of an image, which Adam does not notice. Flips stand for its augmentation.
Command: jaxdiff train experiments/cifar10_edm_ncsnpp.py --workdir runs/cifar10_edm_ncsnpp
Reached: not run at scale yet.
"""

import jax.numpy as jnp
import optax

from jaxdiff.data.augment import flip_horizontally
from jaxdiff.data.named import in_memory, open_source
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.edm import edm
from jaxdiff.metrics.pixels import pixel_extractor
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.ncsnpp import example_inputs
from jaxdiff.networks.ncsnpp_presets import consistency_ncsnpp
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:cifar10",
    num_steps: int = 400_000,
    batch_size: int = 512,
    lr: float = 1e-3,
    ramp_up_images: int = 10_000_000,
    dropout: float = 0.13,
    ema_images: float = 500_000.0,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: ema_images is the average's half-life in training images, without a ramp as in the release."""
    size = 32
    unet = consistency_ncsnpp().clone(dtype=jnp.bfloat16 if bf16 else jnp.float32, dropout=dropout)
    if smoke:
        data, size, num_steps, batch_size = "stand-in", 8, 4, 4
        unet = unet.clone(base_channels=32, channel_mult=(1,), num_res_blocks=1, attention_factors=())

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=None)

    method = edm(as_network(unet), init_params=lambda key, batch: init_params(unet, key, *example_inputs(unet)))
    return Experiment(
        name="cifar10_edm_ncsnpp",
        method=method,
        networks={"model": unet},
        data=lambda: batches(
            source("train"), batch_size=batch_size, seed=seed, augment=[flip_horizontally], prefetch=4
        ),
        optimizers={"model": optax.adam(optax.linear_schedule(0.0, lr, ramp_up_images // batch_size))},
        ema=(ema.half_life("ema", ema_images, ramp_up=None),),
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

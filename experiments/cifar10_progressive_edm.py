"""Progressive distillation of EDM on CIFAR-10, from 8192 steps in sigma to one: the baseline of consistency models.

Paper: Song et al. 2023 (arXiv:2303.01469): FID 8.34 in one step and 5.58 in two. From the release: rounds of 50k steps,
the last two twice as long. The batch is an assumption. The optimiser is not restarted between rounds.
Flips of the images are an assumption.
Command: jaxdiff import ncsnpp edm_cifar10_ema weights/edm_cifar10 (or train experiments/cifar10_edm_ncsnpp.py)
then:    jaxdiff train experiments/cifar10_progressive_edm.py --workdir runs/cifar10_progressive_edm
             --set teacher=weights/edm_cifar10
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
from jaxdiff.methods.progressive import progressive, single, ve_path
from jaxdiff.metrics.pixels import pixel_extractor
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.ncsnpp import example_inputs
from jaxdiff.networks.ncsnpp_presets import consistency_ncsnpp
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:cifar10",
    teacher: str = "runs/cifar10_edm_ncsnpp",
    first_steps: int = 4096,
    round_length: int = 50_000,
    batch_size: int = 512,
    lr: float = 5e-5,
    ema_decay: float = 0.9999,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: first_steps, a power of two, is that of the first student; the rounds make the length of training."""
    size = 32
    unet = consistency_ncsnpp().clone(dtype=jnp.bfloat16 if bf16 else jnp.float32)
    if smoke:
        data, size, batch_size = "stand-in", 8, 4
        first_steps, round_length = 2, 1
        unet = unet.clone(base_channels=32, channel_mult=(1,), num_res_blocks=1, attention_factors=())

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=None)

    num_steps = (first_steps.bit_length() + 2) * round_length  # the rounds of two steps and of one count twice
    old = init_params(unet, jax.random.key(0), *example_inputs(unet)) if smoke else runs.teacher_params(teacher)
    method = progressive(
        as_network(unet),
        teacher_params=old,
        num_steps=first_steps,
        round_length=round_length,
        head=single(parameterization.edm()),
        path=ve_path(),
    )
    return Experiment(
        name="cifar10_progressive_edm",
        method=method,
        networks={"model": unet},
        data=lambda: batches(
            source("train"), batch_size=batch_size, seed=seed, augment=[flip_horizontally], prefetch=4
        ),
        optimizers={"model": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lr))},
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

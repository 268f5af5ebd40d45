"""sCM on CIFAR-10: continuous-time consistency distillation (sCD) or training (sCT), with EDM's DDPM++.

Paper: Lu & Song 2024 (arXiv:2410.11081): FID 3.66 in one step and 2.52 in two for sCD, 2.85 and 2.06 for sCT, from a
TrigFlow teacher of FID 2.15. The number of steps is not verified, the teacher's settings are assumptions.
Flips of the images are an assumption.
Command: jaxdiff train experiments/cifar10_continuous_consistency.py --workdir runs/cifar10_trigflow
             --set first=true --set dropout=0.13 --set lr=1e-3
then:    jaxdiff train experiments/cifar10_continuous_consistency.py --workdir runs/cifar10_scd
or:      jaxdiff train experiments/cifar10_continuous_consistency.py --workdir runs/cifar10_sct --set distil=false
             --set dropout=0.2
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
from jaxdiff.methods.continuous_consistency import from_edm, scm, trigflow
from jaxdiff.metrics.pixels import pixel_extractor
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.ncsnpp import example_inputs
from jaxdiff.networks.ncsnpp_presets import edm_ddpmpp
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:cifar10",
    teacher: str = "runs/cifar10_trigflow",
    first: bool = False,
    distil: bool = True,
    edm_teacher: bool = False,
    num_steps: int = 400_000,
    batch_size: int = 512,
    lr: float = 1e-4,
    dropout: float = 0.0,
    ema_images: float = 500_000.0,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: first True trains the teacher; distil False is sCT, which starts from the teacher, too; edm_teacher
    says that teacher is an EDM network, of cifar10_edm.py or imported, which sees ln(sigma) / 4 in place of t.
    """
    size = 32
    unet = edm_ddpmpp(32).clone(dtype=jnp.bfloat16 if bf16 else jnp.float32, dropout=dropout, augment_dim=None)
    if smoke:
        data, size, num_steps, batch_size = "stand-in", 8, 4, 4
        unet = unet.clone(base_channels=32, channel_mult=(1,), num_res_blocks=1, attention_factors=())

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=None)

    wrap = from_edm if edm_teacher else (lambda network: network)
    if first:
        method = trigflow(
            as_network(unet), init_params=lambda key, batch: init_params(unet, key, *example_inputs(unet))
        )
    else:
        old = init_params(unet, jax.random.key(0), *example_inputs(unet)) if smoke else runs.teacher_params(teacher)
        method = scm(
            wrap(as_network(unet, forward_mode=True)),
            init_params=lambda key, batch: jax.tree.map(jnp.array, old),
            teacher=wrap(as_network(unet)) if distil else None,
            teacher_params=old if distil else None,
        )
    return Experiment(
        name="cifar10_continuous_consistency",
        method=method,
        data=lambda: batches(
            source("train"), batch_size=batch_size, seed=seed, augment=[flip_horizontally], prefetch=4
        ),
        optimizers={"model": optax.radam(lr, b2=0.99)},
        ema=(ema.half_life("ema", ema_images),),
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

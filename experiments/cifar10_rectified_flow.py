"""Rectified flow on CIFAR-10: the first flow, its reflow, and a distillation into one step, with DDPM++ of 32 pixels.

Paper: Liu et al. 2022 (arXiv:2209.03003): FID 2.58 of the first flow (RK45, 127 calls), 12.21 in one step of the next,
4.85 after distilling it with LPIPS. Settings are the release's, which has dropout 0.1 after the first flow; its
distance is LPIPS of AlexNet, ours of VGG16. Without lpips the distance is L2, and that run can be the teacher of one
with lpips. Pairs, a million or more, are made by the flow before with RK45 (the method's default sampler).
Command: jaxdiff train experiments/cifar10_rectified_flow.py --workdir runs/flow1
then:    jaxdiff pairs runs/flow1 --num 1_000_000 --out data/flow1_pairs
then:    jaxdiff train experiments/cifar10_rectified_flow.py --workdir runs/flow2
             --set pairs=data/flow1_pairs --set teacher=runs/flow1 --set dropout=0.1 --set ema_decay=0.9999
then:    jaxdiff pairs runs/flow2 --num 1_000_000 --out data/flow2_pairs
then:    jaxdiff train experiments/cifar10_rectified_flow.py --workdir runs/flow2_distil
             --set distil=True --set pairs=data/flow2_pairs --set teacher=runs/flow2 --set lpips=weights/lpips
             --set dropout=0.1 --set ema_decay=0.9999
Reached: not run at scale yet.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff import losses, runs
from jaxdiff.data.augment import flip_horizontally
from jaxdiff.data.named import in_memory, open_source
from jaxdiff.data.pairs import PairSource, make_pairs, stored_pairs
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.rectified_flow import noise_end, rectified_flow, reflow
from jaxdiff.metrics.pixels import pixel_extractor
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.ncsnpp import NCSNpp, example_inputs
from jaxdiff.pretrained import folders
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "tfds:cifar10",
    pairs: str | None = None,
    teacher: str = "runs/flow1",
    distil: bool = False,
    lpips: str | None = None,
    num_steps: int = 1_300_000,
    batch_size: int = 128,
    lr: float = 2e-4,
    dropout: float = 0.15,
    ema_decay: float = 0.999999,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    sample_every: int = 5000,
    smoke: bool = False,
) -> Experiment:
    """Settings: pairs none trains the first flow; with pairs, teacher is the flow that made them. distil learns one
    step from them, by L2, or by lpips (imported).
    """
    if distil and pairs is None and not smoke:
        raise ValueError("distil needs the pairs of a flow; make them with `jaxdiff pairs` and add --set pairs=DIR")
    if lpips is not None and not distil:
        raise ValueError(f"lpips {lpips} is a distance of images, for one step; add --set distil=True or leave it out")
    first, size = pairs is None and not distil, 32
    unet = NCSNpp(channel_mult=(1, 2, 2, 2), dropout=dropout, dtype=jnp.bfloat16 if bf16 else jnp.float32)
    if smoke:
        data, size, num_steps, batch_size = "stand-in", 16, 4, 4  # LPIPS takes no fewer than 16 pixels
        unet = unet.clone(base_channels=32, channel_mult=(1,), num_res_blocks=1, attention_factors=())

    def source(split: str):
        return open_source(data, size=size, split=split, num_classes=None)

    def stream():
        if first:
            return batches(source("train"), batch_size=batch_size, seed=seed, augment=[flip_horizontally], prefetch=4)
        if pairs is not None and not smoke:
            return batches(stored_pairs(pairs), batch_size=batch_size, seed=seed, prefetch=4)
        chunks = make_pairs(lambda noise, cond: np.tanh(noise), shape=(size, size, 3), num=16, batch_size=16, seed=seed)
        return batches(PairSource(list(chunks)), batch_size=batch_size, seed=seed)

    def fresh(key, batch):
        return init_params(unet, key, *example_inputs(unet))

    if first:
        method = rectified_flow(as_network(unet), init_params=fresh)
    else:
        distance = losses.mse
        if lpips is not None:
            _, spec, weights = folders.load(lpips)
            distance = partial(spec.network.apply, {"params": weights})
        method = reflow(
            as_network(unet),
            teacher_params=fresh(jax.random.key(0), {}) if smoke else runs.teacher_params(teacher),
            time_sampler=noise_end() if distil else None,
            distance=distance,
            num_steps=1 if distil else None,
        )
    rate = optax.linear_schedule(0.0, lr, 5000)
    return Experiment(
        name="cifar10_rectified_flow",
        method=method,
        networks={"model": unet},
        data=stream,
        optimizers={"model": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))},
        ema=(ema.warmup("ema", ema_decay),),
        sample_shape=(size, size, 3),
        conditioning={} if first else {"noise": jax.ShapeDtypeStruct((size, size, 3), jnp.float32)},
        num_classes=None,
        batch_size=batch_size,
        accumulate=accumulate,
        num_steps=num_steps,
        seed=seed,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        sample_every=sample_every,
        preview_steps=1 if distil else 20,
        evaluation=Evaluation(
            name="CIFAR-10 test",
            extractor=pixel_extractor,
            held_out=lambda: in_memory(source("train" if data == "stand-in" else "test"), 64 if smoke else 10000),
            train=lambda: in_memory(source("train"), 64 if smoke else 10000),
            num=16 if smoke else 10000,
            metrics=("frechet", "kernel", "nearest"),
        ),
    )

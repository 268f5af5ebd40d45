"""Rectified flow on the digits: a first flow from the teacher's weights, its reflow, and a distillation, one core each.

Paper: Liu et al. 2022 (arXiv:2209.03003). All flows keep the teacher's preconditioning, so the first one starts where
the teacher left off; a reflow learns the pairs that the run in `teacher` makes, which are made when training begins.
Command: jaxdiff train experiments/digits_rectified_flow.py --workdir runs/ladder/flow-0 --set first=True
then:    jaxdiff train experiments/digits_rectified_flow.py --workdir runs/ladder/reflow-0
             --set teacher=runs/ladder/flow-0
then:    jaxdiff train experiments/digits_rectified_flow.py --workdir runs/ladder/reflow-distilled-0
             --set teacher=runs/ladder/reflow-0 --set distil=True
Expected: at one step two flows 12 times better than one, and 1.60 times the teacher's distance at 50 (docs/ladder.md).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff import parameterization, runs
from jaxdiff.data.images import digits
from jaxdiff.data.pairs import PairSource, make_pairs
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.generate import PLAIN, compiled
from jaxdiff.methods.rectified_flow import noise_end, rectified_flow, reflow
from jaxdiff.metrics.digits import digits_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.solvers.named import named_solver
from jaxdiff.training import ema, sharding
from jaxdiff.training.experiment import Experiment

SIGMA_DATA = 0.752


def pairs_of(run: str, num: int, num_steps: int, seed: int) -> PairSource:
    """Pairs of a finished run: noise, a random class, and what num_steps steps of Heun's method make of them."""
    experiment = runs.open_run(run)
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    params, aux, _, _ = runs.weights_of(experiment, run, None, mesh)
    sample = compiled(experiment.method, solver=named_solver("heun"), num_steps=num_steps)

    def generate(noise, cond):
        return np.asarray(
            sample(params, aux, jax.random.key(0), jnp.asarray(noise), jax.tree.map(jnp.asarray, cond), PLAIN)
        )

    return pairs_by(generate, num, seed)


def pairs_by(generate, num: int, seed: int) -> PairSource:
    """Pairs of the digits' shape and classes."""

    def classes(rng, n):
        return {"label": rng.integers(0, 10, n).astype(np.int32)}

    chunks = make_pairs(generate, shape=(8, 8, 1), num=num, batch_size=min(num, 256), seed=seed, cond=classes)
    return PairSource(list(chunks))


def build(
    *,
    teacher: str = "runs/ladder/teacher",
    first: bool = False,
    distil: bool = False,
    num_pairs: int = 8192,
    pair_steps: int = 16,
    num_steps: int = 3000,
    batch_size: int = 64,
    lr: float = 1e-3,
    width: int = 16,
    ema_decay: float = 0.995,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 500,
    sample_every: int = 1000,
    smoke: bool = False,
) -> Experiment:
    """Settings: first True couples data with fresh noise, else pairs are made by the run in teacher, with pair_steps
    steps of Heun's method; distil True learns them at the noisy end alone.
    """
    if smoke:
        num_steps, batch_size, width, checkpoint_every, sample_every, num_pairs = 4, 8, 8, 2, 4, 16
    unet = UNet(
        in_channels=1,
        out_channels=1,
        base_channels=width,
        channel_mult=(1, 2),
        num_res_blocks=1,
        norm_groups=8,
        scale_shift_norm=True,
        num_classes=10,
        null_label=True,
    )
    if smoke:
        teacher_params = init_params(unet, jax.random.key(0), *example_inputs(unet))
    else:
        teacher_params = runs.teacher_params(teacher)

    def log_ratio(t):
        """ln(sigma / alpha) / 4, as the teacher sees it, within what a network can be told."""
        return jnp.log(jnp.clip(t / (1 - t), 1e-3, 1e3)) / 4

    meaning = parameterization.edm(SIGMA_DATA, log_ratio)

    def data():
        if first:
            source = digits("train")
        elif smoke:
            source = pairs_by(lambda noise, cond: np.tanh(noise), num_pairs, seed)
        else:
            source = pairs_of(teacher, num_pairs, pair_steps, seed)
        return batches(source, batch_size=batch_size, seed=seed)

    if first:
        method = rectified_flow(
            as_network(unet),
            init_params=lambda key, batch: jax.tree.map(jnp.array, teacher_params),
            parameterization=meaning,
            num_steps=50,
        )
    else:
        method = reflow(
            as_network(unet),
            teacher_params=teacher_params,
            parameterization=meaning,
            time_sampler=noise_end() if distil else None,
            num_steps=1,
        )
    rate = optax.warmup_cosine_decay_schedule(0.0, lr, min(100, num_steps // 4 + 1), max(num_steps, 2), lr / 20)
    return Experiment(
        name="digits_rectified_flow",
        method=method,
        networks={"model": unet},
        data=data,
        optimizers={"model": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))},
        ema=(ema.warmup("ema", ema_decay),),
        partition=partition.UNET,
        sample_shape=(8, 8, 1),
        conditioning={} if first else {"noise": jax.ShapeDtypeStruct((8, 8, 1), jnp.float32)},
        num_classes=10,
        batch_size=batch_size,
        num_steps=num_steps,
        seed=seed,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        sample_every=sample_every,
        evaluation=Evaluation(
            name="digits held-out",
            extractor=digits_extractor,
            held_out=lambda: digits("held_out"),
            train=lambda: digits("train"),
            num=40 if smoke else 1536,
        ),
    )

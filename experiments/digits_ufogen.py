"""UFOGen from the digits teacher: one step by an adversary that compares noised images, in minutes of one core.

Paper: Xu et al. 2023 (arXiv:2311.09257), on the teacher's noise levels instead of a chain's. The levels that are
compared must suit images this small: at those of a cosine chain's quarters the discriminator sees nothing. Weights,
learning rates and R1 are ours; the discriminator is the teacher's way down and middle with small heads.
Command: jaxdiff train experiments/digits_ufogen.py --workdir runs/ladder/ufogen-0 (needs digits_edm.py's run first)
Expected: in one step 1.06 times the teacher's Frechet distance at 50 calls (docs/ladder.md).
"""

import jax
import jax.numpy as jnp
import optax

from jaxdiff import parameterization, runs, schedules
from jaxdiff.data.images import digits
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.ufogen import at_t, pair_jumps, signal_share, ufogen
from jaxdiff.metrics.digits import digits_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import UNet, example_inputs, unet_plan
from jaxdiff.networks.unet_discriminator import FeatureDiscriminator, on_backbone
from jaxdiff.training import alarms, ema
from jaxdiff.training.experiment import Experiment

SIGMA_DATA = 0.752


def build(
    *,
    teacher: str = "runs/ladder/teacher",
    levels: tuple[float, ...] = (0.1, 0.3, 0.7),
    starts: tuple[float, ...] = (0.3, 0.7, 2.4),
    sigma_max: float = 20.0,
    last_share: float = 0.6,
    reconstruction_weight: float = 4.0,
    r1_weight: float = 0.02,
    r1_sigma: float = 0.05,
    posterior: bool = False,
    chain: bool = False,
    from_scratch: bool = False,
    num_steps: int = 1000,
    batch_size: int = 64,
    lr: float = 2e-4,
    disc_lr: float = 4e-4,
    width: int = 16,
    ema_decay: float = 0.995,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 500,
    sample_every: int = 500,
    smoke: bool = False,
) -> Experiment:
    """Settings: levels are the sigmas that samples are compared at. From pure noise, sigma_max, which last_share of the
    examples start at, all of them are; from each of starts the one below it. reconstruction_weight 0 leaves the
    adversary alone; r1_weight 0 leaves R1 out, r1_sigma 0 takes it itself, with second derivatives; posterior,
    from_scratch, and chain, which compares neighbours of all these levels only, are three ways to fail.
    """
    if smoke:
        num_steps, batch_size, width, checkpoint_every, sample_every = 4, 8, 8, 2, 4
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
    taps = (*(step.name for step in unet_plan(unet).down), "mid")
    discriminator = FeatureDiscriminator(unet, taps)
    random = init_params(unet, jax.random.key(seed), *example_inputs(unet))
    teacher_params = random if smoke or from_scratch else runs.teacher_params(teacher)

    pairs = [(sigma_max, s) for s in levels] + [(t, max(s for s in levels if s < t)) for t in starts]
    if chain:
        known = sorted({*levels, *starts, sigma_max}, reverse=True)
        pairs = list(zip(known, known[1:], strict=False))
    from_noise = sum(t == sigma_max for t, _ in pairs)
    others = len(pairs) - from_noise
    shares = [last_share / from_noise] * from_noise + [(1 - last_share) / others] * others
    method = ufogen(
        as_network(unet),
        as_network(discriminator),
        schedules.ve(0.002, sigma_max),
        parameterization=parameterization.edm(SIGMA_DATA),
        init_params=lambda key, batch: jax.tree.map(jnp.array, teacher_params),
        init_discriminator=on_backbone(discriminator, teacher_params, *example_inputs(unet)),
        jumps=pair_jumps(pairs, shares),
        reconstruction_weight=reconstruction_weight,
        gamma=at_t(signal_share),
        r1_weight=r1_weight,
        r1_sigma=r1_sigma or None,
        posterior=posterior,
    )
    return Experiment(
        name="digits_ufogen",
        method=method,
        networks={"model": unet, "disc": discriminator},
        data=lambda: batches(digits("train"), batch_size=batch_size, seed=seed),
        optimizers={"disc": optax.adam(disc_lr, b1=0.0, b2=0.99), "model": optax.adam(lr, b1=0.0, b2=0.99)},
        ema=(ema.warmup("ema", ema_decay, players=("model",)),),
        partition=partition.UNET,
        sample_shape=(8, 8, 1),
        num_classes=10,
        batch_size=batch_size,
        num_steps=num_steps,
        seed=seed,
        alarms=alarms.collapse(),
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

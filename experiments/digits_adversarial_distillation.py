"""Adversarial distillation of the digits teacher: heads on its frozen features judge a one-step student.

Papers: Sauer et al. 2023 (arXiv:2311.17042) for the distillation, Sauer et al. 2024 (arXiv:2403.12015) for judging by
the teacher's own features of noised images. Levels, learning rates and the share of noise are ours: images are small.
The heads are APT's, which see neither the label nor the noise level, where the papers' do.
Command: jaxdiff train experiments/digits_adversarial_distillation.py --workdir runs/ladder/add-0
             (needs digits_edm.py's run first)
Expected: in one step 12.5 times the teacher's Frechet distance at 50 calls, seed 0: the heads stay at chance and the
distillation makes means. With levels=20.0,0.7, distillation_weight=0.1, disc_lr=1e-3 and 1200 steps 9.5 times; not
tuned.
"""

import jax
import optax

from jaxdiff import parameterization, runs, schedules
from jaxdiff.data.images import digits
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.adversarial_distillation import adversarial_distillation, logit_normal_share
from jaxdiff.metrics.digits import digits_extractor
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, init_params, param_shapes
from jaxdiff.networks.unet import UNet, example_inputs, unet_plan
from jaxdiff.networks.unet_discriminator import FeatureHeads
from jaxdiff.training import alarms, ema
from jaxdiff.training.experiment import Experiment

SIGMA_DATA = 0.752


def build(
    *,
    teacher: str = "runs/ladder/teacher",
    levels: tuple[float, ...] = (20.0, 2.0, 0.7, 0.3),
    distillation_weight: float = 2.5,
    judge_mean: float = -1.0,
    num_steps: int = 1500,
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
    """Settings: levels are the sigmas that the student is asked at; judge_mean is of the logit of sigma / (1 + sigma),
    at which data and predictions are compared.
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
    if smoke:
        teacher_params = init_params(unet, jax.random.key(0), *example_inputs(unet))
    else:
        teacher_params = runs.teacher_params(teacher)
    names, heads = (*(step.name for step in unet_plan(unet).down), "mid"), FeatureHeads()

    def features(params, x, t, cond):
        _, found = unet.apply({"params": params}, x, t, cond, return_features=True)
        return [found[name].reshape(x.shape[0], -1, found[name].shape[-1]) for name in names]

    shapes = jax.eval_shape(features, param_shapes(unet, *example_inputs(unet)), *example_inputs(unet))
    method = adversarial_distillation(
        as_network(unet),
        schedules.ve(0.002, levels[0]),
        parameterization=parameterization.edm(SIGMA_DATA),
        teacher_params=teacher_params,
        features=features,
        heads=lambda params, taps, t, cond: heads.apply({"params": params}, taps),
        init_heads=lambda key, batch: init_params(heads, key, shapes),
        levels=levels,
        judge_times=logit_normal_share(schedules.ve(0.002, levels[0]), judge_mean),
        distillation_weight=distillation_weight,
    )
    return Experiment(
        name="digits_adversarial_distillation",
        method=method,
        networks={"model": unet, "disc": heads},
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

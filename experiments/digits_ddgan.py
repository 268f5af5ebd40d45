"""A denoising diffusion GAN on the digits in four steps, started from the teacher or from scratch, on one core.

Paper: Xiao et al. 2022 (arXiv:2112.07804), which trains from random weights (`scratch`) with an NCSN++ generator. Here
the generator is the teacher's UNet with a latent, so that one core suffices.
Command: jaxdiff train experiments/digits_ddgan.py --workdir runs/ladder/ddgan-0 (needs digits_edm.py's run first)
Expected: at 4 calls within 1.5 times the teacher's Frechet distance at 50; not measured yet.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff import parameterization, process, runs, schedules
from jaxdiff.data.images import digits
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.ddgan import ddgan
from jaxdiff.metrics.digits import digits_extractor
from jaxdiff.networks import ddgan_discriminators, partition
from jaxdiff.networks.base import as_network, grown, init_params
from jaxdiff.networks.ddgan_discriminators import DDGANDiscriminator
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.training import alarms, ema
from jaxdiff.training.experiment import Experiment

SIGMA_DATA = 0.752


def build(
    *,
    teacher: str = "runs/ladder/teacher",
    scratch: bool = False,
    levels: tuple[float, ...] = (0.4, 1.0, 2.4, 20.0),
    latent_dim: int = 16,
    r1_gamma: float = 0.05,
    r1_sigma: float = 0.05,
    num_steps: int = 1500,
    batch_size: int = 64,
    lr: float = 2e-4,
    disc_lr: float = 4e-4,
    width: int = 16,
    disc_width: int = 8,
    ema_decay: float = 0.995,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 500,
    sample_every: int = 1000,
    smoke: bool = False,
) -> Experiment:
    """Settings: scratch True leaves the teacher out; levels are sigma / alpha of the T states; latent_dim 0 leaves out
    the latent, r1_gamma 0 R1; r1_sigma 0 takes R1 exactly, with second derivatives.
    """
    if smoke:
        num_steps, batch_size, width, disc_width, checkpoint_every, sample_every = 4, 8, 8, 2, 2, 4
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
        vector_dim=latent_dim or None,
    )
    disc = DDGANDiscriminator(
        in_channels=11,
        base_channels=disc_width,
        channel_mult=(2, 4, 4),
        halves=(False, False, False),  # a filter's second derivative compiles for minutes
        time_features=64,
    )
    start = None if scratch or smoke else runs.teacher_params(teacher)
    # The paper's states, `schedules.vp_betas(4)`, are so noisy that a discriminator sees nothing in images this small.
    alphas_cumprod = 1 / (1 + np.array([0.0, *levels]) ** 2)
    betas = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
    chain = schedules.discrete(betas)

    def net_time(t):
        return -process.half_log_snr(chain.level(t)) / 4  # the teacher's ln(sigma) / 4

    def init(key, batch):
        fresh = init_params(unet, key, *example_inputs(unet))
        if start is None:
            return fresh
        if latent_dim:
            fresh["vector_out"] = jax.tree.map(jnp.zeros_like, fresh["vector_out"])  # the teacher at first
        return grown(fresh, start)

    plain, judge = as_network(unet), as_network(disc)

    def generator(params, x_t, t, cond, **training):
        latent = {"vector": cond["z"]} if latent_dim else {}
        return plain(params, x_t, t, {"label": cond["label"]} | latent, **training)

    def discriminator(params, x_t, t, cond, **training):
        """Sees the label as ten more channels of both images."""
        label = jax.nn.one_hot(cond["label"], 10, dtype=x_t.dtype)[:, None, None, :]
        label = jnp.broadcast_to(label, (*x_t.shape[:3], 10))
        judged, noisier = (jnp.concatenate([x, label], axis=-1) for x in (x_t, cond["x_t"]))
        return judge(params, judged, t, {"x_t": noisier}, **training)

    method = ddgan(
        generator,
        discriminator,
        init_params=init,
        init_disc_params=lambda key, batch: init_params(disc, key, *ddgan_discriminators.example_inputs(disc)),
        betas=betas,
        latent_dim=latent_dim or None,
        parameterization=parameterization.edm(SIGMA_DATA, net_time),
        r1_gamma=r1_gamma,
        r1_sigma=r1_sigma or None,
        r1_every=1,  # a lazy penalty saves no time on a CPU
    )

    def adam(lr):
        rate = optax.cosine_decay_schedule(lr, max(num_steps, 2), 0.05)
        return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate, b1=0.5, b2=0.9))

    return Experiment(
        name="digits_ddgan",
        method=method,
        networks={"model": unet, "disc": disc},
        data=lambda: batches(digits("train"), batch_size=batch_size, seed=seed),
        optimizers={"model": adam(lr), "disc": adam(disc_lr)},
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

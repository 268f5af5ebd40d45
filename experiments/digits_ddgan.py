"""A denoising diffusion GAN on the digits in four steps, started from the teacher or from scratch, on one core.

Paper: Xiao et al. 2022 (arXiv:2112.07804), which trains both networks from random weights (`scratch`). Here the
generator is the teacher's UNet with a latent, and the discriminator the same network, to which x_t is one more channel
that starts unseen, so that minutes of one core suffice. It judges pixel by pixel: what tells a mean from an image this
small is in its details.
Command: jaxdiff train experiments/digits_ddgan.py --workdir runs/ladder/ddgan-0 (needs digits_edm.py's run first)
Expected: at 4 calls 1.30 times the teacher's Frechet distance at 50, 1.22 to 1.56 on 3 seeds (docs/ladder.md).
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
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, grown, init_params
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.networks.unet_discriminator import UNetDiscriminator, as_judge, from_backbone
from jaxdiff.training import alarms, ema
from jaxdiff.training.experiment import Experiment
from jaxdiff.types import expand

SIGMA_DATA, CLEAN = 0.752, 0.1


def build(
    *,
    teacher: str = "runs/ladder/teacher",
    scratch: bool = False,
    levels: tuple[float, ...] = (0.4, 1.0, 2.4, 20.0),
    latent_dim: int = 16,
    r1_gamma: float = 1e-4,
    r1_sigma: float = 0.05,
    num_steps: int = 1000,
    batch_size: int = 64,
    lr: float = 2e-4,
    disc_lr: float = 4e-4,
    width: int = 16,
    ema_decay: float = 0.995,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 500,
    sample_every: int = 1000,
    smoke: bool = False,
) -> Experiment:
    """Settings: scratch True leaves the teacher out; levels are sigma / alpha of the T states; latent_dim 0 leaves out
    the latent, r1_gamma 0 R1; r1_sigma 0 takes R1 itself, with second derivatives for each of the 64 logits.
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
        vector_dim=latent_dim or None,
    )
    pair = unet.clone(in_channels=2, vector_dim=None)
    disc = UNetDiscriminator(pair)
    start = None if scratch or smoke else runs.teacher_params(teacher)
    # The paper's states, `schedules.vp_betas(4)`, are so noisy that a discriminator sees nothing in images this small.
    alphas_cumprod = 1 / (1 + np.array([0.0, *levels]) ** 2)
    betas = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
    chain = schedules.discrete(betas)

    def net_time(t):
        return -process.half_log_snr(chain.level(t)) / 4  # the teacher's ln(sigma) / 4

    meaning = parameterization.edm(SIGMA_DATA, net_time)

    def init(key, batch):
        fresh = init_params(unet, key, *example_inputs(unet))
        if start is None:
            return fresh
        if latent_dim:
            fresh["vector_out"] = jax.tree.map(jnp.zeros_like, fresh["vector_out"])  # the teacher at first
        return grown(fresh, start)

    def init_disc(key, batch):
        fresh = init_params(disc, key, *example_inputs(pair))
        if start is None:
            return fresh
        kernel = jnp.asarray(start["conv_in"]["kernel"])
        seen = start["conv_in"] | {"kernel": jnp.concatenate([kernel, jnp.zeros_like(kernel)], axis=2)}
        return from_backbone(fresh, jax.tree.map(jnp.array, start | {"conv_in": seen}))

    plain, judge = as_network(unet), as_judge(disc)

    def generator(params, x_t, t, cond, **training):
        latent = {"vector": cond["z"]} if latent_dim else {}
        return plain(params, x_t, t, {"label": cond["label"]} | latent, **training)

    def discriminator(params, x_s, t, cond, **training):
        """Sees x_s as the teacher would at its own level, clean data as at the level CLEAN, and x_t beside it."""
        level, clean = chain.level(jnp.maximum(t - 1, 0)), t < 1
        ratio = jnp.where(clean, CLEAN, level.sigma / level.alpha)
        alpha = jnp.where(clean, jnp.ones_like(level.alpha), level.alpha)
        scale = 1 / (alpha * jnp.sqrt(SIGMA_DATA**2 + ratio**2))
        noisier = expand(meaning.coefficients(chain.level(t)).scale_in, x_s) * cond["x_t"]
        both = jnp.concatenate([expand(scale, x_s) * x_s, noisier], axis=-1)
        found = judge(params, both, jnp.log(ratio) / 4, {"label": cond["label"]}, **training)
        return found.sample[:, None, None] + found.pixel

    method = ddgan(
        generator,
        discriminator,
        init_params=init,
        init_disc_params=init_disc,
        betas=betas,
        latent_dim=latent_dim or None,
        parameterization=meaning,
        r1_gamma=r1_gamma,
        r1_sigma=r1_sigma or None,
        r1_every=1,  # a lazy penalty saves no time on a CPU
    )

    return Experiment(
        name="digits_ddgan",
        method=method,
        networks={"model": unet, "disc": disc},
        data=lambda: batches(digits("train"), batch_size=batch_size, seed=seed),
        optimizers={"model": optax.adam(lr, b1=0.0, b2=0.99), "disc": optax.adam(disc_lr, b1=0.0, b2=0.99)},
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

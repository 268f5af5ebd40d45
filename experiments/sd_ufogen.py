"""UFOGen from Stable Diffusion 1.5: text to image in one step.

Paper: Xu et al. 2023 (arXiv:2311.09257): on COCO 2017 with 5000 images of 512 pixels FID 22.5 and CLIP score 0.311 in
one step, 22.1 and 0.307 in four (not verified). Of its settings we know the jump of 250 indices, second-hand. Batch,
learning rates, steps, the weight of the reconstruction, last_share and last_time are ours: at index 999 an error of
eps would be multiplied by 15, so the generator asks the network at index 930 at most.
Latents (times 0.18215) and text embeddings are computed before, by the autoencoder and the text encoder.
Command: jaxdiff import diffusers-unet path/to/unet weights/sd15
then:    jaxdiff train experiments/sd_ufogen.py --workdir runs/sd_ufogen
Reached: not run at scale yet.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff import one_step, parameterization, runs, schedules
from jaxdiff.data.latents import Latents, RandomLatents
from jaxdiff.data.pipeline import batches
from jaxdiff.methods.ufogen import chain_jumps, ufogen
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import example_inputs
from jaxdiff.networks.unet_discriminator import UNetDiscriminator, on_backbone
from jaxdiff.networks.unet_presets import stable_diffusion_unet
from jaxdiff.training import alarms, ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "data/sd_latents",
    teacher: str = "weights/sd15",
    jump: int = 250,
    last_share: float = 0.25,
    last_time: float = 930.0,
    reconstruction_weight: float = 1.0,
    num_steps: int = 50_000,
    batch_size: int = 256,
    lr: float = 1e-5,
    disc_lr: float = 1e-5,
    ema_decay: float = 0.999,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 1000,
    sample_every: int = 1000,
    smoke: bool = False,
) -> Experiment:
    """Settings: data is a folder, see `data.latents`; jump is t - s; last_share of the examples are pure noise."""
    unet = stable_diffusion_unet(1).clone(dtype=jnp.bfloat16 if bf16 else jnp.float32)
    if smoke:
        num_steps, batch_size, checkpoint_every, sample_every = 4, 4, 2, 4
        unet = unet.clone(
            base_channels=32, channel_mult=(1,), num_res_blocks=1, attention_factors=(1,), num_heads=1, context_dim=8
        )
    discriminator = UNetDiscriminator(unet)
    source = RandomLatents() if smoke else Latents(data)
    old = init_params(unet, jax.random.key(0), *example_inputs(unet)) if smoke else runs.teacher_params(teacher)
    betas = schedules.scaled_linear_betas(1000)
    trained, to_noise = schedules.discrete(betas), schedules.discrete(schedules.zero_terminal_snr(betas))
    output = parameterization.eps()
    generator = one_step.from_diffusion(as_network(unet), trained, output, onto=to_noise, last_time=last_time)

    method = ufogen(
        generator.network,
        generator.judge(as_network(discriminator)),
        generator.schedule,
        parameterization=generator.parameterization,
        init_params=lambda key, batch: jax.tree.map(jnp.array, old),
        init_discriminator=on_backbone(discriminator, old, *example_inputs(unet)),
        jumps=chain_jumps(len(betas), jump, last_share),
        reconstruction_weight=reconstruction_weight,
    )
    shown = np.stack([source[i]["context"] for i in range(min(16, len(source)))])

    def generate(params, aux, key, noise, cond, sampling):
        """Takes the texts of the first examples in turn where none are given."""
        cond = cond or {"context": jnp.asarray(shown)[np.arange(noise.shape[0]) % len(shown)]}
        return method.generate(params, aux, key, noise, cond, sampling)

    first = source[0]
    clipped = optax.clip_by_global_norm(1.0)
    return Experiment(
        name="sd_ufogen",
        method=method._replace(generate=generate),
        networks={"model": unet, "disc": discriminator},
        data=lambda: batches(source, batch_size=batch_size, seed=seed, prefetch=4),
        optimizers={
            "disc": optax.chain(clipped, optax.adamw(disc_lr, b1=0.0, weight_decay=0.0)),
            "model": optax.chain(clipped, optax.adamw(lr, weight_decay=0.0)),
        },
        ema=(ema.constant("ema", ema_decay, players=("model",)),),
        partition=partition.UNET,
        sample_shape=first["x0"].shape,
        conditioning={"context": jax.ShapeDtypeStruct(first["context"].shape, jnp.float32)},
        batch_size=batch_size,
        accumulate=accumulate,
        num_steps=num_steps,
        seed=seed,
        alarms=alarms.collapse(),
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        sample_every=sample_every,
    )

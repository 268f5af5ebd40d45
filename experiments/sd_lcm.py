"""Latent consistency models from Stable Diffusion 1.5, or LCM-LoRA: low-rank additions to it in their place.

Paper: Luo et al. 2023 (arXiv:2310.04378): FID 35.36, 13.31, 11.10 and 11.84 in one, two, four and eight steps on
LAION-Aesthetics at 512 pixels and w = 8 (not verified); 32 A100-hours. Batch, learning rate, steps, range of w and
target_ema are the paper's, not verified; the release has AdamW at 1e-6, w from 5 to 15 and target_ema 0.95.
LCM-LoRA, Luo et al. 2023 (arXiv:2311.05556): rank 64, 67.5 M parameters; its learning rate is an assumption.
Latents (times 0.18215) and text embeddings are computed before, by the autoencoder and the text encoder.
Command: jaxdiff import diffusers-unet path/to/unet weights/sd15
then:    jaxdiff train experiments/sd_lcm.py --workdir runs/sd_lcm
or:      jaxdiff train experiments/sd_lcm.py --workdir runs/sd_lcm_lora --set lora_rank=64 --set lr=1e-4
Reached: not run at scale yet.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff import runs, schedules
from jaxdiff.data.latents import Latents, RandomLatents
from jaxdiff.data.pipeline import batches
from jaxdiff.methods.lcm import lcm
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, grown, init_params
from jaxdiff.networks.lora import EVERY_BLOCK, adapt, init_lora
from jaxdiff.networks.unet import example_inputs
from jaxdiff.networks.unet_presets import stable_diffusion_unet
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "data/sd_latents",
    teacher: str = "weights/sd15",
    lora_rank: int = 0,
    min_guidance: float = 2.0,
    max_guidance: float = 14.0,
    target_ema: float = 0.999943,
    num_steps: int = 100_000,
    batch_size: int = 72,
    lr: float = 8e-6,
    ema_decay: float = 0.9999,
    bf16: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 1000,
    sample_every: int = 1000,
    smoke: bool = False,
) -> Experiment:
    """Settings: data is a folder, see `data.latents`; lora_rank 0 trains all parameters, with w as an input. w goes
    from min_guidance to max_guidance; target_ema is the decay of the target, which LoRA does without.
    """
    unet = stable_diffusion_unet(1).clone(dtype=jnp.bfloat16 if bf16 else jnp.float32)
    if smoke:
        num_steps, batch_size, checkpoint_every, sample_every = 4, 4, 2, 4
        unet = unet.clone(
            base_channels=32, channel_mult=(1,), num_res_blocks=1, attention_factors=(1,), num_heads=1, context_dim=8
        )
    source = RandomLatents() if smoke else Latents(data, guided=True)
    old = init_params(unet, jax.random.key(0), *example_inputs(unet)) if smoke else runs.teacher_params(teacher)
    guided = unet if lora_rank else unet.clone(guidance_dim=256)

    def start(key, batch):
        if lora_rank:
            return init_lora(key, old, lora_rank, targets=EVERY_BLOCK)
        return grown(init_params(guided, key, *example_inputs(guided)), old)

    def null_cond(cond):
        null = jnp.asarray(source.null_context, jnp.float32)[None]
        return cond | {"context": jnp.broadcast_to(null, cond["context"].shape)}

    method = lcm(
        as_network(guided),
        schedules.scaled_linear_betas(1000),
        teacher=as_network(unet),
        teacher_params=old,
        init_params=start,
        null_cond=null_cond,
        guidance_range=(min_guidance, max_guidance),
        guidance_input=not lora_rank,
        adapt=adapt if lora_rank else None,
        target_decay=None if lora_rank else target_ema,
    )
    shown = np.stack([source[i]["context"] for i in range(min(16, len(source)))])

    def generate(params, aux, key, noise, cond, sampling):
        """Takes the texts of the first examples in turn where none are given."""
        cond = cond or {"context": jnp.asarray(shown)[np.arange(noise.shape[0]) % len(shown)]}
        return method.generate(params, aux, key, noise, cond, sampling)

    first = source[0]
    return Experiment(
        name="sd_lcm",
        method=method._replace(generate=generate),
        networks={} if lora_rank else {"model": guided},
        data=lambda: batches(source, batch_size=batch_size, seed=seed, prefetch=4),
        optimizers={"model": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lr, weight_decay=0.0))},
        ema=(ema.constant("ema", ema_decay),),
        partition=() if lora_rank else partition.UNET,
        sample_shape=first["x0"].shape,
        conditioning={"context": jax.ShapeDtypeStruct(first["context"].shape, jnp.float32)},
        batch_size=batch_size,
        accumulate=accumulate,
        num_steps=num_steps,
        seed=seed,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        sample_every=sample_every,
    )

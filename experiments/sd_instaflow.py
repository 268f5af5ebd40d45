"""InstaFlow from Stable Diffusion 1.5: reflow under texts, then a distillation into one step, first L2, then LPIPS.

Paper: Liu et al. 2023 (arXiv:2309.06380): FID 23.4 on 5000 captions of COCO 2017 in one step of 0.9 B parameters, 199
A100-days in all. Published, though we know it second-hand: AdamW at 1e-6, EMA 0.9999, gradients clipped to norm 1,
1000 steps of warm-up, bfloat16; batch 64 for 70k steps, then 1024 for 25k (reflow), 21.5k (L2) and 18k (LPIPS); 1.6 M
pairs a flow. Ours: weight decay 1e-2 and dropping one text in ten. Their LPIPS is of AlexNet, ours of VGG16. The
network of 1.7 B parameters, two UNets in a row, is not here.
Pairs are a folder of `data.pairs`: noise, latents (times 0.18215) and the text's context, with null_context.npy beside
them; `scripts/sd_pairs.py` makes them of encoded captions. For the reflow the teacher does, in 25 steps of DPM-Solver
at guidance 5; for the distillations the second flow, in 25 steps of Euler at guidance 1.5. The output's meaning
changes from noise to velocity, so samples of the reflow's first thousand steps look broken.
Command: jaxdiff import diffusers-unet path/to/unet weights/sd15
then:    python scripts/sd_pairs.py weights/sd15 --captions data/captions --num 1_600_000 --out data/sd_pairs
then:    jaxdiff train experiments/sd_instaflow.py --workdir runs/sd_flow2_start
             --set batch_size=64 --set num_steps=70_000
then:    jaxdiff train experiments/sd_instaflow.py --workdir runs/sd_flow2 --set teacher=runs/sd_flow2_start
then:    python scripts/sd_pairs.py runs/sd_flow2 --captions data/captions --num 1_600_000 --out data/sd_flow2_pairs
then:    jaxdiff train experiments/sd_instaflow.py --workdir runs/sd_instaflow_l2 --set distil=True
             --set teacher=runs/sd_flow2 --set data=data/sd_flow2_pairs --set num_steps=21_500
then:    jaxdiff import diffusers-autoencoder path/to/vae weights/sd15_vae
then:    jaxdiff import lpips vgg16-397923af.pth vgg.pth weights/lpips
then:    jaxdiff train experiments/sd_instaflow.py --workdir runs/sd_instaflow --set distil=True
             --set teacher=runs/sd_instaflow_l2 --set data=data/sd_flow2_pairs --set num_steps=18_000
             --set lpips=weights/lpips --set autoencoder=weights/sd15_vae
Reached: not run at scale yet.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff import losses, runs
from jaxdiff.data.pairs import PairSource, make_pairs, stored_pairs
from jaxdiff.data.pipeline import batches
from jaxdiff.methods.rectified_flow import noise_end, reflow, velocity
from jaxdiff.networks import partition
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import example_inputs
from jaxdiff.networks.unet_presets import stable_diffusion_unet
from jaxdiff.parameterization import scaled_time
from jaxdiff.pretrained import folders
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment

LATENT_SCALE = 0.18215


def open_pairs(folder: str) -> tuple[PairSource, np.ndarray]:
    """The pairs of a folder, and the context [tokens, width] of the empty text."""
    source, path = stored_pairs(folder), Path(folder) / "null_context.npy"
    if not path.is_file() or "context" not in source[0]:
        raise ValueError(
            f"{folder}: expected context-00000.npy, ... and null_context.npy, the empty text's; make them with "
            "scripts/sd_pairs.py"
        )
    return source, np.load(path, allow_pickle=False).astype(np.float32)


def random_pairs() -> tuple[PairSource, np.ndarray]:
    """Noise in the form of `open_pairs`, for smoke mode."""

    def context(rng, n):
        return {"context": rng.standard_normal((n, 2, 8), np.float32)}

    chunks = make_pairs(
        lambda noise, cond: np.tanh(noise), shape=(8, 8, 4), num=16, batch_size=16, seed=0, cond=context
    )
    return PairSource(list(chunks)), np.zeros((2, 8), np.float32)


def decoded_distance(lpips: str, autoencoder: str) -> losses.Distance:
    """LPIPS of the images that two latents stand for."""
    _, lpips_spec, lpips_params = folders.load(lpips)
    _, decoder_spec, decoder_params = folders.load(autoencoder)

    def decode(latents):
        images = decoder_spec.network.apply({"params": decoder_params}, latents / LATENT_SCALE, method="decode")
        return jnp.clip(images, -1, 1)

    def distance(prediction, target):
        return lpips_spec.network.apply({"params": lpips_params}, decode(prediction), decode(target))

    return distance


def build(
    *,
    data: str = "data/sd_pairs",
    teacher: str = "weights/sd15",
    distil: bool = False,
    lpips: str | None = None,
    autoencoder: str = "weights/sd15_vae",
    context_dropout: float = 0.1,
    num_steps: int = 25_000,
    batch_size: int = 1024,
    lr: float = 1e-6,
    ema_decay: float = 0.9999,
    bf16: bool = True,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 100,
    checkpoint_every: int = 1000,
    sample_every: int = 1000,
    smoke: bool = False,
) -> Experiment:
    """Settings: distil False is the reflow, in which context_dropout is the share of empty texts; distil learns one
    step, where lpips none compares latents, else what autoencoder decodes of them.
    """
    if lpips is not None and not distil:
        raise ValueError(f"lpips {lpips} is a distance of images, for one step; add --set distil=True or leave it out")
    unet = stable_diffusion_unet(1).clone(dtype=jnp.bfloat16 if bf16 else jnp.float32)
    if smoke:
        num_steps, batch_size, checkpoint_every, sample_every = 4, 4, 2, 4
        unet = unet.clone(
            base_channels=32, channel_mult=(1,), num_res_blocks=1, attention_factors=(1,), num_heads=1, context_dim=8
        )
    source, null_context = random_pairs() if smoke else open_pairs(data)
    old = init_params(unet, jax.random.key(0), *example_inputs(unet)) if smoke else runs.teacher_params(teacher)

    def null_cond(cond):
        return cond | {"context": jnp.broadcast_to(jnp.asarray(null_context)[None], cond["context"].shape)}

    method = reflow(
        as_network(unet),
        teacher_params=old,
        parameterization=velocity(scaled_time(1000.0)),
        time_sampler=noise_end(0.0) if distil else None,
        distance=losses.mse if lpips is None else decoded_distance(lpips, autoencoder),
        null_cond=null_cond,
        cond_dropout=0.0 if distil else context_dropout,
        start=0.0,
        num_steps=1 if distil else 25,
    )
    shown = np.stack([source[i]["context"] for i in range(min(16, len(source)))])

    def generate(params, aux, key, noise, cond, sampling):
        """Takes the texts of the first examples in turn where none are given."""
        cond = cond or {"context": jnp.asarray(shown)[np.arange(noise.shape[0]) % len(shown)]}
        return method.generate(params, aux, key, noise, cond, sampling)

    one = source[0]
    return Experiment(
        name="sd_instaflow",
        method=method._replace(generate=generate),
        networks={"model": unet},
        data=lambda: batches(source, batch_size=batch_size, seed=seed, prefetch=4),
        optimizers={
            "model": optax.chain(
                optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.0, lr, 1000), weight_decay=1e-2)
            )
        },
        ema=(ema.constant("ema", ema_decay),),
        partition=partition.UNET,
        sample_shape=one["x0"].shape,
        conditioning={name: jax.ShapeDtypeStruct(one[name].shape, jnp.float32) for name in ("noise", "context")},
        batch_size=batch_size,
        accumulate=accumulate,
        num_steps=num_steps,
        seed=seed,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        sample_every=sample_every,
    )

"""The consistency decoder on the digits: 2x2 means as latents, decoded to 8x8 pixels in two steps.

OpenAI published the decoder and not its training; this is diffusion, then consistency distillation, of a small one.
Command: jaxdiff train experiments/digits_consistency_decoder.py --workdir runs/decoder-first --set first=True
then:    jaxdiff train experiments/digits_consistency_decoder.py --workdir runs/decoder --set teacher=runs/decoder-first
Expected: pictures in `samples/` are digits like the held-out ones whose latents they decode; no number is claimed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff import runs
from jaxdiff.data.images import digits
from jaxdiff.data.pipeline import batches
from jaxdiff.methods.consistency_decoder import consistency_decoder, diffusion_decoder
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.consistency_decoder import ConsistencyDecoder, example_inputs
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment

SIGMA_DATA = 0.752


def latents(x0):
    """Means of 2x2 pixels [B, 4, 4, 1] of images [B, 8, 8, 1]."""
    return x0.reshape(-1, 4, 2, 4, 2, 1).mean((2, 4))


class WithLatents:
    """A batch source that adds the latents of its images and drops their labels."""

    def __init__(self, source):
        self.source = source

    def __next__(self):
        x0 = next(self.source)["x0"]
        return {"x0": x0, "latent": latents(x0)}

    def get_state(self):
        """Of the source."""
        return self.source.get_state()

    def set_state(self, state):
        """Of the source."""
        self.source.set_state(state)


def build(
    *,
    teacher: str = "runs/decoder-first",
    first: bool = False,
    num_steps: int = 2000,
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
    """Settings: first True trains the diffusion decoder, which the second run distils; teacher is the first run."""
    if smoke:
        num_steps, batch_size, width, checkpoint_every, sample_every = 4, 8, 8, 2, 4
    decoder = ConsistencyDecoder(
        in_channels=1,
        out_channels=2,
        base_channels=width,
        channel_mult=(1, 2),
        concat_channels=1,
        norm_groups=8,
        emb_channels=4 * width,
        upscale=2,
    )

    def start(key, batch):
        return init_params(decoder, key, *example_inputs(decoder))

    if first:
        method = diffusion_decoder(as_network(decoder), init_params=start, sigma_data=SIGMA_DATA)
    else:
        teacher_params = start(jax.random.key(0), {}) if smoke else runs.teacher_params(teacher)
        method = consistency_decoder(as_network(decoder), teacher_params=teacher_params, sigma_data=SIGMA_DATA)
    shown = latents(digits("held_out").x0)

    def generate(params, aux, key, noise, cond, sampling):
        """Decodes the held-out latents in turn where none are given."""
        cond = cond or {"latent": jnp.asarray(shown)[np.arange(noise.shape[0]) % len(shown)]}
        return method.generate(params, aux, key, noise, cond, sampling)

    return Experiment(
        name="digits_consistency_decoder",
        method=method._replace(generate=generate),
        networks={"model": decoder},
        data=lambda: WithLatents(batches(digits("train"), batch_size=batch_size, seed=seed)),
        optimizers={"model": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lr))},
        ema=(ema.warmup("ema", ema_decay),),
        sample_shape=(8, 8, 1),
        conditioning={"latent": jax.ShapeDtypeStruct((4, 4, 1), jnp.float32)},
        batch_size=batch_size,
        num_steps=num_steps,
        seed=seed,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        sample_every=sample_every,
    )

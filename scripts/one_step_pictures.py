"""One-step image to image and one-step control, on digits: the picture and the numbers of docs/editing.md.

`python scripts/one_step_pictures.py runs/ladder/ufogen-0` noises held-out digits and calls the generator once with
another class, at several strengths; then trains a ControlNet on the diffusion model that the generator came from (the
run in --teacher) to follow a coarse hint, and adds it, as it is, to the one-step generator. Takes two minutes.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff import one_step, parameterization, pictures, runs, schedules
from jaxdiff.data.images import digits
from jaxdiff.data.pipeline import batches
from jaxdiff.methods.edm import edm
from jaxdiff.metrics.digits import digits_extractor
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.controlnet import controlled_network, controlnet_for, copy_encoder
from jaxdiff.networks.controlnet import example_inputs as control_inputs
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step
from jaxdiff.types import Params

ROOT = Path(__file__).resolve().parents[1]
SIGMA_DATA, SIGMA_MAX = 0.752, 20.0
STRENGTHS = (0.2, 0.35, 0.5, 0.7)
SHOWN = 10


def hint_of(x0: jax.Array) -> jax.Array:
    """Where ink is, in patches of 2 x 2: [B, 8, 8, 1] in {0, 1}."""
    means = x0.reshape(-1, 4, 2, 4, 2, 1).mean(axis=(2, 4))
    return jnp.repeat(jnp.repeat((means > 0).astype(x0.dtype), 2, axis=1), 2, axis=2)


def hinted(batch_size: int) -> Iterator[dict[str, Any]]:
    """Batches of digits with their hints."""
    source = batches(digits("train"), batch_size=batch_size, seed=0)
    while True:
        batch = next(source)
        yield {**batch, "hint": np.asarray(hint_of(jnp.asarray(batch["x0"])))}


def train_control(unet: Any, params: Params, num_steps: int) -> Params:
    """Parameters of a ControlNet for a frozen diffusion model."""
    control = controlnet_for(unet, hint_channels=1, hint_widths=(16,))
    both = controlled_network(unet, control)

    def network(own, x_t, t, cond, **training):
        return both({"unet": params, "controlnet": own}, x_t, t, cond, **training)

    def start(key, batch):
        return copy_encoder(init_params(control, key, *control_inputs(control)), params)

    method, source = edm(network, init_params=start, sigma_data=SIGMA_DATA, log_mean=0.5, log_std=1.5), hinted(64)
    optimizers = {"model": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))}
    state = create_state(method, optimizers, (), jax.random.key(0), next(source))
    step = jax.jit(make_train_step(method, optimizers), donate_argnums=0)
    for _ in range(num_steps):
        state, _ = step(state, next(source))
    return state.params["model"]


def judged(images: jax.Array, labels: jax.Array, hint: jax.Array) -> str:
    """Agreement with the hint, and the classifier's accuracy."""
    agree = float((hint_of(images) == hint).mean())
    logits = digits_extractor().apply(images).logits
    accuracy = float((np.asarray(logits).argmax(-1) == np.asarray(labels)).mean())
    return f"{agree:.3f} of the hint kept, accuracy {accuracy:.3f}"


def main() -> int:
    """Trains the control, draws and prints."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("run", type=Path, help="a run of digits_ufogen.py")
    parser.add_argument("--teacher", type=Path, default=ROOT / "runs" / "ladder" / "teacher")
    parser.add_argument("--steps", type=int, default=1500, help="of the ControlNet's training")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "one_step_editing.png")
    args = parser.parse_args()
    unet = runs.open_run(args.run).networks["model"]
    student, teacher = runs.player_params(args.run), runs.teacher_params(args.teacher)
    schedule, meaning = schedules.ve(0.002, SIGMA_MAX), parameterization.edm(SIGMA_DATA)
    generator = one_step.from_diffusion(as_network(unet), schedule, meaning)
    source = digits("held_out")
    given = jnp.asarray(source.x0)
    classes = jnp.asarray(source.label)
    noise = jax.random.normal(jax.random.key(0), given.shape)

    rows, target = [given[:SHOWN]], (classes + 5) % 10
    for strength in STRENGTHS:
        denoise = generator.denoiser(student, {"label": target})
        edited = jax.jit(one_step.image_to_image, static_argnums=(0, 1))(denoise, schedule, given, strength, noise)
        rows.append(edited[:SHOWN])
        distance = float(jnp.sqrt(jnp.mean((edited - given) ** 2)))
        print(f"strength {strength}: {judged(edited, target, hint_of(given))}, {distance:.3f} from the picture")

    hint = hint_of(given)
    control = train_control(unet, teacher, args.steps)
    controlnet = controlnet_for(unet, hint_channels=1, hint_widths=(16,))
    steered = one_step.from_diffusion(controlled_network(unet, controlnet), schedule, meaning)
    free = one_step.from_noise(generator.denoiser(student, {"label": classes}), schedule, noise)
    follows = steered.denoiser({"unet": student, "controlnet": control}, {"label": classes, "hint": hint})
    controlled = one_step.from_noise(follows, schedule, noise)
    print(f"one step without control: {judged(free, classes, hint)}")
    print(f"one step with control: {judged(controlled, classes, hint)}")
    rows += [2 * hint[:SHOWN] - 1, controlled[:SHOWN], free[:SHOWN]]
    pictures.save_png(args.out, pictures.picture(np.asarray(jnp.concatenate(rows)), SHOWN))
    return 0


if __name__ == "__main__":
    sys.exit(main())

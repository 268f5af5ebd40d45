"""`jaxdiff edit`: zero-shot editing with a trained run, by any method that reaches good images in one or a few calls.

Inpainting, colourisation, super-resolution, strokes to images, denoising and interpolation, all through the method's
own `generate`: a solver that edits takes the place of one that samples. The rules are in `editing`; here are files,
their sizes and what can be wrong with them.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import editing, pictures, runs, times
from jaxdiff.denoiser import clip_x0
from jaxdiff.generate import labels_for
from jaxdiff.methods.base import Sampling
from jaxdiff.process import q_sample
from jaxdiff.settings import UsageError, hint
from jaxdiff.solvers.base import level_like, sample
from jaxdiff.solvers.stochastic_iterative import stochastic_iterative
from jaxdiff.training import sharding
from jaxdiff.types import Array

TASKS = ("inpaint", "colorize", "superres", "stroke", "denoise", "interpolate")


def edit(args: argparse.Namespace) -> int:
    """Edits one picture and writes it, what was known of it, and the results side by side."""
    if args.task not in TASKS:
        raise UsageError(f"unknown task {args.task!r}; {hint(args.task, TASKS)}")
    if args.out.suffix.lower() not in (".png", ".npz"):
        raise UsageError(f"--out {args.out} must end in .png or .npz; name a picture or arrays")
    experiment = runs.open_run(args.run_folder, args.experiment)
    shape = experiment.sample_shape
    if len(shape) != 3 or not pictures.drawable(shape):
        raise UsageError(f"{experiment.name} makes arrays of shape {list(shape)}, no pictures; nothing can be edited")
    labels = labels_for(args.num, experiment.num_classes, args.label)
    image = _image(args, shape)
    view = _view(args, shape, image)
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    params, aux, step, average = runs.weights_of(experiment, args.run_folder, args.ema, mesh)
    cond = {} if labels is None else {"label": jnp.asarray(labels)}
    noise = jax.random.normal(jax.random.key(args.seed), (args.num, *shape))

    def generate(make: Callable[[Any], Callable[[Any], Array]]) -> Array:
        """The method's samples, with `make(schedule)(denoise)` in the place of its sampler."""
        solver = editing.edit_solver(lambda schedule, denoise: make(schedule)(denoise))
        sampling = Sampling(num_steps=1, solver=solver)
        return experiment.method.generate(params, aux, jax.random.key(args.seed), noise, cond, sampling)

    # Methods that train on scaled data multiply their samples by a number, which ones show.
    scale = float(generate(lambda schedule: lambda denoise: jnp.ones((args.num, *shape))).mean())

    def rule(schedule: Any) -> Callable[[Any], Array]:
        def run(denoise: Any) -> Array:
            bounded = clip_x0(denoise, 1 / scale)
            grid = jnp.asarray(times.karras_times(schedule, args.steps), jnp.float32)
            key = jax.random.key(args.seed)
            if image is None:
                first, second = noise[:1], jax.random.normal(jax.random.key(args.seed + 1), (1, *shape))
                weights = jnp.linspace(0.0, 1.0, args.num)
                ends = jnp.broadcast_to(first, noise.shape), jnp.broadcast_to(second, noise.shape)
                start = level_like(schedule, jnp.full(args.num, grid[0]), noise)
                x = start.sigma[0] * editing.slerp(ends[0], ends[1], weights)
                return sample(stochastic_iterative(schedule), bounded, key, x, grid[:1])
            y = jnp.broadcast_to(jnp.asarray(image), noise.shape) / scale
            if view is not None:
                return editing.zero_shot(bounded, schedule, key, y, view, grid)
            t = schedule.time(-jnp.log(jnp.full(args.num, args.noise / scale)))
            level = level_like(schedule, t, y)
            if args.task == "denoise":
                return bounded(level.alpha[0] * y, t).x0
            rest = t[0] * (grid / grid[0]) if args.steps > 1 else t[:1]
            return sample(stochastic_iterative(schedule), bounded, key, q_sample(y, noise, level), rest)

        return run

    samples = np.asarray(jax.jit(lambda: generate(rule))())
    if view is not None:
        # Once more without the method's scaling, which would round.
        whole = jnp.broadcast_to(jnp.asarray(image), samples.shape)
        samples = np.asarray(editing.replace_known(view, whole, jnp.asarray(samples)))
    return _write(args, image, view, samples, f"{experiment.name}, step {step}, parameters {average}")


def _image(args: argparse.Namespace, shape: tuple[int, ...]) -> np.ndarray | None:
    """The picture [H, W, C] in [-1, 1], or None where none is needed."""
    if args.task == "interpolate":
        if args.image is not None:
            raise UsageError(
                "interpolate goes between two noises (--seed and the next) and takes no --image; leave it out"
            )
        return None
    if args.image is None:
        raise UsageError(f"{args.task} needs --image FILE")
    return _read(args.image, shape, args.resize).astype(np.float32) / 127.5 - 1


def _view(args: argparse.Namespace, shape: tuple[int, ...], image: np.ndarray | None) -> editing.View | None:
    """What of the picture is known."""
    if (args.mask is not None) != (args.task == "inpaint"):
        what = (
            "inpaint needs --mask FILE, white where the picture is redrawn"
            if args.mask is None
            else "--mask is for inpaint"
        )
        raise UsageError(f"{what}; {'add it' if args.mask is None else 'leave it out'}")
    if args.task == "inpaint":
        mask = _read(args.mask, (*shape[:2], 1), args.resize) < 128
        if mask.all() or not mask.any():
            raise UsageError(
                f"--mask {args.mask} is all {'black' if mask.all() else 'white'}: nothing to redraw or to keep"
            )
        return editing.region(jnp.broadcast_to(jnp.asarray(mask, jnp.float32), shape)[None])
    if args.task == "colorize":
        if shape[-1] != 3:
            raise UsageError(f"colorize needs a run that makes pictures in colour, this one has {shape[-1]} channel")
        return editing.grey_values()
    if args.task == "superres":
        if args.factor < 2 or shape[0] % args.factor or shape[1] % args.factor:
            raise UsageError(f"--factor {args.factor} must be at least 2 and divide {shape[0]} x {shape[1]}")
        return editing.patch_means(args.factor)
    if args.noise is None and args.task != "interpolate":
        raise UsageError(f"{args.task} needs --noise, the level sigma/alpha that it starts from, such as 0.5")
    return None


def _read(path: Path, shape: tuple[int, ...], resize: bool) -> np.ndarray:
    """uint8 [H, W, C] of a picture file."""
    from PIL import Image, UnidentifiedImageError

    height, width, channels = shape
    try:
        with Image.open(path) as opened:
            picture = opened.convert("L" if channels == 1 else "RGB")
    except FileNotFoundError:
        raise UsageError(f"{path} is not there; check the path") from None
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} is no picture that can be read ({error}); give a PNG or JPEG") from None
    if picture.size != (width, height):
        if not resize:
            raise UsageError(
                f"{path} is {picture.size[0]} x {picture.size[1]} pixels, the run makes {width} x {height}; "
                "scale it, or add --resize"
            )
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture, np.uint8).reshape(height, width, channels)


def _write(args: argparse.Namespace, image: Any, view: Any, samples: np.ndarray, what: str) -> int:
    strip = [samples]
    if image is not None:
        whole = jnp.asarray(image)[None]
        known = whole if view is None else editing.replace_known(view, whole, jnp.zeros_like(whole))
        strip = [np.asarray(whole), np.asarray(known), samples]
    if args.out.suffix.lower() == ".npz":
        pictures.save_samples(args.out, iter([samples]), None)
    else:
        pictures.save_png(args.out, pictures.picture(np.concatenate(strip), args.num + 2 * (image is not None)))
    sides = "" if image is None else "the picture, what was known of it, and "
    print(f"{sides}{len(samples)} results of {args.task} by {what} in {args.out}")
    return 0

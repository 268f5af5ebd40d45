"""Pairs for experiments/sd_instaflow.py: noise, and the latents that a network makes of it under encoded captions.

`python scripts/sd_pairs.py MODEL --captions DIR --out DIR` takes as MODEL an imported UNet of Stable Diffusion that
predicts eps (25 steps of DPM-Solver++ 2M at guidance 5) or a run of sd_instaflow.py (25 steps of Euler at guidance
1.5), whose own pairs must still be there. The captions are context.npy [n, tokens, width] and null_context.npy
[tokens, width], as in `data.latents`; they are taken in turn. Works on one device; what was cut short can be read.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxdiff import parameterization, runs, schedules, times
from jaxdiff.data.pairs import DTYPES, Chunk, check_folder, make_pairs, write_pairs
from jaxdiff.denoiser import denoiser
from jaxdiff.guidance import classifier_free
from jaxdiff.methods.rectified_flow import SCHEDULE, euler_times, flow_denoiser, velocity, velocity_of
from jaxdiff.networks.base import as_network
from jaxdiff.networks.unet import UNet
from jaxdiff.pretrained import folders
from jaxdiff.settings import first_line
from jaxdiff.solvers.base import Solver, sample
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.dpm_solver import dpm_solver
from jaxdiff.types import Array, Cond, Denoiser, Network, Params


class Model(NamedTuple):
    """How a network samples.

    Attributes:
      build: (params, cond) -> Denoiser.
      solver, grid: from noise to data.
      guidance_scale: where the command line names none.
    """

    build: Callable[[Params, Cond], Denoiser]
    solver: Solver
    grid: np.ndarray
    guidance_scale: float


def diffusion(network: Network, num_steps: int) -> Model:
    """Stable Diffusion 1, on the grid that diffusers gives DPM-Solver++."""
    schedule, output = schedules.discrete(schedules.scaled_linear_betas(1000)), parameterization.eps()

    def build(params, cond):
        return denoiser(network, params, schedule, output, cond)

    return Model(build, dpm_solver(schedule), times.linspace(1000, num_steps + 1)[:-1], 5.0)


def flow(network: Network, num_steps: int) -> Model:
    """A flow of sd_instaflow.py."""
    output = velocity(parameterization.scaled_time(1000.0))

    def build(params, cond):
        return flow_denoiser(velocity_of(network, params, output, cond), start=0.0)

    return Model(build, ddim(SCHEDULE), euler_times(num_steps), 1.5)


def sampler(model: Model, guidance_scale: float | None = None) -> Callable[[Params, Array, Array, Array], Array]:
    """(params, noise [B, ...], context [B, tokens, width], null_context [tokens, width]) -> x0, compiled."""
    scale = model.guidance_scale if guidance_scale is None else guidance_scale

    @jax.jit
    def generate(params, noise, context, null_context):
        null = jnp.broadcast_to(null_context[None], context.shape)
        denoise = classifier_free(partial(model.build, params), {"context": context}, {"context": null}, scale)
        return sample(model.solver, denoise, jax.random.key(0), noise, jnp.asarray(model.grid, noise.dtype))

    return generate


def pairs_of(
    generate: Callable[[Any, Any, Any], Any], contexts: np.ndarray, null_context: np.ndarray, **made: Any
) -> Iterator[Chunk]:
    """Chunks of {"x0", "noise", "context"}, the captions in turn.

    Args:
      generate: (noise, context, null_context) -> x0, as `sampler` without params.
      contexts: [n, tokens, width].
      null_context: [tokens, width].
      **made: shape, num, batch_size and seed of `make_pairs`.
    """
    turn = itertools.cycle(range(len(contexts)))

    def cond(rng, n):
        return {"context": np.stack([contexts[i] for i in itertools.islice(turn, n)]).astype(np.float32)}

    return make_pairs(lambda noise, given: generate(noise, given["context"], null_context), cond=cond, **made)


def read_captions(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Contexts, mapped into memory, and the empty text's in float32."""
    paths = [folder / f"{name}.npy" for name in ("context", "null_context")]
    try:
        contexts, null_context = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{folder}: expected context.npy and null_context.npy without objects; {error}") from error
    if contexts.ndim != 3 or len(contexts) == 0 or null_context.shape != contexts.shape[1:]:
        raise ValueError(
            f"{folder}: expected contexts [n, tokens, width] and a null_context of one's shape, got {contexts.shape} "
            f"and {null_context.shape}; encode them again"
        )
    return contexts, null_context.astype(np.float32)


def open_model(path: str, num_steps: int, size: int, bf16: bool) -> tuple[UNet, Model, Params, tuple[int, ...]]:
    """Network, how it samples, its parameters and the shape of a latent: of a run's last EMA, or imported weights."""
    if (Path(path) / runs.RECORD).is_file():
        experiment = runs.open_run(path)
        if experiment.name != "sd_instaflow":
            raise ValueError(f"{path} is a run of {experiment.name}; name one of sd_instaflow, or imported weights")
        unet, params = experiment.networks["model"], runs.params_of(experiment, path, "model", None)
        return unet, flow(as_network(unet), num_steps), params, experiment.sample_shape
    _, spec, params = folders.load(path)
    unet = spec.network
    if not isinstance(unet, UNet) or unet.context_dim is None or unet.concat_channels or unet.guidance_dim:
        raise ValueError(f"{path} holds no UNet of a text and noise alone; import that of Stable Diffusion 1")
    unet = unet.clone(dtype=jnp.bfloat16) if bf16 else unet
    return unet, diffusion(as_network(unet), num_steps), params, (size, size, unet.in_channels)


def make(args: argparse.Namespace) -> int:
    """Reads, samples, writes; returns how many pairs."""
    out = Path(args.out)
    check_folder(out)
    if min(args.steps, args.size) < 1:
        raise ValueError(f"--steps and --size must be at least 1, got {args.steps} and {args.size}")
    contexts, null_context = read_captions(Path(args.captions))
    unet, model, params, shape = open_model(args.model, args.steps, args.size, args.bf16)
    if contexts.shape[-1] != unet.context_dim:
        raise ValueError(
            f"{args.captions}: contexts are {contexts.shape[-1]} wide, the network takes {unet.context_dim}; encode "
            "them by its own text encoder"
        )
    generate = partial(sampler(model, args.guidance), jax.device_put(params))
    num = len(contexts) if args.num is None else args.num
    made = {"shape": shape, "num": num, "batch_size": min(args.batch_size, num), "seed": args.seed}
    pairs = pairs_of(generate, contexts, null_context, **made)
    total = -(-num // made["batch_size"])

    def chunks():
        np.save(out / "null_context.npy", null_context)  # first, so that pairs cut short can be read
        yield from tqdm(pairs, total=total, desc="pairs", unit="batch", disable=None)

    return write_pairs(out, chunks(), args.dtype)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", help="imported UNet, or a run of sd_instaflow.py")
    parser.add_argument("--captions", required=True, metavar="DIR", help="context.npy and null_context.npy")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--num", type=int, help="of pairs (default: one for each caption)")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, help="scale (default: 5, for a run 1.5)")
    parser.add_argument("--size", type=int, default=64, help="of the latents of an imported UNet")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="as which the pairs are written")
    parser.add_argument("--bf16", action="store_true", help="run an imported UNet in bfloat16")
    args = parser.parse_args(argv)
    try:
        print(f"{make(args)} pairs in {args.out}")
        return 0
    except (ValueError, OSError, AssertionError, FloatingPointError, jax.errors.JaxRuntimeError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

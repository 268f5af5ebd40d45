"""The networks of Stable Diffusion on one core of a CPU: UNet, VAE decoder and text encoder beside their PyTorch peers.

    python -m benchmarks.sd_cpu --diffusers PYTHON [--rounds 5] [--only NAMES]

The networks of `NETWORKS` have the structure of Stable Diffusion 1 and widths that fit one core. Each is called in
float32 with the weights of diffusers (transformers for the text encoder), the outputs are compared, and the two
processes are timed in turn, first calls apart. Writes results/DATE_sd_cpu.md and .json. The processes that compute are
this file as well, started through `benchmarks.worker`; what only one of them has installed is imported where it is
used. Training and whole samplers are not measured.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import argparse
import datetime
import os
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import report
from benchmarks.processes import LAUNCHER, Spec, Worker, alternate, say

CONTEXT = (77, 768)


class Shape(NamedTuple):
    """A network and its input.

    Attributes:
      kind: "unet", "vae" or "text".
      width: unit of width; of a token for "text".
      size: height and width of the latent; tokens for "text".
      calls: in a turn.
      about: what is measured, for the page.
    """

    kind: str
    width: int
    size: int
    calls: int
    about: str


NETWORKS = {
    "unet_32": Shape("unet", 128, 32, 4, "UNet of 128 channels (Stable Diffusion 1: 320), 32 x 32 latent, 77 tokens"),
    "unet_64": Shape("unet", 128, 64, 1, "the same UNet, 64 x 64 latent"),
    "vae_16": Shape("vae", 128, 16, 1, "KL-f8 decoder at full width, 16 x 16 latent to 128 x 128 pixels"),
    "vae_64": Shape("vae", 32, 64, 1, "KL-f8 decoder of 32 channels (full: 128), 64 x 64 latent to 512 x 512 pixels"),
    "text": Shape("text", 768, 77, 4, "CLIP ViT-L/14 text encoder at full width, 77 tokens"),
}
SMOKE = {
    "small_unet": Shape("unet", 32, 8, 1, "a small UNet"),
    "small_vae": Shape("vae", 32, 2, 1, "a small decoder"),
    "small_text": Shape("text", 64, 77, 1, "a small text encoder"),
}


class NetworkSpec(Spec):
    """A peer that serves one network, named in the variable BENCH_NETWORK."""

    def command(self, mode: str) -> list[str]:
        return ["bash", str(LAUNCHER), self.python, "-m", "benchmarks.worker", "benchmarks.sd_cpu", mode]


def inputs(shape: Shape) -> tuple[np.ndarray, ...]:
    """Input of a network, channels last; a UNet's time and context behind the latent."""
    rng = np.random.default_rng(0)
    if shape.kind == "text":
        return (rng.integers(0, 49407, (1, shape.size)),)
    latent = rng.standard_normal((1, shape.size, shape.size, 4)).astype(np.float32)
    context = rng.standard_normal((1, *CONTEXT)).astype(np.float32)
    return (latent, np.asarray([500.0], np.float32), context) if shape.kind == "unet" else (latent,)


class PeakMemory:
    """MiB that a process has taken since it was made, at most."""

    def __init__(self) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.before = pages * resource.getpagesize() / 2**20

    def read(self) -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - self.before


class JaxdiffNetwork:
    """jaxdiff's network, with the weights that the peer has dumped."""

    def __init__(self, shape: Shape) -> None:
        import jax

        from jaxdiff.networks import autoencoder_blocks, clip_text, unet
        from jaxdiff.networks.autoencoder_kl import stable_diffusion_vae
        from jaxdiff.networks.base import param_shapes
        from jaxdiff.networks.unet_presets import stable_diffusion_unet
        from jaxdiff.pretrained import clip, diffusers_layout

        self.shape, self.inputs, self.run = shape, inputs(shape), None
        if shape.kind == "unet":
            net = stable_diffusion_unet(1).clone(base_channels=shape.width)
            example = unet.example_inputs(net)
            self.importer = lambda state: diffusers_layout.import_unet(state, net)
            self.apply = lambda p, x, t, context: net.apply({"params": p}, x, t, {"context": context})
        elif shape.kind == "vae":
            net = stable_diffusion_vae().clone(base_channels=shape.width)
            example = (autoencoder_blocks.example_input(net),)
            self.importer = lambda state: diffusers_layout.import_autoencoder(state, net)
            self.apply = lambda p, z: net.apply({"params": p}, z, method="decode")
        else:
            net = clip_text.clip_l().clone(width=shape.width, heads=shape.width // 64)
            example = (clip_text.example_ids(net),)
            self.importer = lambda state: clip.import_text_encoder(state, net, prefix="")
            self.apply = lambda p, ids: net.apply({"params": p}, ids).tokens
        self.shapes = lambda: param_shapes(net, *example)
        self.jit, self.put, self.version = jax.jit, jax.device_put, jax.__version__

    def build(self) -> None:
        self.params = self.memory = None

    def load(self, path: str) -> dict[str, float]:
        with np.load(path) as dumped:
            arrays = dict(dumped)
        theirs = arrays.pop("/output")
        self.params = self.put(self.importer(arrays))
        self.memory = PeakMemory()
        self.run = self.jit(self.apply)
        ours = np.asarray(self.run(self.params, *self.inputs))
        self.run = self.jit(lambda *a: self.apply(*a))  # so that the first call that is timed compiles
        return {"largest": float(np.abs(theirs).max()), "difference": float(np.abs(ours - theirs).max())}

    def sampler_step(self) -> float:
        assert self.run
        return float(np.asarray(self.run(self.params, *self.inputs)).sum())

    train_step = sample = sampler_step  # a worker looks for all three

    def facts(self) -> dict[str, Any]:
        return {"versions": {"jax": self.version}, "memory": self.memory.read() if self.memory else 0.0}


class DiffusersNetwork:
    """The same network in diffusers or transformers, eager and in inference mode."""

    def __init__(self, shape: Shape) -> None:
        import diffusers
        import torch
        import transformers

        torch.set_num_threads(1)
        torch.set_num_interop_threads(1)
        self.torch, self.shape = torch, shape
        self.versions = {p.__name__: p.__version__ for p in (torch, diffusers, transformers)}

    def build(self) -> None:
        import diffusers
        import transformers

        self.torch.manual_seed(0)
        width, arrays = self.shape.width, [self.torch.from_numpy(a) for a in inputs(self.shape)]
        widths = tuple(width * mult for mult in (1, 2, 4, 4))
        if self.shape.kind == "text":
            self.net = transformers.CLIPTextModel(transformers.CLIPTextConfig(
                hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64, num_hidden_layers=12,
                eos_token_id=49407,
            ))  # fmt: skip
            self.call = lambda: self.net(*arrays).last_hidden_state
        elif self.shape.kind == "vae":
            blocks = {f"{way}_block_types": (f"{way.title()}{part}Block2D",) * 4
                      for way, part in (("down", "Encoder"), ("up", "Decoder"))}  # fmt: skip
            self.net = diffusers.AutoencoderKL(
                block_out_channels=widths, layers_per_block=2, latent_channels=4, **blocks
            )
            latent = arrays[0].permute(0, 3, 1, 2).contiguous()
            self.call = lambda: self.net.decode(latent).sample.permute(0, 2, 3, 1)
        else:
            # Its attention_head_dim is the number of heads.
            self.net = diffusers.UNet2DConditionModel(
                block_out_channels=widths, cross_attention_dim=CONTEXT[1], attention_head_dim=8
            )
            latent = arrays[0].permute(0, 3, 1, 2).contiguous()
            self.call = lambda: self.net(latent, arrays[1], arrays[2]).sample.permute(0, 2, 3, 1)
        self.net.eval()
        self.memory = PeakMemory()

    def sampler_step(self) -> float:
        with self.torch.inference_mode():
            return self.call().sum().item()

    train_step = sample = sampler_step  # a worker looks for all three

    def dump(self, path: str) -> dict[str, Any]:
        """Writes the weights and the output."""
        with self.torch.inference_mode():
            output = self.call().numpy()
        np.savez(path, **{name: a.numpy() for name, a in self.net.state_dict().items()}, **{"/output": output})
        return {}

    def facts(self) -> dict[str, Any]:
        return {"versions": self.versions, "memory": self.memory.read(),
                "parameters": sum(p.numel() for p in self.net.parameters())}  # fmt: skip


def Peer() -> Any:
    """What `benchmarks.worker` serves: the network named by BENCH_NETWORK, "library name"."""
    library, name = os.environ["BENCH_NETWORK"].split()
    kinds = {"jaxdiff": JaxdiffNetwork, "diffusers": DiffusersNetwork}
    return kinds[library]((NETWORKS | SMOKE)[name])


def measure(name: str, shape: Shape, pythons: dict[str, str], core: int, rounds: int) -> dict[str, Any]:
    """Both peers of one network, in turn.

    Returns:
      {"first", "call": {peer: times}, "equal": differences, "facts": {peer: facts}}.
    """
    workers: dict[str, Worker] = {}
    try:
        for peer, python in pythons.items():
            env = {"BENCH_NETWORK": f"{peer} {name}"}
            workers[peer] = Worker(NetworkSpec(peer, peer, python, (core,), env=env))
            workers[peer].ask("build")
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "weights.npz")
            _checked(workers["diffusers"].ask(f"dump {path}"))
            equal = _checked(workers["jaxdiff"].ask(f"load {path}"))
        say(f"{name}: {equal}")
        asked = list(workers.values())
        first = alternate(asked, "step", 1, 1)
        call = alternate(asked, "step", shape.calls, rounds)
        for said in (*first.values(), *call.values()):
            _checked(said)
        facts = {peer: worker.ask("facts") for peer, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    return {"first": first, "call": call, "equal": equal, "facts": facts}


def _checked(said: dict[str, Any]) -> dict[str, Any]:
    if "error" in said:
        raise RuntimeError(f"the networks cannot be compared: {said['error']}")
    return said


def tables(raw: dict[str, Any], shapes: dict[str, Shape]) -> list[report.Table]:
    """CPU and wall seconds with ratios, first calls, and the differences of the outputs with the memory."""
    peers = ["diffusers", "jaxdiff"]
    calls = {name: found["call"] for name, found in raw.items()}
    firsts = {name: found["first"] for name, found in raw.items()}
    about = "Median (minimum); ratios are of medians. " + "; ".join(f"{n}: {shapes[n].about}" for n in raw) + "."
    best = [[name, *(report.number(min(found["call"][peer]["cpu"])) for peer in peers),
             report.number(min(found["call"]["jaxdiff"]["cpu"]) / min(found["call"]["diffusers"]["cpu"]))]
            for name, found in raw.items()]  # fmt: skip
    rows = []
    for name, found in raw.items():
        facts, equal = found["facts"], found["equal"]
        rows.append([
            name,
            f"{facts['diffusers']['parameters'] / 1e6:.1f} M",
            f"{equal['difference']:.1e}",
            f"{equal['largest']:.2f}",
            *(f"{facts[peer]['memory']:.0f}" for peer in peers),
        ])  # fmt: skip
    return [
        report.comparison("One call: CPU seconds of the process", calls, peers, "cpu", about),
        report.Table("The fastest call: CPU seconds", ["", *peers, "ratio"], best),
        report.comparison("One call: wall seconds", calls, peers, "wall"),
        report.comparison(
            "First call: wall seconds", firsts, peers, "wall", "jaxdiff traces and compiles; nothing is cached."
        ),
        report.Table(
            "Outputs and memory",
            ["", "parameters", "largest difference", "largest value", *(f"{peer}, MiB" for peer in peers)],
            rows,
            "With the same weights and inputs. Memory is what the process has taken beyond its weights, at most; "
            "jaxdiff's includes what compiling takes.",
        ),
    ]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.sd_cpu", allow_abbrev=False)
    top.add_argument("--diffusers", required=True, metavar="PYTHON", help="with torch, diffusers and transformers")
    top.add_argument("--rounds", type=int, default=5, help="turns of each peer (default: 5)")
    top.add_argument("--only", default=",".join(NETWORKS), help=f"of {','.join(NETWORKS)}")
    top.add_argument("--smoke", action="store_true", help="small networks, to see that the file works")
    top.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the results")
    found = top.parse_args(argv)
    if not Path(found.diffusers).is_file():
        top.error(f"--diffusers takes the interpreter of an environment with diffusers, got {found.diffusers!r}")
    if found.rounds < 1:
        top.error(f"--rounds must be at least 1, got {found.rounds}")
    found.only = list(SMOKE) if found.smoke else found.only.split(",")
    for name in found.only:
        if name not in NETWORKS | SMOKE:
            top.error(f"--only takes {', '.join(NETWORKS)}, got {name!r}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the networks one after the other and writes the page, again after each of them."""
    args = arguments(argv)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    pythons = {"diffusers": args.diffusers, "jaxdiff": sys.executable}
    shapes = SMOKE if args.smoke else NETWORKS
    raw: dict[str, Any] = {}
    for name in args.only:
        raw[name] = measure(name, shapes[name], pythons, cores[-1], args.rounds)
        date = datetime.date.today().isoformat()
        about = {"date": date, **report.machine(), "load at the end": f"{os.getloadavg()[0]:.1f}"}
        about["command"] = f"`python -m benchmarks.sd_cpu --diffusers PYTHON --rounds {args.rounds}`"
        for peer, facts in raw[name]["facts"].items():
            about[peer] = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
        title = f"The networks of Stable Diffusion on one core, {date}"
        say(f"written: {report.write(args.out, f'{date}_sd_cpu', title, about, tables(raw, shapes), raw)}")


if __name__ == "__main__":
    main()

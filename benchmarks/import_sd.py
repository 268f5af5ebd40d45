"""What it costs to import Stable Diffusion 1.5, and the first image afterwards: seconds, memory, disk.

    python -m benchmarks.import_sd [--folder DIR] [--only write,float32,bfloat16,use]

Writes a checkpoint of the published names and shapes with random numbers (4.3 GB), imports it by the command line in
float32 and in bfloat16, then loads the float32 folder, calls the UNet once on a 32 x 32 latent and decodes it to 256 x
256 pixels. Each step is a process of its own. Writes results/DATE_import_sd.md and .json. No weights are downloaded, so
nothing is said about the pictures. DIR needs 11 GB and keeps its files; without it a temporary folder is used.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from benchmarks import report
from benchmarks.processes import ROOT, say
from jaxdiff.pretrained import files, folders
from jaxdiff.pretrained.catalog import BUNDLES, KINDS
from jaxdiff.pretrained.kinds import Deferred, released

PARTS = {"unet": "sd1", "autoencoder": "kl-f8", "text_encoder": "clip-l"}
STEPS = ("write", "float32", "bfloat16", "use")
LIMIT = 1.3  # memory of an import over the size of the checkpoint


def checkpoint() -> dict[str, Any]:
    """The tensors of a single-file Stable Diffusion 1.5 under their names, each drawn when it is asked for."""
    found: dict[str, Any] = {}
    for part in BUNDLES["compvis"].parts:
        kind = KINDS[part.kind]
        if PARTS.get(part.name) not in kind.published or part.kind == "open-clip-text":
            continue
        spec = kind.published[PARTS[part.name]]()
        leaves: Any = traverse_util.flatten_dict(kind.shapes(spec.network), sep="/")
        drawn = {path: _random(path, leaf.shape) for path, leaf in leaves.items()}
        tensors = released(kind, spec, traverse_util.unflatten_dict(drawn, sep="/"))
        found |= {part.prefix + name: tensor for name, tensor in tensors.items()}
    found["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(77)[None]
    return found


def _random(path: str, shape: Sequence[int]) -> Deferred:
    """A kernel with deviation 1 / sqrt(inputs), anything else near the value with which it does nothing."""

    def make() -> np.ndarray:
        drawn = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape, np.float32)
        if len(shape) > 1:
            return drawn * np.float32(np.prod(shape[:-1]) ** -0.5)
        return 0.01 * drawn + np.float32(path.endswith("/scale"))

    return Deferred(tuple(shape), np.dtype(np.float32), make)


def use(folder: Path) -> dict[str, tuple[float, float]]:
    """Loads a folder, calls UNet and decoder twice; wall and CPU seconds."""
    import jax
    import jax.numpy as jnp

    found: dict[str, tuple[float, float]] = {}

    def timed(name: str, function: Any, *inputs: Any) -> Any:
        wall, cpu = time.monotonic(), time.process_time()
        output = function(*inputs)
        jax.block_until_ready(output)
        found[name] = (time.monotonic() - wall, time.process_time() - cpu)
        return output

    unet, decoder = timed("load", lambda: [folders.load(folder / name) for name in ("unet", "autoencoder")])
    x_t = jax.random.normal(jax.random.key(0), (1, 32, 32, 4))
    cond = {"context": jax.random.normal(jax.random.key(1), (1, 77, 768))}
    call = jax.jit(lambda params, x: unet.spec.network.apply({"params": params}, x, jnp.full([1], 500.0), cond))
    decode = jax.jit(lambda params, z: decoder.spec.network.apply({"params": params}, z, method="decode"))

    params = timed("UNet parameters to the device", jax.device_put, unet.params)
    timed("first UNet call", call, params, x_t)
    latent = timed("UNet call", call, params, x_t)
    del params
    params = timed("decoder parameters to the device", jax.device_put, decoder.params)
    timed("first decode", decode, params, latent)
    image = timed("decode", decode, params, latent)
    if image.shape != (1, 256, 256, 3) or not bool(jnp.isfinite(image).all()):
        raise RuntimeError(f"expected a finite image [1, 256, 256, 3], got {image.shape}")
    return found


def watched(command: Sequence[str]) -> dict[str, Any]:
    """Runs a command that must succeed, without programs compiled before.

    Returns:
      Wall and CPU seconds; peak memory in GB, mapped pages of files included ("peak") and without them ("own", looked
      at twenty times a second; 0 where the system does not say); "text", what it printed.
    """
    start, own = time.monotonic(), 0
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=printed)
        status = Path(f"/proc/{process.pid}/status")
        while True:
            pid, code, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if status.is_file():
                lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
                own = max(own, 1024 * int(lines.get("RssAnon", "0 kB").split()[0]))
            time.sleep(0.05)
        process.returncode = os.waitstatus_to_exitcode(code)
        wall = time.monotonic() - start
        printed.seek(0)
        text = printed.read()
    if code:
        raise RuntimeError(f"{' '.join(command[1:4])} failed, see above")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall": wall, "cpu": cpu, "peak": peak / 1e9, "own": own / 1e9, "text": text}


def measure(folder: Path, steps: Sequence[str]) -> dict[str, Any]:
    """Runs the steps in order; what an earlier run left in the folder is used."""
    file, raw = folder / "sd15.safetensors", {}
    itself = [sys.executable, "-m", "benchmarks.import_sd", "--folder", str(folder)]
    commands = {"write": [*itself, "--step", "write"], "use": [*itself, "--step", "use"]}
    for dtype in ("float32", "bfloat16"):
        line = ["import", "compvis", str(file), str(folder / dtype), "--dtype", dtype]
        commands[dtype] = [sys.executable, "-m", "jaxdiff.cli", *line]
    for step in steps:
        raw[step] = watched(commands[step])
        text = raw[step].pop("text")
        if step == "use":
            raw[step]["times"] = json.loads(text.splitlines()[-1])
        raw[step]["disk"] = _size(file if step == "write" else folder / ("float32" if step == "use" else step)) / 1e9
        say(f"{step}: {raw[step]}")
    return raw


def _size(path: Path) -> int:
    paths = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in paths)


def tables(raw: dict[str, Any], size: float) -> list[report.Table]:
    """Imports beside the size of the checkpoint in GB, and the calls afterwards."""
    number, rows = report.number, []
    for dtype in ("float32", "bfloat16"):
        if found := raw.get(dtype):
            figures = [found[key] for key in ("wall", "cpu", "peak", "own", "disk")]
            rows.append([dtype, *map(number, figures), number(found["peak"] / size)])
    header = ["", "wall s", "CPU s", "peak memory GB", "of these own GB", "folder GB", "peak / checkpoint"]
    note = f"The checkpoint has {size:.3f} GB. Peak memory counts its mapped pages, which the system can take back."
    found = [report.Table(f"`jaxdiff import compvis`: at most {LIMIT} times the checkpoint", header, rows, note)]
    if after := raw.get("use"):
        cells = [[name, *map(number, seconds)] for name, seconds in after["times"].items()]
        note = f"Peak memory {after['peak']:.2f} GB, of these {after['own']:.2f} GB its own. First calls compile."
        found.append(report.Table("One image of 256 x 256 in float32", ["", "wall s", "CPU s"], cells, note))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the page; with --step one of the processes that are measured."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.import_sd", allow_abbrev=False)
    top.add_argument("--folder", type=Path, metavar="DIR", help="for 11 GB of files, which stay there")
    top.add_argument("--only", default=",".join(STEPS), help=f"of {','.join(STEPS)}")
    top.add_argument("--step", choices=("write", "use"), help=argparse.SUPPRESS)
    top.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the results")
    args = top.parse_args(argv)
    if args.step == "write":
        return files.write(args.folder / "sd15.safetensors", checkpoint())
    if args.step == "use":
        return print(json.dumps(use(args.folder / "float32")))
    steps = args.only.split(",")
    if unknown := [step for step in steps if step not in STEPS]:
        top.error(f"--only takes {', '.join(STEPS)}, got {unknown[0]!r}")
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        raw = measure(folder, steps)
        size = _size(folder / "sd15.safetensors") / 1e9
    finally:
        if args.folder is None:
            shutil.rmtree(folder)
    date = datetime.date.today().isoformat()
    about = {"date": date, **report.machine(), "load at the end": f"{os.getloadavg()[0]:.1f}"}
    about["command"] = "`python -m benchmarks.import_sd`"
    title = f"Importing Stable Diffusion 1.5, {date}"
    say(f"written: {report.write(args.out, f'{date}_import_sd', title, about, tables(raw, size), raw)}")


if __name__ == "__main__":
    main()

"""Train steps of ADM at ImageNet-64 and of Stable Diffusion's UNet on one GPU, bfloat16, beside diffusers.

    python -m benchmarks.unet_gpu [--diffusers PYTHON] [--peak TFLOPS] [--smoke]

Batch sizes double until the memory is used up; every network runs in a process of its own, jaxdiff and diffusers one
after the other. MFU is the FLOPs of convolutions and matrix products in jaxdiff's traced step (for both, since the
networks are the same) over time and the card's dense bfloat16 peak. `--smoke` runs tiny networks on a CPU, to show
that this file works; its figures mean nothing, and it writes none unless --out says where.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.gpu_shapes import SHAPES
from benchmarks.processes import ROOT, say
from jaxdiff.profiling import peak_of

LARGEST = 4096
MODULES = {"jaxdiff": "benchmarks.workers.gpu_jaxdiff", "diffusers": "benchmarks.workers.gpu_diffusers"}


def child(python: str, module: str, name: str, batches: Sequence[int], smoke: bool) -> list[dict[str, Any]]:
    """What one process says about one network: a dict for each batch size that fits."""
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | ({"JAX_PLATFORMS": "cpu"} if smoke else {})
    command = [python, "-m", module, name, "smoke" if smoke else "full", *map(str, batches)]
    found = []
    with subprocess.Popen(command, env=os.environ | own, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("{"):
                found.append(json.loads(line))
                say(f"{module} {name}: {line.strip()}")
    if process.returncode:
        say(f"{module} {name} ended with code {process.returncode} after {len(found)} batch size(s)")
    return found


def table(name: str, found: dict[str, list[dict[str, Any]]], best: float | None) -> report.Table:
    """Batch sizes as rows; for each peer step time, images a second, MFU, memory."""
    header = ["batch"]
    for peer in found:
        header += [f"{peer}: step, s", "images/s", "MFU", "GB", "first step, s"]
    flops = {one["batch"]: one["flops"] for one in found["jaxdiff"]}
    rows = []
    for batch in sorted({one["batch"] for many in found.values() for one in many}):
        row = [str(batch)]
        for many in found.values():
            one = next((one for one in many if one["batch"] == batch), None)
            if one is None:
                row += ["does not fit", "", "", "", ""]
                continue
            middle = statistics.median(one["seconds"])
            used = f"{flops[batch] / middle / best:.1%}" if best and batch in flops else ""
            times = report.cell({"wall": one["seconds"]}, "wall")
            row += [times, report.number(batch / middle), used, f"{one['memory'] / 1e9:.1f}"]
            row.append(report.number(one["first"]))
        rows.append(row)
    sizes = ", ".join(f"{peer} {many[0]['parameters'] / 1e6:.3f} M" for peer, many in found.items() if many)
    return report.Table(name, header, rows, f"Parameters: {sizes}." if sizes else "")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs both networks with every peer and writes the page."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.unet_gpu", allow_abbrev=False)
    top.add_argument("--diffusers", metavar="PYTHON", help="interpreter with torch and diffusers")
    top.add_argument("--peak", type=float, metavar="TFLOPS", help="dense bfloat16 peak of the card, for the MFU")
    top.add_argument("--smoke", action="store_true", help="tiny networks on a CPU")
    top.add_argument("--out", type=Path, help="folder of the results")
    args = top.parse_args(argv)
    pythons = {"jaxdiff": sys.executable} | ({"diffusers": args.diffusers} if args.diffusers else {})
    batches = [2] if args.smoke else [2**power for power in range(2, LARGEST.bit_length())]
    raw = {
        name: {peer: child(python, MODULES[peer], name, batches, args.smoke) for peer, python in pythons.items()}
        for name in SHAPES
    }
    said = [one for found in raw.values() for many in found.values() for one in many]
    kind = next((one["device"] for one in said if "device" in one), "unknown")
    best = args.peak * 1e12 if args.peak else peak_of(kind)
    date = datetime.date.today().isoformat()
    versions = ", ".join(sorted({one["version"] for one in said}))
    about = {"date": date, "device": kind, **report.machine(), "versions": versions}
    about["peak"] = f"{best / 1e12:.0f} TFLOP/s" if best else "unknown, so no MFU; give it with --peak"
    tables = [table(name, found, best) for name, found in raw.items()]
    title = f"Train steps of UNets on a GPU, {date}"
    if args.smoke and args.out is None:
        print(report.markdown(title + " (smoke run: the figures mean nothing)", about, tables))
        return
    page = report.write(args.out or report.RESULTS, f"{date}_unet_gpu", title, about, tables, {"raw": raw})
    say(f"written: {page}")


if __name__ == "__main__":
    main()

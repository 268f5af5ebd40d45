"""How long until something happens: imports, and from the start of a process to the first images and the first step.

jaxdiff runs twice in processes of its own with one folder for compiled programs: empty in the first (cold), filled in
the second (warm). Everything is on one core.
"""

import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.processes import ROOT, Spec, run_once, say

MODES = {"sample": "to 16 images", "train": "to the first train step"}
HEAVY = ("tensorflow", "torch", "tensorflow_datasets", "grain", "orbax", "PIL", "matplotlib")
TRAINING_SCRIPT = "import experiments.cifar10_ddpm"
JAXDIFF_IMPORTS = {
    "jax alone": "import jax",
    "jaxdiff, to read a command line": "import jaxdiff.cli",
    "jaxdiff, to run a command": "import jaxdiff.cli, jaxdiff.commands",
    "jaxdiff, a training script": TRAINING_SCRIPT,
}
PEER_IMPORTS = {
    "diffusers": "from diffusers import DDIMScheduler, UNet2DModel",
    "flaxdiff": "import flaxdiff.models.simple_unet, flaxdiff.samplers.ddim, flaxdiff.trainer.diffusion_trainer",
}
PROBE = """
import os, sys, time
os.sched_setaffinity(0, {{{core}}}) if hasattr(os, "sched_setaffinity") else None
start = time.perf_counter()
{code}
wall, cpu = time.perf_counter() - start, time.process_time()
import json
print(json.dumps(dict(wall=wall, cpu=cpu, heavy=[name for name in {heavy!r} if name in sys.modules])))
"""


def imports(specs: Sequence[Spec], rounds: int) -> dict[str, dict[str, Any]]:
    """Import times of every peer, in turn; CPU seconds count from the start of the interpreter."""
    jobs = {}
    for spec in specs:
        codes = JAXDIFF_IMPORTS if spec.peer == "jaxdiff" else {spec.name: PEER_IMPORTS[spec.peer]}
        jobs |= {name: (spec, code) for name, code in codes.items()}
    found: dict[str, dict[str, Any]] = {name: {"wall": [], "cpu": [], "heavy": []} for name in jobs}
    for number in range(rounds + 1):
        for name, (spec, code) in jobs.items():
            said = _import(spec, code)
            if "error" in said:
                found[name] = said
            elif number and "error" not in found[name]:  # the first round only brings the files into memory
                found[name]["wall"].append(said["wall"])
                found[name]["cpu"].append(said["cpu"])
                found[name]["heavy"] = said["heavy"]
    for name, times in found.items():
        say(f"import, {name}: {report.cell(times, 'cpu')}")
    return found


def measure(specs: Sequence[Spec], rounds: int) -> dict[str, Any]:
    """Imports, then cold and warm starts of every peer.

    Returns:
      {"imports": {what: times}, "starts": {what: what the process said}}; {"error": ...} for what failed.
    """
    starts: dict[str, dict[str, Any]] = {}
    for spec in specs:
        for mode, what in MODES.items():
            if spec.peer != "jaxdiff":
                starts[f"{spec.name}: {what}"] = run_once(spec, mode)
                continue
            with tempfile.TemporaryDirectory() as folder:
                cache = {
                    "JAX_COMPILATION_CACHE_DIR": folder,
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                }
                for state in ("cache empty", "cache filled"):
                    own = dataclasses.replace(spec, name=f"{spec.name}, {state}", env=spec.env | cache)
                    starts[f"{own.name}: {what}"] = run_once(own, mode)
    return {"imports": imports(specs, rounds), "starts": starts}


def tables(raw: dict[str, Any]) -> list[report.Table]:
    """Import times with the heavy modules that were loaded, and starts in parts."""
    import_rows = [
        [name, report.cell(times, "wall"), report.cell(times, "cpu"), ", ".join(times.get("heavy", [])) or "none"]
        for name, times in raw["imports"].items()
    ]
    parts = ("import", "build", "first", "total")
    start_rows = [
        [name, *(report.cell(said.get(part, said), "wall") for part in parts), report.cell(said.get("total"), "cpu")]
        for name, said in raw["starts"].items()
    ]
    return [
        report.Table("Import: seconds", ["", "wall", "CPU", f"loaded of {', '.join(HEAVY)}"], import_rows),
        report.Table(
            "From the start of a process: seconds",
            ["", "import", "build, initialise", "first call", "whole process, wall", "whole process, CPU"],
            start_rows,
            "One process each. `first call` traces, compiles (or loads the compiled program) and runs.",
        ),
    ]


def _import(spec: Spec, code: str) -> dict[str, Any]:
    probe = PROBE.format(core=spec.cores[0], code=code, heavy=HEAVY)
    command = [spec.python, "-c", probe]
    done = subprocess.run(command, env=spec.environment(), cwd=Path(ROOT), capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])

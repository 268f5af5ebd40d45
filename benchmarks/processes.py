"""The driver's side of a worker: starts it, asks it, and lets several of them answer in turn.

Only one worker computes at any time, and their turns alternate, so that what else the machine does meets all of them
alike. What is measured is the worker's business (`worker`), what is made of it the report's.
"""

import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LAUNCHER = ROOT / "scripts" / "cpu.sh"
# Whatever the caller has set would change what is measured.
FORGET = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAXDIFF_CPU_DEVICES", "OMP_NUM_THREADS")
MODULES = {
    "jaxdiff": "benchmarks.workers.jaxdiff_unet",
    "diffusers": "benchmarks.workers.diffusers_unet",
    "flaxdiff": "benchmarks.workers.flaxdiff_unet",
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """How to start a peer.

    Attributes:
      name: in the tables.
      peer: which worker, a key of MODULES.
      python: the interpreter that has the peer installed.
      cores: cores it may use; also its number of threads (torch) or host devices (JAX).
      launcher: start it through scripts/cpu.sh, with the malloc settings; False leaves the system's.
      env: further variables.
    """

    name: str
    peer: str
    python: str
    cores: tuple[int, ...]
    launcher: bool = True
    env: dict[str, str] = dataclasses.field(default_factory=dict)

    def command(self, mode: str) -> list[str]:
        start = ["bash", str(LAUNCHER)] if self.launcher else []
        return [*start, self.python, "-m", "benchmarks.worker", MODULES[self.peer], mode]

    def environment(self) -> dict[str, str]:
        threads = str(len(self.cores))
        kept = {name: value for name, value in os.environ.items() if name not in FORGET}
        own = {
            "BENCH_CORES": ",".join(map(str, self.cores)),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": threads,
            "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
            "OMP_NUM_THREADS": "1" if self.peer == "jaxdiff" else threads,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
        }
        return kept | own | self.env


class Worker:
    """A running peer."""

    def __init__(self, spec: Spec):
        self.spec = spec
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            spec.command("serve"), env=spec.environment(), cwd=ROOT, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip
        self.imported = self._read()["import"]

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        if self.process.poll() is None:
            try:
                self.process.communicate("quit\n", timeout=60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            said = self.log.read().strip().splitlines() or ["nothing"]
            raise RuntimeError(f"the worker of {self.spec.name} ended; it said: {said[-1]}")
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def alternate(workers: Sequence[Worker], command: str, count: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Asks every worker for `count` times in each of `rounds` rounds.

    Returns:
      By worker, {"wall": [...], "cpu": [...], "load": [...]}, or {"skip": why} or {"error": what} from its last answer.
    """
    found: dict[str, dict[str, Any]] = {worker.spec.name: {"wall": [], "cpu": [], "load": []} for worker in workers}
    for number in range(rounds):
        for worker in workers:
            times = found[worker.spec.name]
            if "wall" not in times:
                continue
            said = worker.ask(f"{command} {count}")
            say(f"{command} {number + 1}/{rounds} {worker.spec.name}: {_short(said)}")
            if "wall" not in said:
                found[worker.spec.name] = said
                continue
            for key in ("wall", "cpu"):
                times[key] += said[key]
            times["load"].append(os.getloadavg()[0])
    return found


def run_once(spec: Spec, mode: str) -> dict[str, Any]:
    """A peer from the start of its process to one sampled batch or one train step, and to its end.

    Returns:
      What the worker said, with "total": wall and CPU seconds of the whole process; or {"error": ...}.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(spec.command(mode), env=spec.environment(), cwd=ROOT, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        return {"error": f"code {done.returncode}, {said[-1]}"}
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    say(f"{mode} from a cold start, {spec.name}: wall {wall:.1f}, cpu {cpu:.1f}")
    return json.loads(done.stdout.splitlines()[-1]) | {"total": {"wall": wall, "cpu": cpu}}


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def _short(said: dict[str, Any]) -> str:
    if "wall" not in said:
        return str(said)
    return " ".join(f"{wall:.3f}" for wall in said["wall"])

"""The process that one peer runs in: it imports the peer's module, builds its `Peer` and does what it is asked.

    python -m benchmarks.worker MODULE serve        reads commands on stdin, writes a line of JSON for each
    python -m benchmarks.worker MODULE sample       builds, draws one batch, and exits; `train` makes one train step

Commands: `build`, `facts`, `dump FILE`, `load FILE`, and `train N`, `step N`, `sample N`, which answer with N wall and
N CPU times (all threads of the process). BENCH_CORES names the cores; it is obeyed before anything numeric is
imported. This file imports the standard library only.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


class NotOffered(Exception):
    """A peer has no such thing; the message says what it has instead."""


class Stopwatch:
    """Wall and CPU seconds since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"wall": time.perf_counter() - self.wall, "cpu": time.process_time() - self.cpu}


def pin() -> None:
    """Keeps this process on the cores of BENCH_CORES ("1", "0,1"), where the system can."""
    cores = os.environ.get("BENCH_CORES")
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})


def one_core() -> None:
    """Keeps this process and its XLA on the last core that it may use; to be called before jax is imported."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    os.environ |= {
        "BENCH_CORES": str(cores[-1]),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    }
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    pin()


def answer(peer: Any, command: str, argument: str) -> dict[str, Any]:
    """What the peer says to one command."""
    if command == "build":
        watch = Stopwatch()
        peer.build()
        return watch.read()
    if command == "facts":
        return peer.facts()
    if command in ("dump", "load"):
        return getattr(peer, command)(argument)
    actions: dict[str, Callable[[], float]] = {
        "train": peer.train_step,
        "step": peer.sampler_step,
        "sample": peer.sample,
    }
    if command not in actions:
        raise ValueError(f"a worker knows build, facts, dump, load and {', '.join(actions)}, got {command!r}")
    times: dict[str, list[float]] = {"wall": [], "cpu": []}
    for _ in range(int(argument or 1)):
        watch = Stopwatch()
        actions[command]()
        for name, value in watch.read().items():
            times[name].append(value)
    return times


def main(module: str, mode: str) -> None:
    """Serves commands, or does one thing from a cold start."""
    pin()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not mix with the answers
    watch = Stopwatch()
    peer = importlib.import_module(module).Peer()
    imported = watch.read()
    if mode != "serve":
        built = answer(peer, "build", "")
        first = answer(peer, mode, "1")
        out.write(json.dumps({"import": imported, "build": built, "first": first, "facts": peer.facts()}) + "\n")
        return
    out.write(json.dumps({"import": imported}) + "\n")
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "quit":
            return
        try:
            reply = answer(peer, command, argument)
        except NotOffered as error:
            reply = {"skip": str(error)}
        except Exception as error:  # the other peers go on
            reply = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        out.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

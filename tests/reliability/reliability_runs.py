"""A small adversarial run with everything that a checkpoint holds, as a process that tests can start, signal and kill.

`reliability_runs.py WORKDIR NUM_STEPS DELAY METHOD` imports, waits for a line on its input, joins other processes if
the environment says so, and trains one of METHODS; DELAY seconds pass before each batch. It exits like the command
line: 130 if stopped.
"""

import functools
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import optax
import training_toys as toys

from jaxdiff.training import distributed, ema, sharding
from jaxdiff.training.loop import train

ROOT = Path(__file__).parents[2]
METHODS = {
    "gan": toys.gan,
    "ddgan": toys.diffusion_gan,
    "consistency": toys.distillation,
    "progressive": functools.partial(toys.distillation, rounds=True),
}


class Logged(toys.Points):
    """Notes in `data.log` from which batch it goes on, and the number and a checksum of every batch it gives."""

    def __init__(self, workdir, delay):
        super().__init__(16, delay=delay, host=jax.process_index(), num_hosts=jax.process_count())
        self.log = workdir / "data.log"
        self.set_state({"step": 0})

    def __next__(self):
        number, batch = self.step, super().__next__()
        self.note(f"{number} {zlib.crc32(batch['x0'])}")
        return batch

    def set_state(self, state):
        super().set_state(state)
        self.note(f"from {self.step}")

    def note(self, line):
        if jax.process_index() == 0:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a") as file:
                file.write(line + "\n")


def experiment(workdir, num_steps, delay=0.0, name="gan", **changes):
    method = METHODS[name]()
    optimizers = {"model": optax.adam(0.01), "disc": optax.sgd(0.02, momentum=0.9)}
    optimizers = {objective.player: optimizers[objective.player] for objective in method.objectives}
    averages = (ema.constant("slow", 0.9), ema.half_life("edm", 100))
    settings = {"method": method, "optimizers": optimizers, "ema": averages, "batch_size": 16, "log_every": 1}
    return toys.experiment(num_steps, data=lambda: Logged(workdir, delay), **{**settings, **changes})


def start(workdir, num_steps, delay=0.0, environment=None, name="gan"):
    """A process that has yet to be told to go; its error stream can be read line by line."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "training")])
    common = {**os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(workdir), str(num_steps), str(delay), name]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    return subprocess.Popen(command, env={**common, **(environment or {})}, text=True, **pipes)


def go(process):
    process.stdin.write("go\n")
    process.stdin.flush()


def final(workdir):
    """{path: array} of the last state: parameters, averages, optimisers, key and all else."""
    with np.load(workdir / "final.npz", allow_pickle=False) as file:
        return dict(file)


def assert_same(ours, theirs):
    assert sorted(ours) == sorted(theirs)
    for path, value in ours.items():
        assert value.dtype == theirs[path].dtype
        np.testing.assert_array_equal(theirs[path], value, err_msg=path)


def main(workdir, num_steps, delay, name):
    import orbax.checkpoint  # noqa: F401  before the line comes, as all imports

    sys.stdin.readline()
    distributed.start("auto")
    mesh = sharding.make_mesh() if jax.process_count() > 1 else sharding.single_device()
    outcome = train(experiment(workdir, num_steps, delay, name), workdir, mesh=mesh)
    about = {"step": outcome.step, "stopped": outcome.stopped}
    (workdir / f"outcome_{jax.process_index()}.json").write_text(json.dumps(about))
    if outcome.stopped is None and jax.process_count() == 1:
        np.savez(workdir / "final.npz", **toys.leaves(outcome.state))
    return 0 if outcome.stopped is None else 130


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]))

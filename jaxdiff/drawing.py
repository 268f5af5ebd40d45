"""A run opened for sampling with the options of the command line: experiment, weights, compiled samplers.

`evaluate`, `compare`, `sample` and `freeze` draw through it. What is drawn is decided by its arguments alone; nothing
is printed but warnings and a progress bar.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxdiff import runs
from jaxdiff.generate import Dials, Generate, batches, compiled, labels_for, place, to_host, whole_batch
from jaxdiff.settings import UsageError, first_line
from jaxdiff.solvers.named import NamedSolver
from jaxdiff.training import loop, sharding
from jaxdiff.training.checkpoint import as_path

Plan = tuple[NamedSolver | None, int | None]


class Drawing:
    """A run opened for sampling with the options of the command line: experiment, weights, compiled samplers.

    Making it opens the run and checks the options; `load` reads the weights and checks what will be drawn.
    """

    def __init__(self, args: argparse.Namespace):
        self.experiment = runs.open_run(args.run_folder, args.experiment)
        runs.average_name(self.experiment, args.ema)
        labels_for(1, self.experiment.num_classes, args.label)
        if args.guidance is not None and self.experiment.num_classes is None:
            raise UsageError(f"--guidance needs classes, {self.experiment.name} has none; leave --guidance out")
        dials = (args.guidance, getattr(args, "eta", None))
        self.dials = Dials(*(None if value is None else jnp.float32(value) for value in dials))
        self.args, self.batch_size = args, args.batch_size or 256
        self._samplers: dict[Plan, Generate] = {}

    def load(self, plans: Sequence[Plan]) -> None:
        """Reads the weights of the newest checkpoint, and traces what is planned: what does not fit fails here."""
        use_cache()
        self.mesh = sharding.make_mesh()
        loaded = runs.weights_of(self.experiment, self.args.run_folder, self.args.ema, self.mesh)
        self.params, self.aux, self.step, self.average = loaded
        self.what = f"{self.experiment.name}, step {self.step}, parameters {self.average}"
        noise = jax.ShapeDtypeStruct((1, *self.experiment.sample_shape), np.float32)
        labels = labels_for(1, self.experiment.num_classes, self.args.label)
        cond = {} if labels is None else {"label": jax.ShapeDtypeStruct((1,), np.int32)}
        # A step costs the same trace whatever the number of steps, so only the longest grid of a solver is tried.
        longest = {plan[0]: plan for plan in sorted(plans, key=lambda plan: plan[1] or 0)}
        for solver, steps in longest.values():
            try:
                generate = self._compiled(solver, steps)
                jax.eval_shape(generate, self.params, self.aux, jax.random.key(0), noise, cond, self.dials)
            except ValueError as error:
                which = "" if solver is None else f" and solver {solver.name}"
                asked = f"{self.experiment.name} cannot be sampled with {steps or 'the usual number of'} steps{which}"
                raise UsageError(f"{asked}: {first_line(error)}") from error
        warn(runs.changed(as_path(self.args.run_folder), runs.source_of(self.args.run_folder, self.args.experiment)))

    def parts(
        self, solver: NamedSolver | None, steps: int | None, num: int, *, quiet: bool = False
    ) -> tuple[Iterator[np.ndarray], np.ndarray | None]:
        """Samples batch by batch, and the labels of all of them."""
        args, experiment = self.args, self.experiment
        labels = labels_for(num, experiment.num_classes, args.label)
        drawn = batches(
            self._sampler(solver, steps), self.params, self.aux, shape=experiment.sample_shape, labels=labels, num=num,
            batch_size=self.batch_size, seed=args.seed, dials=self.dials, mesh=self.mesh,
        )  # fmt: skip
        total = -(-num // whole_batch(num, self.batch_size, self.mesh))
        silent = quiet or not sys.stderr.isatty()
        return iter(tqdm(drawn, total=total, desc="sampling", unit="batch", disable=silent)), labels

    def from_noise(
        self, solver: NamedSolver | None, steps: int | None, noise: np.ndarray, cond: dict[str, np.ndarray], seed: int
    ) -> np.ndarray:
        """What becomes of noise [B, ...]; seed is of what the sampler draws on the way, if anything."""
        given = {name: place(rows, self.mesh) for name, rows in {"noise": noise, **cond}.items()}
        key, start = jax.random.key(seed), given.pop("noise")
        return to_host(self._sampler(solver, steps)(self.params, self.aux, key, start, given, self.dials))

    def _sampler(self, solver: NamedSolver | None, steps: int | None) -> Generate:
        if (solver, steps) not in self._samplers:
            self._samplers[solver, steps] = self._compiled(solver, steps)
        return self._samplers[solver, steps]

    def _compiled(self, solver: NamedSolver | None, steps: int | None) -> Generate:
        experiment = self.experiment
        return compiled(
            experiment.method, solver=solver, num_steps=steps, mesh=self.mesh, partition=experiment.partition
        )

    def draw(
        self, solver: NamedSolver | None, steps: int | None, num: int, *, quiet: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Samples [num, ...] and their labels."""
        parts, labels = self.parts(solver, steps, num, quiet=quiet)
        return np.concatenate(list(parts)), labels

    def about(self, solver: NamedSolver | None, steps: int | None) -> dict[str, Any]:
        """What made a set of samples, for `evaluations.jsonl`; None is the method's own choice."""
        made = {"what": self.what, "sampler": None if solver is None else solver.name, "steps": steps}
        made["calls"] = None if solver is None or steps is None else solver.calls(steps)
        made |= {"guidance": self.args.guidance, "eta": getattr(self.args, "eta", None), "class": self.args.label}
        return made | {"seed": self.args.seed, "time": time.strftime("%Y-%m-%d %H:%M:%S")}


def use_cache() -> None:
    """Keeps compiled programs in JAX_COMPILATION_CACHE_DIR or the user's cache folder, if that can be written."""
    chosen = jax.config.values["jax_compilation_cache_dir"]
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    try:
        loop.enable_compilation_cache(Path(chosen) if chosen else Path(caches) / "jaxdiff")
    except ValueError as error:
        warn(f"{error}, with JAX_COMPILATION_CACHE_DIR; going on without a cache")


def warn(text: str | None) -> None:
    """Prints a warning on standard error; None is none."""
    if text:
        print(f"warning: {text}", file=sys.stderr)

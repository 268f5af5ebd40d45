"""What the commands of the command line do, one function each; `cli.py` reads their arguments.

Each checks everything that can be wrong before it starts to work, prints what it did, and returns an exit code.
"""

import argparse
import json
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

from jaxdiff import info as costs
from jaxdiff import pictures, runs
from jaxdiff.evaluation import BITS, FLOOR_SUBSETS, Evaluation, check_metrics, mean, table
from jaxdiff.generate import Dials, Generate, batches, compiled, labels_for, whole_batch
from jaxdiff.metrics.evaluate import METRICS, Reference, Result
from jaxdiff.metrics.evaluate import evaluate as evaluate_samples
from jaxdiff.settings import UsageError, first_line, hint
from jaxdiff.solvers.named import NamedSolver, named_solver
from jaxdiff.training import loop, sharding
from jaxdiff.training.experiment import Experiment

GRID_IMAGES = 64
Plan = tuple[NamedSolver | None, int | None]


def train(file: str, workdir: Path, pairs: list[str], mesh: dict[str, int]) -> int:
    """`jaxdiff train`: trains, or goes on from the newest checkpoint of the workdir."""
    experiment = runs.experiment_from(file, pairs)
    runs.check_workdir(workdir)
    mesh_of_run = sharding.make_mesh(mesh.get("data", -1), mesh.get("fsdp", 1), mesh.get("tensor", 1))
    changed = runs.changed(workdir, file)

    def open_workdir():
        _warn(changed)
        runs.write_record(workdir, file, experiment)

    use_cache()
    hook = preview(experiment, workdir)
    outcome = loop.train(experiment, workdir, mesh=mesh_of_run, on_sample=hook, on_open=open_workdir)
    return 0 if outcome.stopped is None else 130


def preview(experiment: Experiment, workdir: Path) -> loop.SampleHook | None:
    """A hook that writes `samples/STEP.png`: the same noise every time, so that pictures can be compared.

    Returns:
      The hook, or None where examples make no picture (latents, text).
    """
    if not pictures.drawable(experiment.sample_shape):
        return None
    generate = compiled(experiment.method, num_steps=experiment.preview_steps)
    labels = labels_for(GRID_IMAGES, experiment.num_classes)

    def hook(state, step):
        averages = list(state.ema.values())
        params = {**state.params, **(averages[-1] if averages else {})}
        parts = batches(
            generate, params, state.aux, shape=experiment.sample_shape, labels=labels, num=GRID_IMAGES,
            batch_size=GRID_IMAGES,
        )  # fmt: skip
        picture = pictures.picture(np.concatenate(list(parts)))
        pictures.save_png(workdir / "samples" / f"{step:08d}.png", picture)

    return hook


def sample(args: argparse.Namespace) -> int:
    """`jaxdiff sample`: draws samples and writes them where `--out` says."""
    out, plan = Path(args.out), (_solver(args), args.steps)
    drawn = Drawing(args)
    try:
        pictures.check_target(out, drawn.experiment.sample_shape, overwrite=args.overwrite)
    except ValueError as error:
        raise UsageError(f"--out {error}") from error
    drawn.load([plan])
    parts, labels = drawn.parts(*plan, args.num)
    count = pictures.save_samples(out, parts, labels)
    print(f"{count} samples of {drawn.what} in {out}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """`jaxdiff evaluate`: prints a line per metric and appends them to `evaluations.jsonl` of the run."""
    solver = _solver(args)
    names = _names("--metrics", args.metrics, (*METRICS, BITS))
    drawn = Drawing(args)
    evaluation = evaluation_of(drawn.experiment)
    names, num = names or evaluation.metrics, args.num or evaluation.num
    of_samples = [name for name in names if name != BITS]
    if BITS in names:
        evaluation.require_bits()
    drawn.load([(solver, args.steps)])
    results: dict[str, Result] = {}
    if of_samples:
        reference = _reference(evaluation, drawn.experiment, of_samples, num)
        samples, labels = drawn.draw(solver, args.steps, num)
        results |= evaluate_samples(samples, labels, reference, of_samples)
    if BITS in names:
        results[BITS] = evaluation.bits_per_dim(drawn.params, num, seed=args.seed)
    about = drawn.about(solver, args.steps)
    options = ", ".join(
        f"{name} {value}" for name, value in about.items() if name not in ("what", "time") and value is not None
    )
    print(f"{drawn.what}; {options}")
    for result in results.values():
        print(f"  {result}")
    _append(Path(args.run_folder) / "evaluations.jsonl", about, results)
    return 0


def compare(args: argparse.Namespace) -> int:
    """`jaxdiff compare`: a table of quality against network calls, `compare.md`, and a grid of the samplers."""
    solvers = [named_solver(name) for name in _names("--solvers", args.solvers, None)]
    calls = None if args.calls is None else numbers(args.calls)
    drawn = Drawing(args)
    evaluation = evaluation_of(drawn.experiment)
    solvers = solvers or [named_solver(name) for name in evaluation.solvers]
    plan = [(solver, solver.steps(most)) for solver in solvers for most in calls or evaluation.calls]
    names, num, folder = evaluation.metrics, args.num or evaluation.num, Path(args.run_folder)
    drawn.load([*plan, (None, None)])
    reference = _reference(evaluation, drawn.experiment, names, num)
    floor = evaluation.floor(reference, names, num)
    rows = [_row("real training images", "", next(iter(floor.values())).n, floor, names)]
    strips = []
    for solver, steps in tqdm(plan, desc="samplers", disable=not sys.stderr.isatty()):
        results: dict[str, Result] = {}
        try:
            samples, labels = drawn.draw(solver, steps, num * evaluation.sets, quiet=True)
        except FloatingPointError as error:
            _warn(f"{solver.name}, {steps} steps: {error}")
        else:
            sets = [slice(i * num, (i + 1) * num) for i in range(evaluation.sets)]
            judged = (
                evaluate_samples(samples[s], labels if labels is None else labels[s], reference, names) for s in sets
            )
            results = mean(list(judged))
            strips.append(samples[: min(drawn.experiment.num_classes or 8, 16)])
        rows.append(_row(solver.name, solver.calls(steps), num, results, names))
        if not sys.stderr.isatty():
            values = " ".join(f"{name} {result.value:.4g}" for name, result in results.items()) or "not finite"
            print(f"{solver.name}, {solver.calls(steps)} network calls: {values}", file=sys.stderr)
        _append(folder / "evaluations.jsonl", drawn.about(solver, steps), results)
    sets = f" A row is the mean of {evaluation.sets} sets of {num} samples." if evaluation.sets > 1 else ""
    text = f"{table(rows)}\n\n{drawn.what}, seed {args.seed}.{sets} {_note(floor)}\n"
    (folder / "compare.md").write_text(text)
    print(text)
    grid, _ = drawn.draw(None, None, GRID_IMAGES, quiet=True)
    pictures.save_png(folder / "grid.png", pictures.picture(grid))
    if strips:
        pictures.save_png(folder / "compare.png", pictures.picture(np.concatenate(strips), len(strips[0])))
    print(f"wrote {folder / 'compare.md'}, {folder / 'compare.png'} (a row a sampler) and {folder / 'grid.png'}")
    return 0


def info(file: str, pairs: list[str], mesh: dict[str, int]) -> int:
    """`jaxdiff info`: prints what an experiment costs."""
    experiment = runs.experiment_from(file, pairs)
    print(costs.describe(experiment, costs.info(experiment, mesh), mesh))
    return 0


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
        eta = getattr(args, "eta", None)
        self.dials = Dials(*(None if value is None else jnp.float32(value) for value in (args.guidance, eta)))
        self.args = args
        self._samplers: dict[Plan, Generate] = {}

    def load(self, plans: Sequence[Plan]) -> None:
        """Reads the weights of the newest checkpoint, and traces what is planned: what does not fit fails here."""
        use_cache()
        self.mesh = sharding.make_mesh()
        loaded = runs.weights_of(self.experiment, self.args.run_folder, self.args.ema, self.mesh)
        self.params, self.aux, step, average = loaded
        self.what = f"{self.experiment.name}, step {step}, parameters {average}"
        noise = jax.ShapeDtypeStruct((1, *self.experiment.sample_shape), np.float32)
        labels = labels_for(1, self.experiment.num_classes, self.args.label)
        cond = {} if labels is None else {"label": jax.ShapeDtypeStruct((1,), np.int32)}
        # A step costs the same trace whatever the number of steps, so only the longest grid of a solver is tried.
        longest = {plan[0]: plan for plan in sorted(plans, key=lambda plan: plan[1] or 0)}
        for solver, steps in longest.values():
            try:
                generate = compiled(self.experiment.method, solver=solver, num_steps=steps)
                jax.eval_shape(generate, self.params, self.aux, jax.random.key(0), noise, cond, self.dials)
            except ValueError as error:
                which = "" if solver is None else f" and solver {solver.name}"
                asked = f"{self.experiment.name} cannot be sampled with {steps or 'the usual number of'} steps{which}"
                raise UsageError(f"{asked}: {first_line(error)}") from error
        _warn(runs.changed(Path(self.args.run_folder), runs.source_of(self.args.run_folder, self.args.experiment)))

    def parts(
        self, solver: NamedSolver | None, steps: int | None, num: int, *, quiet: bool = False
    ) -> tuple[Iterator[np.ndarray], np.ndarray | None]:
        """Samples batch by batch, and the labels of all of them."""
        args, experiment = self.args, self.experiment
        labels = labels_for(num, experiment.num_classes, args.label)
        if (solver, steps) not in self._samplers:
            self._samplers[solver, steps] = compiled(experiment.method, solver=solver, num_steps=steps)
        drawn = batches(
            self._samplers[solver, steps], self.params, self.aux, shape=experiment.sample_shape, labels=labels, num=num,
            batch_size=args.batch_size, seed=args.seed, dials=self.dials, mesh=self.mesh,
        )  # fmt: skip
        total = -(-num // whole_batch(num, args.batch_size, self.mesh))
        silent = quiet or not sys.stderr.isatty()
        return iter(tqdm(drawn, total=total, desc="sampling", unit="batch", disable=silent)), labels

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


def evaluation_of(experiment: Experiment) -> Evaluation:
    """The experiment's evaluation.

    Raises:
      UsageError: if it has none.
    """
    if not isinstance(experiment.evaluation, Evaluation):
        raise UsageError(
            f"experiment {experiment.name} names nothing to evaluate against; give it evaluation=Evaluation(...)"
        )
    return experiment.evaluation


def numbers(text: str) -> tuple[int, ...]:
    """`50,20,1` as (50, 20, 1)."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isdecimal() or int(part) < 1:
            raise UsageError(f"--calls takes whole numbers of at least 1, got {part!r}; write --calls 50,20,10,1")
    return tuple(int(part) for part in parts)


def use_cache() -> None:
    """Keeps compiled programs in JAX_COMPILATION_CACHE_DIR or the user's cache folder, if that can be written."""
    chosen = jax.config.values["jax_compilation_cache_dir"]
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    try:
        loop.enable_compilation_cache(Path(chosen) if chosen else Path(caches) / "jaxdiff")
    except ValueError as error:
        _warn(f"{error}, with JAX_COMPILATION_CACHE_DIR; going on without a cache")


def _names(option: str, text: str | None, known: Any) -> tuple[str, ...]:
    """The names of a comma-separated list; empty if the option was not given."""
    if text is None:
        return ()
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise UsageError(f"{option} is empty, expected names with commas between them; leave it out for the usual ones")
    for name in names if known else ():
        if name not in known:
            raise UsageError(f"unknown metric {name!r}; {hint(name, known)}")
    return names


def _solver(args: argparse.Namespace) -> NamedSolver | None:
    solver = None if args.solver is None else named_solver(args.solver)
    if args.eta is not None and not (solver and solver.takes_eta):
        got = "the method's own solver" if solver is None else f"solver {solver.name}"
        raise UsageError(f"--eta has no effect on {got}; leave it out, or add --solver ddim")
    return solver


def _reference(evaluation: Evaluation, experiment: Experiment, names: Sequence[str], num: int) -> Reference:
    reference = evaluation.reference()
    shape = reference.images.shape[1:]
    if shape != experiment.sample_shape:
        raise UsageError(
            f"samples are {list(experiment.sample_shape)}, {evaluation.name} is {list(shape)}; "
            "evaluate against images of the same shape"
        )
    check_metrics(names, reference, num, experiment.num_classes)
    return reference


def _row(name: str, calls: Any, num: int, results: dict[str, Result], names: Sequence[str]) -> dict[str, Any]:
    values = {metric: results[metric].value if metric in results else float("nan") for metric in names}
    return {"sampler": name, "calls": calls, "n": num, **values}


def _note(floor: dict[str, Result]) -> str:
    first = next(iter(floor.values()))
    text = f"Reference {first.reference}, extractor {first.extractor}. The first row is the floor: real training images"
    text += " in the place of samples"
    subsets = [f"{name} {r.settings.rpartition(', ')[2]}" for name, r in floor.items() if "subsets" in r.settings]
    if subsets:
        text += f", the mean of {FLOOR_SUBSETS} random subsets ({'; '.join(subsets)})"
    alone = [name for name in floor if METRICS[name].against == "train"]
    return text + (f". {alone[0]} is there that of the held-out images." if alone else ".")


def _append(path: Path, about: dict[str, Any], results: dict[str, Result]) -> None:
    with path.open("a") as file:
        for result in results.values():
            values = result._asdict() | {"value": result.value if np.isfinite(result.value) else None}
            file.write(json.dumps(about | values) + "\n")


def _warn(text: str | None) -> None:
    if text:
        print(f"warning: {text}", file=sys.stderr)

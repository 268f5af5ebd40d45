"""What the commands of the command line do, one function each; `cli.py` reads their arguments.

Each checks everything that can be wrong before it starts to work, prints what it did, and returns an exit code.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxdiff import pictures
from jaxdiff.evaluation import Evaluation, table
from jaxdiff.generate import Dials, batches, compiled, labels_for
from jaxdiff.metrics.evaluate import METRICS, Result
from jaxdiff.metrics.evaluate import evaluate as evaluate_samples
from jaxdiff.runs import experiment_from, open_run, weights_of, write_record
from jaxdiff.settings import UsageError, hint
from jaxdiff.solvers.named import NamedSolver, named_solver
from jaxdiff.training import loop, sharding
from jaxdiff.training.experiment import Experiment

GRID_IMAGES = 64


def train(file: str, workdir: Path, pairs: list[str], mesh: dict[str, int]) -> int:
    """`jaxdiff train`: trains, or goes on from the newest checkpoint of the workdir."""
    experiment = experiment_from(file, pairs)
    mesh_of_run = sharding.make_mesh(**mesh)
    loop.enable_compilation_cache(cache_folder())
    record = workdir / "run.json"
    known = record.exists()
    hook = preview(experiment, workdir)
    workdir_was_empty = not workdir.exists() or not any(workdir.iterdir())
    if workdir_was_empty or known:
        outcome = loop.train(
            experiment, workdir, mesh=mesh_of_run, on_sample=hook, on_open=lambda: write_record(workdir, file, experiment)
        )
    else:
        raise UsageError(f"workdir {workdir} is not empty and not a run of jaxdiff; choose another folder")
    return 0 if outcome.stopped is None else 130


def preview(experiment: Experiment, workdir: Path) -> loop.SampleHook:
    """A hook that writes `samples/STEP.png`: the same noise every time, so that pictures can be compared."""
    generate = compiled(experiment.method, num_steps=experiment.preview_steps)
    labels = labels_for(GRID_IMAGES, experiment.num_classes)

    def hook(state, step):
        averages = list(state.ema.values())
        params = {**state.params, **(averages[-1] if averages else {})}
        samples = np.concatenate(
            list(
                batches(
                    generate, params, state.aux, shape=experiment.sample_shape, labels=labels, num=GRID_IMAGES,
                    batch_size=GRID_IMAGES,
                )
            )
        )  # fmt: skip
        pictures.save_png(workdir / "samples" / f"{step:08d}.png", pictures.picture(samples))

    return hook


def sample(args: Any) -> int:
    """`jaxdiff sample`: draws samples and writes them where `--out` says."""
    out = Path(args.out)
    if out.suffix not in (".png", ".npz", ""):
        raise UsageError(f"--out {out} has an unknown ending; use .png, .npz or a folder name")
    if out.exists() and not args.overwrite and (out.is_file() or any(out.iterdir())):
        raise UsageError(f"--out {out} exists; choose another name or add --overwrite")
    drawn = Drawing(args)
    samples, labels = drawn.draw(drawn.solver, args.steps, args.num)
    pictures.save_samples(out, samples, labels)
    print(f"{len(samples)} samples of {drawn.what} in {out}")
    return 0


def evaluate(args: Any) -> int:
    """`jaxdiff evaluate`: prints a line per metric and appends them to `evaluations.jsonl` of the run."""
    drawn = Drawing(args)
    evaluation = evaluation_of(drawn.experiment)
    names = metric_names(args.metrics, evaluation)
    num = args.num or evaluation.num
    reference = evaluation.reference()
    samples, labels = drawn.draw(drawn.solver, args.steps, num)
    results = evaluate_samples(samples, labels, reference, names)
    print(f"{drawn.what}, seed {args.seed}")
    for result in results.values():
        print(f"  {result}")
    about = {"what": drawn.what, "seed": args.seed, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    _append(Path(args.run_folder) / "evaluations.jsonl", about, results)
    return 0


def compare(args: Any) -> int:
    """`jaxdiff compare`: a table of quality against network calls, `compare.md`, and a grid of the samplers."""
    drawn = Drawing(args)
    evaluation = evaluation_of(drawn.experiment)
    calls = numbers(args.calls) if args.calls else evaluation.calls
    solvers = [named_solver(name.strip()) for name in (args.solvers.split(",") if args.solvers else evaluation.solvers)]
    num = args.num or evaluation.num
    folder = Path(args.run_folder)
    reference = evaluation.reference()
    floor = evaluation.floor(reference, evaluation.metrics, num)
    n_floor = min(num, len(evaluation.train()))
    rows = [_row("real training images", "", n_floor, floor)]
    strips = []
    plan = [(solver, solver.steps(most)) for solver in solvers for most in calls]
    for solver, steps in tqdm(plan, desc="samplers", disable=not sys.stderr.isatty()):
        samples, labels = drawn.draw(solver, steps, num, quiet=True)
        results = evaluate_samples(samples, labels, reference, evaluation.metrics)
        rows.append(_row(solver.name, solver.calls(steps), num, results))
        strips.append(samples[: drawn.experiment.num_classes or 8])
        _append(folder / "evaluations.jsonl", {"what": rows[-1]["sampler"], "calls": rows[-1]["calls"]}, results)
    first = next(iter(floor.values()))
    note = (
        f"{drawn.what}. Reference {first.reference}, extractor {first.extractor}, seed {args.seed}. "
        "The first row is the floor: real training images in the place of samples."
    )
    text = f"{table(rows)}\n\n{note}\n"
    (folder / "compare.md").write_text(text)
    print(text)
    pictures.save_png(folder / "compare.png", pictures.picture(np.concatenate(strips), len(strips[0])))
    grid, _ = drawn.draw(None, None, GRID_IMAGES, quiet=True)
    pictures.save_png(folder / "grid.png", pictures.picture(grid))
    print(f"wrote {folder / 'compare.md'}, {folder / 'compare.png'} (a row a sampler) and {folder / 'grid.png'}")
    return 0


class Drawing:
    """A run opened for sampling with the options of the command line: experiment, weights, compiled samplers."""

    def __init__(self, args: Any):
        for name, low in (("num", 1), ("steps", 1), ("batch_size", 1)):
            value = getattr(args, name, None)
            if value is not None and value < low:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
        self.solver = _solver(getattr(args, "solver", None))
        self.experiment = open_run(args.run_folder, args.experiment)
        labels_for(1, self.experiment.num_classes, args.label)
        loop.enable_compilation_cache(cache_folder())
        self.mesh = sharding.make_mesh()
        self.params, self.aux, step, average = weights_of(self.experiment, args.run_folder, args.ema, self.mesh)
        self.what = f"{self.experiment.name}, step {step}, parameters {average}"
        self.args = args

    def draw(
        self, solver: NamedSolver | None, steps: int | None, num: int, *, quiet: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Samples [num, ...] and their labels."""
        args, experiment = self.args, self.experiment
        eta, guidance = getattr(args, "eta", None), args.guidance
        dials = Dials(*(None if v is None else np.float32(v) for v in (guidance, eta)))
        labels = labels_for(num, experiment.num_classes, args.label)
        generate = compiled(experiment.method, solver=solver, num_steps=steps)
        batch_size = args.batch_size or min(num, 256)
        parts = batches(
            generate, self.params, self.aux, shape=experiment.sample_shape, labels=labels, num=num,
            batch_size=batch_size, seed=args.seed, dials=dials, mesh=self.mesh,
        )  # fmt: skip
        silent = quiet or not sys.stderr.isatty()
        done = list(tqdm(parts, total=-(-num // batch_size), desc="sampling", unit="batch", disable=silent))
        return np.concatenate(done), labels


def evaluation_of(experiment: Experiment) -> Evaluation:
    """The experiment's evaluation.

    Raises:
      UsageError: if it has none.
    """
    if not isinstance(experiment.evaluation, Evaluation):
        raise UsageError(f"experiment {experiment.name} says nothing to evaluate against; give it evaluation=Evaluation(...)")
    return experiment.evaluation


def metric_names(text: str | None, evaluation: Evaluation) -> tuple[str, ...]:
    """The metrics of a comma-separated list, or the experiment's."""
    if text is None:
        return evaluation.metrics
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in METRICS:
            raise UsageError(f"unknown metric {name!r}; {hint(name, METRICS)}")
    if not names:
        raise UsageError(f"--metrics is empty; choose from: {', '.join(METRICS)}")
    return names


def numbers(text: str) -> tuple[int, ...]:
    """`50,20,1` as (50, 20, 1)."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isdigit() or int(part) < 1:
            raise UsageError(f"--calls takes whole numbers of at least 1, got {part!r}; write --calls 50,20,10,1")
    return tuple(int(part) for part in parts)


def cache_folder() -> Path:
    """Where compiled programs are kept: JAX_COMPILATION_CACHE_DIR, or the user's cache folder."""
    chosen = jax.config.jax_compilation_cache_dir
    return Path(chosen) if chosen else Path.home() / ".cache" / "jaxdiff"


def _solver(name: str | None) -> NamedSolver | None:
    return None if name in (None, "default") else named_solver(name)


def _row(name: str, calls: Any, num: int, results: dict[str, Result]) -> dict[str, Any]:
    return {"sampler": name, "calls": calls, "n": num} | {metric: r.value for metric, r in results.items()}


def _append(path: Path, about: dict[str, Any], results: dict[str, Result]) -> None:
    with path.open("a") as file:
        for result in results.values():
            file.write(json.dumps(about | result._asdict()) + "\n")

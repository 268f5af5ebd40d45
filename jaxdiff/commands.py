"""What the commands of the command line do, one function each; `cli.py` reads their arguments.

Each checks everything that can be wrong before it starts to work, prints what it did, and returns an exit code.
"""

import argparse
import collections
import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxdiff import frozen, inspection, pictures, profiling, runs
from jaxdiff import info as costs
from jaxdiff.data.pairs import check_folder, make_pairs, write_pairs
from jaxdiff.drawing import Drawing, use_cache, warn
from jaxdiff.evaluation import BITS, FLOOR_SUBSETS, Evaluation, check_metrics, mean, table
from jaxdiff.generate import batches, compiled, labels_for, whole_batch
from jaxdiff.metrics.evaluate import METRICS, Reference, Result
from jaxdiff.metrics.evaluate import evaluate as evaluate_samples
from jaxdiff.settings import UsageError, hint, mesh_sizes
from jaxdiff.solvers.named import NamedSolver, named_solver
from jaxdiff.training import distributed, loop, sharding
from jaxdiff.training.checkpoint import as_path
from jaxdiff.training.experiment import Experiment

GRID_IMAGES = 64
FROZEN = ".jaxdiff"


def open_devices(cpu_devices: int | None, mode: Literal["auto", "off"]) -> None:
    """Sets the number of CPU devices and joins other processes; must come before anything touches a device."""
    if cpu_devices is not None:
        try:
            jax.config.update("jax_num_cpu_devices", cpu_devices)
        except RuntimeError:  # the devices are there already, in a notebook or a test
            if jax.local_device_count() != cpu_devices:
                raise UsageError(
                    f"--cpu-devices {cpu_devices} comes too late, {jax.local_device_count()} are in use; leave it out"
                ) from None
    distributed.start(mode)


def train(file: str, workdir: str, pairs: list[str], mesh: dict[str, int]) -> int:
    """`jaxdiff train`: trains, or goes on from the newest checkpoint of the workdir."""
    experiment = runs.experiment_from(file, pairs)
    folder = as_path(workdir)
    runs.check_workdir(folder)
    mesh_of_run = _mesh(mesh)
    changed = runs.changed(folder, file)

    def open_workdir():
        warn(changed)
        runs.write_record(folder, file, experiment)

    use_cache()
    hook = preview(experiment, folder, mesh_of_run)
    outcome = loop.train(experiment, workdir, mesh=mesh_of_run, on_sample=hook, on_open=open_workdir)
    return 0 if outcome.stopped is None else 130


def preview(experiment: Experiment, workdir: Any, mesh: Mesh) -> loop.SampleHook | None:
    """A hook that writes `samples/STEP.png`: the same noise every time, so that pictures can be compared.

    All processes draw, process 0 writes.

    Returns:
      The hook, or None where examples make no picture (latents, text).
    """
    if not pictures.drawable(experiment.sample_shape):
        return None
    generate = compiled(
        experiment.method, num_steps=experiment.preview_steps, mesh=mesh, partition=experiment.partition
    )
    labels = labels_for(GRID_IMAGES, experiment.num_classes)

    def hook(state, step):
        averages = list(state.ema.values())
        params = {**state.params, **(averages[-1] if averages else {})}
        parts = batches(
            generate, params, state.aux, shape=experiment.sample_shape, labels=labels, num=GRID_IMAGES,
            batch_size=GRID_IMAGES, mesh=mesh,
        )  # fmt: skip
        samples = np.concatenate(list(parts))
        if jax.process_index() == 0:
            pictures.save_png(workdir / "samples" / f"{step:08d}.png", pictures.picture(samples))

    return hook


def sample(args: argparse.Namespace) -> int:
    """`jaxdiff sample`: draws samples and writes them where `--out` says."""
    if Path(args.run_folder).suffix == FROZEN:
        return _sample_frozen(args)
    out, plan = Path(args.out), (_solver(args), args.steps)
    drawn = Drawing(args)
    _check_out(out, drawn.experiment.sample_shape, args.overwrite)
    drawn.load([plan])
    parts, labels = drawn.parts(*plan, args.num)
    if not _leads():
        collections.deque(parts, maxlen=0)  # all processes draw, one writes
        return 0
    count = pictures.save_samples(out, parts, labels)
    print(f"{count} samples of {drawn.what} in {out}")
    return 0


def pairs(args: argparse.Namespace) -> int:
    """`jaxdiff pairs`: noise, and what a deterministic sampler makes of it, in a folder that a reflow reads."""
    solver = None if args.solver is None else named_solver(args.solver)
    out, plan = Path(args.out), (solver, args.steps)
    try:
        check_folder(out)
    except ValueError as error:
        raise UsageError(f"--out {error}") from error
    drawn = Drawing(args)
    classes, shape = drawn.experiment.num_classes, drawn.experiment.sample_shape
    drawn.load([plan])

    def labels(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
        if classes is None:
            return {}
        random = rng.integers(0, classes, n).astype(np.int32)
        return {"label": random if args.label is None else np.full(n, args.label, np.int32)}

    def generate(noise: np.ndarray, cond: dict[str, np.ndarray], seed: int = 0) -> np.ndarray:
        return drawn.from_noise(*plan, noise, cond, seed)

    size = whole_batch(args.num, drawn.batch_size, drawn.mesh)
    made = {"shape": shape, "num": args.num, "batch_size": size, "seed": args.seed, "cond": labels}
    first = next(make_pairs(generate, **made))
    if (first["x0"] != next(make_pairs(functools.partial(generate, seed=1), **made))["x0"]).any():
        raise UsageError(
            f"{drawn.experiment.name} makes different samples of the same noise with this solver, which no flow can "
            "learn; choose a deterministic one, such as --solver heun or ddim"
        )
    total = -(-args.num // size)
    chunks = iter(tqdm(make_pairs(generate, **made), total=total, desc="pairs", unit="batch", disable=None))
    if not _leads():
        collections.deque(chunks, maxlen=0)  # all processes draw, one writes
        return 0
    count = write_pairs(out, chunks, args.dtype)
    print(f"{count} pairs of {drawn.what} in {out}")
    return 0


def _sample_frozen(args: argparse.Namespace) -> int:
    for option in ("steps", "solver", "ema", "experiment"):
        if getattr(args, option) is not None:
            raise UsageError(f"--{option} is fixed in a frozen sampler; leave it out, or freeze another one")
    out, sampler = Path(args.out), frozen.load(args.run_folder)
    about = sampler.about
    _check_out(out, tuple(about["sample_shape"]), args.overwrite)
    use_cache()
    parts = frozen.run(
        sampler, args.num, seed=args.seed, label=args.label, guidance=args.guidance, eta=args.eta,
        batch_size=args.batch_size,
    )  # fmt: skip
    count = pictures.save_samples(out, parts, labels_for(args.num, about["num_classes"], args.label))
    print(f"{count} samples of {about['experiment']}, step {about['step']}, parameters {about['average']} in {out}")
    return 0


def _check_out(out: Path, shape: tuple[int, ...], overwrite: bool) -> None:
    try:
        pictures.check_target(out, shape, overwrite=overwrite)
    except ValueError as error:
        raise UsageError(f"--out {error}") from error


def freeze(args: argparse.Namespace) -> int:
    """`jaxdiff freeze`: writes a sampler and its weights into one file."""
    out, solver = Path(args.out), None if args.solver is None else named_solver(args.solver)
    if out.suffix != FROZEN:
        raise UsageError(f"--out {out} ends in {out.suffix!r}, expected {FROZEN}; write {out.with_suffix(FROZEN)}")
    if out.exists() and not args.overwrite:
        raise UsageError(f"--out {out} exists; choose another name or add --overwrite")
    drawn = Drawing(args)
    drawn.load([(solver, args.steps)])
    sampler = frozen.freeze(
        drawn.experiment, drawn.params, drawn.aux, solver=solver, num_steps=args.steps, batch_size=args.batch_size,
        step=drawn.step, average=drawn.average,
    )  # fmt: skip
    frozen.save(sampler, out, overwrite=args.overwrite)
    print(f"{drawn.what}, {out.stat().st_size / 1e6:.1f} MB, for {', '.join(sampler.about['platforms'])} in {out}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """`jaxdiff evaluate`: prints a line per metric and appends them to `evaluations.jsonl` of the run."""
    solver = _solver(args)
    names = _names("--metrics", args.metrics, (*METRICS, BITS))
    drawn = Drawing(args)
    evaluation = evaluation_of(drawn.experiment, args.inception)
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
    if not _leads():
        return 0
    about = drawn.about(solver, args.steps)
    options = ", ".join(
        f"{name} {value}" for name, value in about.items() if name not in ("what", "time") and value is not None
    )
    print(f"{drawn.what}; {options}")
    for result in results.values():
        print(f"  {result}")
    _append(as_path(args.run_folder) / "evaluations.jsonl", about, results)
    return 0


def compare(args: argparse.Namespace) -> int:
    """`jaxdiff compare`: a table of quality against network calls, `compare.md`, and a grid of the samplers."""
    solvers = [named_solver(name) for name in _names("--solvers", args.solvers, None)]
    calls = None if args.calls is None else numbers(args.calls)
    drawn = Drawing(args)
    evaluation = evaluation_of(drawn.experiment, args.inception)
    solvers = solvers or [named_solver(name) for name in evaluation.solvers]
    plan = [(solver, solver.steps(most)) for solver in solvers for most in calls or evaluation.calls]
    names, num, folder = evaluation.metrics, args.num or evaluation.num, as_path(args.run_folder)
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
            warn(f"{solver.name}, {steps} steps: {error}")
        else:
            sets = [slice(i * num, (i + 1) * num) for i in range(evaluation.sets)]
            judged = (
                evaluate_samples(samples[s], labels if labels is None else labels[s], reference, names) for s in sets
            )
            results = mean(list(judged))
            strips.append(samples[: min(drawn.experiment.num_classes or 8, 16)])
        rows.append(_row(solver.name, solver.calls(steps), num, results, names))
        if not _leads():
            continue
        if not sys.stderr.isatty():
            values = " ".join(f"{name} {result.value:.4g}" for name, result in results.items()) or "not finite"
            print(f"{solver.name}, {solver.calls(steps)} network calls: {values}", file=sys.stderr)
        _append(folder / "evaluations.jsonl", drawn.about(solver, steps), results)
    grid, _ = drawn.draw(None, None, GRID_IMAGES, quiet=True)
    if not _leads():
        return 0
    sets = f" A row is the mean of {evaluation.sets} sets of {num} samples." if evaluation.sets > 1 else ""
    text = f"{table(rows)}\n\n{drawn.what}, seed {args.seed}.{sets} {_note(floor)}\n"
    (folder / "compare.md").write_text(text)
    print(text)
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


def profile(args: argparse.Namespace) -> int:
    """`jaxdiff profile`: measures the train step and a step of the sampler."""
    experiment = runs.experiment_from(args.file, args.set)
    rows = profiling.profile(experiment, _mesh(mesh_sizes(args.mesh)), steps=args.steps, trace=args.trace)
    print(profiling.json_lines(rows) if args.json else profiling.describe(rows))
    return 0


def checkpoint(args: argparse.Namespace) -> int:
    """`jaxdiff checkpoint inspect|verify`: prints what checkpoints hold, or whether they are sound."""
    if args.action == "inspect":
        print(inspection.inspect(args.folder))
        return 0
    text, sound = inspection.verify(args.folder, args.step)
    print(text)
    return 0 if sound else 2


def evaluation_of(experiment: Experiment, inception: str | None = None) -> Evaluation:
    """The experiment's evaluation, by its own extractor or by the Inception network of a weight file.

    Raises:
      UsageError: if it has none.
      ValueError: if the file holds no Inception weights.
    """
    if not isinstance(experiment.evaluation, Evaluation):
        raise UsageError(
            f"experiment {experiment.name} names nothing to evaluate against; give it evaluation=Evaluation(...)"
        )
    if inception is None:
        return experiment.evaluation
    from jaxdiff.metrics.inception import inception_extractor
    from jaxdiff.pretrained.perceptual import load_inception

    params = load_inception(inception)
    return dataclasses.replace(experiment.evaluation, extractor=lambda: inception_extractor(params))


def numbers(text: str) -> tuple[int, ...]:
    """`50,20,1` as (50, 20, 1)."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isdecimal() or int(part) < 1:
            raise UsageError(f"--calls takes whole numbers of at least 1, got {part!r}; write --calls 50,20,10,1")
    return tuple(int(part) for part in parts)


def _leads() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def _mesh(sizes: dict[str, int]) -> Mesh:
    if not sizes:
        return sharding.usual_mesh()
    return sharding.make_mesh(sizes.get("data", -1), sizes.get("fsdp", 1), sizes.get("tensor", 1))


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
    reference = evaluation.reference(sharding.make_mesh(devices=jax.local_devices()))
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


def _append(path: Any, about: dict[str, Any], results: dict[str, Result]) -> None:
    values = [r._asdict() | {"value": r.value if np.isfinite(r.value) else None} for r in results.values()]
    before = path.read_text() if path.exists() else ""  # a bucket's objects are written whole
    path.write_text(before + "".join(json.dumps(about | value) + "\n" for value in values))

"""The ladder: one teacher, every method that makes it generate in few steps, one table.

`python scripts/ladder.py` (or `make ladder`) trains what is missing in --runs, two runs side by side, each on one
core; judges every run at 1, 2 and 4 network calls beside the teacher at 50; and writes docs/ladder.md and its pictures.
A run that was cut short goes on where it stopped. What a row is made of stands in ROWS: an experiment of this
repository and its settings. CPU seconds are those of the training processes, compilation included.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "experiments"
TEACHER = "digits_edm.py"
CALLS = (1, 2, 4)
TEACHER_CALLS = (50, 4, 2, 1)
NUM = 1536
METRICS = ("frechet", "kernel", "accuracy", "nearest", "recall")
GRID = 10
CORES = itertools.cycle(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else None


class Row(NamedTuple):
    """A method of the ladder.

    Attributes:
      name: of its runs, NAME-SEED.
      label: in the table.
      file: its experiment.
      settings: of the experiment.
      calls: of the network, at which it is judged; none for a stage that only leads to another row.
      steps: {calls: step}, of the checkpoints that are judged where it is not the last one, as of earlier rounds.
      before: name of the row whose run of the same seed takes the teacher's place.
    """

    name: str
    label: str
    file: str
    settings: dict[str, Any] = {}
    calls: tuple[int, ...] = CALLS
    steps: dict[int, int] = {}
    before: str = ""


PAIRS = {"num_pairs": 4096, "pair_steps": 12, "num_steps": 1200}
ROWS = (
    Row("cd", "consistency distillation", "digits_consistency.py"),
    Row(
        "ct",
        "consistency training",
        "digits_consistency.py",
        {"distil": False, "end_levels": 96, "target_ema": 0.9, "huber": 0.01, "lr": 5e-4, "num_steps": 2300},
    ),
    Row("ict", "improved consistency training", "digits_improved_consistency.py"),
    Row("ect", "easy consistency tuning", "digits_easy_consistency.py", calls=(1, 2)),
    Row("scd", "continuous-time distillation (sCD)", "digits_continuous_consistency.py"),
    Row(
        "sct",
        "continuous-time training (sCT)",
        "digits_continuous_consistency.py",
        {"distil": False, "num_steps": 4000},
    ),
    Row("pd", "progressive distillation", "digits_progressive.py", steps={2: 2700, 4: 1800}),
    Row("guided-first", "", "digits_guided_distillation.py", {"first": True, "num_steps": 500}, calls=()),
    Row(
        "guided", "guided distillation", "digits_guided_distillation.py", steps={2: 1200, 4: 800}, before="guided-first"
    ),
    Row("lcm", "latent consistency distillation, on pixels", "digits_lcm.py"),
    Row("ufogen", "UFOGen", "digits_ufogen.py"),
    Row("ddgan", "denoising diffusion GAN", "digits_ddgan.py", calls=(4, 2, 1)),
    Row("siddm", "SIDDM", "digits_siddm.py", calls=(4, 2, 1)),
    Row("dmd2", "DMD2", "digits_dmd2.py", calls=(1,)),
    Row("flow", "1-rectified flow", "digits_rectified_flow.py", {"first": True, "num_steps": 1200}),
    Row("flow-distilled", "1-rectified flow, distilled", "digits_rectified_flow.py", {"distil": True, **PAIRS},
        calls=(1,), before="flow"),
    Row("reflow", "2-rectified flow", "digits_rectified_flow.py", PAIRS, before="flow"),
    Row("reflow-distilled", "2-rectified flow, distilled", "digits_rectified_flow.py", {"distil": True, **PAIRS},
        calls=(1,), before="reflow"),
)  # fmt: skip


ABLATIONS = (
    Row("ufogen-blind", "UFOGen without reconstruction", "digits_ufogen.py", {"reconstruction_weight": 0.0}, (1,)),
    Row("ufogen-scratch", "UFOGen from random weights", "digits_ufogen.py", {"from_scratch": True}, (1,)),
    Row("ufogen-posterior", "UFOGen with posterior sampling", "digits_ufogen.py", {"posterior": True}, (1,)),
    Row("ufogen-chain", "UFOGen along a chain", "digits_ufogen.py", {"chain": True}, (1,)),
    Row("ufogen-chain-posterior", "UFOGen along a chain with posterior sampling", "digits_ufogen.py",
        {"chain": True, "posterior": True}, (1,)),
    Row("ufogen-no-r1", "UFOGen without R1", "digits_ufogen.py", {"r1_weight": 0.0}, (1,)),
    Row("ddgan-no-r1", "denoising diffusion GAN without R1", "digits_ddgan.py", {"r1_gamma": 0.0}, (4, 2, 1)),
    Row("siddm-marginal", "SIDDM without auxiliary forward diffusion", "digits_siddm.py", {"forward_weight": 0.0},
        (4, 2, 1)),
    Row("siddm-no-regressor", "SIDDM without its regressor", "digits_siddm.py", {"regressor": False}, (4, 2, 1)),
    Row("reflow-twice", "3-rectified flow", "digits_rectified_flow.py", PAIRS, before="reflow"),
)  # fmt: skip
ALL = (*ROWS, *ABLATIONS)
WHOLE = ("ufogen", "ddgan", "siddm", "flow", "reflow")  # what stands beside them


def main() -> int:
    """Trains, judges, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ladder", help="folder of all runs")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="names of rows, comma-separated")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one core each")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "ladder.md")
    parser.add_argument("--note", default="", help="a sentence for the page, such as what the machine did besides")
    parser.add_argument("--no-train", action="store_true", help="judge what is there")
    args = parser.parse_args()
    names = [name for name in args.only.split(",") if name]
    if unknown := sorted(set(names) - {row.name for row in ALL}):
        print(f"error: unknown row {unknown[0]!r}; rows are {', '.join(row.name for row in ALL)}", file=sys.stderr)
        return 2
    rows = [row for row in ALL if not names or row.name in names]
    seeds = [int(seed) for seed in args.seeds.split(",")]
    teacher = args.runs / "teacher"
    planned = [
        (row, seed, args.runs / f"{row.name}-{seed}")
        for seed in seeds
        for row in rows
        if row not in ABLATIONS or seed == seeds[0]
    ]
    if not args.no_train:
        train(teacher, EXPERIMENTS / TEACHER, {})
        locks = {f"{row.name}-{seed}": threading.Lock() for seed in seeds for row in ALL}
        with concurrent.futures.ThreadPoolExecutor(args.jobs, initializer=own_core) as pool:
            list(pool.map(lambda p: train_row(p[0], p[1], args.runs, locks), planned))
    report(teacher, [run for run in planned if run[0].calls], args.out, args.note)
    return 0


def own_core() -> None:
    """Keeps this thread, and the processes it starts, to the next core in turn, where the system can (Linux)."""
    if CORES is not None:
        os.sched_setaffinity(0, {next(CORES)})


def train_row(row: Row, seed: int, folder: Path, locks: dict[str, threading.Lock]) -> Path:
    """Trains the run of a row, after the one it starts from; returns its folder."""
    run = folder / f"{row.name}-{seed}"
    teacher = train_row(_row_of(row.before), seed, folder, locks) if row.before else folder / "teacher"
    with locks[run.name]:  # two rows may start from one
        train(run, EXPERIMENTS / row.file, {"teacher": teacher, "seed": seed, **row.settings})
    return run


def train(folder: Path, file: Path, values: dict[str, Any]) -> None:
    """Trains a run, or the rest of it, and adds up its CPU seconds in `cost.json`."""
    record = folder.with_suffix(".cost.json")
    cost = json.loads(record.read_text()) if record.is_file() else {"cpu_s": 0.0, "wall_s": 0.0, "done": False}
    if cost["done"]:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "jaxdiff.cli", "train", str(file), "--workdir", str(folder), "--cpu-devices", "1"]
    for name, value in values.items():
        command += ["--set", f"{name}={value}"]
    threads = {"OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    start = time.monotonic()
    with open(folder.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | threads, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    cost["cpu_s"] += usage.ru_utime + usage.ru_stime
    cost["wall_s"] += time.monotonic() - start
    cost["done"] = process.returncode == 0
    record.write_text(json.dumps(cost))
    if not cost["done"]:
        raise SystemExit(
            f"error: {' '.join(command)} ended with {process.returncode}; see {folder.with_suffix('.log')}"
        )
    print(f"{folder.name}: {cost['cpu_s']:.0f} CPU s", flush=True)


def judge(
    folder: Path, calls: tuple[int, ...], solver: str | None, steps: dict[int, int] | None = None
) -> dict[str, dict[str, float]]:
    """{calls: {metric: value}} of a run, kept in `judged.json`, with a strip of samples for each number of calls."""
    import jax
    import numpy as np

    from jaxdiff import runs
    from jaxdiff.evaluation import Evaluation
    from jaxdiff.generate import batches, compiled, labels_for
    from jaxdiff.metrics.evaluate import evaluate
    from jaxdiff.solvers.named import named_solver
    from jaxdiff.training import sharding

    kept = folder.with_suffix(".judged.json")
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    if all(set(METRICS) <= set(found.get(str(n), {})) for n in calls):
        return found
    experiment, mesh = runs.open_run(folder), sharding.make_mesh(devices=jax.local_devices()[:1])
    assert isinstance(experiment.evaluation, Evaluation)
    reference, labels = experiment.evaluation.reference(), labels_for(NUM, experiment.num_classes)
    for n in calls:
        params, aux, _, _ = runs.weights_of(experiment, folder, None, mesh, step=(steps or {}).get(n))
        named = None if solver is None else named_solver(solver)
        generate = compiled(experiment.method, solver=named, num_steps=n if named is None else named.steps(n))
        parts = batches(
            generate, params, aux, shape=experiment.sample_shape, labels=labels, num=NUM, batch_size=256, mesh=None
        )
        samples = np.concatenate(list(parts))
        results = evaluate(samples, labels, reference, METRICS)
        found[str(n)] = {name: float(result.value) for name, result in results.items()}
        np.save(folder.with_suffix(f".{n}.npy"), samples[:GRID])
        kept.write_text(json.dumps(found))
        print(folder.name, n, {name: round(value, 4) for name, value in found[str(n)].items()}, flush=True)
    return found


def floor() -> dict[str, float]:
    """What real training images score against the held-out ones."""
    from jaxdiff.settings import build_experiment

    experiment, _ = build_experiment(EXPERIMENTS / TEACHER, [])
    evaluation = experiment.evaluation
    results = evaluation.floor(evaluation.reference(), METRICS, NUM)
    return {name: float(result.value) for name, result in results.items()}


def report(teacher: Path, planned: list[tuple[Row, int, Path]], out: Path, note: str) -> None:
    """Judges all runs and writes the page and its pictures."""
    best = judge(teacher, TEACHER_CALLS, "ddim")
    real, scale = floor(), best["50"]["frechet"]
    cost = json.loads(teacher.with_suffix(".cost.json").read_text())["cpu_s"]
    lines = [_row("real training images", "", [real], scale, "")]
    lines += [_row("teacher, DDIM", n, [best[str(n)]], scale, f"{cost:.0f}") for n in TEACHER_CALLS]
    curves: dict[str, dict[int, float]] = {"teacher, DDIM": {n: best[str(n)]["frechet"] for n in TEACHER_CALLS}}
    rows, ablated = {row.name: row for row, _, _ in planned}, []
    for row in rows.values():
        folders = [folder for other, _, folder in planned if other.name == row.name]
        done = [folder for folder in folders if _done(folder)]
        if not done:
            continue
        judged = [judge(folder, row.calls, None, row.steps) for folder in done]
        seconds = f"{statistics.median(_cost(row, folder) for folder in done):.0f}"
        judged_rows = [_row(row.label, n, [j[str(n)] for j in judged], scale, seconds) for n in row.calls]
        if row in ABLATIONS or row.name in WHOLE:
            ablated += judged_rows
        if row in ABLATIONS:
            continue
        lines += judged_rows
        curves[row.label] = {n: statistics.median(j[str(n)]["frechet"] for j in judged) for n in row.calls}
    head = [
        "method",
        "calls",
        "seeds",
        "Frechet",
        "over teacher at 50",
        "kernel",
        "accuracy",
        "nearest",
        "recall",
        "CPU s",
    ]
    top = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    table = "\n".join([*top, *lines])
    any_part = any(row in ABLATIONS and _done(folder) for row, _, folder in planned)
    parts = PARTS.format(table="\n".join([*top, *ablated])) if any_part else ""
    planned = [run for run in planned if run[0] not in ABLATIONS]
    images = out.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    _plot(curves, real["frechet"], images / "ladder.png")
    _grid(teacher, planned, images / "ladder_samples.png")
    _health(planned, images / "ladder_health.png")
    out.write_text(PAGE.format(table=table, parts=parts, num=NUM, note=f"\n{note}\n" if note else ""))
    print(table, parts, sep="\n")


def _done(folder: Path) -> bool:
    record = folder.with_suffix(".cost.json")
    return record.is_file() and json.loads(record.read_text())["done"]


def _row_of(name: str) -> Row:
    return next(row for row in ALL if row.name == name)


def _cost(row: Row, folder: Path) -> float:
    """CPU seconds of a run and of those it starts from."""
    own = json.loads(folder.with_suffix(".cost.json").read_text())["cpu_s"]
    if not row.before:
        return own
    seed = folder.name.removeprefix(f"{row.name}-")
    return own + _cost(_row_of(row.before), folder.with_name(f"{row.before}-{seed}"))


def _row(label: str, calls: Any, judged: list[dict[str, float]], scale: float, seconds: str) -> str:
    def cell(name: str, digits: int) -> str:
        values = [j[name] for j in judged]
        middle = f"{statistics.median(values):.{digits}f}"
        return middle if len(values) < 2 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    ratio = statistics.median(j["frechet"] for j in judged) / scale
    cells = [label, calls, len(judged), cell("frechet", 3), f"{ratio:.2f}", cell("kernel", 4), cell("accuracy", 3)]
    return f"| {' | '.join(map(str, [*cells, cell('nearest', 3), cell('recall', 3), seconds]))} |"


def _plot(curves: dict[str, dict[int, float]], real: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for place, (label, points) in enumerate(curves.items()):
        calls, color = sorted(points), matplotlib.colormaps["tab20"](place % 20)
        style = {"color": "black", "linewidth": 2} if label.startswith("teacher") else {"color": color}
        axes.plot(calls, [points[n] for n in calls], marker="o", label=label, **style)
    axes.axhline(real, color="grey", linestyle=":", label="real training images")
    axes.set(xscale="log", yscale="log", xlabel="network calls", ylabel="Frechet distance to held-out digits")
    axes.set_xticks([1, 2, 4, 50], ["1", "2", "4", "50"])
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _of_first_seed(planned: list[tuple[Row, int, Path]]) -> dict[str, tuple[Row, Path]]:
    """{name: (row, its first run)} in the order of the table."""
    first: dict[str, tuple[Row, Path]] = {}
    for row, _, folder in planned:
        first.setdefault(row.name, (row, folder))
    return first


def _grid(teacher: Path, planned: list[tuple[Row, int, Path]], path: Path) -> None:
    """A row of samples for the teacher at 50 calls and for each method at one."""
    import numpy as np

    from jaxdiff import pictures

    first = _of_first_seed(planned)
    strips = [teacher.with_suffix(".50.npy")] + [
        folder.with_suffix(f".{row.calls[0]}.npy") for row, folder in first.values()
    ]
    samples = np.concatenate([np.load(strip) for strip in strips if strip.is_file()])
    pictures.save_png(path, pictures.picture(samples, GRID))


def _health(planned: list[tuple[Row, int, Path]], path: Path) -> None:
    """Loss and gradient norm of one run of each method: what a normal run looks like."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = {name: run for name, run in _of_first_seed(planned).items() if (run[1] / "metrics.jsonl").is_file()}
    figure, axes = pyplot.subplots(2, max(len(first), 1), figsize=(2.2 * max(len(first), 1), 4), squeeze=False)
    for column, (row, folder) in enumerate(first.values()):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for place, name in enumerate(("model/loss", "model/grad_norm")):
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            axes[place][column].plot(*zip(*points, strict=True), linewidth=0.8)
            axes[place][column].set_title(f"{row.name}: {name.split('/')[1]}", fontsize=7)
            axes[place][column].tick_params(labelsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


PAGE = """# The ladder

From 50 network calls to one, on the embedded 8x8 digits: one EDM teacher (`experiments/digits_edm.py`), every method
trained from it on one core of a CPU, judged alike. `make ladder` trains what is missing and writes this page; a row is
an experiment of `experiments/digits_*.py`.

{table}

Frechet distance to the 360 held-out images with the classifier's features, n = {num} samples in equal classes; kernel
distance, classifier accuracy, distance to the nearest training image and recall (k = 3) beside it, since each of them
alone misleads. The first row is what real training images score. Medians over the seeds of the student, with the
range; the teacher is one.
CPU seconds are of one training process, compilation included; a row that starts from another counts that one's, too.
{note}
![quality against calls](images/ladder.png)

The pictures below are the first seed's: the teacher at 50 calls, then each method in the order of the table at its
first number of calls.

![samples](images/ladder_samples.png)

Loss and gradient norm of a normal run. A consistency loss says little by itself: it compares neighbours on a grid that
may be refined while training, and a distance that falls to zero at once means that the network answers with a constant.

![health](images/ladder_health.png)
{parts}"""
PARTS = """
## What the parts are worth

Methods without one of the parts that their papers rest on, one seed each, beside the whole method on its seeds, whose
range says how much one seed is worth. A flow's number is one more than that of its reflows. UFOGen compares what comes
of pure noise at 0.1, 0.3 and 0.7, where a sample of the posterior is nearly a fresh one; along a chain it compares
neighbours among 20, 2.4, 0.7, 0.3 and 0.1 only, as diffusion GANs do.

{table}
"""


if __name__ == "__main__":
    sys.exit(main())

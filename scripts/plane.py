"""The plane: one teacher, every method that makes it generate in few steps, on a mixture with a known density.

`python scripts/plane.py` trains a small teacher and every row of ROWS for every seed, in this process and through the
library's own train step; judges one step of each beside the teacher at 50 steps and at one; and writes docs/plane.md
and its picture. What is done is kept in --runs, by row and seed, and done again only if its settings change. CPU
seconds are `time.process_time`, compilation included. `consistency_decoder` decodes latents and has no row.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from jaxdiff import losses, schedules
from jaxdiff import parameterization as parameterizations
from jaxdiff.data import toy
from jaxdiff.methods import consistency, continuous_consistency, easy_consistency, improved_consistency, lcm
from jaxdiff.methods.base import Method, Sampling
from jaxdiff.methods.edm import edm
from jaxdiff.methods.guided_distillation import guided_distillation
from jaxdiff.methods.progressive import progressive, single, vp_path
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.layers import fourier_embedding
from jaxdiff.networks.mlp import MLP
from jaxdiff.training import ema
from jaxdiff.training.state import TrainState, create_state
from jaxdiff.training.step import make_train_step
from jaxdiff.types import Params

ROOT = Path(__file__).resolve().parents[1]
MIXTURE, ABOUT = toy.gaussian_grid(5, std=0.05), "a grid of 25 Gaussians of deviation 0.05 over [-1, 1]^2"
NUM, ANGLES, SHOWN, CHUNK = 50_000, (np.arange(64) + 0.5) * np.pi / 64, 1500, 250
SCALE: dict[str, Any] = {"sigma_data": 0.7089, "sigma_max": 10.0}
POINTS: dict[str, Any] = {**SCALE, "clip": None}
PATH, BETAS = schedules.cosine(-4.6, 12.0), schedules.scaled_linear_betas(1000)
FASTEST = 4.0  # radians; faster waves of the time make the derivative in it rough
EMBEDDING = functools.partial(fourier_embedding, fastest=FASTEST)
MODULE = MLP(2, 64, time_features=EMBEDDING, num_classes=2, null_label=True)
NET, FORWARD = as_network(MODULE), as_network(MODULE, forward_mode=True)
TRIG, TRIG_FORWARD = (continuous_consistency.from_edm(net, SCALE["sigma_data"]) for net in (NET, FORWARD))


class Recipe(NamedTuple):
    """Adam, its rate falling from `lr` to 0 as a cosine, gradients clipped to norm 1; `decay` is of the average."""

    steps: int
    lr: float
    decay: float = 0.999
    batch: int = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """The teacher or a method, in stages (name in BUILD, recipe, settings)."""

    name: str
    label: str
    stages: tuple[tuple[str, Recipe, dict[str, Any]], ...]


def fresh(key, batch) -> Params:
    """Random parameters."""
    return init_params(MODULE, key, batch["x0"], jnp.zeros(len(batch["x0"])), {"label": batch["label"]})


def start(params: Params, wider: bool = False):
    """`init_params` with the teacher's, and zeros for w if the student is to see that."""
    kernel = jnp.pad(params["in"]["kernel"], ((0, int(wider)), (0, 0)))
    return lambda key, batch: jax.tree.map(jnp.array, {**params, "in": {**params["in"], "kernel": kernel}})


def guided_net(params, x_t, t, cond, *, train=False, key=None):
    """The network with w as a third coordinate of its input."""
    x_t = jnp.concatenate([x_t, cond["guidance"][:, None] / 4], axis=1)
    return NET(params, x_t, t, {"label": cond["label"]}, train=train, key=key)


def meaning(schedule: schedules.Schedule) -> parameterizations.Parameterization:
    """What the teacher's output means at the times of another schedule."""

    def net_time(t):
        level = schedule.level(t)
        return jnp.log(level.sigma / level.alpha) / 4

    return parameterizations.edm(SCALE["sigma_data"], net_time)


def unlabelled(cond):
    return cond | {"label": jnp.full_like(cond["label"], 2)}


def guidance(params: Params, schedule: schedules.Schedule) -> dict[str, Any]:
    """What methods that learn guidance share."""
    how = {"teacher": NET, "teacher_params": params, "parameterization": meaning(schedule)}
    return how | {"init_params": start(params, wider=True), "null_cond": unlabelled}


def plain_scm(c: float, **settings: Any) -> Method:
    """sCM with w(t) = 0 and g / (|g| + c): with two values an example, |g| is not nearly constant as for images."""
    form = continuous_consistency.Form(continuous_consistency.unit_norm(c), continuous_consistency.no_weight)
    return continuous_consistency.scm(TRIG_FORWARD, form=form, adaptive_weight=False, **settings, **SCALE)


def doubling(first: int, last: int, steps: int, mu: float) -> consistency.Curriculum:
    """N doubles in equally long stages: it leaves the coarse grids later than the paper's root of k does."""
    levels = improved_consistency.doubling_levels(first, last, steps)
    return consistency.Curriculum(levels, consistency.fixed(2, mu).target_ema, last + 1)


BUILD = {
    "teacher": lambda _, n, **s: edm(NET, init_params=fresh, null_label=2, **s, **SCALE),
    "cd": lambda teacher, n, *, levels, mu, huber: consistency.consistency_distillation(
        NET, teacher_params=teacher, curriculum=consistency.fixed(levels, mu), distance=losses.pseudo_huber(huber),
        **POINTS
    ),
    "ct": lambda _, n, *, first, last, mu, huber: consistency.consistency_training(
        NET, init_params=fresh, curriculum=doubling(first, last, n, mu), distance=losses.pseudo_huber(huber),
        weight=lambda level: 1 / level.sigma, **POINTS
    ),
    "ccd": lambda teacher, n: consistency.continuous_time_consistency(
        FORWARD, loss=consistency.pseudo_l2, teacher_params=teacher, **POINTS
    ),
    "cct": lambda teacher, n: consistency.continuous_time_consistency(
        FORWARD, loss=consistency.pseudo_l2, init_params=start(teacher), **POINTS
    ),
    "ict": lambda _, n, *, first, last, huber, **s: improved_consistency.improved_consistency(
        NET, init_params=fresh, num_levels=improved_consistency.doubling_levels(first, last, n),
        distance=losses.pseudo_huber(huber), **s, **POINTS
    ),
    "ect": lambda teacher, n, *, stages, huber, **s: easy_consistency.easy_consistency(
        NET, init_params=start(teacher), steps_per_stage=n // stages, distance=losses.pseudo_huber(huber), **s, **SCALE
    ),
    "scd": lambda teacher, n, *, c, **s: plain_scm(c, teacher=TRIG, teacher_params=teacher, **s),
    "sct": lambda teacher, n, *, c, **s: plain_scm(c, init_params=start(teacher), **s),
    "round": lambda teacher, n, *, num_steps, w=None: progressive(
        guided_net if w else NET, teacher_params=teacher, num_steps=num_steps, head=single(meaning(PATH)),
        path=vp_path(PATH), guidance_range=w, clip=None
    ),
    "guided": lambda teacher, n, *, w: guided_distillation(
        guided_net, schedule=PATH, clip=None, guidance_range=w, **guidance(teacher, PATH)
    ),
    "lcm": lambda teacher, n, *, w, huber, **s: lcm.lcm(
        guided_net, BETAS, guidance_range=w, distance=lcm.elementwise_huber(huber), **s,
        **guidance(teacher, schedules.discrete(BETAS))
    ),
}  # fmt: skip


def rounds(**settings: Any) -> tuple[Any, ...]:
    """Progressive distillation from 32 steps, longer where the map gets harder."""
    lengths = {32: 1000, 16: 1000, 8: 2000, 4: 4000, 2: 6000, 1: 10_000}
    return tuple(("round", Recipe(steps, 1e-3, 0.995), {"num_steps": n, **settings}) for n, steps in lengths.items())


LEVELS, W = {"log_mean": -1.5, "log_std": 1.8}, {"w": (0.0, 1.0)}
TEACHER = Row("teacher", "EDM, undistilled", (("teacher", Recipe(3000, 2e-3), {"label_dropout": 0.1, **LEVELS}),))
ROWS = (
    Row("cd", "consistency distillation", (("cd", Recipe(15_000, 1e-3), {"levels": 18, "mu": 0.95, "huber": 0.03}),)),
    Row("ct", "consistency training",
        (("ct", Recipe(15_000, 1e-3), {"first": 10, "last": 640, "mu": 0.5, "huber": 0.03}),)),
    Row("ccd", "continuous-time CD", (("ccd", Recipe(15_000, 5e-4), {}),)),
    Row("cct", "continuous-time CT", (("cct", Recipe(15_000, 5e-4), {}),)),
    Row("ict", "improved consistency training",
        (("ict", Recipe(15_000, 1e-3), {"first": 10, "last": 1280, "huber": 0.03, **LEVELS}),)),
    Row("ect", "easy consistency tuning", (("ect", Recipe(15_000, 1e-3), {"stages": 10, "huber": 0.03, **LEVELS}),)),
    Row("scd", "sCD", (("scd", Recipe(15_000, 1e-3), {"c": 3.0, "warmup_steps": 500, **LEVELS}),)),
    Row("sct", "sCT", (("sct", Recipe(15_000, 1e-3), {"c": 3.0, "warmup_steps": 500, **LEVELS}),)),
    Row("pd", "progressive distillation", rounds()),
    Row("guided", "guided distillation", (("guided", Recipe(6000, 1e-3), W), *rounds(**W))),
    Row("lcm", "LCM, on points", (("lcm", Recipe(30_000, 1e-3), {"huber": 0.03, "num_ddim_steps": 200, **W}),)),
)  # fmt: skip


def train(method: Method, recipe: Recipe, seed: int) -> tuple[Params, Any]:
    """The average of the player "model" after training, and aux."""
    rate = optax.cosine_decay_schedule(recipe.lr, recipe.steps)
    optimizers = {"model": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))}
    averages, rng = (ema.warmup("ema", recipe.decay),), np.random.default_rng(1000 + seed)

    def draw(*shape: int) -> dict[str, np.ndarray]:
        points, component = MIXTURE.draw(rng, int(np.prod(shape)))
        return {"x0": points.astype(np.float32).reshape(*shape, 2), "label": (component % 2).reshape(shape)}

    state = fit(method, optimizers, averages, draw, steps=recipe.steps, batch=recipe.batch, seed=seed)
    return state.ema["ema"]["model"], state.aux


def fit(
    method: Method,
    optimizers: dict[str, optax.GradientTransformation],
    averages: tuple[ema.EMA, ...],
    draw: Callable[..., dict[str, np.ndarray]],
    *,
    steps: int,
    batch: int,
    seed: int,
) -> TrainState:
    """The state after training on what draw(*shape) gives."""
    state = create_state(method, optimizers, averages, jax.random.key(seed), draw(batch))
    step = make_train_step(method, optimizers, averages)
    # a scan, because these steps are about as short as the call of a compiled function
    chunk = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches), donate_argnums=0)
    for _ in range(steps // CHUNK):
        state, metrics = chunk(state, draw(CHUNK, batch))
        if not metrics["finite"].all():
            raise FloatingPointError(f"a loss or gradient was not finite before step {int(state.step)}")
    return state


def projected(points: np.ndarray) -> np.ndarray:
    """[len(points), angles] projections, sorted."""
    return np.sort(points @ np.stack([np.cos(ANGLES), np.sin(ANGLES)]), axis=0)


@functools.cache
def quantiles() -> np.ndarray:
    """[NUM, angles] of the mixture's projections, from 10 NUM points."""
    points = MIXTURE.draw(np.random.default_rng(1), 10 * NUM)[0]
    return projected(points).reshape(NUM, 10, len(ANGLES)).mean(axis=1)


def distance(points: np.ndarray) -> float:
    """Sliced Wasserstein-1 distance of NUM points to the mixture."""
    return float(np.abs(projected(points) - quantiles()).mean())


def settings_of(row: Row) -> Any:
    """All that a result depends on, in the form in which JSON gives it back."""
    above = [SCALE, NUM, ABOUT, MODULE.features, FASTEST] if row is TEACHER else settings_of(TEACHER)
    return json.loads(json.dumps([row.stages, above]))


def run(row: Row, seed: int, folder: Path) -> None:
    """Trains and judges a row, and keeps {"settings", "cpu_s", "1": distance, and of the teacher "50"}."""
    params: Params = {} if row is TEACHER else load_params(folder / f"teacher-{seed}.npz")
    began = time.process_time()
    for name, recipe, chosen in row.stages:
        method = BUILD[name](params, recipe.steps, **chosen)
        params, aux = train(method, recipe, seed)
    found = {"settings": settings_of(row), "cpu_s": time.process_time() - began}
    noise = jax.random.normal(jax.random.key(100 + seed), (NUM, 2))  # the same for every row of a seed
    cond, key = {"label": jnp.asarray(MIXTURE.draw(np.random.default_rng(7), NUM)[1] % 2)}, jax.random.key(seed)
    for n in (50, 1) if row is TEACHER else (1,):
        generate = functools.partial(method.generate, key=key, noise=noise, cond=cond, sampling=Sampling(num_steps=n))
        points = np.asarray(jax.jit(generate)({"model": params}, aux))
        found[str(n)] = distance(points)
        np.save(folder / f"{row.name}-{seed}.{n}.npy", points[:SHOWN])
    if row is TEACHER:
        save_params(folder / f"teacher-{seed}.npz", params)
    (folder / f"{row.name}-{seed}.json").write_text(json.dumps(found))
    scores = ", ".join(f"{n} steps {found[n]:.4f}" for n in ("50", "1") if n in found)
    print(f"{row.name} {seed}: {scores}, {found['cpu_s']:.0f} CPU s", flush=True)


def main() -> int:
    """Trains, judges, writes."""
    args = arguments("plane", str(__doc__), ROWS)
    found = results([TEACHER, *args.rows], args, settings_of, run)
    args.out.write_text(page(found, args.note))
    picture([row for row, of in found.items() if args.seeds[0] in of], args.seeds[0], args.runs, args.images)
    return 0


def arguments(name: str, doc: str, rows: Sequence[Any]) -> argparse.Namespace:
    """The command line of a script that trains small rows and writes docs/NAME.md; rows have a name each."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / name, help="folder of what is done")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="names of rows, comma-separated")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / f"{name}.md")
    parser.add_argument("--note", default="", help="a sentence for the page, such as what the machine did besides")
    parser.add_argument("--no-train", action="store_true", help="write the page of what is there")
    args = parser.parse_args()
    names = [name for name in args.only.split(",") if name]
    if unknown := sorted(set(names) - {row.name for row in rows}):
        parser.error(f"unknown row {unknown[0]!r}; rows are {', '.join(row.name for row in rows)}")
    args.rows = [row for row in rows if not names or row.name in names]
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    args.images = args.out.parent / "images"
    args.images.mkdir(parents=True, exist_ok=True)
    args.runs.mkdir(parents=True, exist_ok=True)
    return args


def results(
    rows: Sequence[Any], args: argparse.Namespace, settings_of: Callable[[Any], Any], run: Callable[..., None]
) -> dict[Any, dict[int, dict[str, Any]]]:
    """{row: {seed: what is on record}} of rows that have any; what is missing is trained, unless it shall not be."""

    def kept(row: Any, seed: int) -> dict[str, Any] | None:
        """What was made with these very settings."""
        record = args.runs / f"{row.name}-{seed}.json"
        found = json.loads(record.read_text()) if record.is_file() else {}
        return found if found.get("settings") == settings_of(row) else None

    for seed, row in itertools.product(args.seeds, rows):
        if not args.no_train and kept(row, seed) is None:
            run(row, seed, args.runs)
    found = {row: {seed: f for seed in args.seeds if (f := kept(row, seed)) is not None} for row in rows}
    return {row: of for row, of in found.items() if of}


def save_params(path: Path, params: Params) -> None:
    """Writes a tree of arrays."""
    flat: Any = traverse_util.flatten_dict(params, sep="/")
    np.savez(path, **flat)


def load_params(path: Path) -> Params:
    """The tree that `save_params` wrote."""
    with np.load(path) as flat:
        return traverse_util.unflatten_dict({name: jnp.asarray(flat[name]) for name in flat}, sep="/")


def page(found: dict[Row, dict[int, dict[str, Any]]], note: str) -> str:
    """The text of docs/plane.md."""
    teacher, lines, settings = found[TEACHER], [], []
    for row, of in found.items():
        one = [f["1"] for f in of.values()]
        ratios = [f["1"] / teacher[seed]["50"] for seed, f in of.items()]
        gains = [teacher[seed]["1"] / f["1"] for seed, f in of.items()]
        cells = [row.name, row.label, len(of), _spread(one, 4), _spread(ratios, 2), _spread(gains, 0)]
        cells.append(f"{statistics.median(f['cpu_s'] for f in of.values()):.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
        settings.append(f"- **{row.name}**: " + "; then ".join(map(_stage, row.stages)))
    true = [distance(MIXTURE.draw(np.random.default_rng(50 + i), NUM)[0]) for i in range(5)]
    best, worst = ([f[n] for f in teacher.values()] for n in ("50", "1"))
    return PAGE.format(
        about=ABOUT, num=NUM, angles=len(ANGLES), floor=_spread(true, 4), best=_spread(best, 4),
        worst=_spread(worst, 3), table="\n".join(lines), settings="\n".join(settings), jax=jax.__version__,
        width=MODULE.features, fastest=FASTEST, note=f"\n{note}\n" if note else "", **SCALE,
    )  # fmt: skip


def _spread(values: list[float], digits: int) -> str:
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _stage(stage: tuple[str, Recipe, dict[str, Any]]) -> str:
    _, recipe, chosen = stage
    numbers = {"steps": recipe.steps, "batch": recipe.batch, "lr": recipe.lr, "average": recipe.decay} | chosen
    return ", ".join(f"{name} {value}" for name, value in numbers.items())


def picture(rows: list[Row], seed: int, folder: Path, images: Path) -> None:
    """Points of the mixture, of the teacher and of one step of every method."""
    panels = {"the mixture": MIXTURE.draw(np.random.default_rng(0), SHOWN)[0]}
    panels["teacher, 50 steps"] = np.load(folder / f"teacher-{seed}.50.npy")
    panels |= {f"{row.name}, one step": np.load(folder / f"{row.name}-{seed}.1.npy") for row in rows}
    scatter(panels, images / "plane.png")


def scatter(panels: dict[str, np.ndarray], path: Path) -> None:
    """Draws {title: points} side by side, five in a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(-(-len(panels) // 5), 5, figsize=(10, 2.2 * -(-len(panels) // 5)), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, points) in zip(axes.flat, panels.items(), strict=False):
        axis.scatter(*points.T, s=1.5, linewidths=0, color="black")
        axis.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
        axis.set_title(title, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


PAGE = """# The plane

One teacher, every method that makes it generate in one step, in the plane, on
{about}.
A row trains in a minute or two on one core of a CPU. `python scripts/plane.py` trains what is missing and writes this
page; what the rows are stands in that file.

| | method | seeds | one step | over the teacher's 50 | times better than its one | CPU s |
|---|---|---|---|---|---|---|
{table}

Sliced Wasserstein-1 distance of {num} points to the mixture, over {angles} directions; as many true points
score {floor}.
The teacher, EDM with Heun's solver, scores {best} at 50 steps (99 network calls) and {worst} at one.
Medians over the seeds with their range; a seed is that of teacher, student and noise, and the noise is the same for
all rows. CPU seconds are of one core and of the method's own training. The aim is at most 1.5 times the teacher's 50,
and at least 5 times better than its one.
{note}
The parity of a component is its label, which teacher and students see. Guided distillation and LCM learn every
w = guidance_scale - 1 of their range and are judged at w = 0, as the teacher is. ct and ict start from random weights,
the other methods from the teacher's. ct is algorithm 3 with N that doubles in equally long stages and the weight
1 / sigma; scd and sct see the teacher's network through `from_edm`, normalise the tangent as g / (|g| + c) and leave
sCM's learned weight out. `consistency_decoder` decodes latents and has no
plane.

![points](images/plane.png)

Settings, with an MLP of three blocks of {width} features, waves of ln(sigma) / 4 of up to {fastest} radians,
sigma_data {sigma_data}, sigma_max {sigma_max}, and points drawn afresh at every step:

{settings}

jax {jax}.
"""


if __name__ == "__main__":
    sys.exit(main())

"""The plane: every method that makes a teacher generate in few steps, on a mixture with a known density.

`python scripts/plane.py` trains four small teachers and every row of ROWS, through the library's own train step, in
this process; judges one step of each beside its teacher at 50 steps and at one; and writes docs/plane.md and its
picture. What is done is kept in --runs, by row and seed, and is done again only if its settings change. CPU seconds
are `time.process_time`, compilation included. `consistency_decoder` decodes latents and has no row.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from jaxdiff import losses, parameterization, schedules
from jaxdiff.data import toy
from jaxdiff.methods import continuous_consistency, lcm, progressive
from jaxdiff.methods.base import Method, Sampling
from jaxdiff.methods.consistency import (
    adaptive,
    consistency_distillation,
    consistency_training,
    continuous_time_consistency,
    fixed,
    pseudo_l2,
)
from jaxdiff.methods.ddpm import ddpm
from jaxdiff.methods.easy_consistency import easy_consistency
from jaxdiff.methods.edm import edm
from jaxdiff.methods.guided_distillation import guided_distillation
from jaxdiff.methods.improved_consistency import doubling_levels, improved_consistency
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.layers import fourier_embedding
from jaxdiff.networks.mlp import MLP
from jaxdiff.solvers.ddim import ddim
from jaxdiff.training import ema
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step
from jaxdiff.types import Network, Params

ROOT = Path(__file__).resolve().parents[1]
MIXTURE, ABOUT = toy.ring(8, std=0.06), "eight Gaussians of deviation 0.06 on the unit circle"
SIGMA_DATA = 0.71
EDM = {"sigma_data": SIGMA_DATA, "sigma_max": 20.0}
BETAS = schedules.scaled_linear_betas(1000)
NUM, ANGLES = 20_000, (np.arange(64) + 0.5) * np.pi / 64
BATCH, CHUNK, WIDTH, NULL = 256, 250, 64, 2


class Recipe(NamedTuple):
    """Adam with a cosine decay from `lr` over `steps`, gradients clipped to norm 1; samples from the average."""

    steps: int
    lr: float
    decay: float = 0.999


class Teacher(NamedTuple):
    """A diffusion model: what it is, whether it sees the parity of a component as a label, its sampler."""

    label: str
    build: Callable[[], Method]
    recipe: Recipe
    classes: bool = False
    solver: Callable[..., Any] | None = None


class Row(NamedTuple):
    """A method: its stages, each (parameters of the one before, recipe, **settings) -> Method, with their settings."""

    name: str
    label: str
    teacher: str
    stages: tuple[tuple[Callable[..., Method], Recipe, dict[str, Any]], ...]


def module(classes: bool = False, **fields: Any) -> MLP:
    return MLP(out_features=2, features=WIDTH, num_classes=NULL if classes else None, null_label=classes, **fields)


def starting(net: MLP) -> Callable[..., Params]:
    """`init_params` with random numbers."""

    def init(key, batch):
        cond = {"label": batch["label"]} if net.num_classes else {}
        return init_params(net, key, batch["x0"], jnp.zeros(len(batch["x0"])), cond)

    return init


def copying(params: Params) -> Callable[..., Params]:
    """`init_params` with those of the teacher."""
    return lambda key, batch: jax.tree.map(jnp.array, params)


def seeing_guidance(net: MLP) -> Network:
    """The network with w as a third coordinate of its input."""

    def network(params, x_t, t, cond, *, train=False, key=None):
        x_t = jnp.concatenate([x_t, cond["guidance"][:, None] / 4], axis=1)
        return as_network(net)(params, x_t, t, {"label": cond["label"]}, train=train, key=key)

    return network


def widened(params: Params) -> Callable[..., Params]:
    """`init_params` for `seeing_guidance`: the teacher's, with zeros for w."""
    kernel = jnp.concatenate([params["in"]["kernel"], jnp.zeros((1, WIDTH))])
    return copying({**params, "in": {**params["in"], "kernel": kernel}})


def without_label(cond):
    return cond | {"label": jnp.full_like(cond["label"], NULL)}


LOG = module(time_features=functools.partial(fourier_embedding, fastest=16.0))
ANGLE = module(time_features=functools.partial(fourier_embedding, slowest=0.5, fastest=8.0))
COSINE = module(True, time_features=functools.partial(fourier_embedding, slowest=0.5, fastest=16.0))
CHAIN = module(True, time_features=functools.partial(fourier_embedding, slowest=0.002, fastest=0.05))

TEACHERS = {
    "edm": Teacher(
        "EDM, Heun",
        lambda: edm(as_network(LOG), init_params=starting(LOG), log_mean=-1.2, log_std=1.4, **EDM),
        Recipe(4000, 2e-3),
    ),
    "trig": Teacher(
        "TrigFlow, Heun",
        lambda: continuous_consistency.trigflow(as_network(ANGLE), init_params=starting(ANGLE), log_mean=-1.2, **EDM),
        Recipe(4000, 2e-3),
    ),
    "cosine": Teacher(
        "cosine path, v, with classes, DDIM",
        lambda: progressive.first_teacher(
            as_network(COSINE), init_params=starting(COSINE), clip=None, label_dropout=0.1, null_label=NULL
        ),
        Recipe(4000, 2e-3),
        classes=True,
    ),
    "chain": Teacher(
        "chain of 1000 steps, v, with classes, DDIM",
        lambda: ddpm(
            as_network(CHAIN), BETAS, init_params=starting(CHAIN), parameterization=parameterization.v(),
            label_dropout=0.1, null_label=NULL, clip=None,
        ),
        Recipe(4000, 2e-3),
        classes=True,
        solver=ddim,
    ),
}  # fmt: skip


def build_cd(teacher, recipe, *, levels, mu, huber):
    return consistency_distillation(
        as_network(LOG), teacher_params=teacher, curriculum=fixed(levels, mu), distance=losses.pseudo_huber(huber), **EDM
    )


def build_ct(teacher, recipe, *, first_levels, last_levels, mu, huber):
    curriculum = adaptive(first_levels, last_levels, recipe.steps, mu)
    distance = losses.pseudo_huber(huber)
    return consistency_training(
        as_network(LOG), init_params=starting(LOG), curriculum=curriculum, distance=distance, **EDM
    )


def build_continuous(teacher, recipe, *, distil):
    chosen = {"teacher_params": teacher} if distil else {"init_params": copying(teacher)}
    return continuous_time_consistency(as_network(LOG, forward_mode=True), loss=pseudo_l2, **chosen, **EDM)


def build_ict(teacher, recipe, *, first_levels, last_levels, huber, log_mean, log_std):
    return improved_consistency(
        as_network(LOG), init_params=starting(LOG), num_levels=doubling_levels(first_levels, last_levels, recipe.steps),
        distance=losses.pseudo_huber(huber), log_mean=log_mean, log_std=log_std, **EDM,
    )  # fmt: skip


def build_ect(teacher, recipe, *, q, stages, log_mean, log_std):
    return easy_consistency(
        as_network(LOG), init_params=copying(teacher), steps_per_stage=recipe.steps // stages, q=q, log_mean=log_mean,
        log_std=log_std, **EDM,
    )  # fmt: skip


def build_scm(teacher, recipe, *, distil, warmup, log_mean, log_std):
    chosen = {"teacher": as_network(ANGLE), "teacher_params": teacher} if distil else {}
    return continuous_consistency.scm(
        as_network(ANGLE, forward_mode=True), init_params=copying(teacher), log_mean=log_mean, log_std=log_std,
        warmup_steps=warmup, **chosen, **EDM,
    )  # fmt: skip


def build_pd(teacher, recipe, *, first_steps, guidance=None):
    network = as_network(COSINE) if guidance is None else seeing_guidance(COSINE)
    rounds = first_steps.bit_length() + 2  # those of two steps and of one count twice
    return progressive.progressive(
        network, teacher_params=teacher, num_steps=first_steps, round_length=recipe.steps // rounds,
        guidance_range=None if guidance is None else (0.0, guidance), clip=None,
    )  # fmt: skip


def build_guided(teacher, recipe, *, guidance):
    return guided_distillation(
        seeing_guidance(COSINE), teacher=as_network(COSINE), teacher_params=teacher, init_params=widened(teacher),
        null_cond=without_label, guidance_range=(0.0, guidance), clip=None,
    )  # fmt: skip


def build_lcm(teacher, recipe, *, guidance, huber, mu):
    return lcm.lcm(
        seeing_guidance(CHAIN), BETAS, teacher=as_network(CHAIN), teacher_params=teacher, init_params=widened(teacher),
        null_cond=without_label, guidance_range=(0.0, guidance), parameterization=parameterization.v(),
        distance=lcm.elementwise_huber(huber), target_decay=mu,
    )  # fmt: skip


LEVELS = {"log_mean": -1.2, "log_std": 1.6}
ROWS = (
    Row("cd", "consistency distillation", "edm",
        ((build_cd, Recipe(2500, 1e-3), {"levels": 18, "mu": 0.95, "huber": 0.03}),)),
    Row("ct", "consistency training", "edm",
        ((build_ct, Recipe(4000, 1e-3), {"first_levels": 2, "last_levels": 32, "mu": 0.9, "huber": 0.03}),)),
    Row("ccd", "continuous-time consistency distillation", "edm",
        ((build_continuous, Recipe(2500, 3e-4), {"distil": True}),)),
    Row("cct", "continuous-time consistency training", "edm",
        ((build_continuous, Recipe(2500, 3e-4), {"distil": False}),)),
    Row("ict", "improved consistency training", "edm",
        ((build_ict, Recipe(4000, 1e-3), {"first_levels": 10, "last_levels": 320, "huber": 0.01, **LEVELS}),)),
    Row("ect", "easy consistency tuning", "edm",
        ((build_ect, Recipe(3000, 5e-4), {"q": 2.0, "stages": 8, **LEVELS}),)),
    Row("scd", "continuous-time distillation (sCD)", "trig",
        ((build_scm, Recipe(3000, 5e-4), {"distil": True, "warmup": 500, **LEVELS}),)),
    Row("sct", "continuous-time training (sCT)", "trig",
        ((build_scm, Recipe(3000, 5e-4), {"distil": False, "warmup": 500, **LEVELS}),)),
    Row("pd", "progressive distillation", "cosine",
        ((build_pd, Recipe(4000, 1e-3, 0.99), {"first_steps": 32}),)),
    Row("guided", "guided distillation", "cosine",
        ((build_guided, Recipe(2000, 2e-3), {"guidance": 2.0}),
         (build_pd, Recipe(4000, 1e-3, 0.99), {"first_steps": 16, "guidance": 2.0}))),
    Row("lcm", "latent consistency distillation, on points", "chain",
        ((build_lcm, Recipe(3000, 1e-3), {"guidance": 2.0, "huber": 0.03, "mu": 0.95}),)),
)  # fmt: skip


def train(method: Method, recipe: Recipe, seed: int, classes: bool) -> tuple[Params, Any]:
    """Parameters after training (the average of the player "model") and aux."""
    rate = optax.cosine_decay_schedule(recipe.lr, recipe.steps)
    optimizers = {"model": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))}
    averages, rng = (ema.warmup("ema", recipe.decay),), np.random.default_rng(1000 + seed)

    def draw(*shape: int) -> dict[str, np.ndarray]:
        points, component = MIXTURE.draw(rng, int(np.prod(shape)))
        batch = {"x0": points.astype(np.float32).reshape(*shape, 2)}
        return batch | ({"label": (component % 2).reshape(shape)} if classes else {})

    state = create_state(method, optimizers, averages, jax.random.key(seed), draw(BATCH))
    step = make_train_step(method, optimizers, averages)
    # a scan, because these steps are shorter than the call of a compiled function
    chunk = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches), donate_argnums=0)
    for _ in range(recipe.steps // CHUNK):
        state, metrics = chunk(state, draw(CHUNK, BATCH))
    if not metrics["finite"].all():
        raise FloatingPointError("training left the finite numbers")
    return state.ema["ema"]["model"], state.aux


def samples(method: Method, params: Params, aux: Any, seed: int, classes: bool, **sampling: Any) -> np.ndarray:
    """NUM points, of the same noise for every method of a seed."""
    noise = jax.random.normal(jax.random.key(100 + seed), (NUM, 2))
    cond = {"label": jnp.arange(NUM) % 2} if classes else {}
    chosen = Sampling(**sampling)
    draw = jax.jit(lambda params, aux: method.generate({"model": params}, aux, jax.random.key(seed), noise, cond, chosen))
    return np.asarray(draw(params, aux))


def projected(points: np.ndarray) -> np.ndarray:
    """[len(points), angles] sorted projections."""
    return np.sort(points @ np.stack([np.cos(ANGLES), np.sin(ANGLES)]), axis=0)


@functools.cache
def reference() -> np.ndarray:
    """Quantiles of the mixture in every direction, from 20 NUM points."""
    points = MIXTURE.draw(np.random.default_rng(1), 20 * NUM)[0]
    return projected(points).reshape(NUM, 20, len(ANGLES)).mean(axis=1)


def distance(points: np.ndarray) -> float:
    """Sliced Wasserstein-1 distance to the mixture."""
    return float(np.abs(projected(points) - reference()).mean())


def teacher_of(name: str, seed: int, folder: Path) -> tuple[Params, dict[str, Any]]:
    """Trains a teacher or reads it: its parameters, and {"cpu_s", "best" at 50 steps, "one" at one}."""
    spec, base = TEACHERS[name], folder / f"teacher-{name}-{seed}"
    settings = json.loads(json.dumps([spec.recipe, WIDTH, BATCH, ABOUT]))
    if (found := kept(base, settings)) is not None:
        flat = np.load(base.with_suffix(".npz"))
        return traverse_util.unflatten_dict({path: jnp.asarray(flat[path]) for path in flat}, sep="/"), found
    start, method = time.process_time(), spec.build()
    params, aux = train(method, spec.recipe, seed, spec.classes)
    found = {"settings": settings, "cpu_s": time.process_time() - start}
    draw = functools.partial(samples, method, params, aux, seed, spec.classes, solver=spec.solver)
    points = {"best": draw(num_steps=50), "one": draw(num_steps=1)}
    found |= {key: distance(value) for key, value in points.items()}
    np.savez(base.with_suffix(".npz"), **traverse_util.flatten_dict(params, sep="/"))
    np.savez(base.with_suffix(".points.npz"), **{key: value[:SHOWN] for key, value in points.items()})
    base.with_suffix(".json").write_text(json.dumps(found))
    print(f"teacher {name} {seed}: 50 steps {found['best']:.4f}, 1 step {found['one']:.4f}, {found['cpu_s']:.0f} CPU s")
    return params, found


def run(row: Row, seed: int, folder: Path) -> dict[str, Any]:
    """Trains a row with its teacher and judges one step: {"distance", "best", "one", "cpu_s"}."""
    teacher, about = teacher_of(row.teacher, seed, folder)
    base = folder / f"{row.name}-{seed}"
    stages = [[recipe, settings] for _, recipe, settings in row.stages]
    settings = json.loads(json.dumps([stages, about["settings"]]))
    if (found := kept(base, settings)) is not None:
        return found
    start, params, classes = time.process_time(), teacher, TEACHERS[row.teacher].classes
    for build, recipe, chosen in row.stages:
        method = build(params, recipe, **chosen)
        params, aux = train(method, recipe, seed, classes)
    found = {"settings": settings, "cpu_s": time.process_time() - start, "best": about["best"], "one": about["one"]}
    points = samples(method, params, aux, seed, classes, num_steps=1)
    found["distance"] = distance(points)
    np.savez(base.with_suffix(".points.npz"), one=points[:SHOWN])
    base.with_suffix(".json").write_text(json.dumps(found))
    ratios = f"{found['distance'] / found['best']:.2f} of the teacher, {found['one'] / found['distance']:.1f} times better"
    print(f"{row.name} {seed}: {found['distance']:.4f}, {ratios}, {found['cpu_s']:.0f} CPU s", flush=True)
    return found


def kept(base: Path, settings: Any) -> dict[str, Any] | None:
    """What is on record, if it was made with these settings."""
    record = base.with_suffix(".json")
    found = json.loads(record.read_text()) if record.is_file() else {}
    return found if found.get("settings") == settings else None


def main() -> int:
    """Trains, judges, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "plane", help="folder of what is done")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="names of rows, comma-separated")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "plane.md")
    args = parser.parse_args()
    names = [name for name in args.only.split(",") if name]
    if unknown := sorted(set(names) - {row.name for row in ROWS}):
        print(f"error: unknown row {unknown[0]!r}; rows are {', '.join(row.name for row in ROWS)}", file=sys.stderr)
        return 2
    args.runs.mkdir(parents=True, exist_ok=True)
    rows, seeds = [row for row in ROWS if not names or row.name in names], [int(s) for s in args.seeds.split(",")]
    done = {(row.name, seed): run(row, seed, args.runs) for seed in seeds for row in rows}
    return 0


SHOWN = 1500

if __name__ == "__main__":
    sys.exit(main())

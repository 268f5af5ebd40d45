"""The grid: 25 Gaussians in the plane, which a generator must all find. Diffusion GANs in one and in four steps.

`python scripts/grid.py` trains an EDM teacher and every row of ROWS for every seed through the library's own train
step, counts the modes that samples reach, and writes docs/grid.md and its picture. UFOGen starts from the teacher; its
row along a chain with the posterior is the failure that it mends. All networks see waves of the points beside them: a
plain MLP is slow to tell neighbouring modes apart. What is done is kept in --runs, as in plane.py.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plane

from jaxdiff import losses, parameterization, schedules
from jaxdiff.data import toy
from jaxdiff.methods import ddgan, siddm, ufogen
from jaxdiff.methods.base import Method, Sampling
from jaxdiff.methods.edm import edm
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.mlp import MLP
from jaxdiff.training import ema
from jaxdiff.types import Network, Params

STD, NUM, WIDTH, LATENT = 0.05, 10_000, 64, 4
MIXTURE = toy.gaussian_grid(5, std=STD)
SIGMA_DATA, SIGMA_MAX = 0.7089, 10.0
WAVES = (1, 2, 4, 8)  # quarters of a turn over a unit of the input
NET = MLP(2, features=WIDTH, num_blocks=3, time_features=plane.EMBEDDING)
DISC = MLP(1, features=WIDTH, num_blocks=3, time_features=plane.EMBEDDING)


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A method: settings of `build_NAME`, steps of training, Adam's rates for model and discriminator, steps judged."""

    name: str
    label: str
    method: str
    settings: dict[str, Any]
    steps: int
    rates: tuple[float, ...]
    momenta: tuple[float, float]
    calls: tuple[int, ...]
    batch: int = 256


def waves(points: jax.Array) -> jax.Array:
    """Points [B, D] and their sines and cosines [B, D (1 + 2 len(WAVES))]."""
    turned = (points[:, :, None] * (0.5 * np.pi * np.asarray(WAVES, np.float32))).reshape(len(points), -1)
    return jnp.concatenate([points, jnp.sin(turned), jnp.cos(turned)], axis=1)


def seeing_waves(net: MLP) -> Network:
    """A network of points that is given their waves, too."""
    plain = as_network(net)
    return lambda params, x_t, t, cond, **training: plain(params, waves(x_t), t, cond, **training)


def inputs(points: int = 1, latent: int = 0) -> tuple[Any, ...]:
    """Example inputs of a network that sees so many points an example."""
    return jnp.zeros((1, waves(jnp.zeros((1, 2 * points))).shape[1] + latent)), jnp.zeros(1), {}


def build_teacher(start: Params, **settings: Any) -> Method:
    """EDM from random weights."""
    return edm(
        seeing_waves(NET), init_params=lambda key, batch: init_params(NET, key, *inputs()), sigma_data=SIGMA_DATA,
        sigma_max=SIGMA_MAX, **settings,
    )  # fmt: skip


def build_ufogen(start: Params, *, pairs: list[tuple[float, float]], **settings: Any) -> Method:
    """UFOGen from the teacher; the discriminator, too, but for its last layer."""

    def init_discriminator(key, batch):
        return jax.tree.map(jnp.array, start) | {"out": init_params(DISC, key, *inputs())["out"]}

    return ufogen.ufogen(
        seeing_waves(NET), seeing_waves(DISC), schedules.ve(0.002, SIGMA_MAX),
        parameterization=parameterization.edm(SIGMA_DATA),
        init_params=lambda key, batch: jax.tree.map(jnp.array, start),
        init_discriminator=init_discriminator, jumps=ufogen.pair_jumps(pairs),
        gamma=ufogen.at_t(ufogen.signal_share), adversarial=losses.relativistic(), **settings,
    )  # fmt: skip


def generator() -> tuple[MLP, Any]:
    """A network with a latent, and it as the methods call it."""
    net = MLP(2, features=WIDTH, num_blocks=3)
    plain = as_network(net)

    def call(params, x, t, cond, **training):
        return plain(params, jnp.concatenate([waves(x), cond["z"]], 1), t, {}, **training)

    return net, call


def build_ddgan(start: Params, *, levels: Sequence[float], **settings: Any) -> Method:
    """From random weights, in a step for each of the levels sigma / alpha."""
    alphas_cumprod = 1 / (1 + np.array([0.0, *levels]) ** 2)
    net, call = generator()
    disc = MLP(1, features=WIDTH, num_blocks=3)
    plain = seeing_waves(disc)

    def judge(params, x, t, cond, **training):
        return plain(params, jnp.concatenate([x, cond["x_t"]], 1), 250 * t, {}, **training)[:, 0]

    return ddgan.ddgan(
        call, judge, init_params=lambda key, batch: init_params(net, key, *inputs(1, LATENT)),
        init_disc_params=lambda key, batch: init_params(disc, key, *inputs(2)), latent_dim=LATENT,
        betas=1 - alphas_cumprod[1:] / alphas_cumprod[:-1], adversarial=losses.relativistic(),
        parameterization=parameterization.x0(parameterization.scaled_time(250.0)), **settings,
    )  # fmt: skip


def build_siddm(start: Params, *, shift: float, **settings: Any) -> Method:
    """Four steps with a regressor, from random weights; one network is discriminator, denoiser and regressor.

    The shift of the cosine makes its quarters less noisy.
    """
    net, call = generator()
    disc = MLP(5, features=WIDTH, num_blocks=3)
    plain = seeing_waves(disc)

    def judge(params, x, t, cond, **training):
        out = plain(params, x, 1000 * t, {}, **training)
        return siddm.Verdict(out[:, 0], None, out[:, 1:3], x + out[:, 3:])

    return siddm.siddm(
        call, judge, init_params=lambda key, batch: init_params(net, key, *inputs(1, LATENT)),
        init_disc_params=lambda key, batch: init_params(disc, key, *inputs()), latent_dim=LATENT,
        schedule=schedules.cosine(shift=shift), adversarial=losses.relativistic(), **settings,
    )  # fmt: skip


BUILD = {"teacher": build_teacher, "ufogen": build_ufogen, "ddgan": build_ddgan, "siddm": build_siddm}
PAIRS = [(SIGMA_MAX, s) for s in (0.05, 0.15, 0.4, 1.0)] + [(1.0, 0.4), (0.4, 0.15), (0.15, 0.05)]
CHAIN = [(SIGMA_MAX, 5.0), (5.0, 2.0), (2.0, 1.0), (1.0, 0.4), (0.4, 0.15), (0.15, 0.05)]
UFOGEN = {"pairs": PAIRS, "reconstruction_weight": 0.1, "r1_weight": 0.01, "r1_sigma": 0.02}
TEACHER = Row("teacher", "EDM, Heun", "teacher", {"log_mean": -2.0, "log_std": 1.4}, 6000, (2e-3,), (0.9, 0.999),
    (18, 1))  # fmt: skip
ROWS = (
    Row("ufogen", "UFOGen", "ufogen", UFOGEN, 24_000, (7e-4, 2.8e-3), (0.0, 0.99), (1, 2, 4)),
    Row("posterior", "UFOGen with posterior sampling, along a chain", "ufogen",
        UFOGEN | {"pairs": CHAIN, "posterior": True}, 16_000, (5e-4, 2e-3), (0.0, 0.99), (6, 1)),
    Row("ddgan", "DDGAN", "ddgan",
        {"levels": (0.1, 0.3, 1.0, 10.0), "r1_gamma": 0.01, "r1_every": 1, "r1_sigma": 0.02}, 16_000, (5e-4, 2e-3),
        (0.0, 0.99), (4, 2, 1)),
    Row("siddm", "SIDDM", "siddm", {"shift": 2.8}, 16_000, (5e-4, 2e-3), (0.0, 0.99), (4, 2, 1)),
)  # fmt: skip


def train(row: Row, start: Params, seed: int) -> tuple[Method, Params, Any]:
    """The method, the average of its generator, and aux."""
    method, players = BUILD[row.method](start, **row.settings), ("model", "disc")
    optimizers = {
        player: optax.adam(optax.cosine_decay_schedule(lr, row.steps, 0.01), *row.momenta)
        for player, lr in zip(players, row.rates, strict=False)
    }
    rng = np.random.default_rng(1000 + seed)

    def draw(*shape: int) -> dict[str, np.ndarray]:
        points = MIXTURE.draw(rng, int(np.prod(shape)))[0]
        return {"x0": points.astype(np.float32).reshape(*shape, 2)}

    averages = (ema.warmup("ema", 0.999, players=("model",)),)
    state = plane.fit(method, optimizers, averages, draw, steps=row.steps, batch=row.batch, seed=seed)
    return method, state.ema["ema"]["model"], state.aux


def judged(points: np.ndarray) -> dict[str, float]:
    """Modes that hold at least a tenth of their share, the share of samples within 3 deviations, and of modes' mass."""
    far = np.linalg.norm(points[:, None] - MIXTURE.modes[None], axis=2)
    near = np.bincount(far.argmin(1)[far.min(1) < 3 * STD], minlength=25)
    share = near / max(near.sum(), 1)
    return {
        "modes": int((near >= len(points) / 250).sum()),
        "near": float(near.sum() / len(points)),
        "uneven": float(0.5 * np.abs(share - 1 / 25).sum()),
    }


def settings_of(row: Row) -> Any:
    """All that a result depends on, in the form in which JSON gives it back."""
    above = [STD, NUM, WIDTH, WAVES, LATENT, SIGMA_DATA, SIGMA_MAX] if row is TEACHER else settings_of(TEACHER)
    return json.loads(json.dumps([dataclasses.astuple(row), above]))


def run(row: Row, seed: int, folder: Path) -> None:
    """Trains and judges a row, and keeps {"settings", "cpu_s", number of steps: scores}."""
    start: Params = {} if row is TEACHER else plane.load_params(folder / f"teacher-{seed}.npz")
    began = time.process_time()
    method, params, aux = train(row, start, seed)
    found: dict[str, Any] = {"settings": settings_of(row), "cpu_s": time.process_time() - began}
    noise, key = jax.random.normal(jax.random.key(100 + seed), (NUM, 2)), jax.random.key(seed)
    for n in row.calls:
        generate = jax.jit(lambda params, n=n: method.generate(params, aux, key, noise, {}, Sampling(num_steps=n)))
        points = np.asarray(generate({"model": params}))
        found[str(n)] = judged(points)
        np.save(folder / f"{row.name}-{seed}.{n}.npy", points[: plane.SHOWN])
        print(f"{row.name} {seed}, {n} steps: {found[str(n)]}, {found['cpu_s']:.0f} CPU s", flush=True)
    if row is TEACHER:
        plane.save_params(folder / f"teacher-{seed}.npz", params)
    (folder / f"{row.name}-{seed}.json").write_text(json.dumps(found))


def main() -> int:
    """Trains, judges, writes."""
    args = plane.arguments("grid", str(__doc__), ROWS)
    found = plane.results([TEACHER, *args.rows], args, settings_of, run)
    args.out.write_text(page(found, args.note))
    picture(list(found), args.seeds[0], args.runs, args.images)
    return 0


def page(found: dict[Row, dict[int, dict[str, Any]]], note: str) -> str:
    """The text of docs/grid.md."""
    lines: list[str] = []
    for row, of in found.items():
        for n in row.calls:
            modes, near, uneven = ([f[str(n)][name] for f in of.values()] for name in ("modes", "near", "uneven"))
            cells = [row.name, row.label, n, len(of), _spread(modes, "d"), _spread(near, ".3f"), _spread(uneven, ".3f")]
            cells.append(f"{statistics.median(f['cpu_s'] for f in of.values()):.0f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    true = judged(MIXTURE.draw(np.random.default_rng(0), NUM)[0])
    settings = [
        f"- **{row.name}**: steps {row.steps}, batch {row.batch}, Adam's rates {row.rates} and momenta {row.momenta}, "
        f"{row.settings}"
        for row in found
    ]
    return PAGE.format(
        std=STD, num=NUM, near=f"{true['near']:.3f}", uneven=f"{true['uneven']:.3f}", table="\n".join(lines),
        settings="\n".join(settings), width=WIDTH, latent=LATENT, jax=jax.__version__,
        note=f"\n{note}\n" if note else "",
    )  # fmt: skip


def _spread(values: list[float], form: str) -> str:
    middle = f"{statistics.median_low(values):{form}}"
    return middle if len(values) < 2 else f"{middle} ({min(values):{form}} to {max(values):{form}})"


def picture(rows: list[Row], seed: int, folder: Path, images: Path) -> None:
    """Samples of every row at its first number of steps, and of the rows with several at one."""
    panels = {"the mixture": MIXTURE.draw(np.random.default_rng(0), plane.SHOWN)[0]}
    for row in rows:
        for n in sorted({row.calls[0], 1}, reverse=True):
            strip = folder / f"{row.name}-{seed}.{n}.npy"
            if strip.is_file():
                panels[f"{row.name}, {n} {'step' if n == 1 else 'steps'}"] = np.load(strip)
    plane.scatter(panels, images / "grid.png")


PAGE = """# The grid

25 Gaussians of deviation {std} on a grid over [-1, 1]^2: does a generator find them all, and in how many steps?
`python scripts/grid.py` trains what is missing and writes this page; what the rows are stands in that file.

The mixture is easier than that of SIDDM's study, whose components are a fifteenth of the spacing wide and cut at three
deviations: here they are a tenth of it wide, and not cut. Nothing is claimed for that one: it is not measured yet.

| | method | steps | seeds | modes of 25 | within 3 deviations | uneven | CPU s |
|---|---|---|---|---|---|---|---|
{table}

Of {num} samples. A mode is found if a tenth of its share of them lies within 3 deviations of it. "Uneven" is the
distance in total variation of the modes' shares from equal ones. As many true points score 25, {near} and {uneven}.
Medians over the seeds with their range; CPU seconds are of one core and of the method's own training.
{note}
UFOGen starts from the teacher; ddgan and siddm start from random weights, as in their papers, with a latent of
{latent}. `posterior` is UFOGen along a chain of neighbouring levels whose samples for the discriminator come from the
posterior given x_t, as in diffusion GANs. Its six steps find what there is, its first alone makes the mean of the data:
after the noisiest step the adversary compares little but noise. `ddgan` and `siddm` fail in one step for the same
reason. UFOGen compares pure noise's x0 at low levels at once. All have the relativistic loss, which is none of their
papers'.

![samples](images/grid.png)

Settings, with MLPs of three blocks of {width} features that see the points and their waves:

{settings}

jax {jax}.
"""


if __name__ == "__main__":
    sys.exit(main())

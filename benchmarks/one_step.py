"""What one step costs on one core of a CPU: a one-step generator's call beside its network's pass and 50 steps.

    python -m benchmarks.one_step [--rounds 7] [--images 64]

The UNet of the digits experiments, in three compiled functions that are called in turn in one process: the network's
plain pass; `generate` of UFOGen in one step, from unit noise to images, through `one_step.from_diffusion`; and 50 DDIM
steps of the teacher. Writes results/DATE_one_step.md and .json.
"""

import argparse
import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.processes import say
from benchmarks.worker import Stopwatch, one_core

CALLS = {"network": 20, "one step": 20, "50 steps": 1}


def functions_of(images: int) -> tuple[dict[str, Callable[..., Any]], tuple[Any, ...]]:
    """{name of CALLS: function of (params, noise, label)}, and arguments for them."""
    import jax
    import jax.numpy as jnp

    from jaxdiff import one_step, parameterization, schedules
    from jaxdiff.methods.base import Sampling
    from jaxdiff.methods.edm import edm
    from jaxdiff.methods.ufogen import level_jumps, ufogen
    from jaxdiff.networks.base import as_network, init_params
    from jaxdiff.networks.unet import UNet, example_inputs
    from jaxdiff.solvers.ddim import ddim

    unet = UNet(
        in_channels=1, out_channels=1, base_channels=16, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8,
        scale_shift_norm=True, num_classes=10, null_label=True,
    )  # fmt: skip
    network, schedule, meaning = as_network(unet), schedules.ve(), parameterization.edm(0.752)

    def fresh(key, batch):
        return init_params(unet, key, *example_inputs(unet))

    generator = one_step.from_diffusion(network, schedule, meaning)
    student = ufogen(
        generator.network, lambda params, x, t, cond, **training: x.mean((1, 2, 3)), generator.schedule,
        parameterization=generator.parameterization, init_params=fresh, init_discriminator=lambda key, batch: {},
        jumps=level_jumps((0.3, 0.7, schedule.t_max)),
    )  # fmt: skip
    teacher = edm(network, init_params=fresh, sigma_data=0.752)
    key = jax.random.key(0)
    fifty = Sampling(num_steps=50, solver=ddim)
    functions = {
        "network": lambda params, x, label: network(params, x, jnp.ones(images), {"label": label}),
        "one step": lambda params, x, label: student.generate(
            {"model": params}, {}, key, x, {"label": label}, Sampling()
        ),
        "50 steps": lambda params, x, label: teacher.generate({"model": params}, {}, key, x, {"label": label}, fifty),
    }
    noise = jax.random.normal(jax.random.key(1), (images, 8, 8, 1))
    return functions, (fresh(jax.random.key(2), {}), noise, jnp.arange(images, dtype=jnp.int32) % 10)


def measure(rounds: int, images: int) -> dict[str, Any]:
    """Times of the three functions, taken in turn, and what they count in FLOPs."""
    import jax

    from jaxdiff.flops import count_flops

    functions, given = functions_of(images)
    found: dict[str, Any] = {"times": {name: {"wall": [], "cpu": []} for name in functions}, "flops": {}}
    compiled = {name: jax.jit(function) for name, function in functions.items()}
    for name, function in compiled.items():
        found["flops"][name] = count_flops(jax.make_jaxpr(functions[name])(*given).jaxpr)
        jax.block_until_ready(function(*given))
    for _ in range(rounds):
        for name, function in compiled.items():
            watch = Stopwatch()
            for _ in range(CALLS[name]):
                jax.block_until_ready(function(*given))
            for unit, value in watch.read().items():
                found["times"][name][unit].append(value / CALLS[name])
    return found


def tables(found: dict[str, Any], images: int) -> list[report.Table]:
    """Seconds of a call, and products."""
    times = {f"{images} images": found["times"]}
    counted = [found["flops"][name] for name in CALLS]
    flops = [[f"{images} images"]]
    for value in counted:
        flops[0] += [f"{value / 1e9:.4g}", report.number(value / counted[0])]
    header = [""] + [cell for name in CALLS for cell in (name, "ratio")]
    return [
        report.comparison("One call: CPU seconds", times, list(CALLS), "cpu", "Median (minimum); ratios of medians."),
        report.comparison("One call: wall seconds", times, list(CALLS), "wall"),
        report.Table("Products, 10^9 FLOPs", header, flops, "Convolutions and matrix products."),
    ]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.one_step", allow_abbrev=False)
    top.add_argument("--rounds", type=int, default=7, help="turns of each function (default: 7)")
    top.add_argument("--images", type=int, default=64, help="in one call (default: 64)")
    top.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the results")
    found = top.parse_args(argv)
    for name in ("rounds", "images"):
        if getattr(found, name) < 1:
            top.error(f"--{name} must be at least 1, got {getattr(found, name)}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the page."""
    args = arguments(argv)
    one_core()
    date = datetime.date.today().isoformat()
    found = measure(args.rounds, args.images)
    about = {"date": date, **report.one_core()}
    about["command"] = f"`python -m benchmarks.one_step --rounds {args.rounds} --images {args.images}`"
    page = report.write(
        args.out, f"{date}_one_step", f"One step on one core, {date}", about, tables(found, args.images), found
    )
    say(f"written: {page}")


if __name__ == "__main__":
    main()

"""What sCM's derivative costs on one core of a CPU: a network's pass with its derivative, beside one without.

    python -m benchmarks.jvp_cpu [--rounds 7] [--only NAMES]

sCM needs dF/dt along the ODE in every step, which `continuous_consistency.network_jvp` takes by one forward-mode
derivative. A product has two products in its derivative's pass, so twice a plain pass is the least. Three functions of
each network are timed in turn in one process: the plain pass; the same pass of the functions that can be derived
(`as_network(module, forward_mode=True)`: on a CPU, attention and convolutions otherwise have backward passes of their
own, which refuse it); and the pass with the derivative. Writes results/DATE_jvp_cpu.md and .json. The train step
around it is not measured.
"""

import argparse
import datetime
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.processes import say
from benchmarks.worker import Stopwatch, one_core

PASSES = ("plain", "plain, derivable", "with derivative")
# Name: calls in one turn, so that a turn takes about as long for each.
CALLS = {"mlp": 20, "unet_8": 5, "unet_32": 2}
ABOUT = {
    "mlp": "an MLP of 256 features and 3 blocks on 512 points in the plane",
    "unet_8": "the UNet of the digits experiments, 64 images of 8 x 8",
    "unet_32": "the UNet of `workload.py` with attention, 4 images of 32 x 32",
}


def network_of(name: str) -> tuple[Any, tuple[int, ...]]:
    """The module, and the shape of its x_t."""
    from benchmarks import workload
    from benchmarks.workers.jaxdiff_unet import unet
    from jaxdiff.networks.layers import fourier_embedding
    from jaxdiff.networks.mlp import MLP
    from jaxdiff.networks.unet import UNet

    if name == "mlp":
        features = functools.partial(fourier_embedding, fastest=4.0)
        return MLP(features=256, num_blocks=3, time_features=features), (512, 2)
    if name == "unet_8":
        digits = UNet(
            in_channels=1, out_channels=1, base_channels=16, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8,
            scale_shift_norm=True,
        )  # fmt: skip
        return digits, (64, 8, 8, 1)
    return unet(), (4, workload.SIZE, workload.SIZE, workload.CHANNELS)


def passes_of(module: Any) -> dict[str, Callable[..., Any]]:
    """{name of PASSES: function of (params, u_t, t, velocity)}."""
    from jaxdiff.methods.continuous_consistency import network_jvp
    from jaxdiff.networks.base import as_network

    plain, derivable = as_network(module), as_network(module, forward_mode=True)
    functions = (
        lambda params, u_t, t, velocity: plain(params, u_t, t, {}),
        lambda params, u_t, t, velocity: derivable(params, u_t, t, {}),
        lambda params, u_t, t, velocity: network_jvp(derivable, params, u_t, t, velocity, {}),
    )
    return dict(zip(PASSES, functions, strict=True))


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Times of the three passes, taken in turn, and what they count in FLOPs.

    Returns:
      {"times", "first": {pass: {"wall": [...], "cpu": [...]}}, "flops": {pass: FLOPs}}.
    """
    import jax
    import jax.numpy as jnp

    from jaxdiff.flops import count_flops
    from jaxdiff.networks.base import init_params

    module, shape = network_of(name)
    u_key, velocity_key, t_key, key = jax.random.split(jax.random.key(0), 4)
    u_t, velocity = (jax.random.normal(k, shape) for k in (u_key, velocity_key))
    t = jax.random.uniform(t_key, shape[:1], minval=0.1, maxval=1.5)
    given = (init_params(module, key, u_t, t, {}), u_t, t, velocity)
    found: dict[str, Any] = {"times": {}, "first": {}, "flops": {}}
    compiled = {}
    for what, function in passes_of(module).items():
        found["flops"][what] = count_flops(jax.make_jaxpr(function)(*given).jaxpr)
        compiled[what] = jax.jit(function)
        watch = Stopwatch()
        jax.block_until_ready(compiled[what](*given))
        found["first"][what] = {unit: [value] for unit, value in watch.read().items()}
        found["times"][what] = {"wall": [], "cpu": []}
    same = [jnp.asarray(out[0] if isinstance(out, tuple) else out) for out in (f(*given) for f in compiled.values())]
    found["difference"] = float(max(jnp.abs(out - same[0]).max() for out in same))
    for _ in range(rounds):
        for what, function in compiled.items():
            for _ in range(CALLS[name]):
                watch = Stopwatch()
                jax.block_until_ready(function(*given))
                for unit, value in watch.read().items():
                    found["times"][what][unit].append(value)
    say(f"{name}: " + ", ".join(f"{what} {report.cell(times, 'cpu')}" for what, times in found["times"].items()))
    return found


def tables(raw: dict[str, Any]) -> list[report.Table]:
    """CPU seconds, the fastest calls, wall seconds, FLOPs, and first calls."""
    times = {name: found["times"] for name, found in raw.items()}
    about = "Median (minimum); ratios are of medians. " + "; ".join(f"{name}: {ABOUT[name]}" for name in raw) + "."
    fastest, flops = [], []
    for name, found in raw.items():
        least = [min(found["times"][what]["cpu"]) for what in PASSES]
        fastest.append([name, *(report.number(value) for value in (*least, least[2] / least[0]))])
        counted = [found["flops"][what] for what in PASSES]
        difference = f"{found['difference']:.1e}"
        flops.append([name, *(f"{value / 1e9:.3g}" for value in counted), report.number(counted[2] / counted[0]),
                      difference])  # fmt: skip
    last = f"ratio of {PASSES[2]}"
    return [
        report.comparison("One call: CPU seconds of the process", times, PASSES, "cpu", about),
        report.Table("The fastest call: CPU seconds", ["", *PASSES, last], fastest),
        report.comparison("One call: wall seconds", times, PASSES, "wall"),
        report.Table(
            "Products, 10^9 FLOPs",
            ["", *PASSES, last, "largest difference"],
            flops,
            "Convolutions and matrix products. A product of two activations, as in attention, has three in the pass "
            "with the derivative. The difference is of the outputs of the three passes.",
        ),
        report.comparison("First call: CPU seconds", {n: f["first"] for n, f in raw.items()}, PASSES, "cpu"),
    ]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.jvp_cpu", allow_abbrev=False)
    top.add_argument("--rounds", type=int, default=7, help="turns of each pass (default: 7)")
    top.add_argument("--only", default=",".join(CALLS), help=f"of {','.join(CALLS)}")
    top.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the results")
    found = top.parse_args(argv)
    if found.rounds < 1:
        top.error(f"--rounds must be at least 1, got {found.rounds}")
    found.only = found.only.split(",")
    for name in found.only:
        if name not in CALLS:
            top.error(f"--only takes {', '.join(CALLS)}, got {name!r}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measures one network after the other and writes the page, again after each of them."""
    args = arguments(argv)
    one_core()
    date = datetime.date.today().isoformat()
    raw: dict[str, Any] = {}
    for name in args.only:
        raw[name] = measure(name, args.rounds)
        about = {"date": date, **report.one_core()}
        about["command"] = f"`python -m benchmarks.jvp_cpu --rounds {args.rounds}`"
        title = f"The derivative of sCM on one core, {date}"
        say(f"written: {report.write(args.out, f'{date}_jvp_cpu', title, about, tables(raw), raw)}")


if __name__ == "__main__":
    main()

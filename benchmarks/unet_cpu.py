"""The one command for a CPU: jaxdiff beside its peers on the same small UNet, alternately in one run.

    python -m benchmarks.unet_cpu --peer diffusers=PYTHON [--peer flaxdiff=PYTHON] [--install]

Asks what a train step, a sampler step and 50 steps of DDIM take on one core, with the first calls (trace, compile)
apart; then `startup`, `two_cores` and `install_size`. Writes results/DATE_unet_cpu.md and .json. A PYTHON is the
interpreter of an environment with that peer; jaxdiff runs in the one that runs this file.
"""

import argparse
import datetime
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import install_size, report, startup, two_cores, workload
from benchmarks.processes import MODULES, Spec, Worker, alternate, say

SECTIONS = ("steps", "startup", "two_cores", "install")
COMMANDS = {"train step": ("train", 3), "sampler step": ("step", 4), "DDIM-50": ("sample", 1)}
SYSTEM = ", system malloc"


def measure(specs: Sequence[Spec], rounds: int) -> dict[str, Any]:
    """Times of every peer on one core, in turn.

    Args:
      specs: the peers. Those whose name ends with SYSTEM do not draw whole batches, to save time.
      rounds: turns of each peer for each figure.

    Returns:
      {"peers", "facts": {peer: facts}, "figures": {figure: {peer: times}}, "traces": {figure: int}, "equal": ...}.
    """
    figures: dict[str, dict[str, Any]] = {"import": {}, "build, initialise": {}}
    traces, equal = {}, None
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(spec)) for spec in specs]
        by_name = {worker.spec.name: worker for worker in workers}
        for name, worker in by_name.items():
            figures["import"][name] = worker.imported
            figures["build, initialise"][name] = worker.ask("build")
            say(f"build {name}: {figures['build, initialise'][name]}")
        if {"diffusers", "jaxdiff"} <= by_name.keys():
            with tempfile.TemporaryDirectory() as folder:
                path = str(Path(folder) / "weights.npz")
                by_name["diffusers"].ask(f"dump {path}")
                equal = by_name["jaxdiff"].ask(f"load {path}")
        for figure, (command, count) in COMMANDS.items():
            asked = [w for w in workers if command != "sample" or not w.spec.name.endswith(SYSTEM)]
            before = by_name["jaxdiff"].ask("facts").get("traces", 0)
            figures[f"first {figure}"] = alternate(asked, command, 1, 1)
            figures[figure] = alternate(asked, command, count, rounds)
            traces[figure] = by_name["jaxdiff"].ask("facts").get("traces", 0) - before
        facts = {name: worker.ask("facts") for name, worker in by_name.items()}
    return {"peers": list(by_name), "facts": facts, "figures": figures, "traces": traces, "equal": equal}


def tables(raw: dict[str, Any]) -> list[report.Table]:
    """Wall and CPU seconds with ratios to the first peer, the cost of the loop, and both kinds of malloc."""
    figures, facts = raw["figures"], raw["facts"]
    peers = [name for name in raw["peers"] if not name.endswith(SYSTEM)]
    traced = ", ".join(f"{number} for the {figure}" for figure, number in raw["traces"].items())
    notes = ["Median (minimum); ratios are of medians, to the first column."]
    notes.append("Parameters: " + ", ".join(f"{name} {facts[name].get('parameters', '?')}" for name in peers) + ".")
    notes.append(f"Times jaxdiff's network was traced: {traced}.")
    equal = raw["equal"]
    if equal and "difference" in equal:
        notes.append(
            f"With the weights of diffusers, jaxdiff's output differs by at most {equal['difference']:.1e} (largest "
            f"value {equal['largest']:.2f})."
        )
    loop = []
    for name in peers:
        one, whole = figures["sampler step"][name], figures["DDIM-50"][name]
        if "wall" in one and "wall" in whole:
            parts = [[statistics.median(times[key]) for times in (whole, one)] for key in ("wall", "cpu")]
            loop.append([name, *(report.number(many / workload.DDIM_STEPS / step) for many, step in parts)])
    found = [
        report.comparison("One core: wall seconds", figures, peers, "wall", " ".join(notes)),
        report.comparison("One core: CPU seconds of the process", figures, peers, "cpu"),
        report.Table("DDIM-50 over 50 sampler steps", ["", "wall", "CPU"], loop),
    ]
    both = [name for peer in peers for name in (peer, peer + SYSTEM) if peer + SYSTEM in facts]
    if both:  # page faults are CPU time of the process
        steps = {figure: figures[figure] for figure in ("train step", "sampler step")}
        found.append(report.comparison("Malloc of scripts/cpu.sh and of the system: CPU seconds", steps, both, "cpu"))
    return found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    known = [name for name in MODULES if name != "jaxdiff"]
    top = argparse.ArgumentParser(prog="python -m benchmarks.unet_cpu", allow_abbrev=False)
    top.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=f"one of {', '.join(known)}")
    top.add_argument("--rounds", type=int, default=4, help="turns of each peer for each figure (default: 4)")
    top.add_argument("--only", default="steps,startup,two_cores", help=f"of {','.join(SECTIONS)}")
    top.add_argument("--install", action="store_true", help="also measure a fresh installation; needs a network")
    top.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the results")
    found = top.parse_args(argv)
    found.only = found.only.split(",") + ["install"] * found.install
    for section in found.only:
        if section not in SECTIONS:
            top.error(f"--only takes {', '.join(SECTIONS)}, got {section!r}")
    if found.rounds < 1:
        top.error(f"--rounds must be at least 1, got {found.rounds}")
    found.pythons = {}
    for text in found.peer:
        name, _, python = text.partition("=")
        if name not in known or not Path(python).is_file():
            top.error(f"--peer takes NAME=PYTHON with a NAME of {', '.join(known)} and a file PYTHON, got {text!r}")
        found.pythons[name] = python
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the sections and writes the page, again after each of them."""
    args = arguments(argv)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    # The first core of a machine has the most interrupts to serve.
    own = (cores[-1],)
    pythons = {name: args.pythons[name] for name in MODULES if name in args.pythons}
    # PyTorch is what most people use: it comes first, and everything is compared with it.
    order = [name for name in ("diffusers",) if name in pythons] + ["jaxdiff"]
    order += [name for name in pythons if name not in order]
    specs = [Spec(name, name, pythons.get(name, sys.executable), own) for name in order]
    common = [spec for spec in specs if spec.name in ("diffusers", "jaxdiff")]
    raw: dict[str, Any] = {}
    found: list[report.Table] = []

    def save() -> None:
        date = datetime.date.today().isoformat()
        about = {"date": date, **report.machine(), "load at the end": f"{os.getloadavg()[0]:.1f}"}
        about["command"] = "`python -m benchmarks.unet_cpu " + " ".join(
            [f"--peer {name}=PYTHON" for name in pythons] + [f"--rounds {args.rounds}", f"--only {','.join(args.only)}"]
        ) + "`"  # fmt: skip
        for name, facts in raw.get("steps", {}).get("facts", {}).items():
            if "versions" in facts and not name.endswith(SYSTEM):
                about[name] = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
        title = f"A small UNet on a CPU, {date}"
        page = report.write(args.out, f"{date}_unet_cpu", title, about, found, raw)
        say(f"written: {page}")

    for section in args.only:
        if section == "steps":
            system = [Spec(s.name + SYSTEM, s.peer, s.python, s.cores, launcher=False) for s in common]
            raw["steps"] = measure([*specs, *system], args.rounds)
            found += tables(raw["steps"])
        elif section == "startup":
            raw["startup"] = startup.measure(specs, args.rounds)
            found += startup.tables(raw["startup"])
        elif section == "two_cores":
            if len(cores) < 2:
                say("two_cores is left out: this process may use one core only")
                continue
            raw["two_cores"] = two_cores.measure(common, (cores[-1], cores[-2]), max(1, args.rounds // 2))
            found += two_cores.tables(raw["two_cores"])
        else:
            raw["install"] = {name: install_size.sizes(python) for name, python in pythons.items()}
            raw["install"]["jaxdiff core"] = install_size.fresh_core()
            found += install_size.tables(raw["install"])
        save()


if __name__ == "__main__":
    main()

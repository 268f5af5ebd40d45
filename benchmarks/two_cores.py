"""What the second core of a CPU gives: two host devices with half the batch each, beside PyTorch's two threads.

XLA runs a convolution on one core of a CPU device, so a second core helps JAX only as a second device. Every peer
answers once on one core and once on two, in turn. Wall times, since that is what more cores are for.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks import report
from benchmarks.processes import Spec, Worker, alternate

FIGURES = {"train step": ("train", 3), "sampler step": ("step", 4), "DDIM-50": ("sample", 1)}


def measure(specs: Sequence[Spec], cores: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Times every peer of `specs` on the first of the cores, and on both.

    Returns:
      {"peers": names, "figures": {figure: {name: times}}}; names come in pairs, one core first.
    """
    pairs = [
        dataclasses.replace(spec, name=f"{spec.name}, {name}", cores=used)
        for spec in specs
        for name, used in (("one core", cores[:1]), ("two cores", cores))
    ]
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(spec)) for spec in pairs]
        figures = {}
        for worker in workers:
            worker.ask("build")
        for figure, (command, count) in FIGURES.items():
            alternate(workers, command, 1, 1)
            figures[figure] = alternate(workers, command, count, rounds)
    return {"peers": [spec.name for spec in pairs], "figures": figures}


def tables(raw: dict[str, Any]) -> list[report.Table]:
    """Wall seconds, and how much faster each peer is on two cores."""
    peers, figures = raw["peers"], raw["figures"]
    gains = []
    for figure, times in figures.items():
        row = [figure]
        for one, two in zip(peers[::2], peers[1::2], strict=True):
            known = all("wall" in times[name] for name in (one, two))
            medians = [statistics.median(times[name]["wall"]) for name in (one, two)] if known else []
            row.append(report.number(medians[0] / medians[1]) if known else "")
        gains.append(row)
    names = [name.removesuffix(", one core") for name in peers[::2]]
    return [
        report.comparison("One core and two: wall seconds", figures, peers, "wall"),
        report.Table("How many times faster on two cores", ["", *names], gains),
    ]

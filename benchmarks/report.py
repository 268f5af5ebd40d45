"""What the benchmarks write: a dated page of tables, and the raw figures beside it as JSON.

A table cell is a median with the minimum after it. The machine is described by its processor and nothing that names
it. Nothing is measured here.
"""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"


class Table(NamedTuple):
    """One table of a page; the note stands under it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def number(value: float) -> str:
    """Three digits, without an exponent: 0.00523, 0.563, 12.3, 1280."""
    digits = next((d for limit, d in ((0.01, 5), (0.1, 4), (1, 3), (10, 2), (100, 1)) if abs(value) < limit), 0)
    return f"{value:.{digits}f}"


def cell(times: Mapping[str, Any] | None, key: str) -> str:
    """Median and minimum of the times of `key`, or why there are none."""
    if not times:
        return ""
    if "skip" in times or "error" in times:
        return times.get("skip") or f"failed: {times['error']}"
    values = times[key] if isinstance(times[key], list) else [times[key]]
    middle = number(statistics.median(values))
    return f"{middle} ({number(min(values))})" if len(values) > 1 else middle


def ratio(times: Mapping[str, Any] | None, other: Mapping[str, Any] | None, key: str) -> str:
    """Median over median, empty where either is missing."""
    if not times or not other or key not in times or key not in other:
        return ""
    medians = [statistics.median(t[key] if isinstance(t[key], list) else [t[key]]) for t in (times, other)]
    return number(medians[0] / medians[1])


def comparison(
    title: str, figures: Mapping[str, Mapping[str, Mapping[str, Any]]], peers: Sequence[str], key: str, note: str = ""
) -> Table:
    """Figures as rows, peers as columns, and behind each but the first its ratio to the first.

    Args:
      title: of the table.
      figures: {figure: {peer: times}}.
      peers: in order; the first is what the others are compared with.
      key: "wall" or "cpu".
      note: under the table.
    """
    header = ["", peers[0], *(name for peer in peers[1:] for name in (peer, "ratio"))]
    rows = []
    for figure, by_peer in figures.items():
        first = by_peer.get(peers[0])
        row = [figure, cell(first, key)]
        for peer in peers[1:]:
            row += [cell(by_peer.get(peer), key), ratio(by_peer.get(peer), first, key)]
        rows.append(row)
    return Table(title, header, rows, note)


def machine() -> dict[str, str]:
    """Processor, cores, memory and system."""
    model, memory = platform.processor() or platform.machine(), ""
    info, sizes = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if info.exists():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = models[0] if models else model
    if sizes.exists():
        memory = f"{int(sizes.read_text().split()[1]) / 2**20:.0f} GiB"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    about = {"processor": model, "cores": str(cores), "memory": memory, "system": f"{platform.system()}"}
    return {name: value for name, value in about.items() if value}


def one_core() -> dict[str, str]:
    """The machine after `worker.one_core` and the measuring, and jax's version."""
    import jax

    load = f"{os.getloadavg()[0]:.1f}"
    return machine() | {"load at the end": load, "cores used": "1", "jax": jax.__version__}


def markdown(title: str, about: Mapping[str, str], tables: Sequence[Table]) -> str:
    """The page: a title, a line for each fact, the tables."""
    parts = [f"# {title}", "\n".join(f"- {name}: {value}" for name, value in about.items())]
    for table in tables:
        widths = {len(row) for row in (table.header, *table.rows)}
        if len(widths) != 1:
            raise ValueError(
                f"table {table.title!r} has rows of {sorted(widths)} cells; every row needs one per column"
            )
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        parts.append(f"## {table.title}")
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
        parts += [table.note] if table.note else []
    return "\n\n".join(parts) + "\n"


def write(
    folder: Path, stem: str, title: str, about: Mapping[str, str], tables: Sequence[Table], raw: Mapping[str, Any]
) -> Path:
    """Writes STEM.md and STEM.json.

    Returns:
      The page's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{stem}.md"
    page.write_text(markdown(title, about, tables))
    (folder / f"{stem}.json").write_text(json.dumps({"about": dict(about)} | dict(raw), indent=1) + "\n")
    return page

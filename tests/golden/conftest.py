"""`pytest tests/golden --golden-dir DIR` tests exactly the .npz files below DIR and prints one line per topic."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from golden_harness import GoldenFile, Outcome, topic_of

HERE = Path(__file__).parent
OUTCOMES: list[Outcome] = []


def golden_files(config) -> list[Path]:
    folder = Path(config.getoption("--golden-dir") or HERE)
    if not folder.is_dir():
        raise pytest.UsageError(f"--golden-dir {folder} is not a folder")
    files = sorted(folder.rglob("*.npz"))
    if not files:
        raise pytest.UsageError(f"--golden-dir {folder} holds no .npz file")
    return files


def pytest_generate_tests(metafunc):
    if "golden_path" in metafunc.fixturenames:
        files = golden_files(metafunc.config)
        metafunc.parametrize("golden_path", files, ids=[f"{topic_of(p)}:{p.stem}" for p in files])


@pytest.fixture
def golden(golden_path):
    file = GoldenFile(golden_path)
    yield file
    OUTCOMES.append(file.outcome())


def report(outcomes: list[Outcome]) -> list[str]:
    """A Markdown table, one row per topic: arrays compared and left, largest error and the tolerance it was held to."""
    rows = ["| topic | files | arrays compared | left | largest error | its tolerance | worst share of tolerance |"]
    rows.append("|---|---|---|---|---|---|---|")
    by_topic = defaultdict(list)
    for outcome in outcomes:
        by_topic[outcome.topic].append(outcome)
    for name, files in sorted(by_topic.items()):
        compared, left = sum(f.compared for f in files), sum(f.left for f in files)
        if not compared:
            rows.append(f"| {name} | {len(files)} | 0 | {left} | pending | | |")
            continue
        worst = max(files, key=lambda f: f.error)
        share = max(f.share for f in files)
        rows.append(
            f"| {name} | {len(files)} | {compared} | {left} | {worst.error:.2g} | {worst.tolerance} | {share:.2g} |"
        )
    return rows


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist: the table is printed by its master
        session.config.workeroutput["golden"] = json.dumps([tuple(o) for o in OUTCOMES])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    del error
    OUTCOMES.extend(Outcome(*row) for row in json.loads(getattr(node, "workeroutput", {}).get("golden", "[]")))


def pytest_terminal_summary(terminalreporter):
    if OUTCOMES:
        terminalreporter.section("golden contract")
        for row in report(OUTCOMES):
            terminalreporter.write_line(row)

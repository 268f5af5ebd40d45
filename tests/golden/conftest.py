"""`pytest tests/golden --golden-dir DIR` tests exactly the .npz files below DIR and prints one line per topic."""

from pathlib import Path

import pytest
from golden_harness import GoldenFile, topic_of

HERE = Path(__file__).parent
RESULTS: dict[str, list[GoldenFile]] = {}


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
    RESULTS.setdefault(file.topic, []).append(file)
    return file


def report(results: dict[str, list[GoldenFile]]) -> list[str]:
    """A Markdown table, one row per topic: arrays compared and left, largest error and the tolerance it was held to."""
    rows = ["| topic | files | arrays compared | left | largest error | its tolerance | worst share of tolerance |"]
    rows.append("|---|---|---|---|---|---|---|")
    for name, files in sorted(results.items()):
        done = [c for f in files for c in f.compared]
        left = sum(len(f.left) for f in files)
        if not done:
            rows.append(f"| {name} | {len(files)} | 0 | {left} | pending | | |")
            continue
        worst = max(done, key=lambda c: c.error)
        share = max(c.share for c in done)
        rows.append(f"| {name} | {len(files)} | {len(done)} | {left} | {worst.error:.2g} | {worst.tolerance} | {share:.2g} |")
    return rows


def pytest_terminal_summary(terminalreporter):
    if RESULTS:
        terminalreporter.section("golden contract")
        for row in report(RESULTS):
            terminalreporter.write_line(row)

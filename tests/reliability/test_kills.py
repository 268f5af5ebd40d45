"""SIGKILL at random moments, writing a checkpoint among them: the run always goes on, and ends with the same bits.

Every life is a process of its own. To save time, the next one imports while the current one trains.
"""

import random
import signal
import time

import pytest
import reliability_runs as runs

from jaxdiff.training import goodput


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "kills", "seed"),
    [("gan", 2, 0), slow("gan", 50, 1), slow("ddgan", 3, 4), slow("consistency", 3, 2), slow("progressive", 3, 3)],
)
def test_killed_runs_end_with_the_bits_of_an_uninterrupted_one(tmp_path, capsys, name, kills, seed):
    num_steps, began = 10 * kills + 10, time.monotonic()
    whole = spawn(tmp_path / "whole", num_steps, delay=0.0, name=name)
    try:
        runs.go(whole)
        caught = kill_and_resume(tmp_path / "killed", num_steps, kills, random.Random(seed), name)
        heard = whole.communicate(timeout=300)[1]
        assert whole.returncode == 0, heard
    finally:
        whole.kill()

    runs.assert_same(runs.final(tmp_path / "whole"), runs.final(tmp_path / "killed"))
    order, expected = batches_of(tmp_path / "killed"), batches_of(tmp_path / "whole")
    assert list(expected) == list(range(num_steps))
    assert order == expected
    result = goodput.summary(tmp_path / "killed")
    # A kill before the first step leaves no start in the record.
    assert result.starts <= kills + 1 and 0 < result.share < 1
    assert sum(result.seconds.values()) == pytest.approx(result.wall, abs=0.1)
    with capsys.disabled():
        seconds = time.monotonic() - began
        print(f"\n{name}: {kills} kills, {caught} of them in a save, {kills} restarts, 0 failures, {seconds:.0f} s")
        print(result.line())


def spawn(workdir, num_steps, delay, name):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache")}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return runs.start(workdir, num_steps, delay, cache, name)


def kill_and_resume(workdir, num_steps, kills, draw, name):
    """Runs to the end in spite of the kills; returns how many of them left a checkpoint half written."""
    caught, lives = 0, [spawn(workdir, num_steps, 0.02, name)]
    try:
        for _ in range(kills):
            process = lives[-1]
            runs.go(process)
            lives.append(spawn(workdir, num_steps, 0.02, name))
            steps = draw.randint(0, 8)
            heard = wait_for_steps(process, steps)
            time.sleep(draw.uniform(0.0, 0.2) if steps else draw.uniform(0.0, 1.0))
            assert process.poll() is None, "".join(heard) + process.stderr.read()
            process.send_signal(signal.SIGKILL)
            process.communicate()
            caught += any("tmp" in path.name for path in workdir.glob("checkpoints/*"))
        runs.go(lives[-1])
        heard = lives[-1].communicate(timeout=300)[1]
        assert lives[-1].returncode == 0, heard
        assert f"step {num_steps}/{num_steps}" in heard
    finally:
        for process in lives:
            process.kill()
            process.communicate()
    return caught


def wait_for_steps(process, steps):
    """Reads what the process says until that many log lines have come."""
    heard = []
    while steps:
        line = process.stderr.readline()
        assert line, "the process ended by itself: " + "".join(heard)
        heard.append(line)
        steps -= line.startswith("step ")
    return heard


def batches_of(workdir):
    """{number of a batch: its checksum}. Batches follow one another, and one that comes again is the same."""
    seen, expected = {}, None
    for line in (workdir / "data.log").read_text().splitlines():
        first, second = line.split()
        if first == "from":
            expected = int(second)
            continue
        assert int(first) == expected and seen.get(expected, second) == second
        seen[expected] = second
        expected += 1
    return dict(sorted(seen.items()))

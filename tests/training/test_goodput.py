"""Goodput: seconds that add up, steps that count once, and records that survive kills."""

import json
import time

import pytest
import training_toys as toys

from jaxdiff.training import goodput, sharding
from jaxdiff.training.goodput import COMPILE, DOWN, INPUT, LOST, SAVE, START, STEP, Record, Stopwatch, summary
from jaxdiff.training.lines import read_lines
from jaxdiff.training.loop import train


def entry(event, done, at, /, **seconds):
    return json.dumps({"event": event, "step": done, "time": at, "seconds": seconds}) + "\n"


def test_steps_that_are_done_again_count_once(tmp_path):
    (tmp_path / goodput.GOODPUT).write_text(
        # Ten steps in 20 s, then a kill; the checkpoint of step 6 is there, so four of them are lost.
        entry("start", 0, 100.0, start=0.0)
        + entry("first step", 1, 105.0, start=2.0, compile=3.0)
        + entry("alive", 10, 126.0, start=2.0, compile=3.0, step=20.0, save=1.0)
        + '{"event": "alive", "st\n'
        # The next one walks back to step 4 and gets to 8; the last one starts from there.
        + entry("start", 4, 140.0, start=0.0)
        + entry("alive", 8, 150.0, start=2.0, step=8.0)
        + entry("start", 8, 155.0, start=0.0)
        + entry("done", 12, 165.0, start=1.0, step=8.0, input=1.0)
    )
    result = summary(tmp_path)
    assert result.wall == 65.0 and result.starts == 3 and result.redone == 6
    expected = {START: 5.0, COMPILE: 3.0, SAVE: 1.0, INPUT: 1.0, LOST: 12.0, STEP: 8.0 + 8.0 + 8.0, DOWN: 19.0}
    assert {name: seconds for name, seconds in result.seconds.items() if seconds} == pytest.approx(expected)
    assert sum(result.seconds.values()) == pytest.approx(result.wall)
    assert result.share == pytest.approx(24.0 / 65.0)
    assert result.line() == (
        "goodput 36.9 % of 65.0 s (seconds: step 24.0, down 19.0, lost 12.0, start 5.0, compile 3.0, "
        "input 1.0, save 1.0, 3 starts, 6 steps done again)"
    )


def test_a_run_knows_its_goodput(tmp_path, capsys):
    source = {"data": lambda: toys.Points(delay=0.01)}
    train(toys.experiment(4, **source), tmp_path, mesh=sharding.single_device())
    train(toys.experiment(8, **source), tmp_path, mesh=sharding.single_device())
    result = summary(tmp_path)
    assert result.starts == 2 and result.redone == 0 and result.seconds[LOST] == 0
    assert sum(result.seconds.values()) == pytest.approx(result.wall, abs=0.02)
    assert result.seconds[INPUT] >= 0.08 and result.seconds[COMPILE] > 0 and result.seconds[SAVE] > 0
    assert result.line() in capsys.readouterr().err
    events = [(line["event"], line["step"]) for line in read_lines(tmp_path / goodput.GOODPUT)]
    assert events[:6] == [("start", 0), ("first step", 1), ("alive", 2), ("saved", 2), ("alive", 4), ("saved", 4)]
    assert events[6:8] == [("done", 4), ("start", 4)] and events[-1] == ("done", 8)


def test_phases_add_up_to_the_time_since_the_beginning():
    began, stopwatch = time.monotonic(), Stopwatch()
    stopwatch.enter(STEP)
    with stopwatch.during(SAVE):
        with pytest.raises(StopIteration), stopwatch.during(INPUT):
            time.sleep(0.02)
            next(iter([]))
        assert stopwatch.now[0] == SAVE
    assert stopwatch.now[0] == STEP
    seconds = stopwatch.seconds()
    assert seconds[INPUT] >= 0.02
    assert sum(seconds.values()) == pytest.approx(stopwatch.now[1] - began, abs=0.01)


def test_only_a_run_has_a_goodput(tmp_path):
    with pytest.raises(ValueError, match="has no record of a run: train it first, or name the folder of a run"):
        summary(tmp_path)
    Record(tmp_path, Stopwatch(), print, shown=False).write("start", 0)
    assert not list(tmp_path.iterdir())
    assert Record(tmp_path, Stopwatch(), print).line().startswith("goodput is not known: ")

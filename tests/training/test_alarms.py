"""Metrics that leave their range: what is counted, what is saved meanwhile, what is said."""

import jax.numpy as jnp
import pytest
import training_toys as toys

from jaxdiff.methods.base import Objective
from jaxdiff.training import faults, sharding
from jaxdiff.training.alarms import Alarm, collapse
from jaxdiff.training.loop import train


def watched(values, alarm, **changes):
    """The regression, with a metric that takes these values step by step."""
    method, table = toys.regression(), jnp.asarray(values, jnp.float32)
    (objective,) = method.objectives

    def loss(params, aux, batch, key, step):
        value, metrics = objective.loss(params, aux, batch, key, step)
        return value, metrics | {"diversity": table[step]}

    method = method._replace(objectives=(Objective("model", loss),))
    return toys.experiment(len(values), method=method, alarms=(alarm,), **changes)


def run(workdir, experiment):
    return train(experiment, workdir, mesh=sharding.single_device())


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def test_a_metric_that_stays_out_of_range_stops_the_run_and_the_last_good_checkpoint_is_the_newest(tmp_path):
    alarm = Alarm("diversity", low=0.2, patience=4, meaning="the generator has collapsed")
    with pytest.raises(FloatingPointError) as caught:
        run(tmp_path, watched([1.0, 0.9, 0.1, 0.1, 0.1, 0.05, 0.0, 0.0], alarm))
    message = str(caught.value)
    assert message.startswith(
        "diversity was below 0.2 for 4 steps in a row, 0.05 at step 6: the generator has collapsed; last good state: "
        "the checkpoint of step 2 in "
    )
    assert "\n" not in message and "learning rate" not in message
    assert saved_steps(tmp_path) == [2]


def test_a_checkpoint_that_an_alarm_put_off_is_written_when_the_metric_is_back(tmp_path):
    alarm = Alarm("diversity", high=1.5, patience=4)
    experiment = watched([1.0, 2.0, float("nan"), 2.0, 1.0, 1.0, 1.0, 2.0], alarm, checkpoint_every=2, max_to_keep=9)
    assert run(tmp_path, experiment).step == 8
    # due at 2 and 4, written at 5; 6 and, as the last step, 8 are written in any case
    assert saved_steps(tmp_path) == [5, 6, 8]


def inspector(tmp_path, alarm):
    return faults.Inspector(tmp_path, 0, lambda line: None, alarms=(alarm,))


def metrics(value):
    return {"finite": jnp.bool_(True), "model/loss": jnp.float32(1), "logit": jnp.float32(value)}


def test_only_a_row_without_a_break_counts_and_nan_breaks_none(tmp_path):
    look = inspector(tmp_path, Alarm("logit", -10.0, 10.0, patience=3))
    for step, value in enumerate([11.0, -11.0, 10.0, 11.0, float("nan"), -20.0]):
        look.sent(step, metrics(value), {})
        look.look()
        assert look.alarmed == (value != 10.0)
    look.sent(7, metrics(20.0), {})
    with pytest.raises(faults.AlarmError, match=r"logit was above 10 for 3 steps in a row, 20 at step 7"):
        look.look()


def test_an_alarm_on_a_metric_that_is_not_there_is_refused_at_the_first_step(tmp_path):
    look = inspector(tmp_path, collapse()[0])
    look.sent(1, metrics(0.0), {})
    with pytest.raises(ValueError, match=r"watches 'diversity', which this method does not log; it logs \['finite', "):
        look.look()


@pytest.mark.parametrize("bad", [Alarm("a", 1.0, 0.0), Alarm("a", patience=0), Alarm("a", float("nan"))])
def test_ranges_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="takes low <= high and a patience of at least 1 step"):
        toys.experiment(alarms=(bad,))

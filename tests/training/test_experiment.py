"""Experiments refuse what cannot be trained, and recognise one another."""

import json

import optax
import pytest
import training_toys as toys

from jaxdiff.training import ema
from jaxdiff.training.experiment import difference

WRONG = [
    ({"name": "two words"}, "experiment name takes letters, digits and '._-', got 'two words'"),
    ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ({"num_steps": -5}, "num_steps must be an integer of at least 1, got -5"),
    ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ({"checkpoint_every": 0}, "checkpoint_every must be an integer of at least 1, got 0"),
    ({"sample_every": -1}, "sample_every must be an integer of at least 0, got -1"),
    ({"max_to_keep": 0}, "max_to_keep must be an integer of at least 1, got 0"),
    ({"num_classes": 0}, "num_classes must be an integer of at least 1, got 0"),
    ({"preview_steps": 0}, "preview_steps must be an integer of at least 1, got 0"),
    ({"sample_shape": (8, 0, 1)}, "every size in sample_shape must be an integer of at least 1, got 0"),
    ({"accumulate": 3}, "accumulate must divide batch_size, got 3 and 8"),
    ({"optimizers": {}}, "player 'model' has no optimizer"),
    ({"optimizers": {"model": optax.sgd(1.0), "disc": optax.sgd(1.0)}}, "optimizer for 'disc', which no objective"),
    ({"method": toys.regression()._replace(objectives=())}, "has no objective: there is nothing to train"),
    ({"ema": (ema.constant("a", 0.5), ema.warmup("a", 0.9))}, "every EMA needs a name of its own"),
    ({"config": {"lr": object()}}, "config takes names and values that JSON can hold, got 'lr'"),
    ({"config": {"lr": float("nan")}}, "config takes names and values that JSON can hold, got 'lr': nan"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_refusals_are_one_line(changes, message):
    with pytest.raises(ValueError) as caught:
        toys.experiment(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_description_survives_json():
    about = toys.experiment().describe()
    assert json.loads(json.dumps(about)) == about
    assert about["sample_shape"] == [3] and about["config"] == {"lr": 0.05}


def test_what_may_change_and_what_may_not():
    about = toys.experiment().describe()
    longer = toys.experiment(num_steps=99, log_every=7, config={"lr": 0.05, "num_steps": 99}).describe()
    assert difference(longer, about) is None
    assert difference(toys.experiment(seed=3).describe(), about) == "seed is 0 there and 3 here"
    other = toys.experiment(config={"lr": 0.1}).describe()
    assert difference(other, about) == "config.lr is 0.05 there and 0.1 here"
    decay = toys.experiment(ema=(ema.constant("slow", 0.5), ema.half_life("edm", 100))).describe()
    assert "ema.slow is ['constant decay 0.9', None] there" in difference(decay, about)
    fewer = toys.experiment(config={}).describe()
    assert difference(fewer, about) == "config.lr is 0.05 there and 'absent' here"

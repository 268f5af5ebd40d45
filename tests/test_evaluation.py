"""The table and its floor, and metrics tried before anything is sampled."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.data.images import ArraySource, digits
from jaxdiff.evaluation import FLOOR_SUBSETS, Evaluation, check_metrics, table
from jaxdiff.metrics import evaluate as judge
from jaxdiff.metrics.bits_per_dim import BitsPerDim
from jaxdiff.metrics.digits import digits_extractor
from jaxdiff.metrics.features import Extractor, Features

DRAW = np.random.default_rng(0)
TRAIN = ArraySource(DRAW.uniform(-1, 1, (60, 2, 2, 1)).astype(np.float32), np.arange(60) % 3)
HELD_OUT = ArraySource(DRAW.uniform(-1, 1, (40, 2, 2, 1)).astype(np.float32))


def pixels():
    return Extractor("pixels", "none", lambda x: Features(x.reshape(len(x), -1)))


def classifier():
    """Features are the pixels; the class is 2 for every image."""
    logits = np.float32([[0, 0, 5]])
    return Extractor("toy", "none", lambda x: Features(x.reshape(len(x), -1), np.repeat(logits, len(x), axis=0)))


def evaluation(extractor=pixels):
    return Evaluation(name="toy", extractor=extractor, held_out=lambda: HELD_OUT, train=lambda: TRAIN)


def test_the_floor_is_a_mean_over_subsets():
    made = evaluation()
    reference = made.reference()
    names = ("nearest", "frechet", "kernel")
    floor = made.floor(reference, names, 20)
    alone = [judge.floor(reference, TRAIN.label, names, num_samples=20, seed=s) for s in range(FLOOR_SUBSETS)]
    values = [draw["frechet"].value for draw in alone]
    assert tuple(floor) == names
    assert floor["frechet"].value == pytest.approx(np.mean(values)) and min(values) < floor["frechet"].value < max(
        values
    )
    assert floor["frechet"].n == 20
    assert floor["frechet"].settings == f"mean of 8 subsets, {min(values):.4g} to {max(values):.4g}"
    assert floor["nearest"] == alone[0]["nearest"]


def test_the_floor_of_all_training_images_has_one_subset():
    made = evaluation()
    reference = made.reference()
    floor = made.floor(reference, ("frechet",), 1000)["frechet"]
    assert floor == judge.floor(reference, TRAIN.label, ("frechet",), num_samples=60)["frechet"]


def test_training_images_are_opened_once():
    opened = []

    def train():
        opened.append(1)
        return TRAIN

    made = Evaluation(name="toy", extractor=pixels, held_out=lambda: HELD_OUT, train=train)
    made.floor(made.reference(), ("frechet",), 20)
    assert len(opened) == 1


@pytest.mark.parametrize(
    ("names", "num", "num_classes", "message"),
    [
        (("frechet",), 1, None, "metrics need at least 2 samples, got 1"),
        (("precision",), 3, None, "metric precision cannot judge 3 samples"),
        (("accuracy",), 20, 3, "metric accuracy needs logits, but extractor pixels is no classifier"),
        (("frechet", "inception_score"), 20, 3, "leave inception_score out of --metrics"),
    ],
)
def test_metrics_are_tried_beforehand(names, num, num_classes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_metrics(names, evaluation().reference(), num, num_classes)


def test_metrics_that_need_labels():
    reference = evaluation(classifier).reference()
    check_metrics(tuple(judge.METRICS), reference, 20, 3)
    with pytest.raises(ValueError, match="metric accuracy needs labels, but this experiment has no classes"):
        check_metrics(("accuracy",), reference, 20, None)
    with pytest.raises(ValueError, match=r"metric accuracy cannot judge 20 samples: labels must be 0 to 2"):
        check_metrics(("accuracy",), reference, 20, 5)


def test_metrics_that_need_training_images():
    reference = evaluation().reference()._replace(train_images=None)
    with pytest.raises(
        ValueError, match="metric nearest needs train_images, but the evaluation has no training images"
    ):
        check_metrics(("nearest",), reference, 20, None)


def test_table_is_aligned_markdown():
    rows = [
        {"sampler": "real", "calls": "", "frechet": 1.23456},
        {"sampler": "dpmpp_2m", "calls": 50, "frechet": 0.000123456},
    ]
    assert table(rows).splitlines() == [
        "| sampler  | calls |   frechet |",
        "|----------|------:|----------:|",
        "| real     |       |     1.235 |",
        "| dpmpp_2m |    50 | 0.0001235 |",
    ]


def test_bits_per_dim_averages_the_held_out_images_and_pads_nothing_in():
    def bits(params, key, x0, cond):
        del key
        total = params["model"] + x0.mean((1, 2, 3)) + cond["label"].astype(x0.dtype)
        terms = jnp.zeros((x0.shape[0], 7))
        return BitsPerDim(total, jnp.zeros_like(total), terms, terms, terms)

    held_out = digits("held_out")
    judged = Evaluation(
        name="held-out", extractor=digits_extractor, held_out=lambda: held_out, train=lambda: held_out, bits=bits
    )
    result = judged.bits_per_dim({"model": jnp.float32(2.0)}, 50, batch_size=16)
    expected = 2 + held_out.x0[:50].mean((1, 2, 3)) + held_out.label[:50]
    assert result.value == pytest.approx(float(expected.mean()), rel=1e-6)
    assert result.n == 50 and "7 terms" in result.settings
    assert judged.bits_per_dim({"model": jnp.float32(0.0)}, 10**6).n == len(held_out)


def test_bits_per_dim_without_a_bound_is_refused():
    source = digits("held_out")
    judged = Evaluation(name="x", extractor=digits_extractor, held_out=lambda: source, train=lambda: source)
    with pytest.raises(ValueError, match="there is none; leave bits_per_dim out"):
        judged.bits_per_dim({}, 4)

"""One call for all metrics: they agree with the single functions, see collapse, carry provenance, refuse clearly."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.data.images import digits
from jaxdiff.metrics import statistics as stats
from jaxdiff.metrics.digits import digits_extractor
from jaxdiff.metrics.evaluate import DEFAULT_METRICS, METRICS, evaluate, floor, reference
from jaxdiff.metrics.features import Extractor, Features, extract
from jaxdiff.metrics.fid import frechet_distance
from jaxdiff.metrics.kid import kernel_distance
from jaxdiff.metrics.neighbours import nearest
from jaxdiff.metrics.precision_recall import density_coverage, precision_recall

TRAIN, HELD_OUT = digits("train"), digits("held_out")
PIXELS = Extractor("pixels", "flatten", lambda images: Features(images.reshape(len(images), -1)))


@pytest.fixture(scope="module")
def held_out():
    return reference("digits held-out", HELD_OUT.x0, digits_extractor(), train_images=TRAIN.x0)


@pytest.fixture(scope="module")
def floor_360(held_out):
    return floor(held_out, TRAIN.label, list(METRICS), num_samples=360)


def test_values_are_those_of_the_single_functions(held_out):
    extractor = digits_extractor()
    real, fake = extract(extractor, HELD_OUT.x0).features, extract(extractor, TRAIN.x0[:100]).features
    got = {name: r.value for name, r in evaluate(TRAIN.x0[:100], TRAIN.label[:100], held_out, list(METRICS)).items()}
    assert list(got) == list(METRICS)
    assert got["frechet"] == pytest.approx(frechet_distance(stats.of(extractor, fake), stats.of(extractor, real)))
    assert got["kernel"] == pytest.approx(kernel_distance(real, fake))
    assert (got["precision"], got["recall"]) == precision_recall(real, fake)
    assert (got["density"], got["coverage"]) == density_coverage(real, fake)
    assert got["accuracy"] == 1.0 and 1 < got["inception_score"] <= 10
    assert evaluate(HELD_OUT.x0, None, held_out, ["nearest"])["nearest"].value == pytest.approx(
        nearest(HELD_OUT.x0, TRAIN.x0).distance.mean()
    )


def test_the_reference_against_itself_is_perfect(held_out):
    got = evaluate(HELD_OUT.x0, HELD_OUT.label, held_out, ["frechet", "precision", "recall", "coverage"])
    assert got["frechet"].value == pytest.approx(0, abs=1e-6)
    assert [got[name].value for name in ("precision", "recall", "coverage")] == [1.0, 1.0, 1.0]


def test_collapse_is_seen_although_accuracy_is_perfect(held_out, floor_360):
    means = np.stack([TRAIN.x0[TRAIN.label == k].mean(0) for k in range(10)])[HELD_OUT.label]
    got = evaluate(means, HELD_OUT.label, held_out, list(METRICS))
    assert got["accuracy"].value == 1.0
    assert got["frechet"].value > 5 * floor_360["frechet"].value
    assert got["recall"].value < 0.1 < floor_360["recall"].value
    assert got["nearest"].value < floor_360["nearest"].value


def test_noise_is_seen(held_out, floor_360):
    noise = np.random.default_rng(0).normal(0, 0.75, HELD_OUT.x0.shape).astype(np.float32)
    got = evaluate(noise, HELD_OUT.label, held_out)
    assert got["frechet"].value > 20 * floor_360["frechet"].value and got["accuracy"].value < 0.3
    assert got["kernel"].value > 0.3 and got["nearest"].value > 2 * floor_360["nearest"].value


def test_floor_is_that_of_real_images(floor_360):
    assert floor_360["frechet"].n == 360 and list(floor_360) == list(METRICS)
    assert floor_360["accuracy"].value > 0.99 and abs(floor_360["kernel"].value) < 0.03
    assert floor_360["nearest"].value == pytest.approx(0.265, abs=0.001)


def test_floor_is_fixed_by_its_seed(held_out):
    values = [floor(held_out, None, ["frechet"], num_samples=100, seed=s)["frechet"].value for s in (1, 1, 2)]
    assert values[0] == values[1] != values[2]


def test_results_name_what_they_may_be_compared_with(held_out):
    got = evaluate(jnp.asarray(TRAIN.x0[:50]), jnp.asarray(TRAIN.label[:50]), held_out)
    assert tuple(got) == DEFAULT_METRICS
    assert got["frechet"]._replace(value=0.0) == (
        "frechet", 0.0, 50, "digits held-out (n=360)", "digits-cnn-64", "clip to [-1, 1]", ""
    )  # fmt: skip
    assert got["nearest"].reference == "train (n=1437)" and got["nearest"].extractor == "pixels"
    assert got["accuracy"].reference == ""
    for part in ("kernel ", "n=50", "reference digits held-out (n=360)", "extractor digits-cnn-64", "unbiased"):
        assert part in str(got["kernel"])


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["frechet", "frechett"], "unknown metric 'frechett'; did you mean 'frechet'?"),
        (["zzz"], "unknown metric 'zzz'; choose from frechet, kernel"),
        ([], "no metrics asked for; choose from frechet"),
        (["accuracy"], "accuracy needs labels, got none"),
    ],
)
def test_wrong_requests_are_refused(held_out, metrics, message):
    with pytest.raises(ValueError, match=message):
        evaluate(HELD_OUT.x0[:4], None, held_out, metrics)


def test_what_a_reference_cannot_give_is_refused():
    bare = reference("bare", HELD_OUT.x0[:50], PIXELS)
    with pytest.raises(ValueError, match="inception_score needs logits, got none; use an extractor that classifies"):
        evaluate(HELD_OUT.x0[:4], None, bare, ["inception_score"])
    with pytest.raises(ValueError, match="nearest needs train_images, got none; make the reference with train_images="):
        evaluate(HELD_OUT.x0[:4], None, bare, ["nearest"])
    with pytest.raises(ValueError, match="floor needs training images"):
        floor(bare, num_samples=10)


@pytest.mark.parametrize(
    ("samples", "labels", "message"),
    [
        (np.zeros((4, 9, 9, 1), np.float32), None, r"samples are \[9, 9, 1\], digits held-out is \[8, 8, 1\]"),
        (np.full((4, 8, 8, 1), np.inf, np.float32), None, "4 of 4 images hold values that are not finite"),
        (np.zeros((4, 8, 8, 1), np.float32), np.arange(3), r"labels must be 4 integers, got int64 \[3\]"),
        (np.zeros((4, 8, 8, 1), np.float32), np.zeros(4), "labels must be 4 integers, got float64"),
        (np.zeros((1, 8, 8, 1), np.float32), None, "at least 2 images"),
    ],
)
def test_wrong_samples_are_refused(held_out, samples, labels, message):
    with pytest.raises(ValueError, match=message):
        evaluate(samples, labels, held_out, ["frechet"])


def test_floor_refuses_more_than_there_are(held_out):
    with pytest.raises(ValueError, match="num_samples must be 2 to 1437, the number of training images, got 2000"):
        floor(held_out, num_samples=2000, metrics=["frechet"])

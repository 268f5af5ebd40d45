"""Inception score at its extremes and by hand; accuracy; softmax."""

import numpy as np
import pytest

from jaxdiff.metrics.class_scores import class_accuracy, inception_score
from jaxdiff.metrics.features import probabilities


def test_certain_and_balanced_scores_the_number_of_classes():
    got = inception_score(np.tile(np.eye(4), (10, 1)), num_splits=1)
    assert got.mean == pytest.approx(4, rel=1e-12) and got.std == 0


def test_uncertain_or_collapsed_scores_one():
    assert inception_score(np.full((20, 5), 0.2)).mean == pytest.approx(1, rel=1e-12)
    assert inception_score(np.tile(np.eye(5)[:1], (20, 1))).mean == pytest.approx(1, rel=1e-12)


def test_two_rows_by_hand():
    p = np.array([[0.75, 0.25], [0.25, 0.75]])
    divergence = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert inception_score(p, num_splits=1).mean == pytest.approx(np.exp(divergence), rel=1e-12)


def test_splits_are_consecutive_parts():
    p = np.concatenate([np.tile(np.eye(2), (5, 1)), np.full((10, 2), 0.5)])
    got = inception_score(p, num_splits=2)
    assert got.mean == pytest.approx(1.5) and got.std == pytest.approx(0.5)


def test_score_refuses_what_is_no_distribution():
    with pytest.raises(ValueError, match="num_splits must be 1 to n = 4, got 10"):
        inception_score(np.eye(4))
    with pytest.raises(ValueError, match="rows must be probabilities that sum to 1"):
        inception_score(np.ones((20, 4)))


def test_accuracy_counts():
    logits = np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [0.0, 9.0]])
    assert class_accuracy(logits, np.array([1, 0, 0, 1])) == 0.75


@pytest.mark.parametrize("labels", [[0, 2], [-1, 0]])
def test_accuracy_refuses_unknown_classes(labels):
    with pytest.raises(ValueError, match="labels must be 0 to 1, the classifier's classes"):
        class_accuracy(np.eye(2), np.array(labels))


def test_softmax_is_stable():
    got = probabilities(np.array([[1000.0, 1000.0 + np.log(3.0)], [-2000.0, 0.0]]))
    assert np.allclose(got, [[0.25, 0.75], [0, 1]], rtol=1e-12)

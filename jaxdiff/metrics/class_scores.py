"""Scores from a classifier's probabilities: Inception score and class accuracy.

Both reward collapse onto what the classifier likes (a blurred class mean can have accuracy 1), so never read them
without a distance to held-out data beside them.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer


class InceptionScore(NamedTuple):
    """Mean and standard deviation over splits; the score lies in [1, number of classes]."""

    mean: float
    std: float


def inception_score(probabilities: Float[np.ndarray, "n k"], *, num_splits: int = 10) -> InceptionScore:
    """exp of the mean Kullback-Leibler divergence from p(class) to p(class | image), split by split.

    Args:
      probabilities: [n, k] rows that sum to 1.
      num_splits: number of equal parts of the rows in their order; 1 to n. p(class) is the mean of a part.

    Raises:
      ValueError: if num_splits is out of range or a row is no distribution.

    Source: Salimans et al. 2016 (arXiv:1606.03498) section 4.
    """
    if not 1 <= num_splits <= len(probabilities):
        raise ValueError(f"num_splits must be 1 to n = {len(probabilities)}, got {num_splits}")
    if not (np.all(probabilities >= 0) and np.allclose(probabilities.sum(1), 1, atol=1e-5)):
        raise ValueError("rows must be probabilities that sum to 1; apply features.probabilities to logits first")
    scores = [_score(part.astype(np.float64)) for part in np.array_split(probabilities, num_splits)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def class_accuracy(logits: Float[np.ndarray, "n k"], labels: Integer[np.ndarray, " n"]) -> float:
    """Share of images whose most likely class is the wanted one.

    Args:
      logits: [n, k] logits or probabilities.
      labels: [n] wanted classes, 0 to k - 1.

    Raises:
      ValueError: if a label is not one of the k classes.
    """
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels must be 0 to {logits.shape[1] - 1}, the classifier's classes, got {labels.min()} to {labels.max()}"
        )
    return float(np.mean(logits.argmax(1) == labels))


def _score(p: np.ndarray) -> float:
    # 0 log 0 is 0; the marginal is 0 only where every p is.
    marginal = np.broadcast_to(p.mean(0, keepdims=True), p.shape)
    safe, safe_marginal = np.where(p > 0, p, 1.0), np.where(p > 0, marginal, 1.0)
    return float(np.exp(np.mean(np.sum(p * (np.log(safe) - np.log(safe_marginal)), axis=1))))

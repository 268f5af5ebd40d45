"""Judges generated images against a reference set: several metrics from one pass of one extractor.

A `Reference` is made once from held-out images. `evaluate` gives a `Result` per metric, which names n, reference,
extractor and preprocessing. `floor` gives the same table for real training images in place of generated ones: what a
perfect model would score at that n. Nothing here samples, or computes bits/dim.
"""

import difflib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxdiff.metrics import statistics as stats
from jaxdiff.metrics.class_scores import class_accuracy, inception_score
from jaxdiff.metrics.features import Extractor, HostFeatures, check_images, extract, probabilities
from jaxdiff.metrics.fid import frechet_distance
from jaxdiff.metrics.kid import kernel_distance
from jaxdiff.metrics.neighbours import nearest
from jaxdiff.metrics.precision_recall import density_coverage, precision_recall

Images = Float[Array, "n h w c"] | Float[np.ndarray, "n h w c"]
TrainImages = Float[Array, "m h w c"] | Float[np.ndarray, "m h w c"]


class Reference(NamedTuple):
    """Real images to compare with; make it with `reference`.

    Attributes:
      name: which images these are.
      extractor: what features were computed with.
      images: float32 [n, H, W, C] in [-1, 1].
      features: as `extract` gives them.
      statistics: moments of the features.
      train_images: float32 [m, H, W, C], the images a model was trained on, or None.
      mesh: whose devices share the extractor's batches; None for one device.
    """

    name: str
    extractor: Extractor
    images: np.ndarray
    features: HostFeatures
    statistics: stats.Statistics
    train_images: np.ndarray | None
    mesh: Mesh | None = None


class Result(NamedTuple):
    """One number and everything needed to know what it may be compared with.

    Attributes:
      metric: its name in METRICS.
      value: the number.
      n: how many generated images.
      reference: which images it was measured against, and how many; empty where none are used.
      extractor: name of the extractor, or "pixels".
      preprocessing: what was done to the images.
      settings: the metric's own numbers, such as k.
    """

    metric: str
    value: float
    n: int
    reference: str
    extractor: str
    preprocessing: str
    settings: str = ""

    def __str__(self) -> str:
        details = [f"n={self.n}", self.reference and f"reference {self.reference}", f"extractor {self.extractor}"]
        details += [f"preprocessing {self.preprocessing}", self.settings]
        return f"{self.metric} {self.value:.4g} ({', '.join(d for d in details if d)})"


class Samples(NamedTuple):
    """What a metric sees: generated images, their features and, if known, the classes that were asked for."""

    images: np.ndarray
    features: HostFeatures
    statistics: stats.Statistics
    labels: np.ndarray | None


class Metric(NamedTuple):
    """A metric: (samples, reference) -> value, what it needs, and how to describe it.

    Attributes:
      value: the function.
      against: "held_out", "train" or "" for a metric without reference images.
      needs: of "labels", "logits", "train_images".
      settings: copied into the result.
      pixels: True if it looks at pixels and not at features.
    """

    value: Callable[[Samples, Reference], float]
    against: str = "held_out"
    needs: tuple[str, ...] = ()
    settings: str = ""
    pixels: bool = False


def _pair(s: Samples, r: Reference) -> tuple[Any, Any]:
    return r.features.features, s.features.features


METRICS: dict[str, Metric] = {
    "frechet": Metric(lambda s, r: frechet_distance(s.statistics, r.statistics)),
    "kernel": Metric(lambda s, r: kernel_distance(*_pair(s, r)), settings="unbiased, all samples"),
    "precision": Metric(lambda s, r: precision_recall(*_pair(s, r)).precision, settings="k=3"),
    "recall": Metric(lambda s, r: precision_recall(*_pair(s, r)).recall, settings="k=3"),
    "density": Metric(lambda s, r: density_coverage(*_pair(s, r)).density, settings="k=5"),
    "coverage": Metric(lambda s, r: density_coverage(*_pair(s, r)).coverage, settings="k=5"),
    "inception_score": Metric(
        lambda s, r: inception_score(probabilities(s.features.logits), num_splits=min(10, len(s.images))).mean,
        against="",
        needs=("logits",),
        settings="mean of at most 10 splits",
    ),
    "accuracy": Metric(
        lambda s, r: class_accuracy(s.features.logits, s.labels), against="", needs=("logits", "labels")
    ),
    "nearest": Metric(
        lambda s, r: float(nearest(s.images, r.train_images).distance.mean()),
        against="train",
        needs=("train_images",),
        settings="mean over samples of the RMS per pixel to the nearest",
        pixels=True,
    ),
}
DEFAULT_METRICS = ("frechet", "kernel", "accuracy", "nearest")


def reference(
    name: str,
    images: Images,
    extractor: Extractor,
    *,
    train_images: TrainImages | None = None,
    mesh: Mesh | None = None,
) -> Reference:
    """Computes what evaluations against a set of real images need.

    Args:
      name: shown in every result, such as "digits held-out".
      images: [n, H, W, C] in [-1, 1], n >= 2; images that neither the model nor the extractor was trained on.
      extractor: what to compute features with.
      train_images: [m, H, W, C] the model's training images, for "nearest" and `floor`.
      mesh: of devices of this process, which share the extractor's work here and in `evaluate`; None for one device.

    Raises:
      ValueError: if images are too few or not finite.
    """
    checked = check_images(images)
    features = extract(extractor, checked, mesh=mesh)
    moments = stats.of(extractor, features.features, name=name)
    train = None if train_images is None else check_images(train_images)
    return Reference(name, extractor, checked, features, moments, train, mesh)


def evaluate(
    samples: Images,
    labels: Array | np.ndarray | None,
    reference: Reference,
    metrics: Sequence[str] = DEFAULT_METRICS,
) -> dict[str, Result]:
    """Computes metrics of generated images.

    Args:
      samples: [n, H, W, C] in [-1, 1] up to overshoot, of the reference's shape; n >= 2.
      labels: int [n] the classes that were asked for, or None.
      reference: what to compare with.
      metrics: names out of METRICS, at least one.

    Returns:
      {name: Result} in the order asked.

    Raises:
      ValueError: for an unknown name, for what a metric needs and does not get, or for images that are not finite, too
        few or of another shape.
    """
    chosen = _choose(metrics)
    images = check_images(samples)
    if images.shape[1:] != reference.images.shape[1:]:
        raise ValueError(
            f"samples are {list(images.shape[1:])}, {reference.name} is {list(reference.images.shape[1:])}; "
            "evaluate against images of the same shape"
        )
    labels = None if labels is None else np.asarray(labels)
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise ValueError(f"labels must be {len(images)} integers, got {labels.dtype} {list(labels.shape)}")
    extractor = reference.extractor
    features = extract(extractor, images, mesh=reference.mesh)
    _check_needs(chosen, labels, features, reference)
    seen = Samples(images, features, stats.of(extractor, features.features, name="samples"), labels)
    return {name: _result(name, metric, seen, reference) for name, metric in chosen.items()}


def floor(
    reference: Reference,
    train_labels: Array | np.ndarray | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    num_samples: int,
    seed: int = 0,
) -> dict[str, Result]:
    """What real images score: a random subset of the training images in the place of generated ones.

    "nearest" would be 0 for training images; there the reference images themselves stand in.

    Args:
      reference: with train_images.
      train_labels: int [m] classes of the training images, or None.
      metrics: as in `evaluate`.
      num_samples: size of the subset; give it the number of generated images it is shown beside.
      seed: fixes the subset.

    Raises:
      ValueError: as `evaluate` does, and if there are fewer training images than num_samples.
    """
    train = reference.train_images
    if train is None:
        raise ValueError("floor needs training images; make the reference with train_images=")
    if not 2 <= num_samples <= len(train):
        raise ValueError(f"num_samples must be 2 to {len(train)}, the number of training images, got {num_samples}")
    chosen = _choose(metrics)
    rows = np.random.default_rng(seed).choice(len(train), num_samples, replace=False)
    labels = None if train_labels is None else np.asarray(train_labels)[rows]
    against_train = [name for name, metric in chosen.items() if metric.against == "train"]
    results = {}
    if others := [name for name in chosen if name not in against_train]:
        results |= evaluate(train[rows], labels, reference, others)
    if against_train:
        results |= evaluate(reference.images, None, reference, against_train)
    return {name: results[name] for name in chosen}


def _choose(metrics: Sequence[str]) -> dict[str, Metric]:
    if not metrics:
        raise ValueError(f"no metrics asked for; choose from {', '.join(METRICS)}")
    for name in metrics:
        if name not in METRICS:
            close = difflib.get_close_matches(name, METRICS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(METRICS)}"
            raise ValueError(f"unknown metric {name!r}; {hint}")
    return {name: METRICS[name] for name in metrics}


def _check_needs(
    chosen: dict[str, Metric], labels: np.ndarray | None, features: HostFeatures, reference: Reference
) -> None:
    remedies = {
        "labels": (labels, "pass the classes that were asked for as labels"),
        "logits": (features.logits, f"use an extractor that classifies, {reference.extractor.name} does not"),
        "train_images": (reference.train_images, "make the reference with train_images="),
    }
    for name, metric in chosen.items():
        for need in metric.needs:
            present, remedy = remedies[need]
            if present is None:
                raise ValueError(f"{name} needs {need}, got none; {remedy}, or leave {name} out")


def _result(name: str, metric: Metric, samples: Samples, reference: Reference) -> Result:
    sizes = {
        "held_out": len(reference.images),
        "train": 0 if reference.train_images is None else len(reference.train_images),
    }
    against = {"": "", "held_out": f"{reference.name} (n={sizes['held_out']})", "train": f"train (n={sizes['train']})"}
    extractor = reference.extractor
    return Result(
        metric=name,
        value=float(metric.value(samples, reference)),
        n=len(samples.images),
        reference=against[metric.against],
        extractor="pixels" if metric.pixels else extractor.name,
        preprocessing="none" if metric.pixels else extractor.preprocessing,
        settings=metric.settings,
    )

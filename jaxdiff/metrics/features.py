"""What a metric looks at: an extractor from images to features, run in batches.

An extractor carries its own name and a description of its preprocessing. Every statistic and result repeats them, so
that numbers made with different extractors cannot be compared by accident. No network is defined here.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float


class Features(NamedTuple):
    """What an extractor says about a batch of b images.

    Attributes:
      features: [b, d] vectors in which distances mean something.
      logits: [b, k] unnormalised log-probabilities of k classes, or None if the extractor is no classifier.
    """

    features: Array
    logits: Array | None = None


class HostFeatures(NamedTuple):
    """The same for all n images, as NumPy float64: [n, d] and [n, k] or None."""

    features: np.ndarray
    logits: np.ndarray | None


class Extractor(NamedTuple):
    """A fixed map from images to features.

    Attributes:
      name: says which network and which weights.
      preprocessing: says what happens to an image in [-1, 1] before the network sees it.
      apply: float32 images [b, H, W, C] in [-1, 1] -> Features with b rows. Called with one batch size only, so it may
        be jitted.
    """

    name: str
    preprocessing: str
    apply: Callable[[Array], Features]


def extract(
    extractor: Extractor,
    images: Float[Array, "n ..."] | Float[np.ndarray, "n ..."],
    *,
    batch_size: int = 256,
    mesh: Mesh | None = None,
) -> HostFeatures:
    """Features of many images, in batches of one size (the last is padded, so nothing is compiled twice).

    Args:
      extractor: the extractor.
      images: [n, H, W, C] float in [-1, 1], n >= 1.
      batch_size: rows given to the extractor at once, >= 1; rounded up to a multiple of the devices.
      mesh: whose devices, all of them along all its axes, share every batch; None for one device. They must be of this
        process: with several, each extracts images of its own and `statistics.across_processes` joins the results.

    Returns:
      HostFeatures: [n, d] and [n, k] or None.

    Raises:
      ValueError: if there are no images, images or features are not finite, or the mesh has devices of other
        processes.
    """
    images = check_images(images)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    place = _splitter(mesh)
    parts = 1 if mesh is None else mesh.size
    rows = -(-min(batch_size, len(images)) // parts) * parts
    features, logits = [], []
    for start in range(0, len(images), rows):
        batch = images[start : start + rows]
        padded = np.concatenate([batch, np.repeat(batch[-1:], rows - len(batch), axis=0)])
        out = extractor.apply(place(padded))
        features.append(np.asarray(out.features, np.float64)[: len(batch)])
        if out.logits is not None:
            logits.append(np.asarray(out.logits, np.float64)[: len(batch)])
    result = HostFeatures(np.concatenate(features), np.concatenate(logits) if logits else None)
    if not np.isfinite(result.features).all():
        raise ValueError(f"extractor {extractor.name} gave features that are not finite; check its weights and input")
    return result


def _splitter(mesh: Mesh | None) -> Callable[[np.ndarray], Array]:
    if mesh is None:
        return jnp.asarray
    if any(device.process_index != jax.process_index() for device in mesh.devices.flat):
        raise ValueError(
            "the mesh has devices of other processes, expected this process' own: extract on a mesh of "
            "jax.local_devices() and join with statistics.across_processes"
        )
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return lambda batch: jax.device_put(batch, sharding)


def check_images(images: Array | np.ndarray) -> Float[np.ndarray, "n ..."]:
    """Brings images to NumPy float32 and refuses what cannot be judged.

    Raises:
      ValueError: if there are none, or some are not finite.
    """
    images = np.asarray(images, np.float32)
    if len(images) == 0:
        raise ValueError("got 0 images, expected at least 1; ask for more samples")
    bad = int((~np.isfinite(images.reshape(len(images), -1))).any(1).sum())
    if bad:
        raise ValueError(f"{bad} of {len(images)} images hold values that are not finite; look at the sampler first")
    return images


def probabilities(logits: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
    """Softmax in float64: [n, k] logits to rows that sum to 1."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)

"""Augmentations: small functions (rng, example) -> example, applied to one example before batching.

Images are already float32 [H, W, C] in [-1, 1] and leave so. `rng` is a NumPy Generator that depends only on the seed
of the pipeline and the position in the stream, so a resumed run, or one on more hosts, draws the same. Each returns a
new dict and leaves other keys alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

Augmentation = Callable[[np.random.Generator, dict[str, Any]], dict[str, Any]]


def flip_horizontally(rng: np.random.Generator, example: dict[str, Any]) -> dict[str, Any]:
    """Mirrors the image left to right with probability 1/2, as DDPM, Improved DDPM and EDM do on CIFAR-10."""
    if rng.random() < 0.5:
        return {**example, "x0": example["x0"][:, ::-1]}
    return example


def shift(pixels: int) -> Augmentation:
    """Moves the image by up to `pixels` in each direction; what moves in repeats the border.

    Args:
      pixels: largest shift, >= 1.

    Raises:
      ValueError: if pixels < 1.
    """
    if pixels < 1:
        raise ValueError(f"pixels must be at least 1, got {pixels}; leave the augmentation out for no shift")
    # Partials, unlike closures, pickle, which worker processes need.
    return functools.partial(_shift, pixels)


def random_crop(size: int) -> Augmentation:
    """Cuts a square of `size` pixels at a uniformly drawn place.

    Args:
      size: side of the square, >= 1 and at most the smaller side of the images.

    Raises:
      ValueError: if size < 1, and when it meets an image smaller than `size`.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    return functools.partial(_crop, size)


def _shift(pixels: int, rng: np.random.Generator, example: dict[str, Any]) -> dict[str, Any]:
    x0 = example["x0"]
    height, width = x0.shape[:2]
    down, right = rng.integers(-pixels, pixels + 1, size=2)
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    return {**example, "x0": x0[rows[:, None], columns[None, :]]}


def _crop(size: int, rng: np.random.Generator, example: dict[str, Any]) -> dict[str, Any]:
    height, width = example["x0"].shape[:2]
    if size > min(height, width):
        raise ValueError(f"random_crop: size must be 1 to {min(height, width)} for this image, got {size}")
    row, column = rng.integers(0, height - size + 1), rng.integers(0, width - size + 1)
    return {**example, "x0": example["x0"][row : row + size, column : column + size]}

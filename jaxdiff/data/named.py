"""Data sets by one word, for settings and command lines: `digits`, `tfds:cifar10`, `folder:PATH`, `npz:PATH`.

Also a stand-in of any shape made of the embedded digits, with which experiments on data that must be downloaded run in
smoke mode. Opening is all that happens here; batches are `data/pipeline.py`'s.
"""

import difflib

import numpy as np

from jaxdiff.data.images import ArraySource, Source, digits, npz
from jaxdiff.data.pipeline import normalize

KINDS = ("digits", "tfds:NAME", "folder:PATH", "npz:PATH", "stand-in")


def open_source(
    spec: str, *, size: int, channels: int = 3, split: str = "train", num_classes: int | None = None
) -> Source:
    """A source of square images by its name.

    Args:
      spec: `digits` (8 pixels, 1 channel, embedded), `tfds:NAME`, `folder:PATH`, `npz:PATH`, or `stand-in`.
      size: side of the images in pixels; files and TFDS images are scaled and cut to it.
      channels: 3 or 1.
      split: "train" or another split of the data set; "held_out" of the digits. Folders and .npz files have one.
      num_classes: None leaves labels out.

    Raises:
      ValueError: for an unknown kind, or whatever the data set itself refuses.
    """
    kind, _, name = spec.partition(":")
    labelled = num_classes is not None
    if spec == "digits":
        return _without_labels(digits(split), labelled)
    if spec == "stand-in":
        return stand_in((size, size, channels), num_classes)
    if kind == "tfds" and name:
        from jaxdiff.data.tfds import tfds_source

        return tfds_source(name, split=split, label="label" if labelled else None, size=size, download=True)
    if kind == "folder" and name:
        from jaxdiff.data.folder import image_folder

        return image_folder(name, size=size, channels=channels, labelled=labelled)
    if kind == "npz" and name:
        source = _without_labels(npz(name), labelled)
        if num_classes is not None and source.label is not None and source.label.max() >= num_classes:
            raise ValueError(
                f"{name}: labels go up to {source.label.max()}, expected 0 to {num_classes - 1} for {num_classes} "
                "classes; mend the labels"
            )
        return source
    close = difflib.get_close_matches(spec, KINDS, n=1)
    raise ValueError(
        f"unknown data {spec!r}; " + (f"did you mean {close[0]!r}?" if close else f"one of {', '.join(KINDS)}")
    )


def stand_in(shape: tuple[int, int, int], num_classes: int | None, num: int = 256) -> ArraySource:
    """The embedded digits repeated to `shape` [H, W, C]: real pictures where the real data are not at hand."""
    source = digits("train")
    x0 = source.x0[:num]
    rows = np.arange(shape[0]) * x0.shape[1] // shape[0]
    columns = np.arange(shape[1]) * x0.shape[2] // shape[1]
    x0 = np.repeat(x0[:, rows][:, :, columns], shape[2], axis=3)
    return ArraySource(x0, None if num_classes is None else np.arange(num, dtype=np.int32) % num_classes)


def _without_labels(source: ArraySource, labelled: bool) -> ArraySource:
    if labelled and source.label is None:
        raise ValueError("this experiment needs labels, and the data set has none; use a labelled one")
    return source if labelled else ArraySource(source.x0)


def in_memory(source: Source, num: int, *, seed: int = 0) -> ArraySource:
    """Up to `num` examples of a source as arrays, drawn by the seed without repetition: reference images of metrics."""
    rows = np.random.default_rng(seed).permutation(len(source))[:num]
    examples = [normalize(source[int(i)]) for i in rows]
    labels = np.stack([e["label"] for e in examples]) if "label" in examples[0] else None
    return ArraySource(np.stack([e["x0"] for e in examples]), labels)

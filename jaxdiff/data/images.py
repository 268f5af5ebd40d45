"""Image sources that are arrays: the embedded digits, `.npz` files, anything already in memory.

A source is random access: `len(source)` and `source[i]`, a dict with "x0" (clean data; images float32 [H, W, C] in
[-1, 1] or uint8 [H, W, C]) and, where there are classes, "label" (int32 scalar). `data/pipeline.py` turns uint8 into
[-1, 1] by x / 127.5 - 1 and makes batches. Files on disk are read here without executing anything they contain.

The embedded set is the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, UCI
Machine Learning Repository, doi:10.24432/C50P49, CC BY 4.0): 1797 grey images of 8 x 8 pixels with 17 levels, ten
classes. digits.NOTICE.txt beside the array says what was changed.
"""

import zipfile
import zlib
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Integer, UInt8

Example = dict[str, Any]
SPLITS = ("train", "held_out", "all")


@runtime_checkable
class Source(Protocol):
    """Random access to examples; index i always gives the same example."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class ArraySource:
    """A source over arrays in memory.

    Attributes:
      x0: [n, ...] clean data: float32 (images in [-1, 1]) or uint8 [n, H, W, C].
      label: int32 [n], or None when there are no classes.
    """

    def __init__(
        self,
        x0: Float[np.ndarray, "n ..."] | UInt8[np.ndarray, "n ..."],
        label: Integer[np.ndarray, " n"] | None = None,
    ):
        self.x0 = x0 if x0.dtype == np.uint8 else x0.astype(np.float32)
        self.label = None if label is None else label.astype(np.int32)

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, index: int) -> Example:
        example: Example = {"x0": self.x0[index]}
        if self.label is not None:
            example["label"] = self.label[index]
        return example


def digits(split: str = "train") -> ArraySource:
    """The embedded digits: 1437 training and 360 held-out images (36 of each class), always the same split.

    Args:
      split: "train", "held_out", or "all" (the order of the original file).

    Returns:
      Source with x0 float32 [8, 8, 1], grey levels 0..16 mapped to [-1, 1], and label int32 in 0..9.

    Raises:
      ValueError: for another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    with (resources.files("jaxdiff.data") / "digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as f:
        images, labels, held_out = f["images"], f["labels"], f["held_out"]
    rows = {"train": ~held_out, "held_out": held_out, "all": np.ones_like(held_out)}[split]
    return ArraySource(images[rows, :, :, None].astype(np.float32) / np.float32(8) - 1, labels[rows].astype(np.int32))


def npz(path: str | Path) -> ArraySource:
    """Images, and classes if there are any, from a `.npz` file.

    Args:
      path: file with `images` and optionally `labels`, or `arr_0` and `arr_1` (the names of the ADM sample files).
        Images are [n, H, W, C], uint8 or float in [-1, 1]; labels are integers [n] >= 0.

    Returns:
      Source in the file's order. uint8 images stay uint8 in memory.

    Raises:
      ValueError: naming the file, if it is missing or broken, or an array is missing or of the wrong kind.
    """
    path = Path(path)
    arrays = _read_npz(path)
    images_key = next((k for k in ("images", "arr_0") if k in arrays), None)
    if images_key is None:
        raise ValueError(f"{path}: expected an array `images` (or `arr_0`), got {_listing(arrays)}; rename the array")
    images, labels = arrays[images_key], arrays.get("labels" if images_key == "images" else "arr_1")
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"{path}: `{images_key}` must be [n, H, W, C] with 1 or 3 channels last, got {list(images.shape)}; "
            "transpose or add a channel axis"
        )
    if images.dtype != np.uint8:
        _check_float_images(path, images_key, images)
    if labels is not None and (
        labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= 2**31
    ):
        raise ValueError(
            f"{path}: labels must be {len(images)} integers >= 0, one for each image, "
            f"got {labels.dtype} {list(labels.shape)}; store class numbers, not names or one-hot rows"
        )
    return ArraySource(images, labels)


def _check_float_images(path: Path, key: str, images: np.ndarray) -> None:
    if images.dtype.kind != "f":
        raise ValueError(f"{path}: `{key}` must be uint8 or float in [-1, 1], got {images.dtype}; convert to uint8")
    low, high = float(images.min()), float(images.max())
    if not (np.isfinite(low) and np.isfinite(high) and low >= -1 and high <= 1):
        raise ValueError(
            f"{path}: float `{key}` must lie in [-1, 1], got [{low:.4g}, {high:.4g}]; rescale, or store uint8 0..255"
        )


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of a .npz file with images [n, H, W, C]")
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("not an archive of arrays")
            return {key: file[key] for key in file.files if key in ("images", "labels", "arr_0", "arr_1")}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, NotImplementedError) as error:
        reason = "it holds Python objects" if "bject arrays" in str(error) else "it is broken or of another format"
        raise ValueError(
            f"{path}: cannot be read as .npz, {reason}; write it again with numpy.savez and plain arrays"
        ) from error


def _listing(arrays: dict[str, np.ndarray]) -> str:
    return ", ".join(sorted(arrays)) or "none of the known arrays"

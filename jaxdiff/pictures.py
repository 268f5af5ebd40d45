"""Samples as files: a grid PNG to look at, a folder of PNGs or an .npz for outside FID tools, a plot of points.

Images come as float [n, H, W, C] in [-1, 1], with 1 or 3 channels; points as [n, 2].
"""

import io
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jaxdiff.training.checkpoint import as_path

SUFFIXES = (".png", ".npz", "")


def drawable(shape: tuple[int, ...]) -> bool:
    """Whether `picture` can show examples of this shape: [H, W, 1 or 3] or points [2]."""
    return shape == (2,) or (len(shape) == 3 and shape[-1] in (1, 3))


def check_target(path: Path, shape: tuple[int, ...], *, overwrite: bool = False) -> None:
    """Refuses a name that `save_samples` could not write, before any work is done.

    Args:
      path: where samples shall go.
      shape: of one example.
      overwrite: existing samples may be replaced. A folder must then hold nothing but PNGs of `save_samples`.

    Raises:
      ValueError: saying what stands in the way.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} ends in {path.suffix!r}; expected .png, .npz or a folder name")
    if path.suffix != ".npz" and (not drawable(shape) or (path.suffix == "" and len(shape) != 3)):
        takes = "a grid takes images or points [2]" if path.suffix else "a folder takes images"
        raise ValueError(f"{path} cannot hold examples of shape {list(shape)}, {takes}; use a name ending in .npz")
    if path.exists() and path.is_dir() != (path.suffix == ""):
        raise ValueError(f"{path} exists and is a {'folder' if path.is_dir() else 'file'}; choose another name")
    if path.is_dir():
        entries = sorted(entry.name for entry in path.iterdir())
        others = [name for name in entries if not re.fullmatch(r"\d{6}\.png", name)]
        if entries and not overwrite:
            raise ValueError(f"{path} exists and is not empty; choose another name or add --overwrite")
        if others:
            raise ValueError(f"{path} holds {others[0]}, which is no sample; choose another folder")
    elif path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another name or add --overwrite")
    above = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
    if (above != path and not above.is_dir()) or not os.access(above, os.W_OK):
        raise ValueError(f"{path} cannot be written, since {above} is not a writable folder; choose another place")


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0..255: round(127.5 (x + 1)), clipped."""
    return np.clip(np.rint((np.asarray(images, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def grid(images: np.ndarray, columns: int | None = None, gap: int = 1, smallest: int = 384) -> np.ndarray:
    """Images [n, H, W, C] in [-1, 1] side by side, enlarged by a whole factor to at least `smallest` pixels wide.

    Returns:
      uint8 [height, width, 3], white between the images.
    """
    pixels = to_uint8(images)
    n, h, w, c = pixels.shape
    if c not in (1, 3):
        raise ValueError(f"a picture needs 1 or 3 channels, got {c}; decode latents to images first")
    pixels = np.broadcast_to(pixels, (n, h, w, 3)) if c == 1 else pixels
    columns = columns or max(1, int(np.ceil(np.sqrt(n))))
    rows = -(-n // columns)
    canvas = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(pixels):
        y, x = (i // columns) * (h + gap) + gap, (i % columns) * (w + gap) + gap
        canvas[y : y + h, x : x + w] = image
    factor = max(1, -(-smallest // canvas.shape[1]))
    return canvas.repeat(factor, axis=0).repeat(factor, axis=1)


def scatter(points: np.ndarray, size: int = 384, extent: float = 1.25) -> np.ndarray:
    """Points [n, 2] as a uint8 [size, size, 3] density picture of the square [-extent, extent]^2, y upwards."""
    edges = np.linspace(-extent, extent, size // 4 + 1)
    counts, _, _ = np.histogram2d(points[:, 1], points[:, 0], bins=[edges, edges])
    shade = 255 - np.clip(255 * np.sqrt(counts[::-1] / max(np.quantile(counts, 0.995), 1)), 0, 255)
    return shade.astype(np.uint8)[..., None].repeat(3, axis=2).repeat(4, axis=0).repeat(4, axis=1)


def picture(samples: np.ndarray, columns: int | None = None) -> np.ndarray:
    """A uint8 picture of samples: a grid of images, or a density plot of points."""
    return scatter(samples) if samples.ndim == 2 else grid(samples, columns)


def save_png(path: str | Path, pixels: np.ndarray) -> None:
    """Writes uint8 [H, W, 3] as a PNG file, making its folder."""
    from PIL import Image

    target, encoded = as_path(path), io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(encoded.getvalue())


def save_samples(path: str | Path, parts: Iterable[np.ndarray], labels: np.ndarray | None = None) -> int:
    """Writes samples where the name says: `x.png` one grid, `x.npz` all of them, any other name a folder of PNGs.

    The .npz holds uint8 images as arr_0 and labels as arr_1, the layout of the ADM evaluation suite; points stay float.
    A folder is written part by part, so it may hold more images than memory does; its old samples go first.

    Args:
      path: a name that `check_target` accepts.
      parts: samples in pieces, each [b, ...].
      labels: int [n] over all parts, or None.

    Returns:
      The number of samples.
    """
    path = Path(path)
    if path.suffix == "":
        return _save_folder(path, parts)
    pieces = [to_uint8(part) if part.ndim == 4 and path.suffix == ".npz" else part for part in parts]
    samples = np.concatenate(pieces)
    if path.suffix == ".png":
        save_png(path, picture(samples))
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, *[samples], *([] if labels is None else [labels]))
    return len(samples)


def _save_folder(path: Path, parts: Iterable[np.ndarray]) -> int:
    from PIL import Image

    count = 0
    for part in parts:
        if not count:  # only now, when there is something in their place
            path.mkdir(parents=True, exist_ok=True)
            for old in path.glob("[0-9]" * 6 + ".png"):
                old.unlink()
        for image in to_uint8(part):
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path / f"{count:06d}.png")
            count += 1
    return count

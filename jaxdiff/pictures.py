"""Samples as files: a grid PNG to look at, a folder of PNGs or an .npz for outside FID tools, a plot of points.

Images come as float [n, H, W, C] in [-1, 1], with 1 or 3 channels; points as [n, 2].
"""

from pathlib import Path

import numpy as np


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

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_samples(path: str | Path, samples: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Writes samples where the name says: `x.png` one grid, `x.npz` all of them, any other name a folder of PNGs.

    The .npz holds uint8 images as arr_0 and labels as arr_1, the layout of the ADM evaluation suite; points stay float.
    """
    path = Path(path)
    if path.suffix == ".png":
        save_png(path, picture(samples))
    elif path.suffix == ".npz":
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = [to_uint8(samples) if samples.ndim == 4 else samples]
        np.savez(path, *arrays, *([] if labels is None else [labels]))
    elif path.suffix == "":
        if samples.ndim != 4:
            raise ValueError(f"a folder of PNGs needs images [n, H, W, C], got shape {samples.shape}; use a .npz name")
        path.mkdir(parents=True, exist_ok=True)
        from PIL import Image

        for i, image in enumerate(to_uint8(samples)):
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path / f"{i:06d}.png")
    else:
        raise ValueError(f"cannot write samples as {path.name}; use a name ending in .png, .npz, or a folder name")

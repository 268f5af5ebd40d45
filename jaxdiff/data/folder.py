"""Images from a folder whose subfolders are the classes, decoded with Pillow when asked for.

Each image is scaled as in ADM: halved by a box filter while its smaller side is at least twice the wanted size, then
bicubic so that the smaller side fits, then the centre square is cut. Pictures that would be changed silently on the
way (CMYK, 16 bits a channel, animations) are refused. As in ADM, alpha is dropped and EXIF rotation is not applied.
Nothing here downloads.
"""

import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from jaxdiff.data.images import Example

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")


class FolderSource:
    """A source over image files; make it with `image_folder`.

    Attributes:
      paths: the files, sorted by class and then by path.
      label: int32 [n], or None for a folder without classes.
      classes: names of the subfolders; classes[k] is label k. Empty without classes.
      skipped: bad files that were left out: (path, reason).
    """

    def __init__(
        self,
        paths: list[Path],
        label: np.ndarray | None,
        classes: tuple[str, ...],
        skipped: list[tuple[Path, str]],
        size: int,
        channels: int,
    ):
        self.paths = paths
        self.label = label
        self.classes = classes
        self.skipped = skipped
        self._size = size
        self._channels = channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        example: Example = {"x0": read_image(self.paths[index], size=self._size, channels=self._channels)}
        if self.label is not None:
            example["label"] = self.label[index]
        return example


def image_folder(
    path: str | Path,
    *,
    size: int,
    channels: int = 3,
    labelled: bool = True,
    verify: bool = True,
    skip_bad: bool = False,
) -> FolderSource:
    """A source over the images of a folder.

    Args:
      path: the folder. Images of class k lie anywhere below its k-th subfolder, in sorted order of the names. Hidden
        files and files that are not images by their suffix are ignored.
      size: side of the square images in pixels, >= 1.
      channels: 3 for colour, 1 for grey.
      labelled: False ignores the structure and gives images without classes.
      verify: decode every file once now, so that no bad file stops a run later. False only lists the files.
      skip_bad: leave bad files out and list them in `skipped` instead of raising. Needs verify.

    Returns:
      Source with x0 uint8 [size, size, channels] and label int32.

    Raises:
      ValueError: if the folder is missing, has no class folders or an empty one, holds no images or a bad one (naming
        it), or an argument is out of range.
    """
    root = Path(path)
    if size < 1 or channels not in (1, 3):
        raise ValueError(f"size must be at least 1 and channels 1 or 3, got {size} and {channels}")
    if skip_bad and not verify:
        raise ValueError("skip_bad=True needs verify=True: a bad file can only be left out before the run starts")
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; expected a folder with one subfolder of images per class")
    groups = _class_groups(root) if labelled else {"": _images_below(root)}
    skipped: list[tuple[Path, str]] = []
    if verify:
        groups = {name: _good(files, size, channels, skip_bad, skipped) for name, files in groups.items()}
    empty = [name for name, files in groups.items() if not files]
    if empty:
        where = root / empty[0]
        detail = f"all {len(skipped)} files that were tried are bad" if skipped else "no image files below it"
        raise ValueError(f"{where}: {detail}; expected files ending in {', '.join(SUFFIXES)}")
    label = np.repeat(np.arange(len(groups), dtype=np.int32), [len(files) for files in groups.values()])
    paths = [file for files in groups.values() for file in files]
    return FolderSource(
        paths, label if labelled else None, tuple(groups) if labelled else (), skipped, size=size, channels=channels
    )


def read_image(path: Path, *, size: int, channels: int = 3) -> UInt8[np.ndarray, "size size channels"]:
    """Decodes one file, scales it and cuts its centre.

    Args:
      path: the file.
      size: side of the result in pixels.
      channels: 3 or 1.

    Raises:
      ValueError: naming the file and what is wrong with it.

    Source: Dhariwal and Nichol 2021 (arXiv:2105.05233), the data loader of the released code.
    """
    from PIL import Image

    if not path.is_file():
        raise ValueError(f"{path}: the file is gone; make the source again")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes); remove it or pass skip_bad=True")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _check_kind(path, image)
                image.load()
                decoded = image.convert("RGB" if channels == 3 else "L")
    except _BadKindError as error:
        raise ValueError(f"{error}; convert it to 8-bit RGB or grey, remove it, or pass skip_bad=True") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{path}: more than {Image.MAX_IMAGE_PIXELS} pixels; make it smaller or pass skip_bad=True"
        ) from error
    # Pillow's decoders raise whatever their format trips over: OSError, SyntaxError, struct.error, IndexError ...
    except Exception as error:
        raise ValueError(
            f"{path}: not a readable image (broken or cut off); remove it or pass skip_bad=True"
        ) from error
    return np.asarray(_centre_square(decoded, size)).reshape(size, size, channels)


def centre_square(image: UInt8[np.ndarray, "h w c"], *, size: int) -> UInt8[np.ndarray, "size size c"]:
    """Scales and cuts a decoded image as `read_image` does.

    Args:
      image: uint8 [H, W, C] with 1 or 3 channels.
      size: side of the result in pixels.
    """
    from PIL import Image

    grey = image.shape[-1] == 1
    picture = _centre_square(Image.fromarray(image[..., 0] if grey else image), size)
    return np.asarray(picture).reshape(size, size, image.shape[-1])


class _BadKindError(Exception):
    pass


def _check_kind(path, image) -> None:
    if image.mode == "CMYK" or image.mode == "YCCK":
        raise _BadKindError(f"{path}: colours are CMYK")
    # Pillow gives 16-bit RGB as mode RGB and drops the low byte; only the raw mode of its tiles tells.
    raw = " ".join(str(tile[3]) for tile in image.tile)
    if image.mode in SIXTEEN_BIT_MODES or ";16" in raw:
        raise _BadKindError(f"{path}: more than 8 bits a channel (mode {image.mode})")
    if getattr(image, "n_frames", 1) > 1:
        raise _BadKindError(f"{path}: animated or many pages ({image.n_frames} frames)")


def _centre_square(image, size: int):
    from PIL import Image

    if image.size == (size, size):
        return image
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    shape = (round(image.width * scale), round(image.height * scale))
    image = image.resize(shape, resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _images_below(folder: Path) -> list[Path]:
    found = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _class_groups(root: Path) -> dict[str, list[Path]]:
    entries = sorted(p for p in root.iterdir() if not p.name.startswith("."))
    stray = [p for p in entries if p.is_file() and p.suffix.lower() in SUFFIXES]
    folders = [p for p in entries if p.is_dir()]
    if stray:
        raise ValueError(
            f"{root}: {len(stray)} images lie outside class folders ({stray[0].name} first); "
            "move them into one subfolder per class, or pass labelled=False"
        )
    if not folders:
        raise ValueError(f"{root}: no class folders; expected one subfolder of images per class")
    return {folder.name: _images_below(folder) for folder in folders}


def _good(files: list[Path], size: int, channels: int, skip_bad: bool, skipped: list[tuple[Path, str]]) -> list[Path]:
    good = []
    for file in files:
        try:
            read_image(file, size=size, channels=channels)
        except ValueError as error:
            if not skip_bad:
                raise
            skipped.append((file, str(error)))
        else:
            good.append(file)
    return good

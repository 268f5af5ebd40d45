"""Image folders: classes from names, ADM's scaling, and one clear line for every bad file or structure."""

import io

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data.folder import SUFFIXES, centre_square, image_folder, read_image
from jaxdiff.data.pipeline import batches, in_order


def picture(seed=0, size=(8, 8), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Classes bird, cat, dog with 1, 2 and 3 PNG images, one of them a level deeper, and things to ignore."""
    for name, count in (("dog", 3), ("bird", 1), ("cat", 2)):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for i in range(count):
            picture(seed=10 * count + i).save(tmp_path / name / ("deeper" if i == 2 else "") / f"{i}.png")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / ".hidden.png").write_bytes(b"")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README.md").write_text("nor this")
    return tmp_path


def test_classes_are_sorted_subfolders(folder):
    source = image_folder(folder, size=8)
    assert source.classes == ("bird", "cat", "dog") and source.label.tolist() == [0, 1, 1, 2, 2, 2]
    assert [str(path.relative_to(folder)) for path in source.paths[-3:]] == [
        "dog/0.png",
        "dog/1.png",
        "dog/deeper/2.png",
    ]
    assert source[1]["x0"].dtype == np.uint8 and source[1]["label"] == 1
    assert np.array_equal(source[1]["x0"], np.asarray(picture(seed=20)))


def test_a_folder_goes_through_the_pipeline(folder):
    stream = batches(image_folder(folder, size=4), batch_size=3, seed=0, prefetch=2)
    labels = np.concatenate([next(stream)["label"] for _ in range(4)])
    stream.close()
    assert np.array_equal(np.sort(labels.reshape(2, 6), axis=1), [[0, 1, 1, 2, 2, 2]] * 2)
    (batch,) = in_order(image_folder(folder, size=4, channels=1), batch_size=8)
    assert batch["x0"].shape == (6, 4, 4, 1) and np.abs(batch["x0"]).max() <= 1


def test_without_classes(folder):
    picture().save(folder / "loose.png")
    source = image_folder(folder, size=8, labelled=False)
    assert len(source) == 7 and source.label is None and set(source[0]) == {"x0"}


def test_scaling_halves_by_boxes_then_goes_bicubic():
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    # 16 x 24 to 8: one halving brings the smaller side to 8, so nothing is left for the bicubic filter.
    boxes = image.reshape(8, 2, 12, 2, 3).astype(np.float64).mean((1, 3))
    # Pillow rounds after each axis, hence 1 and not 1/2.
    assert np.abs(centre_square(image, size=8) - boxes[:, 2:10]).max() <= 1
    bicubic = Image.fromarray(image).resize((15, 10), resample=Image.Resampling.BICUBIC).crop((2, 0, 12, 10))
    assert np.array_equal(centre_square(image, size=10), np.asarray(bicubic))
    assert np.array_equal(centre_square(image[:16, :16], size=16), image[:16, :16])
    assert centre_square(image[..., :1], size=5).shape == (5, 5, 1)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "RGB"])
@pytest.mark.parametrize("channels", [1, 3])
def test_ordinary_modes_are_read(tmp_path, mode, channels):
    picture(mode=mode).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", size=4, channels=channels)
    assert image.shape == (4, 4, channels) and image.dtype == np.uint8


def png16(colour):
    """A PNG with 16 bits a channel; Pillow writes grey ones only, so the colour one is put together by hand."""
    if not colour:
        file = io.BytesIO()
        Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(file, "PNG")
        return file.getvalue()
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(48) for _ in range(8))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def encoded(kind, image=None, **options):
    file = io.BytesIO()
    (image or picture(size=(64, 64))).save(file, kind, **options)
    return file.getvalue()


BAD = {
    "empty.png": (b"", r"the file is empty \(0 bytes\)"),
    "text.jpg": (b"this is no image", "not a readable image"),
    "cut.png": (encoded("PNG")[:3000], "not a readable image"),
    "cut.jpg": (encoded("JPEG")[:900], "not a readable image"),
    "header.png": (encoded("PNG")[:20], "not a readable image"),
    "flipped.png": (encoded("PNG")[:200] + b"\xff" * 50 + encoded("PNG")[250:], "not a readable image"),
    "cmyk.jpg": (encoded("JPEG", picture().convert("CMYK")), "colours are CMYK"),
    "grey16.png": (png16(colour=False), "more than 8 bits a channel"),
    "colour16.png": (png16(colour=True), "more than 8 bits a channel"),
    "float.tiff": (encoded("TIFF", picture().convert("F")), "more than 8 bits a channel"),
    "moving.gif": (
        encoded("GIF", picture(1), save_all=True, append_images=[picture(2)]),
        r"animated or many pages \(2 frames\)",
    ),
    "moving.png": (
        encoded("PNG", picture(1), save_all=True, append_images=[picture(2)]),
        r"animated or many pages \(2 frames\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(folder, name):
    content, message = BAD[name]
    (folder / "cat" / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        image_folder(folder, size=8)
    assert str(folder / "cat" / name) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_files_can_be_left_out(folder):
    for name, (content, _) in BAD.items():
        (folder / "cat" / name).write_bytes(content)
    source = image_folder(folder, size=8, skip_bad=True)
    assert len(source) == 6 and source.label.tolist() == [0, 1, 1, 2, 2, 2]
    assert sorted(path.name for path, _ in source.skipped) == sorted(BAD)
    assert all(str(path) in reason for path, reason in source.skipped)


def test_huge_images_are_refused(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ValueError, match="more than 50 pixels"):
        image_folder(folder, size=8)


def test_without_verification_a_bad_file_is_named_when_read(folder):
    (folder / "bird" / "0.png").write_bytes(b"")
    source = image_folder(folder, size=8, verify=False)
    with pytest.raises(ValueError, match="bird.0.png: the file is empty"):
        source[0]
    source.paths[1].unlink()
    with pytest.raises(ValueError, match="cat.0.png: the file is gone"):
        source[1]


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="none: no such folder"):
        image_folder(tmp_path / "none", size=8)


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="no class folders; expected one subfolder of images per class"):
        image_folder(tmp_path, size=8)
    with pytest.raises(ValueError, match="no image files below it"):
        image_folder(tmp_path, size=8, labelled=False)


def test_class_without_images(folder):
    (folder / "emu").mkdir()
    with pytest.raises(ValueError, match="emu: no image files below it; expected files ending in " + SUFFIXES[0]):
        image_folder(folder, size=8)


def test_class_of_bad_images(folder):
    (folder / "bird" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="bird: all 1 files that were tried are bad"):
        image_folder(folder, size=8, skip_bad=True)


def test_images_outside_the_classes(folder):
    picture().save(folder / "loose.png")
    with pytest.raises(ValueError, match=r"1 images lie outside class folders \(loose.png first\).*labelled=False"):
        image_folder(folder, size=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be at least 1 and channels 1 or 3, got 0 and 3"),
        ({"size": 8, "channels": 4}, "got 8 and 4"),
        ({"size": 8, "skip_bad": True, "verify": False}, "skip_bad=True needs verify=True"),
    ],
)
def test_wrong_options(folder, options, message):
    with pytest.raises(ValueError, match=message):
        image_folder(folder, **options)

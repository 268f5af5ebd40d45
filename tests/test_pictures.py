"""Samples as files: pixels, layouts, and names that cannot be written refused beforehand."""

import re

import numpy as np
import pytest
from PIL import Image

from jaxdiff.pictures import check_target, drawable, grid, save_samples, scatter, to_uint8

IMAGES = np.linspace(-1, 1, 5 * 4 * 3 * 1, dtype=np.float32).reshape(5, 4, 3, 1)


def test_pixels_are_rounded_and_clipped():
    values = np.float32([-2, -1, -1 + 1 / 255, 0, 1 - 1 / 255, 1, 3])
    assert to_uint8(values).tolist() == [0, 0, 0, 128, 254, 255, 255]


def test_grid_places_images_row_by_row():
    picture = grid(IMAGES, columns=2, gap=1, smallest=1)
    assert picture.shape == (3 * 5 + 1, 2 * 4 + 1, 3)
    pixels = to_uint8(IMAGES)
    for i, (y, x) in enumerate([(1, 1), (1, 5), (6, 1), (6, 5), (11, 1)]):
        assert (picture[y : y + 4, x : x + 3] == pixels[i]).all()
    assert (picture[0] == 255).all() and (picture[11:15, 5:8] == 255).all()
    assert grid(IMAGES, smallest=100).shape[1] >= 100
    with pytest.raises(ValueError, match="needs 1 or 3 channels, got 4"):
        grid(np.zeros([1, 2, 2, 4], np.float32))


def test_points_are_dark_where_they_lie():
    picture = scatter(np.float32([[1.0, 1.0]] * 50))
    assert picture.shape == (384, 384, 3)
    rows, columns = np.nonzero(picture[..., 0] < 255)
    # +1 of 1.25 lies nine tenths of the way to the right and to the top.
    assert abs(columns.mean() / 384 - 0.9) < 0.02 and abs(rows.mean() / 384 - 0.1) < 0.02


@pytest.mark.parametrize(
    ("shape", "can"),
    [((2,), True), ((3,), False), ((4, 4, 1), True), ((4, 4, 3), True), ((4, 4, 4), False), ((8, 4, 4, 3), False)],
)
def test_what_can_be_drawn(shape, can):
    assert drawable(shape) is can


def test_parts_become_one_file_or_many(tmp_path):
    parts = [IMAGES[:2], IMAGES[2:]]
    assert save_samples(tmp_path / "deep" / "a.npz", iter(parts), np.arange(5)) == 5
    with np.load(tmp_path / "deep" / "a.npz") as file:
        assert sorted(file.files) == ["arr_0", "arr_1"]
        assert (file["arr_0"] == to_uint8(IMAGES)).all() and file["arr_1"].tolist() == [0, 1, 2, 3, 4]
    assert save_samples(tmp_path / "folder", iter(parts)) == 5
    saved = [np.asarray(Image.open(tmp_path / "folder" / f"{i:06d}.png")) for i in range(5)]
    assert (np.stack(saved) == to_uint8(IMAGES)[..., 0]).all()
    points = np.float32([[0.5, -2.0]])
    assert save_samples(tmp_path / "points.npz", [points]) == 1
    with np.load(tmp_path / "points.npz") as file:
        assert file.files == ["arr_0"] and (file["arr_0"] == points).all()


def test_old_samples_stay_until_new_ones_are_there(tmp_path):
    save_samples(tmp_path / "folder", [IMAGES])

    def broken():
        raise FloatingPointError
        yield

    with pytest.raises(FloatingPointError):
        save_samples(tmp_path / "folder", broken())
    assert len(list((tmp_path / "folder").iterdir())) == 5


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("a.jpeg", (4, 4, 3), "ends in '.jpeg'; expected .png, .npz or a folder name"),
        ("a.png", (4, 4, 4), "cannot hold examples of shape [4, 4, 4], a grid takes images or points [2]"),
        ("a", (2,), "cannot hold examples of shape [2], a folder takes images; use a name ending in .npz"),
        ("kept.png", (4, 4, 3), "exists; choose another name or add --overwrite"),
        ("kept.png/a.png", (4, 4, 3), "is not a writable folder; choose another place"),
        ("folder.png", (4, 4, 3), "exists and is a folder; choose another name"),
        ("full", (4, 4, 3), "exists and is not empty; choose another name or add --overwrite"),
    ],
)
def test_targets_are_refused_beforehand(tmp_path, name, shape, message):
    (tmp_path / "kept.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "000000.png").write_bytes(b"")
    with pytest.raises(ValueError, match=re.escape(message)):
        check_target(tmp_path / name, shape)


def test_targets_that_are_fine(tmp_path):
    (tmp_path / "kept.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "new" / "a.png", (4, 4, 3))
    check_target(tmp_path / "kept.png", (2,), overwrite=True)
    check_target(tmp_path / "empty", (4, 4, 1))
    check_target(tmp_path / "latents.npz", (4, 4, 4))

"""`jaxdiff edit`: what is known of a picture is kept exactly, every task writes results, wrong pictures are refused."""

import numpy as np
import pytest
from PIL import Image

from jaxdiff.cli import main


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pictures of the size of the digits, and some that are not."""
    folder = tmp_path_factory.mktemp("pictures")
    values = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[3:] = 255
    arrays = {"image": values, "mask": mask, "black": 0 * mask, "large": np.zeros((20, 30, 3), np.uint8)}
    arrays |= {"tall": np.zeros((9, 8), np.uint8)}
    for name, array in arrays.items():
        Image.fromarray(array).save(folder / f"{name}.png")
    (folder / "text.png").write_text("no picture")
    return {name: str(folder / f"{name}.png") for name in (*arrays, "text")}


def edited(places, out, *words):
    assert main(["edit", places["run"], *words, "--num", "3", "--steps", "2", "--out", str(out)]) == 0
    with np.load(out) as arrays:
        return arrays[arrays.files[0]]


def test_inpainting_keeps_every_known_pixel_and_redraws_the_others(places, files, tmp_path):
    results = edited(places, tmp_path / "a.npz", "inpaint", "--image", files["image"], "--mask", files["mask"])
    image = np.asarray(Image.open(files["image"]))
    assert results.shape == (3, 8, 8, 1)
    for result in results[..., 0]:
        np.testing.assert_array_equal(result[:3], image[:3])
        assert (result[3:] != image[3:]).mean() > 0.5
    assert (results[0] != results[1]).any()


def test_super_resolution_keeps_the_means_of_patches(places, files, tmp_path):
    results = edited(places, tmp_path / "a.npz", "superres", "--image", files["image"], "--factor", "4")
    means = [x.reshape(2, 4, 2, 4).mean((1, 3)) for x in (results[0, ..., 0].astype(float), _pixels(files["image"]))]
    # Results are clipped and rounded to 8 bits; a mean of 16 moves with what is clipped.
    assert np.abs(means[0] - means[1]).max() < 30


def _pixels(path):
    return np.asarray(Image.open(path)).astype(float)


@pytest.mark.parametrize("words", [("stroke", "--noise", "0.5"), ("denoise", "--noise", "0.2"), ("interpolate",)])
def test_other_tasks_write_a_strip(places, files, tmp_path, words):
    image = () if words[0] == "interpolate" else ("--image", files["image"])
    command = ["edit", places["run"], *words, *image, "--num", "2", "--steps", "2", "--out", str(tmp_path / "a.png")]
    assert main(command) == 0
    assert Image.open(tmp_path / "a.png").width > 0


def test_pictures_of_another_size_are_scaled_when_asked(places, files, tmp_path):
    results = edited(places, tmp_path / "a.npz", "denoise", "--noise", "0.2", "--image", files["large"], "--resize")
    assert results.shape == (3, 8, 8, 1)


CASES = [
    ("edit {run} repaint --out {tmp}/a.png", "unknown task 'repaint'"),
    ("edit {run} inpaint --image {image} --out {tmp}/a.png", "inpaint needs --mask FILE", "add it"),
    ("edit {run} inpaint --mask {mask} --out {tmp}/a.png", "inpaint needs --image FILE"),
    ("edit {run} stroke --image {image} --mask {mask} --noise 1 --out {tmp}/a.png", "--mask is for inpaint"),
    ("edit {run} stroke --image {image} --out {tmp}/a.png", "stroke needs --noise"),
    (
        "edit {run} inpaint --image {tall} --mask {mask} --out {tmp}/a.png",
        "tall.png is 8 x 9 pixels, the run makes 8 x 8",
    ),
    ("edit {run} inpaint --image {image} --mask {tall} --out {tmp}/a.png", "tall.png is 8 x 9 pixels", "--resize"),
    ("edit {run} inpaint --image {image} --mask {black} --out {tmp}/a.png", "is all black: nothing to redraw"),
    ("edit {run} inpaint --image {text} --mask {mask} --out {tmp}/a.png", "is no picture that can be read"),
    ("edit {run} inpaint --image {tmp}/no.png --mask {mask} --out {tmp}/a.png", "no.png is not there"),
    ("edit {run} colorize --image {image} --out {tmp}/a.png", "colorize needs a run that makes pictures in colour"),
    ("edit {run} superres --image {image} --factor 3 --out {tmp}/a.png", "--factor 3 must", "divide 8 x 8"),
    ("edit {run} interpolate --image {image} --out {tmp}/a.png", "takes no --image"),
    ("edit {run} denoise --image {image} --noise 0.1 --out {tmp}/a.txt", "must end in .png or .npz"),
    ("edit {run} denoise --image {image} --noise 0.1 --class 10 --out {tmp}/a.png", "class must be 0 to 9, got 10"),
    ("edit {run} denoise --image {image} --noise -1 --out {tmp}/a.png", "--noise", "0.001"),
    ("edit {toyrun} denoise --image {image} --noise 0.1 --out {tmp}/a.png", "nothing can be edited"),
    ("edit {tmp} inpaint --image {image} --mask {mask} --out {tmp}/a.png", "is not a run: it has no run.json"),
]


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_edit_refuses(refused, places, files, case):
    places.update(files)
    refused(*case)

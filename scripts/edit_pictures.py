"""Pictures of zero-shot editing for docs/editing.md: real digits and a drawing, through `jaxdiff edit`.

`python scripts/edit_pictures.py RUN` takes any run of the ladder. It writes held-out digits and a drawing as a user
would have them, edits them by the commands that docs/editing.md shows, and puts the strips into one picture, ten times
enlarged.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from jaxdiff.data.images import digits

ROOT = Path(__file__).resolve().parents[1]
CLASS, INDEX = 3, 1  # of the held-out digits, one that is easy to recognise
TASKS = (
    ("inpaint", ["--image", "digit.png", "--mask", "mask.png", "--class", "3", "--steps", "20"]),
    ("superres", ["--image", "digit.png", "--class", "3", "--steps", "20"]),
    ("denoise", ["--image", "noisy.png", "--noise", "0.5", "--class", "3", "--num", "1"]),
    ("stroke", ["--image", "drawing.png", "--resize", "--noise", "1.0", "--class", "5", "--steps", "4"]),
    ("inpaint", ["--image", "drawing.png", "--mask", "drawing_mask.png", "--resize", "--class", "5", "--steps", "20"]),
    ("interpolate", ["--class", "8", "--num", "6", "--seed", "3"]),
)


def main() -> int:
    """Writes the inputs, edits, and stacks the strips."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "editing.png")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        strips = [
            edit(args.run.resolve(), task, options, folder, f"{i}.png") for i, (task, options) in enumerate(TASKS)
        ]
    tile = min(strip.height for strip in strips)
    strips = [strip.resize((strip.width * tile // strip.height, tile), Image.Resampling.NEAREST) for strip in strips]
    width = max(strip.width for strip in strips)
    sheet = Image.new("L", (width, sum(strip.height + 4 for strip in strips)), 255)
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height + 4
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * 5, sheet.height * 5), Image.Resampling.NEAREST).save(args.out)
    return 0


def write_inputs(folder: Path) -> None:
    """A held-out digit, the same with noise, a mask of its right half, a drawing in colour and a mask for it."""
    source = digits("held_out")
    assert source.label is not None
    chosen = np.flatnonzero(source.label == CLASS)[INDEX]
    image = source.x0[chosen, :, :, 0]
    noisy = image + 0.5 * np.random.default_rng(0).standard_normal(image.shape)
    for name, values in (("digit", image), ("noisy", noisy)):
        grey = np.clip(np.round((values + 1) * 127.5), 0, 255).astype(np.uint8)
        Image.fromarray(grey).save(folder / f"{name}.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    drawing = Image.new("RGB", (160, 160), "black")
    pen = ImageDraw.Draw(drawing)
    pen.line([(115, 20), (55, 20), (50, 75), (95, 75), (115, 100), (100, 140), (45, 140)], "white", 22, "curve")
    drawing.save(folder / "drawing.png")
    cut = Image.new("L", (160, 160), 0)
    ImageDraw.Draw(cut).rectangle((0, 80, 160, 160), 255)
    cut.save(folder / "drawing_mask.png")


def edit(run: Path, task: str, options: list[str], folder: Path, out: str) -> Image.Image:
    """The strip that `jaxdiff edit` writes."""
    command = [sys.executable, "-m", "jaxdiff.cli", "edit", str(run), task, *options, "--out", str(folder / out)]
    subprocess.run(command, check=True, cwd=folder)
    with Image.open(folder / out) as strip:
        return strip.convert("L").copy()


if __name__ == "__main__":
    sys.exit(main())

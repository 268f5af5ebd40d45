"""The two networks of the GPU benchmark in plain numbers, for jaxdiff and diffusers alike, and their small copies.

Both are trained on eps with a mean squared error, without the learned variances of ADM, so that the steps are equal.
Nothing is imported here but the standard library.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """A UNet and its data.

    Attributes:
      size: height and width of x.
      channels: of x.
      base: unit of width.
      mult: width of each level over base.
      res_blocks: a level on the way down.
      attends: which levels have attention.
      heads: number of heads, or None to have heads of `head_channels`.
      head_channels: channels of a head.
      classes: number of classes, 0 for none.
      context: tokens and width of a text context, None for none.
    """

    size: int
    channels: int
    base: int
    mult: tuple[int, ...]
    res_blocks: int
    attends: tuple[bool, ...]
    heads: int | None = None
    head_channels: int | None = None
    classes: int = 0
    context: tuple[int, int] | None = None


SHAPES = {
    "adm64": Shape(64, 3, 192, (1, 2, 3, 4), 3, (False, True, True, True), head_channels=64, classes=1000),
    "sd": Shape(64, 4, 320, (1, 2, 4, 4), 2, (True, True, True, False), heads=8, context=(77, 768)),
}
SMOKE = {
    "adm64": Shape(8, 3, 32, (1, 2), 1, (False, True), head_channels=16, classes=10),
    "sd": Shape(8, 4, 32, (1, 2), 1, (True, False), heads=4, context=(5, 16)),
}
STEPS, ROUNDS, CHAIN_LENGTH = 10, 3, 1000


def out_of_memory(error: Exception) -> bool:
    """Whether a framework says with this error that the batch is too large."""
    text = f"{type(error).__name__}: {error}"
    return any(word in text for word in ("RESOURCE_EXHAUSTED", "OutOfMemory", "out of memory"))

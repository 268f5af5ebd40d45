"""An extractor without a network: an image shrunk by means over blocks, and its pixels as features.

It makes every image set comparable with itself before a trained extractor is at hand. It sees layout and colour, not
content; its distances have nothing in common with published ones.
"""

import numpy as np

from jaxdiff.metrics.features import Extractor, Features


def pixel_extractor(size: int = 8) -> Extractor:
    """Features [n, size * size * C]: each the mean of a block of an image [H, W, C] in [-1, 1].

    Raises:
      ValueError: when applied, if size does not divide H and W.
    """

    def apply(images):
        n, h, w, c = images.shape
        if h % size or w % size:
            raise ValueError(f"pixel_extractor: {size} must divide the image size, got {h} x {w}")
        blocks = np.asarray(images).reshape(n, size, h // size, size, w // size, c)
        return Features(blocks.mean((2, 4)).reshape(n, -1))

    return Extractor(f"pixels-{size}x{size}", f"means over blocks to {size} x {size}", apply)

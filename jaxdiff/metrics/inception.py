"""The Inception network as an extractor: what published Frechet distances and Inception scores look at.

Images are prepared as pytorch-fid prepares picture files: 8 bits a value, resized to 299 pixels by bilinear
interpolation without antialiasing, [-1, 1]. Numbers made with other weights or another resize are other numbers, so
the extractor's name holds a digest of the weights. Weights are an argument (`pretrained.perceptual.load_inception`
reads a file); nothing is downloaded.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.metrics.features import Extractor, Features
from jaxdiff.networks.inception import Inception
from jaxdiff.types import Params

SIZE = 299
PREPROCESSING = "clip to [-1, 1], round to 8 bits, grey to RGB, bilinear to 299 x 299 without antialiasing"


def inception_extractor(params: Params) -> Extractor:
    """Features [n, 2048] ("pool3") and logits [n, 1008] of images [n, H, W, 3] or [n, H, W, 1] in [-1, 1].

    Args:
      params: of `networks.inception.Inception()`, as `pretrained.perceptual.load_inception` gives them.

    Returns:
      The extractor. Its name ends with the first eight digits of the SHA-256 of the weights.

    Raises:
      ValueError: when applied, if images have neither one nor three channels.

    Source: Heusel et al. 2017 (arXiv:1706.08500); Parmar et al. 2022 (arXiv:2104.11222) for what a resize changes.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    params = jax.tree.map(jnp.asarray, params)
    module = Inception()

    @jax.jit
    def classify(weights: Params, images: Array) -> Features:
        out: Any = module.apply({"params": weights}, prepare(images))
        return Features(out.features, out.logits)

    def apply(images: Array) -> Features:
        if images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise ValueError(
                f"the Inception extractor takes images [n, H, W, 3] or [n, H, W, 1], got {list(images.shape)}; decode "
                "latents first"
            )
        return classify(params, images)

    return Extractor(f"inception-v3-fid-{digest.hexdigest()[:8]}", PREPROCESSING, apply)


def prepare(images: Float[Array, "n h w c"]) -> Float[Array, "n 299 299 3"]:
    """What the network sees of images [n, H, W, 1 or 3] in [-1, 1].

    The 8-bit value is floor(127.5 (x + 1) + 0.5). Bilinear interpolation has half-pixel centres, repeats the edge, and
    does not average where it shrinks an image.
    """
    n, _, _, c = images.shape
    bits = jnp.floor(127.5 * (jnp.clip(images, -1.0, 1.0) + 1.0) + 0.5)
    images = jax.image.resize(bits / 127.5 - 1.0, (n, SIZE, SIZE, c), "bilinear", antialias=False)
    return jnp.broadcast_to(images, (n, SIZE, SIZE, 3))

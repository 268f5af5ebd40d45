"""Features in batches over several devices: the same rows, whatever the batch and the mesh."""

import jax
import numpy as np
import pytest

from jaxdiff.metrics.features import Extractor, Features, extract
from jaxdiff.training import sharding

IMAGES = np.random.default_rng(0).uniform(-1, 1, (21, 4, 4, 3)).astype(np.float32)


def extractor(seen=None):
    def apply(images):
        if seen is not None:
            seen.append((images.shape[0], {shard.data.shape[0] for shard in images.addressable_shards}))
        return Features(images.reshape(len(images), -1) ** 2, images.mean((1, 2)))

    return Extractor("squares", "none", apply)


@pytest.mark.parametrize("sizes", [(4, 1, 1), (2, 2, 1), (1, 2, 2)])
@pytest.mark.parametrize(("batch_size", "rows"), [(8, 8), (6, 8), (256, 24), (1, 4)])
def test_devices_share_every_batch(sizes, batch_size, rows):
    seen = []
    expected = extract(extractor(), IMAGES)
    got = extract(extractor(seen), IMAGES, batch_size=batch_size, mesh=sharding.make_mesh(*sizes))
    assert got.features.dtype == np.float64
    np.testing.assert_allclose(got.features, expected.features, rtol=1e-6)
    np.testing.assert_allclose(got.logits, expected.logits, rtol=1e-6)
    assert set(map(repr, seen)) == {repr((rows, {rows // 4}))}


def test_a_jitted_extractor_is_traced_once():
    shapes = []

    def apply(images):
        shapes.append(images.shape)
        return extractor().apply(images)

    extract(Extractor("squares", "none", jax.jit(apply)), IMAGES, batch_size=8, mesh=sharding.make_mesh(4))
    assert shapes == [(8, 4, 4, 3)]

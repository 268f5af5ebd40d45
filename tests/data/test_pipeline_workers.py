"""Worker processes give the stream of one process. Alone in its file: the processes take seconds to start."""

import numpy as np

from jaxdiff.data.augment import flip_horizontally, shift
from jaxdiff.data.images import digits
from jaxdiff.data.pipeline import batches


def test_workers_change_nothing():
    options = {"batch_size": 16, "seed": 5, "augment": (flip_horizontally, shift(1)), "start_step": 3}
    alone, spread = batches(digits(), **options), batches(digits(), **options, workers=1)
    try:
        for _ in range(4):
            a, b = next(alone), next(spread)
            assert all(np.array_equal(a[key], b[key]) for key in ("x0", "label"))
    finally:
        spread.close()

"""Drawing many samples: example i has its own noise, the last batch is cut, and devices share every batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.generate import batches, labels_for, start_noise, whole_batch
from jaxdiff.training import sharding


def shifted(params, aux, key, noise, cond, dials):
    """Stands for a trained method: the noise, plus the label times ten."""
    del aux, key, dials
    return noise * params["model"] + 10 * cond["label"].astype(noise.dtype)[:, None]


def draw(num, batch_size, *, seed=0, mesh=None, scale=1.0):
    parts = list(
        batches(
            shifted, {"model": jnp.float32(scale)}, {}, shape=(2,), labels=labels_for(num, 3), num=num,
            batch_size=batch_size, seed=seed, mesh=mesh,
        )
    )  # fmt: skip
    return [len(part) for part in parts], np.concatenate(parts)


def test_labels_take_all_classes_in_turn_or_one():
    assert labels_for(5, 3).tolist() == [0, 1, 2, 0, 1]
    assert labels_for(3, 3, 2).tolist() == [2, 2, 2]
    assert labels_for(3, None) is None
    for bad in (3, -1):
        with pytest.raises(ValueError, match=f"class must be 0 to 2, got {bad}"):
            labels_for(3, 3, bad)
    with pytest.raises(ValueError, match="class 1 was asked for, but this experiment has no classes"):
        labels_for(3, None, 1)


def test_the_last_batch_is_cut():
    sizes, samples = draw(7, 3)
    assert sizes == [3, 3, 1] and samples.shape == (7, 2)
    assert np.round(samples.mean(1) / 10).astype(int).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_more_samples_or_another_batch_size_leave_the_first_ones():
    _, samples = draw(7, 3)
    np.testing.assert_array_equal(draw(20, 5)[1][:7], samples)
    assert np.abs(draw(7, 3, seed=1)[1] - samples).max() > 0.1
    key = jax.random.split(jax.random.key(0))[0]
    one = start_noise(key, jnp.int32(4), 1, (2,))
    np.testing.assert_array_equal(np.asarray(one)[0] + np.float32(10), samples[4])


def test_a_batch_is_rounded_up_to_the_devices_and_no_larger_than_needed():
    mesh = sharding.make_mesh(data=2, fsdp=2)
    assert [whole_batch(n, 256) for n in (1, 5, 300)] == [1, 5, 256]
    assert [whole_batch(n, 6, mesh) for n in (1, 5, 300)] == [4, 8, 8]
    sizes, samples = draw(10, 6, mesh=mesh)
    assert sizes == [8, 2]
    np.testing.assert_array_equal(samples, draw(10, 6)[1])


def test_samples_that_are_not_finite_stop_at_once():
    with pytest.raises(FloatingPointError, match="not finite; use more steps, another solver or less guidance"):
        draw(2, 2, scale=float("nan"))

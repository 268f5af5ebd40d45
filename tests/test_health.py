"""Health of adversarial training: means by noise level and diversity against direct sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import health
from jaxdiff.types import Level

SHARES = jnp.array([0.0, 0.1, 0.25, 0.39, 0.95, 1.0])
LEVEL = Level(1 - SHARES, SHARES)


def test_means_by_level_are_those_of_the_examples_in_each_fifth():
    logits = jnp.array([1.0, 3.0, 5.0, -5.0, 7.0, 9.0])
    found = health.by_level({"logit": logits}, LEVEL)
    np.testing.assert_array_equal(found.pop("logit"), logits)
    assert set(found) == {f"logit_{low}" for low in ("0.0", "0.2", "0.4", "0.6", "0.8")}
    assert (found["logit_0.0"], found["logit_0.2"], found["logit_0.8"]) == (2.0, 0.0, 8.0)
    assert np.isnan(found["logit_0.4"]) and np.isnan(found["logit_0.6"])


def test_diversity_is_a_ratio_of_deviations_over_the_batch():
    data = jax.random.normal(jax.random.key(0), (512, 3, 2))
    centre = data.mean(0, keepdims=True)
    assert health.diversity(data, data) == pytest.approx(1, abs=1e-6)
    assert health.diversity(centre + 0.25 * (data - centre) + 7, data) == pytest.approx(0.25, abs=1e-5)
    assert health.diversity(jnp.ones_like(data), data) == pytest.approx(0, abs=1e-6)


def test_only_predictions_from_noise_count():
    data = jax.random.normal(jax.random.key(0), (6, 4))
    samples = data.at[4:].set(1.0)  # the last two, of shares 0.95 and 1, are alike
    assert health.diversity(samples, data, LEVEL) == pytest.approx(0, abs=1e-6)
    assert health.diversity(data.at[:4].set(1.0), data, LEVEL) == pytest.approx(1, abs=1e-6)
    one = Level(jnp.ones(6).at[0].set(0.0), jnp.ones(6))
    assert np.isnan(health.diversity(data, data, one))


def test_both_work_in_bfloat16():
    data = jnp.ones((4, 3), jnp.bfloat16).at[0].set(0)
    assert health.diversity(data, data).dtype == jnp.bfloat16
    assert health.by_level({"a": data[:, 0]}, Level(jnp.zeros(4), jnp.ones(4)))["a_0.8"] == pytest.approx(0.75)

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import process, schedules
from jaxdiff.metrics.bits_per_dim import bits_per_dim, prior_bits
from jaxdiff.types import Denoised

BETAS = schedules.linear_betas(20)
KEY = jax.random.key(0)
X0 = jnp.round(jax.random.uniform(KEY, (3, 4, 4, 1)) * 255) / 127.5 - 1


def knows(x0):
    return lambda x_t, t: Denoised(x0)


def test_an_oracle_pays_for_the_prior_and_the_last_bin_only():
    result = bits_per_dim(knows(X0), BETAS, process.fixed_small, KEY, X0)
    assert result.vb.shape == result.x0_mse.shape == result.eps_mse.shape == (3, 20)
    assert np.asarray(result.vb[:, :-1]) == pytest.approx(0, abs=1e-5)
    assert np.asarray(result.x0_mse) == pytest.approx(0)
    assert np.asarray(result.eps_mse) == pytest.approx(0, abs=1e-6)
    assert np.asarray(result.total) == pytest.approx(np.asarray(result.prior + result.vb.sum(axis=1)), rel=1e-6)


def test_prior_is_the_divergence_of_the_last_level():
    abar = np.cumprod(1 - BETAS)[-1]
    expected = 0.5 * (abar * np.asarray(X0) ** 2 + (1 - abar) - 1 - np.log(1 - abar)) / math.log(2)
    assert np.asarray(prior_bits(schedules.tables(BETAS), X0)) == pytest.approx(expected.mean(axis=(1, 2, 3)), rel=1e-3)


def test_columns_run_from_the_noisiest_step_and_use_the_noise_in_that_order():
    noise = jax.random.normal(KEY, (20, *X0.shape))
    seen = bits_per_dim(
        lambda x_t, t: Denoised(jnp.full_like(x_t, t[0])), BETAS, process.fixed_large, KEY, X0, noise=noise
    )
    expected = [float(((i - X0[0]) ** 2).mean()) for i in range(19, -1, -1)]
    assert np.asarray(seen.x0_mse[0]) == pytest.approx(expected, rel=1e-4)
    zero = bits_per_dim(lambda x_t, t: Denoised(x_t * 0), BETAS, process.fixed_large, KEY, X0, noise=noise)
    level = schedules.discrete(BETAS).level(jnp.array([19.0]))
    implied = (level.alpha[0] * X0[0] + level.sigma[0] * noise[0, 0]) / level.sigma[0]  # eps of x0 = 0
    assert float(zero.eps_mse[0, 0]) == pytest.approx(float(((implied - noise[0, 0]) ** 2).mean()), rel=1e-4)


def test_a_worse_denoiser_needs_more_bits():
    good = bits_per_dim(knows(X0), BETAS, process.fixed_large, KEY, X0).total
    bad = bits_per_dim(knows(0.5 * X0), BETAS, process.fixed_large, KEY, X0).total
    assert (bad > good).all()


def test_refuses_noise_of_another_shape():
    with pytest.raises(ValueError, match=r"noise has shape \(5, 3, 4, 4, 1\), expected \(20, 3, 4, 4, 1\)"):
        bits_per_dim(knows(X0), BETAS, process.fixed_large, KEY, X0, noise=jnp.zeros((5, *X0.shape)))

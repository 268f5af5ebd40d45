import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import parameterization, schedules, weighting
from jaxdiff.types import Level

BETAS = schedules.linear_betas(100)
ABAR = np.cumprod(1 - BETAS)
SNR = ABAR / (1 - ABAR)
LEVEL = Level(jnp.asarray(np.sqrt(ABAR), jnp.float32), jnp.asarray(np.sqrt(1 - ABAR), jnp.float32))
EPS, X0, V = parameterization.eps(), parameterization.x0(), parameterization.v()


def close(value, expected):
    assert value.shape == LEVEL.sigma.shape
    assert np.asarray(value) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(
    "weight, expected",
    [
        (weighting.uniform, np.ones(100)),
        (weighting.snr, SNR),
        (weighting.snr_plus_one, SNR + 1),
        (weighting.truncated_snr, np.maximum(SNR, 1)),
        (weighting.min_snr(5.0), np.minimum(SNR, 5)),
        (weighting.min_snr(5.0, X0), np.minimum(SNR, 5)),
        (weighting.min_snr(5.0, EPS), np.minimum(SNR, 5) / SNR),
        (weighting.min_snr(5.0, V), np.minimum(SNR, 5) / (SNR + 1)),
        (weighting.p2(1.0, 0.5), (1 + SNR) ** -0.5),
        (weighting.edm(0.5), 4 + SNR),
        (weighting.sigmoid(2.0), np.exp(2) / (np.exp(2) + SNR)),
        (weighting.on_output(weighting.snr, EPS), np.ones(100)),
        (weighting.on_output(weighting.snr, V), SNR / (SNR + 1)),
        (weighting.on_output(weighting.snr_plus_one, V), np.ones(100)),
        (weighting.on_output(weighting.edm(0.5), parameterization.edm(0.5)), np.ones(100)),
        (weighting.by_index(schedules.discrete(BETAS), np.arange(100.0)), np.arange(100.0)),
    ],
)
def test_closed_forms(weight, expected):
    close(weight(LEVEL), expected)


def test_min_snr_is_one_without_signal():
    level = Level(jnp.array([0.0, 0.6]), jnp.array([1.0, 0.8]))
    for meaning in (None, X0, EPS, V):
        value = weighting.min_snr(5.0, meaning)(level)
        assert value[0] == 1 and jnp.isfinite(value).all()


def test_inverse_gap_counts_in_sigma_over_alpha():
    t, s = (Level(jnp.array([1.0, 0.5]), jnp.array(sigma)) for sigma in ([3.0, 2.0], [1.0, 1.0]))
    assert weighting.inverse_gap(t, s).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("meaning", [EPS, V, parameterization.flow(), parameterization.edm(0.5)])
def test_on_output_weights_the_same_error(meaning):
    """w(x0 error) = on_output(w)(output error) for any output."""
    level = Level(jnp.array([0.9, 0.3]), jnp.array([0.4, 0.95]))
    x_t, f, best = (jnp.asarray(np.random.default_rng(i).normal(size=(2, 3)), jnp.float32) for i in range(3))
    errors = [parameterization.to_x0(meaning, a, x_t, level) for a in (f, best)]
    in_x0 = weighting.snr(level)[:, None] * (errors[0] - errors[1]) ** 2
    in_output = weighting.on_output(weighting.snr, meaning)(level)[:, None] * (f - best) ** 2
    assert np.asarray(in_output) == pytest.approx(np.asarray(in_x0), rel=1e-4)


def test_elbo_weight_turns_the_eps_error_into_the_divergence():
    """KL of two Gaussians with the posterior's variance: (difference of means)^2 / (2 variance)."""
    t = schedules.tables(BETAS)
    on_eps = BETAS / np.sqrt(1 - t.alphas_cumprod) / np.sqrt(1 - BETAS)  # how the mean moves with eps
    divergence = on_eps[1:] ** 2 / (2 * t.posterior_variance[1:])
    assert weighting.elbo_eps(BETAS)[1:] == pytest.approx(divergence, rel=1e-10)
    assert weighting.elbo_eps(BETAS)[0] == weighting.elbo_eps(BETAS)[1]
    assert weighting.posterior_variance(BETAS, 1.0) == pytest.approx(BETAS)
    assert weighting.posterior_variance(BETAS) == pytest.approx(t.posterior_variance)
    assert weighting.release_elbo_x0(BETAS)[5] == pytest.approx(0.5 * np.sqrt(ABAR[5]) / (2 - ABAR[5]))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: weighting.min_snr(0.0), "gamma must be positive"),
        (lambda: weighting.p2(0.0), "k must be positive"),
        (lambda: weighting.edm(-1.0), "sigma_data must be positive"),
        (lambda: weighting.by_index(schedules.discrete(BETAS), np.ones(7)), "7 entries, the chain 100 steps"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import process, schedules
from jaxdiff.types import Level

BETAS = schedules.linear_betas(1000)
CHAIN = schedules.discrete(BETAS)
SCHEDULES = [CHAIN, schedules.vp_linear(), schedules.ve(), schedules.rectified_flow(), schedules.trigonometric()]
PAIRS = [(0.9, 0.4), (0.5, 0.45), (0.2, 0.01)]  # shares of the way from t_min to t_max
X0, EPS = (jax.random.normal(jax.random.key(i), (4, 3)) for i in range(2))


def level64(schedule, share):
    t = schedule.t_min + share * (schedule.t_max - schedule.t_min)
    t = round(t) if schedule is CHAIN else t
    return schedule.level(jnp.full(4, t, jnp.float64))


@pytest.mark.parametrize("i", [1, 10, 500, 999])
def test_posterior_is_ddpm_s_formula(i):
    abar = np.cumprod(1 - BETAS)
    on_x0 = np.sqrt(abar[i - 1]) * BETAS[i] / (1 - abar[i])
    on_x_t = np.sqrt(1 - BETAS[i]) * (1 - abar[i - 1]) / (1 - abar[i])
    variance = (1 - abar[i - 1]) / (1 - abar[i]) * BETAS[i]
    mean = on_x0 * np.asarray(X0, np.float64) + on_x_t * np.asarray(EPS, np.float64)
    t, s = (CHAIN.level(jnp.full(4, float(j), jnp.float32)) for j in (i, i - 1))
    q = process.posterior(X0, EPS, t, s)
    assert np.asarray(q.mean) == pytest.approx(mean, rel=1e-3, abs=1e-4)
    assert np.asarray(q.variance) == pytest.approx(variance, rel=2e-3)
    with jax.enable_x64(True):
        t, s = (CHAIN.level(jnp.full(4, float(j), jnp.float64)) for j in (i, i - 1))
        q = process.posterior(X0.astype(jnp.float64), EPS.astype(jnp.float64), t, s)
        assert np.asarray(q.mean) == pytest.approx(mean, rel=1e-9)
        assert np.asarray(q.variance) == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("shares", PAIRS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_is_gaussian_conditioning(schedule, shares):
    """q(x_s | x_t) from the joint normal of (x_s, x_t) given x0, whose covariance is r sigma_s^2."""
    with jax.enable_x64(True):
        t, s = (level64(schedule, share) for share in shares)
        x0, x_t = X0.astype(jnp.float64), EPS.astype(jnp.float64)
        q = process.posterior(x0, x_t, t, s)
        (at, st), (as_, ss) = ((float(level.alpha[0]), float(level.sigma[0])) for level in (t, s))
        covariance = at / as_ * ss**2
        mean = as_ * np.asarray(x0) + covariance / st**2 * (np.asarray(x_t) - at * np.asarray(x0))
        assert np.asarray(q.mean) == pytest.approx(mean, rel=1e-8, abs=1e-9)
        assert np.asarray(q.variance) == pytest.approx(ss**2 - covariance**2 / st**2, rel=1e-6)


@pytest.mark.parametrize("shares", PAIRS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_transitions_are_one(schedule, shares):
    """x0 to s, then s to t, has the mean and variance of x0 to t."""
    with jax.enable_x64(True):
        t, s = (level64(schedule, share) for share in shares)
        x0 = X0.astype(jnp.float64)
        mean_s = process.q_sample(x0, jnp.zeros_like(x0), s)
        step = process.transition(mean_s, t, s)
        assert np.asarray(step.mean) == pytest.approx(
            np.asarray(process.q_sample(x0, jnp.zeros_like(x0), t)), rel=1e-12
        )
        total = step.variance[:, 0] + (t.alpha / s.alpha) ** 2 * s.sigma**2
        assert np.asarray(total) == pytest.approx(np.asarray(t.sigma**2), rel=1e-10)


def test_posterior_averages_back_to_the_marginal():
    """Sampling x_t and then x_s from the posterior gives x_s its own marginal."""
    t, s = (CHAIN.level(jnp.full(100_000, i)) for i in (700.0, 300.0))
    x0 = jnp.full((100_000, 1), 0.8)
    eps, z = (jax.random.normal(jax.random.key(i), x0.shape) for i in range(2))
    q = process.posterior(x0, process.q_sample(x0, eps, t), t, s)
    x_s = q.mean + jnp.sqrt(q.variance) * z
    assert float(x_s.mean()) == pytest.approx(0.8 * float(s.alpha[0]), abs=0.01)
    assert float(x_s.std()) == pytest.approx(float(s.sigma[0]), abs=0.01)


def test_chain_bridge_is_the_bridge_of_neighbours():
    index = jnp.array([0, 1, 250, 999])
    tables = schedules.tables(BETAS)
    with jax.enable_x64(True):
        t, s = (CHAIN.level(jnp.maximum(index - i, 0).astype(jnp.float64)) for i in (0, 1))
        clean = process.clean_like(s)
        s = jax.tree.map(lambda c, a: jnp.where(index == 0, c, a), clean, s)
        ours = process.bridge(t, s, smallest=float(tables.posterior_variance[1]))
        chain = process.chain_bridge(tables, index, jnp.float64)
        for a, b in zip(ours, chain, strict=True):
            assert np.asarray(a) == pytest.approx(np.asarray(b), rel=1e-8, abs=1e-14)
    assert all(a.dtype == jnp.float32 for a in process.chain_bridge(tables, index))


def test_to_clean_data_the_posterior_is_x0():
    t = CHAIN.level(jnp.full(4, 5.0))
    q = process.posterior(X0, EPS, t, process.clean_like(t))
    assert np.asarray(q.mean) == pytest.approx(np.asarray(X0), rel=1e-6) and (q.variance == 0).all()


def test_eps_and_snr_follow_from_the_level():
    level = Level(jnp.array([0.8, 0.5, 0.1, 1.0]), jnp.array([0.6, 0.5, 2.0, 0.1]))
    x_t = process.q_sample(X0, EPS, level)
    assert np.asarray(process.eps_from_x0(X0, x_t, level)) == pytest.approx(np.asarray(EPS), abs=1e-5)
    assert np.asarray(process.snr(level)) == pytest.approx([(4 / 3) ** 2, 1, 0.0025, 100], rel=1e-5)
    assert np.asarray(2 * process.half_log_snr(level)) == pytest.approx(np.log(process.snr(level)), abs=1e-5)


def test_variance_rules():
    tables = schedules.tables(BETAS)
    index = jnp.array([0, 1, 250, 999])
    between = process.chain_bridge(tables, index)
    i = np.asarray(index)
    small, large = process.fixed_small(between, X0), process.fixed_large(between, X0)
    assert small.value.shape == small.log.shape == (4, 1)
    assert np.asarray(small.value[:, 0]) == pytest.approx(tables.posterior_variance[i], rel=1e-6)
    assert np.asarray(small.log[:, 0]) == pytest.approx(tables.posterior_log_variance_clipped[i], rel=1e-6)
    # the step to clean data has no beta of its own: the release puts the next posterior variance there
    expected = np.append(tables.posterior_variance[1], BETAS[i[1:]])
    assert np.asarray(large.value[:, 0]) == pytest.approx(expected, rel=1e-5)
    out = jnp.stack([-jnp.ones(3), jnp.zeros(3), jnp.ones(3), 0.2 * jnp.ones(3)])
    low, high = tables.posterior_log_variance_clipped[i], np.log(BETAS[i])
    fraction = (np.array([-1, 0, 1, 0.2]) + 1) / 2
    ranged = process.learned_range(between, X0, out)
    assert np.asarray(ranged.log[:, 0]) == pytest.approx(fraction * high + (1 - fraction) * low, rel=1e-5)
    free = process.learned(between, X0, out)
    assert (free.log == out).all() and np.asarray(free.value) == pytest.approx(np.exp(np.asarray(out)), rel=1e-6)


def test_shapes_are_checked():
    level = Level(jnp.ones(4), jnp.ones(4))
    with pytest.raises(AssertionError, match="shape"):
        process.q_sample(X0, EPS[:, :1], level)
    with pytest.raises(AssertionError, match="shape"):
        process.posterior(X0, EPS[:, :1], level, level)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import process, schedules
from jaxdiff.solvers.ancestral import ancestral
from jaxdiff.types import Denoised, Level
from tests.solvers.gaussian_data import KEY, SCHEDULES, best_denoiser, even, integrate, linear_chain, sample

T = 1000
BETAS = schedules.linear_betas(T)
CHAIN = schedules.discrete(BETAS)
X = jax.random.normal(jax.random.key(1), (3, 2))
NOISE = jax.random.normal(jax.random.key(2), (4, 3, 2))


@pytest.mark.parametrize("t", [1, 10, 500, 999])
def test_step_is_algorithm_2(t):
    tables = schedules.tables(BETAS)
    denoise = best_denoiser(CHAIN)
    times = jnp.asarray([t, t - 1.0])
    x0 = np.asarray(denoise(X, jnp.full(3, float(t))).x0, np.float64)
    mean = tables.posterior_mean_coef1[t] * x0 + tables.posterior_mean_coef2[t] * X
    for rule, std in (
        (process.fixed_small, np.sqrt(tables.posterior_variance[t])),
        (process.fixed_large, np.sqrt(BETAS[t])),
    ):
        got = integrate(ancestral(CHAIN, rule), denoise, KEY, X, times, noise=NOISE)
        np.testing.assert_allclose(got, mean + std * NOISE[0], atol=5e-6)


def test_respaced_grid_is_the_chain_of_the_new_betas():
    """Every 4th index of the long chain, or all of the short one: the same levels, the same numbers."""
    kept = np.arange(3, T, 4)
    bars = np.cumprod(1 - BETAS)[kept]
    short = schedules.discrete(1 - bars / np.append(1.0, bars[:-1]))
    grid = jnp.asarray([249.0, 170.0, 90.0, 0.0])
    for rule in (process.fixed_small, process.fixed_large):
        one = sample(ancestral(CHAIN, rule), best_denoiser(CHAIN), KEY, X, 4 * grid + 3, noise=NOISE)
        two = sample(ancestral(short, rule), best_denoiser(short), KEY, X, grid, noise=NOISE)
        np.testing.assert_allclose(one, two, atol=2e-5)


def learned_denoiser(out):
    return lambda x, t: best_denoiser(CHAIN)(x, t)._replace(variance_out=jnp.full_like(x, out))


@pytest.mark.parametrize(("out", "rule"), [(-1.0, process.fixed_small), (1.0, process.fixed_large)])
def test_learned_range_ends_at_the_fixed_variances(out, rule):
    times = jnp.asarray([800.0, 500.0, 200.0])
    got = integrate(ancestral(CHAIN, process.learned_range), learned_denoiser(out), KEY, X, times, noise=NOISE)
    expected = integrate(ancestral(CHAIN, rule), best_denoiser(CHAIN), KEY, X, times, noise=NOISE)
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_learned_variance_is_the_log_variance():
    times = jnp.asarray([800.0, 500.0])
    args = KEY, X, times
    got = integrate(ancestral(CHAIN, process.learned), learned_denoiser(np.log(0.04)), *args, noise=NOISE)
    silent = integrate(ancestral(CHAIN), best_denoiser(CHAIN), *args, noise=0 * NOISE)
    np.testing.assert_allclose(got - silent, 0.2 * NOISE[0], atol=2e-6)


def test_classifier_moves_the_mean_by_the_variance():
    times = jnp.asarray([800.0, 500.0])
    t, s = (jax.tree.map(lambda a: a[:, None], CHAIN.level(times[i : i + 1])) for i in (0, 1))
    seen = []

    def gradient(x, t):
        seen.append(t)
        return jnp.full_like(x, 2.0)

    for rule, variance in (
        (process.fixed_small, process.bridge(t, s).variance),
        (process.fixed_large, process.bridge(t, s).added),
    ):
        args = best_denoiser(CHAIN), KEY, X, times
        guided = integrate(ancestral(CHAIN, rule, classifier_gradient=gradient), *args, noise=NOISE)
        plain = integrate(ancestral(CHAIN, rule), *args, noise=NOISE)
        np.testing.assert_allclose(guided - plain, jnp.broadcast_to(2 * variance, X.shape), atol=2e-6)
    assert len(seen) == 2


def test_the_step_to_clean_data_is_guided_with_the_variance_of_the_transition_before_it():
    times = jnp.asarray([800.0, 500.0, 200.0])
    t, s = (CHAIN.level(times[i : i + 1]) for i in (1, 2))
    clipped = float(process.bridge(t, s).variance[0])
    for rule, variance in ((process.fixed_small, 0.0), (process.fixed_large, clipped)):
        args = lambda x, t: Denoised(jnp.zeros_like(x)), KEY, X, times
        solver = ancestral(CHAIN, rule, classifier_gradient=lambda x, t: jnp.ones_like(x))
        np.testing.assert_allclose(sample(solver, *args, noise=NOISE), np.full(X.shape, variance), atol=1e-7)


@pytest.mark.parametrize("rule", [process.fixed_small, process.fixed_large, process.learned_range])
def test_one_point_is_the_denoiser(rule):
    times = jnp.asarray([999.0])
    got = sample(ancestral(CHAIN, rule), learned_denoiser(0.3), KEY, X, times)
    np.testing.assert_allclose(got, best_denoiser(CHAIN)(X, jnp.full(3, 999.0)).x0, rtol=1e-6)
    solver = ancestral(CHAIN, rule, classifier_gradient=lambda x, t: jnp.ones_like(x))
    assert jnp.isfinite(sample(solver, learned_denoiser(0.3), KEY, X, times)).all()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_mean_and_variance_are_those_of_the_linear_chain(schedule):
    schedule, start, end = schedule
    times = even(start, end, 20)
    x = 0.2 + 1.1 * jax.random.normal(jax.random.key(3), (20_000, 1))
    out = integrate(ancestral(schedule), best_denoiser(schedule), KEY, x, times)
    mean, variance = linear_chain(schedule, times, 1.0, float(x.mean()), float(x.var()))
    assert out.mean() == pytest.approx(mean, abs=0.02)
    assert out.std() == pytest.approx(np.sqrt(variance), rel=0.015)


def test_float64_stays():
    with jax.enable_x64(True):
        x, times = X.astype(jnp.float64), jnp.asarray([800.0, 500.0, 200.0], jnp.float64)
        assert sample(ancestral(CHAIN), best_denoiser(CHAIN), KEY, x, times).dtype == jnp.float64
        state = ancestral(CHAIN).init(x, times)
        a, b = (CHAIN.level(times[i : i + 1]) for i in (1, 2))
        assert float(state) == float(process.bridge(Level(*a), Level(*b)).variance[0])

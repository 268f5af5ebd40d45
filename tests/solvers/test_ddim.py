import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import schedules
from jaxdiff.solvers.ancestral import ancestral
from jaxdiff.solvers.ddim import ddim, ddim_inversion, eps_weight, level_like
from jaxdiff.solvers.heun import euler, euler_ancestral
from jaxdiff.types import Denoised, Level
from tests.solvers.gaussian_data import (
    KEY,
    MEAN,
    SCHEDULES,
    best_denoiser,
    even,
    integrate,
    linear_chain,
    path,
    sample,
    spread,
)

BETAS = schedules.scaled_linear_betas(1000)
CHAIN = schedules.discrete(BETAS)
GRID = jnp.asarray([900.0, 640.0, 333.0, 100.0, 7.0])
X = jax.random.normal(jax.random.key(1), (3, 2))
NOISE = jax.random.normal(jax.random.key(2), (5, 3, 2))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_step_is_equation_12(eta):
    bars = np.cumprod(1 - BETAS)
    now, then = bars[640], bars[333]
    denoise = best_denoiser(CHAIN)
    x0 = np.asarray(denoise(X, jnp.full(3, 640.0)).x0, np.float64)
    eps = (X - np.sqrt(now) * x0) / np.sqrt(1 - now)
    sigma = eta * np.sqrt((1 - then) / (1 - now)) * np.sqrt(1 - now / then)
    expected = np.sqrt(then) * x0 + np.sqrt(1 - then - sigma**2) * eps + sigma * NOISE[0]
    got = integrate(ddim(CHAIN, eta), denoise, KEY, X, GRID[1:3], noise=NOISE)
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_eta_one_is_ancestral_with_small_variance(schedule):
    schedule, start, end = schedule
    args = best_denoiser(schedule), KEY, X, even(start, end, 5)
    one = sample(ddim(schedule, 1.0), *args, noise=NOISE)
    np.testing.assert_allclose(one, sample(ancestral(schedule), *args, noise=NOISE), atol=2e-5)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_eta_zero_is_euler_in_sigma_over_alpha(schedule):
    schedule, start, end = schedule
    denoise, times = best_denoiser(schedule), even(start, end, 5)
    alpha, sigma = (np.asarray(a, np.float64) for a in schedule.level(times))
    x = np.asarray(X, np.float64) / alpha[0]
    for i in range(4):
        x0 = np.asarray(denoise(jnp.asarray(x * alpha[i], jnp.float32), jnp.full(3, times[i])).x0, np.float64)
        slope = (x - x0) * alpha[i] / sigma[i]
        x = x + (sigma[i + 1] / alpha[i + 1] - sigma[i] / alpha[i]) * slope
    for solver in (ddim(schedule), euler(schedule)):
        np.testing.assert_allclose(integrate(solver, denoise, KEY, X, times), x * alpha[-1], atol=2e-5)


def test_euler_ancestral_is_the_step_up_and_down_of_k_diffusion():
    schedule = schedules.ve()
    denoise, (t, s) = best_denoiser(schedule), (4.0, 1.5)
    up = np.sqrt(s**2 * (t**2 - s**2) / t**2)
    down = np.sqrt(s**2 - up**2)
    slope = (X - denoise(X, jnp.full(3, t)).x0) / t
    expected = X + slope * (down - t) + NOISE[0] * up
    got = integrate(euler_ancestral(schedule), denoise, KEY, X, jnp.asarray([t, s]), noise=NOISE)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_converges_to_the_exact_path_at_order_one(schedule):
    schedule, start, end = schedule
    with jax.enable_x64(True):
        x = jnp.linspace(-2.0, 2.0, 9)
        exact, denoise = path(schedule, x, start, end), best_denoiser(schedule)
        errors = [
            jnp.abs(integrate(ddim(schedule), denoise, KEY, x, even(start, end, n + 1, jnp.float64)) - exact).max()
            for n in (64, 128)
        ]
        assert np.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_mean_and_variance_are_those_of_the_linear_chain(eta):
    schedule, start, end = SCHEDULES["vp"]
    times = even(start, end, 20)
    x = 0.2 + 1.1 * jax.random.normal(jax.random.key(3), (20_000, 1))
    out = integrate(ddim(schedule, eta), best_denoiser(schedule), KEY, x, times)
    mean, variance = linear_chain(schedule, times, eta, float(x.mean()), float(x.var()))
    assert out.mean() == pytest.approx(mean, abs=0.02)
    assert out.std() == pytest.approx(np.sqrt(variance), rel=0.015)


def test_a_fine_chain_keeps_the_marginal():
    schedule, start, end = SCHEDULES["vp"]
    times = even(start, end, 1000)
    first, last = (schedule.level(jnp.asarray([t])) for t in (start, end))
    for eta in (0.0, 0.5, 1.0):
        mean, variance = linear_chain(schedule, times, eta, float(first.alpha[0]) * MEAN, float(spread(first)[0]) ** 2)
        assert mean == pytest.approx(float(last.alpha[0]) * MEAN, abs=2e-3)
        assert np.sqrt(variance) == pytest.approx(float(spread(last)[0]), rel=5e-3)


def test_sampling_ends_with_the_last_prediction_after_as_many_calls_as_times():
    calls = []

    def denoise(x, t):
        jax.debug.callback(lambda time: calls.append(float(time[0])), t)
        return best_denoiser(CHAIN)(x, t)

    x, trajectory = sample(ddim(CHAIN), denoise, KEY, X, GRID, return_trajectory=True)
    jax.effects_barrier()
    assert sorted(calls, reverse=True) == GRID.tolist()
    assert trajectory.x.shape == (5, 3, 2)
    np.testing.assert_array_equal(x, trajectory.x0[-1])
    np.testing.assert_allclose(x, best_denoiser(CHAIN)(trajectory.x[-2], jnp.full(3, 7.0)).x0, rtol=1e-6)


def test_eta_and_times_change_without_compiling():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(eta, times):
        return sample(ddim(CHAIN, eta), best_denoiser(CHAIN), KEY, X, times, noise=NOISE)

    zero, one = run(jnp.float32(0), GRID), run(jnp.float32(1), GRID)
    run(jnp.float32(1), GRID - 1)
    assert not np.allclose(zero, one)
    np.testing.assert_allclose(zero, sample(ddim(CHAIN), best_denoiser(CHAIN), KEY, X, GRID), atol=1e-6)


def test_zero_terminal_snr_is_finite_with_full_noise():
    chain = schedules.discrete(schedules.zero_terminal_snr(BETAS))
    denoise = best_denoiser(chain)
    for eta in (0.0, 0.5, 1.0):
        out = sample(ddim(chain, eta), denoise, KEY, X, jnp.asarray([999.0, 700.0, 300.0]), noise=NOISE)
        assert jnp.isfinite(out).all()


def test_inversion_and_back_returns_and_the_error_falls_with_the_steps():
    denoise = best_denoiser(CHAIN)
    errors = []
    for n in (25, 100):
        down = even(999.0, 0.0, n)
        noise = integrate(ddim_inversion(CHAIN), denoise, KEY, X, down[::-1])
        errors.append(float(jnp.abs(integrate(ddim(CHAIN), denoise, KEY, noise, down) - X).max()))
    assert errors[1] < 0.5 * errors[0] < 0.15


def test_inversion_of_samples_ends_in_the_unit_noise_of_the_exact_path():
    denoise, up = best_denoiser(CHAIN), even(0.0, 999.0, 400)
    level = CHAIN.level(jnp.zeros(1))
    x = level.alpha[0] * MEAN + spread(level)[0] * X
    noise = sample(ddim_inversion(CHAIN), denoise, KEY, x, up)
    np.testing.assert_allclose(noise, X, atol=0.05)


def test_limit_keeps_the_direction_of_the_unlimited_prediction():
    def denoise(x, t):
        del t
        return Denoised(jnp.full_like(x, 3.0))

    limited = ddim(CHAIN, limit_x0=lambda x0: jnp.clip(x0, -1, 1))
    got = integrate(limited, denoise, KEY, X, GRID[:2])
    t, s = (Level(*(a[:, None] for a in CHAIN.level(GRID[i : i + 1]))) for i in (0, 1))
    np.testing.assert_allclose(got, s.alpha * 1.0 + s.sigma * (X - t.alpha * 3.0) / t.sigma, rtol=1e-5)
    assert (sample(limited, denoise, KEY, X, GRID) == 1).all()


def test_keeps_the_dtype_of_x():
    with jax.enable_x64(True):
        out = sample(ddim(CHAIN, 0.5), best_denoiser(CHAIN), KEY, X.astype(jnp.float64), GRID.astype(jnp.float64))
        assert out.dtype == jnp.float64
    level = level_like(CHAIN, GRID, X.astype(jnp.bfloat16))
    assert level.alpha.dtype == level.sigma.dtype == jnp.bfloat16


def test_eps_weight_leaves_out_what_no_signal_would_multiply():
    weight = eps_weight(
        Level(jnp.asarray([0.0, 0.6]), jnp.asarray([1.0, 0.8])), Level(jnp.full(2, 0.8), jnp.full(2, 0.6))
    )
    np.testing.assert_allclose(weight, [0.0, 0.6 - 0.8 * 0.8 / 0.6], rtol=1e-6)

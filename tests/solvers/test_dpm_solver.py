"""Multistep DPM-Solver: equivalence with DDIM, one call a step, pure noise, inversion, SDE marginals, refusals."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import schedules, times
from jaxdiff.solvers.base import integrate, sample
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.dpm_solver import dpm_solver
from jaxdiff.solvers.exponential import DATA_ODE, DATA_SDE, NOISE_ODE, NOISE_SDE, psi, step_orders
from tests.solvers.gaussian_data import KEY, MEAN, STD, best_denoiser

VP = schedules.vp_linear()


def solve(solver, x, times, schedule=VP, method=integrate, **options):
    """integrate or sample with the exact denoiser, compiled as a whole."""
    return jax.jit(lambda x, t: method(solver, best_denoiser(schedule), KEY, x, t, **options))(x, times)


def counting(denoise):
    """The denoiser, and the list that its times go to whenever it runs."""
    calls = []

    def counted(x, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t[0], ordered=True)
        return denoise(x, t)

    return counted, calls


def grid(n, schedule=VP, **ends):
    return jnp.asarray(times.uniform_log_snr(schedule, n, **ends), jnp.float32)


def test_psi_is_exact_at_every_size():
    def exact(z, k):
        return float(Fraction(z) * sum(Fraction(z) ** j / math.factorial(j + k) for j in range(150)))

    values = [-20.0, -3.0, -1.0, -0.999, -0.1, -1e-6, 0.0, 1e-9, 0.3, 0.99, 1.0, 2.5]
    with jax.enable_x64(True):
        for k, got in enumerate(psi(jnp.array(values), 4), 1):
            np.testing.assert_allclose(got, [exact(z, k) for z in values], rtol=2e-14)
    for k, got in enumerate(psi(jnp.array(values, jnp.float32), 4), 1):
        np.testing.assert_allclose(got, [exact(float(np.float32(z)), k) for z in values], rtol=3e-6)


def test_psi_of_a_step_from_pure_noise():
    assert [float(v[0]) for v in psi(jnp.array([-jnp.inf]), 3)] == [-1.0, -1.0, -0.5]


def test_orders_of_the_steps():
    assert step_orders(6, 3, None).tolist() == [1, 2, 3, 3, 3, 3]
    assert step_orders(6, 3, 1).tolist() == [1, 2, 3, 3, 2, 1]
    assert step_orders(6, 3, 2).tolist() == [1, 2, 3, 3, 3, 2]
    assert step_orders(2, 3, 1).tolist() == [1, 1]
    assert step_orders(0, 3, 1).tolist() == []


@pytest.mark.parametrize("form", [DATA_ODE, NOISE_ODE])
def test_order_1_is_ddim(form):
    x, ts = jnp.linspace(-2.0, 2.0, 9), grid(9)
    ours = solve(dpm_solver(VP, 1, form=form), x, ts)
    np.testing.assert_allclose(ours, solve(ddim(VP), x, ts), atol=1e-6)


def test_the_second_difference_makes_order_3_exact_for_quadratic_predictions():
    """With the exact history of x0 = l + l^2 / 2, l = half log SNR, one step solves the ODE exactly."""

    def x0(level):
        half = np.log(level.alpha) - np.log(level.sigma)
        return half + half**2 / 2

    with jax.enable_x64(True):
        ts = jnp.asarray(times.uniform_log_snr(VP, 4) + np.array([0, 0.01, 0, 0]))
        level = jax.tree.map(np.asarray, VP.level(ts))
        solver = dpm_solver(VP, 3)
        linear = jax.tree.map(np.asarray, jax.jit(solver.init)(jnp.zeros(1), ts).linear)
        m = x0(level)
        got = linear.on_x[2] * 1.5 + linear.on_m[2] @ m[[2, 1, 0]]
    half = np.log(level.alpha) - np.log(level.sigma)
    at = np.polynomial.legendre.leggauss(40)
    nodes = (half[3] - half[2]) / 2 * at[0] + (half[3] + half[2]) / 2
    integrand = np.exp(nodes - half[3]) * (nodes + nodes**2 / 2)
    exact = level.sigma[3] / level.sigma[2] * 1.5 + level.alpha[3] * (half[3] - half[2]) / 2 * (at[1] @ integrand)
    assert got == pytest.approx(exact, abs=1e-12)


def test_n_times_are_n_network_calls():
    denoise, calls = counting(best_denoiser(VP))
    jax.jit(lambda x: sample(dpm_solver(VP, 2), denoise, KEY, x, grid(5)))(jnp.ones(2))
    jax.effects_barrier()
    np.testing.assert_allclose(calls, grid(5))


def test_a_new_grid_of_the_same_length_compiles_nothing_and_the_network_is_traced_once():
    traces = []
    denoise = best_denoiser(VP)

    def counted(x, t):
        traces.append(t.shape)
        return denoise(x, t)

    run = jax.jit(lambda x, ts: integrate(dpm_solver(VP, 3), counted, KEY, x, ts))
    first, second = run(jnp.ones(2), grid(7)), run(jnp.ones(2), jnp.linspace(1.0, 0.1, 7))
    assert traces == [(2,)]
    assert not np.allclose(first, second)


def test_sample_ends_with_the_denoiser():
    x, ts = jnp.linspace(-2.0, 2.0, 9), grid(5)
    before = solve(dpm_solver(VP), x, ts)
    clean = best_denoiser(VP)(before, jnp.full(9, ts[-1])).x0
    np.testing.assert_allclose(solve(dpm_solver(VP), x, ts, method=sample), clean, atol=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_data_form_starts_from_pure_noise(order):
    flow = schedules.rectified_flow()
    x = jnp.linspace(-2.0, 2.0, 9)
    ts = jnp.concatenate([jnp.ones(1), jnp.linspace(0.99, 0.02, 80)])
    got = solve(dpm_solver(flow, order), x, ts, flow)
    alpha, sigma = 0.98, 0.02
    exact = alpha * MEAN + math.hypot(alpha * STD, sigma) * np.asarray(x)
    np.testing.assert_allclose(got, exact, atol={1: 0.05, 2: 3e-3, 3: 3e-3}[order])


@pytest.mark.parametrize("form", [DATA_ODE, NOISE_ODE])
def test_an_increasing_grid_inverts(form):
    x = jnp.linspace(-1.0, 1.0, 9)
    errors = []
    for n in (17, 33):
        ts = grid(n, start=0.8, end=0.05)
        noise = solve(dpm_solver(VP, 2, form=form), x, ts[::-1])
        back = solve(dpm_solver(VP, 2, form=form), noise, ts)
        errors.append(float(jnp.abs(back - x).max()))
    assert errors[1] < errors[0] / 2
    assert errors[1] < 0.01


@pytest.mark.parametrize("order", [2, 3])
def test_a_repeated_time_moves_nothing(order):
    ts = grid(8)[jnp.array([0, 1, 2, 3, 3, 4, 5, 6, 7])]
    solver = dpm_solver(VP, order)
    _, path = solve(solver, jnp.ones(2), ts, return_trajectory=True)
    np.testing.assert_array_equal(path.x[3], path.x[2])
    assert np.isfinite(path.x).all()


@pytest.mark.parametrize("form", [DATA_SDE, NOISE_SDE])
@pytest.mark.parametrize("variant", ["midpoint", "heun"])
def test_sde_keeps_the_marginal(form, variant):
    """Standard errors of 40000 samples: 0.4 % of the mean's unit, 0.4 % of the deviation; 48 steps add about 1 %."""
    start, end = 0.9, 0.1
    a, b = (jax.tree.map(float, jax.tree.map(lambda c: c[0], VP.level(jnp.array([t])))) for t in (start, end))
    z = jax.random.normal(jax.random.key(1), (40000,))
    x = a.alpha * MEAN + math.hypot(a.alpha * STD, a.sigma) * z
    solver = dpm_solver(VP, 2, form=form, variant=variant)
    got = solve(solver, x, grid(49, start=start, end=end))
    assert float(got.mean()) == pytest.approx(b.alpha * MEAN, abs=0.02)
    assert float(got.std()) == pytest.approx(math.hypot(b.alpha * STD, b.sigma), rel=0.02)
    # fresh noise is really used: the result is not a function of the start
    assert abs(np.corrcoef(got, x)[0, 1]) < 0.5


@pytest.mark.parametrize("form", [DATA_SDE, NOISE_SDE])
def test_sde_step_adds_the_noise_of_the_exact_transition(form):
    """From x0 known, order 1 draws from the posterior q(x_s | x_t, x0): its mean and variance, exactly."""
    t, s = VP.level(jnp.array([0.7])), VP.level(jnp.array([0.4]))
    linear = jax.jit(dpm_solver(VP, 1, form=form).init)(jnp.zeros(1), jnp.array([0.7, 0.4])).linear
    ratio = t.alpha / s.alpha
    added = t.sigma**2 - ratio**2 * s.sigma**2
    if form is DATA_SDE:
        np.testing.assert_allclose(linear.on_x[0], (ratio * s.sigma**2 / t.sigma**2)[0], rtol=1e-5)
        np.testing.assert_allclose(linear.on_m[0, 0], (s.alpha * added / t.sigma**2)[0], rtol=1e-5)
        np.testing.assert_allclose(linear.on_noise[0], jnp.sqrt(added * s.sigma**2 / t.sigma**2)[0], rtol=1e-5)
    else:
        np.testing.assert_allclose(linear.on_noise[0], (jnp.sqrt(added) / ratio)[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, "order must be one of 1, 2, 3, got 4"),
        ({"variant": "hean"}, "variant must be one of midpoint, taylor, heun, got 'hean'; did you mean 'heun'?"),
        ({"final_order": 0}, "final_order must be at least 1, got 0; None keeps the full order"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError) as error:
        dpm_solver(VP, **options)
    assert str(error.value) == f"dpm_solver: {message}"

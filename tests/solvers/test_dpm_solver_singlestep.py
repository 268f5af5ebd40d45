"""Single-step and adaptive DPM-Solver: plans, grids of calls, exactness for polynomials, tolerance, refusals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import schedules, times
from jaxdiff.solvers.base import integrate, sample
from jaxdiff.solvers.dpm_solver_adaptive import integrate_adaptive
from jaxdiff.solvers.dpm_solver_singlestep import dpm_solver_singlestep, singlestep_orders, stage_times
from jaxdiff.solvers.exponential import DATA_ODE, DATA_SDE, NOISE_ODE
from jaxdiff.types import Denoised
from tests.solvers.gaussian_data import KEY, best_denoiser, path

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


def test_plans_spend_exactly_the_calls():
    assert singlestep_orders(1, 3) == (1,)
    assert singlestep_orders(3, 3) == (2, 1)
    assert singlestep_orders(6, 3) == (3, 2, 1)
    assert singlestep_orders(7, 3) == (3, 3, 1)
    assert singlestep_orders(8, 3) == (3, 3, 2)
    assert singlestep_orders(5, 2) == (2, 2, 1)
    assert singlestep_orders(4, 1) == (1, 1, 1, 1)
    assert all(sum(singlestep_orders(n, q)) == n for n in range(1, 30) for q in (1, 2, 3))


def test_stage_times_divide_each_block():
    got = stage_times(np.array([9.0, 3.0, 1.0]), (3, 2), times.time_uniform)
    np.testing.assert_allclose(got, [9, 7, 5, 3, 2, 1])


@pytest.mark.parametrize(("start", "end", "n"), [(1.0, 0.001, 8), (1.0, 0.1, 6)])
def test_grids_equal_in_time_are_their_own_grids_of_calls(start, end, n):
    orders = singlestep_orders(n, 3)
    for make in (times.time_uniform, times.time_quadratic):
        outer = make(start, end, n + 1)[np.cumsum((0, *orders))]
        np.testing.assert_allclose(stage_times(outer, orders, make), make(start, end, n + 1), rtol=1e-12)


@pytest.mark.parametrize(
    ("order", "variant", "degree"), [(1, "midpoint", 0), (2, "taylor", 1), (3, "midpoint", 1), (3, "taylor", 2)]
)
def test_one_block_is_exact_for_polynomial_predictions(order, variant, degree):
    """x0 = l^degree with l half log SNR: x_t = (sigma_t / sigma_s) x + alpha_t int e^(l - l_t) x0 dl."""
    ve = schedules.ve()

    def denoise(x, t):
        return Denoised(jnp.broadcast_to((-jnp.log(t)) ** degree, x.shape))

    start, end = 3.0, 0.4
    with jax.enable_x64(True):
        ts = jnp.exp(jnp.linspace(math.log(start), math.log(end), order + 1))
        solver = dpm_solver_singlestep(ve, (order,), variant=variant)
        got = integrate(solver, denoise, KEY, jnp.array([1.5]), ts)[0]
    nodes, weights = np.polynomial.legendre.leggauss(40)
    low, high = -math.log(start), -math.log(end)
    place = (high - low) / 2 * nodes + (high + low) / 2
    exact = end / start * 1.5 + (high - low) / 2 * float(weights @ (np.exp(place - high) * place**degree))
    assert float(got) == pytest.approx(exact, abs=1e-12)


def test_sum_of_orders_is_the_number_of_calls_before_the_step_to_clean_data():
    denoise, calls = counting(best_denoiser(VP))
    ts = jnp.linspace(1.0, 0.1, 7)
    jax.jit(lambda x: sample(dpm_solver_singlestep(VP, (3, 2, 1)), denoise, KEY, x, ts))(jnp.ones(2))
    jax.effects_barrier()
    np.testing.assert_allclose(calls, ts)


def test_a_new_grid_compiles_nothing_and_the_network_is_traced_once():
    traces = []
    denoise = best_denoiser(VP)

    def counted(x, t):
        traces.append(t.shape)
        return denoise(x, t)

    run = jax.jit(lambda x, ts: integrate(dpm_solver_singlestep(VP, (3, 2)), counted, KEY, x, ts))
    first, second = run(jnp.ones(2), jnp.linspace(1.0, 0.1, 6)), run(jnp.ones(2), jnp.linspace(0.9, 0.2, 6))
    assert traces == [(2,)]
    assert not np.allclose(first, second)


@pytest.mark.parametrize("form", [DATA_ODE, NOISE_ODE])
def test_an_increasing_grid_inverts(form):
    x, ts = jnp.linspace(-1.0, 1.0, 9), jnp.asarray(times.uniform_log_snr(VP, 31, start=0.8, end=0.05), jnp.float32)
    solver = dpm_solver_singlestep(VP, (3,) * 10, form=form)
    noise = solve(solver, x, ts[::-1])
    back = solve(solver, noise, ts)
    np.testing.assert_allclose(back, x, atol=2e-3)


@pytest.mark.parametrize("form", [DATA_ODE, NOISE_ODE])
@pytest.mark.parametrize("order", [2, 3])
def test_adaptive_meets_its_tolerance(order, form):
    x = jnp.linspace(-2.0, 2.0, 9)
    errors, calls = [], []
    for tolerance in (1e-1, 1e-3):
        run = jax.jit(
            lambda x, tol=tolerance: integrate_adaptive(
                VP, best_denoiser(VP), x, 1.0, 0.05, order=order, form=form, atol=tol, rtol=tol
            )
        )
        got, num_calls = run(x)
        errors.append(float(jnp.abs(got - path(VP, x, 1.0, 0.05)).max()))
        calls.append(int(num_calls))
    assert errors[1] < errors[0] / 5
    assert errors[1] < 2e-3
    assert calls[0] < calls[1]
    assert [n % order for n in calls] == [0, 0]


def test_adaptive_counts_its_calls_and_goes_back():
    denoise, calls = counting(best_denoiser(VP))
    x = jnp.linspace(-1.0, 1.0, 5)
    run = jax.jit(lambda x: integrate_adaptive(VP, denoise, x, 0.2, 0.8, order=2, atol=0.02, rtol=0.02))
    noise, num_calls = run(x)
    jax.effects_barrier()
    assert len(calls) == int(num_calls)
    np.testing.assert_allclose(noise, path(VP, x, 0.2, 0.8), atol=0.03)


@pytest.mark.parametrize(("factor", "max_calls", "made"), [(1.0, 4, 4), (math.nan, 2000, 2)])
def test_adaptive_says_so_when_it_did_not_arrive(factor, max_calls, made):
    def denoise(x, t):
        return Denoised(best_denoiser(VP)(x, t).x0 * factor)

    run = jax.jit(lambda x: integrate_adaptive(VP, denoise, x, 1.0, 0.05, order=2, max_calls=max_calls))
    got, num_calls = run(jnp.ones(2))
    assert int(num_calls) == made
    assert np.isnan(got).all()


def test_refusals():
    with pytest.raises(ValueError, match="got a stochastic form; use DATA_ODE or NOISE_ODE, or dpm_solver"):
        dpm_solver_singlestep(VP, (2,), form=DATA_SDE)
    with pytest.raises(ValueError, match="order must be one of 1, 2, 3, got 4"):
        dpm_solver_singlestep(VP, (4,))
    with pytest.raises(ValueError, match=r"blocks of orders \(2, 1\) need 4 times, got 3; see singlestep_orders"):
        solve(dpm_solver_singlestep(VP, (2, 1)), jnp.ones(2), jnp.linspace(1.0, 0.1, 3))
    with pytest.raises(ValueError, match="num_calls must be at least 1, got 0"):
        singlestep_orders(0, 3)
    with pytest.raises(ValueError, match="2 blocks need 3 outer times, got 2"):
        stage_times(np.array([1.0, 0.5]), (1, 1), times.time_uniform)
    with pytest.raises(ValueError, match="integrate_adaptive: order must be one of 2, 3, got 1"):
        integrate_adaptive(VP, best_denoiser(VP), jnp.ones(2), 1.0, 0.1, order=1)
    with pytest.raises(ValueError, match="atol must be positive, got 0.0"):
        integrate_adaptive(VP, best_denoiser(VP), jnp.ones(2), 1.0, 0.1, atol=0.0)

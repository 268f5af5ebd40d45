"""UniPC: one call a step, the corrector, pure noise, inversion, refusals.

Compared once by hand with diffusers 0.42.1 (UniPCMultistepScheduler, solver orders 1-3, bh1 and bh2, 6, 9 and 20 steps,
final_sigmas_type "sigma_min"): our float64 run with final_order=1 on its timesteps and 0 differed from its float32 run
by at most 1.6e-6, on values up to 1.9.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import schedules, times
from jaxdiff.solvers.base import integrate, sample
from jaxdiff.solvers.dpm_solver import dpm_solver
from jaxdiff.solvers.unipc import unipc
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


def grid(n, **ends):
    return jnp.asarray(times.uniform_log_snr(VP, n, **ends), jnp.float32)


def test_one_step_is_ddim():
    x, ts = jnp.linspace(-2.0, 2.0, 9), grid(2)
    ddim = solve(dpm_solver(VP, 1), x, ts)
    np.testing.assert_allclose(solve(unipc(VP, 3), x, ts), ddim, atol=1e-6)


def test_n_times_are_n_network_calls():
    denoise, calls = counting(best_denoiser(VP))
    jax.jit(lambda x: sample(unipc(VP, 2), denoise, KEY, x, grid(5)))(jnp.ones(2))
    jax.effects_barrier()
    np.testing.assert_allclose(calls, grid(5))


@pytest.mark.parametrize("order", [2, 3])
def test_corrected_steps_are_exact_for_polynomials_one_degree_above_the_predictor(order):
    """With x0 = l^order, l = half log SNR, and exact predictions, the corrector of order p solves a step exactly."""
    ve = schedules.ve()
    with jax.enable_x64(True):
        half = np.array([-1.5, -1.1, -0.4, 0.2])
        ts = jnp.exp(-jnp.asarray(half))
        linear = jax.jit(unipc(ve, order).init)(jnp.zeros(1), ts).linear
        on_x, correct, on_next = (np.asarray(a)[2] for a in (linear.on_x, linear.correct, linear.on_next))
    m = half**order
    got = on_x * 1.5 + on_next * m[3] + correct @ m[2::-1][:order]
    nodes, weights = np.polynomial.legendre.leggauss(40)
    h = half[3] - half[2]
    place = h / 2 * nodes + (half[3] + half[2]) / 2
    exact = math.exp(-h) * 1.5 + h / 2 * float(weights @ (np.exp(place - half[3]) * place**order))
    assert got == pytest.approx(exact, abs=1e-12)


def test_a_new_grid_compiles_nothing_and_the_network_is_traced_once():
    traces = []
    denoise = best_denoiser(VP)

    def counted(x, t):
        traces.append(t.shape)
        return denoise(x, t)

    run = jax.jit(lambda x, ts: integrate(unipc(VP, 3), counted, KEY, x, ts))
    first, second = run(jnp.ones(2), grid(7)), run(jnp.ones(2), jnp.linspace(1.0, 0.1, 7))
    assert traces == [(2,)]
    assert not np.allclose(first, second)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_starts_from_pure_noise(order):
    flow = schedules.rectified_flow()
    x = jnp.linspace(-2.0, 2.0, 9)
    ts = jnp.concatenate([jnp.ones(1), jnp.linspace(0.99, 0.02, 80)])
    got = solve(unipc(flow, order), x, ts, flow)
    np.testing.assert_allclose(got, 0.98 * MEAN + math.hypot(0.98 * STD, 0.02) * np.asarray(x), atol=3e-3)


def test_an_increasing_grid_inverts():
    x, ts = jnp.linspace(-1.0, 1.0, 9), grid(33, start=0.8, end=0.05)
    noise = solve(unipc(VP), x, ts[::-1])
    back = solve(unipc(VP), noise, ts)
    np.testing.assert_allclose(back, x, atol=2e-3)


def test_a_repeated_time_stays_finite():
    ts = grid(8)[jnp.array([0, 1, 2, 3, 3, 4, 5, 6, 7])]
    assert np.isfinite(solve(unipc(VP, 3), jnp.ones(2), ts)).all()


def test_final_order_lowers_the_last_steps():
    def predictor(final_order):
        return np.asarray(jax.jit(unipc(VP, 3, final_order=final_order).init)(jnp.zeros(1), grid(7)).linear.predict)

    lowered, full = predictor(1), predictor(None)
    np.testing.assert_array_equal(lowered[-1, 1:], [0.0, 0.0])
    np.testing.assert_array_equal(lowered[-2, 2:], [0.0])
    np.testing.assert_array_equal(lowered[:-2], full[:-2])
    assert (full[-2:] != 0).all()


def test_refusals():
    with pytest.raises(ValueError, match="unipc: variant must be one of bh1, bh2, got 'bh3'; did you mean"):
        unipc(VP, variant="bh3")
    with pytest.raises(ValueError, match="unipc: order must be one of 1, 2, 3, got 5"):
        unipc(VP, 5)
    with pytest.raises(ValueError, match="unipc: final_order must be at least 1, got 0"):
        unipc(VP, final_order=0)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import schedules
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.pndm import plms, pndm, pndm_prk, pndm_prk_times, pndm_times
from tests.solvers.gaussian_data import KEY, best_denoiser, integrate, path, sample

CHAIN = schedules.discrete(schedules.scaled_linear_betas(1000))
X = jax.random.normal(jax.random.key(1), (3, 2))
TIMES = np.linspace(900, 0, 10)
BY_SIGMA = schedules.ve()


def run(solver, times, x=X, schedule=CHAIN, **options):
    times = jnp.asarray(times, x.dtype)
    return integrate(solver(schedule), best_denoiser(schedule), KEY, x, times, **options)


def plms_in_numpy(x, times):
    """The release's loop: improved Euler, then Adams-Bashforth of order 2, 3, 4 in eps."""
    alpha, sigma = (np.asarray(a, np.float64) for a in CHAIN.level(jnp.asarray(times, jnp.float32)))
    denoise = best_denoiser(CHAIN)

    def eps(x, i):
        x0 = np.asarray(denoise(jnp.asarray(x, jnp.float32), jnp.full(x.shape[:1], times[i], jnp.float32)).x0)
        return (x - alpha[i] * x0) / sigma[i]

    def move(x, e, i):
        return alpha[i + 1] * (x - sigma[i] * e) / alpha[i] + sigma[i + 1] * e

    x, past = np.asarray(x, np.float64), []
    for i in range(len(times) - 1):
        e = eps(x, i)
        if not past:
            used = (e + eps(move(x, e, i), i + 1)) / 2
        elif len(past) == 1:
            used = (3 * e - past[0]) / 2
        elif len(past) == 2:
            used = (23 * e - 16 * past[0] + 5 * past[1]) / 12
        else:
            used = (55 * e - 59 * past[0] + 37 * past[1] - 9 * past[2]) / 24
        x, past = move(x, used, i), [e, *past]
    return x


def test_plms_is_the_release_s_loop():
    np.testing.assert_allclose(run(plms, TIMES), plms_in_numpy(X, TIMES), atol=2e-5)


def test_pndm_on_its_grid_is_plms():
    np.testing.assert_allclose(run(pndm, pndm_times(TIMES)), run(plms, TIMES), atol=2e-6)


def test_grids():
    np.testing.assert_array_equal(pndm_times(np.array([9.0, 6, 3, 0])), [9, 6, 6, 3, 0])
    np.testing.assert_array_equal(
        pndm_prk_times(np.array([9.0, 7, 5, 3, 1])), [9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 1]
    )


def test_runge_kutta_start_is_the_classical_rule():
    """Along sigma with alpha = 1, one cycle is the classical Runge-Kutta step for dx/dsigma = eps."""
    with jax.enable_x64(True):
        x, denoise = X.astype(jnp.float64), best_denoiser(BY_SIGMA)
        times = pndm_prk_times(np.array([4.0, 3.0, 2.0, 1.0]))

        def eps(x, sigma):
            return (x - denoise(x, jnp.full(3, sigma)).x0) / sigma

        expected = x
        for t in (4.0, 3.0, 2.0):
            a = eps(expected, t)
            b = eps(expected - a / 2, t - 0.5)
            c = eps(expected - b / 2, t - 0.5)
            d = eps(expected - c, t - 1)
            expected = expected - (a + 2 * b + 2 * c + d) / 6
        np.testing.assert_allclose(run(pndm_prk, times, x, BY_SIGMA), expected, rtol=1e-12)


@pytest.mark.parametrize(("solver", "grid", "least"), [(plms, np.asarray, 1.8), (pndm_prk, pndm_prk_times, 3.8)])
def test_order_on_equal_steps(solver, grid, least):
    """In sigma the steps are equal, as Adams-Bashforth wants them: order 2 from the start, 4 with Runge-Kutta."""
    with jax.enable_x64(True):
        x = jnp.linspace(-2.0, 2.0, 9)
        exact = path(BY_SIGMA, x, 4.0, 1.0)
        errors = [
            float(jnp.abs(run(solver, grid(np.linspace(4.0, 1.0, n + 1)), x, BY_SIGMA) - exact).max())
            for n in (64, 128)
        ]
        assert np.log2(errors[0] / errors[1]) > least


def test_beats_ddim_on_a_chain():
    x = jnp.linspace(-2.0, 2.0, 9)
    exact = path(CHAIN, x, 900.0, 1.0)
    times = np.linspace(900, 1, 21)
    errors = {name: float(jnp.abs(run(s, times, x) - exact).max()) for name, s in (("ddim", ddim), ("plms", plms))}
    assert errors["plms"] < 0.3 * errors["ddim"]


def test_trajectory_and_calls():
    calls = []

    def denoise(x, t):
        jax.debug.callback(lambda time: calls.append(float(time[0])), t)
        return best_denoiser(CHAIN)(x, t)

    x, trajectory = integrate(plms(CHAIN), denoise, KEY, X, jnp.asarray([900.0, 600.0, 300.0]), return_trajectory=True)
    jax.effects_barrier()
    assert sorted(calls) == [600.0, 600.0, 900.0]
    assert trajectory.x.shape == trajectory.x0.shape == (2, *X.shape)
    np.testing.assert_array_equal(x, trajectory.x[-1])


def test_starts_without_signal():
    chain = schedules.discrete(schedules.zero_terminal_snr(schedules.scaled_linear_betas(1000)))
    times = np.linspace(999, 0, 8)
    for solver, grid in ((plms, times), (pndm, pndm_times(times)), (pndm_prk, pndm_prk_times(times))):
        out = sample(solver(chain), best_denoiser(chain), KEY, X, jnp.asarray(grid, jnp.float32))
        assert jnp.isfinite(out).all()


def test_times_may_be_traced():
    got = jax.jit(lambda times: run(pndm, times))(jnp.asarray(pndm_times(TIMES), jnp.float32))
    np.testing.assert_allclose(got, run(pndm, pndm_times(TIMES)), atol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="pndm_times: needs at least 2 times, got 1; use more steps"):
        pndm_times(np.array([5.0]))
    with pytest.raises(ValueError, match="pndm_prk_times: needs at least 4 times, got 3; use more steps"):
        pndm_prk_times(np.array([5.0, 4.0, 3.0]))


ON_SCHEDULES = [schedules.ve(0.01, 10.0), schedules.vp_linear(), schedules.rectified_flow(), schedules.trigonometric()]


@pytest.mark.parametrize("schedule", ON_SCHEDULES, ids=["ve", "vp_linear", "rectified_flow", "trigonometric"])
@pytest.mark.parametrize(("solver", "grid"), [(plms, np.asarray), (pndm, pndm_times), (pndm_prk, pndm_prk_times)])
def test_order_is_four_on_every_schedule(solver, grid, schedule):
    """On steps that are equal in sigma / alpha; the improved Euler start is too short to be seen."""
    with jax.enable_x64(True):
        errors = []
        for n in (128, 256):
            times = np.asarray(schedule.time(jnp.asarray(-np.log(np.linspace(4.0, 1.0, n + 1)))))
            x = jnp.linspace(-2.0, 2.0, 9) * schedule.level(jnp.asarray(times[:1])).alpha[0]
            exact = path(schedule, x, times[0], times[-1])
            errors.append(float(jnp.abs(run(solver, grid(times), x, schedule) - exact).max()))
        assert np.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.15)

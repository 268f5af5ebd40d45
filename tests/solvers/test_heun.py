import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import schedules, times
from jaxdiff.solvers.heun import euler, euler_in_time, heun, heun_in_time
from tests.solvers.gaussian_data import KEY, MEAN, SCHEDULES, best_denoiser, even, integrate, path, sample, spread

X = jax.random.normal(jax.random.key(1), (3, 2))
NOISE = jax.random.normal(jax.random.key(2), (6, 3, 2))
ORDERS = {
    "euler": (euler, 1),
    "heun": (heun, 2),
    "euler_in_time": (euler_in_time, 1),
    "heun_in_time": (heun_in_time, 2),
}


@pytest.mark.parametrize("solver", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_converges_at_its_order(schedule, solver):
    (schedule, start, end), (make, order) = schedule, solver
    with jax.enable_x64(True):
        x = jnp.linspace(-2.0, 2.0, 9)
        exact, denoise = path(schedule, x, start, end), best_denoiser(schedule)
        errors = [
            jnp.abs(integrate(make(schedule), denoise, KEY, x, even(start, end, n + 1, jnp.float64)) - exact).max()
            for n in (128, 256)
        ]
        assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def edm_algorithm_2(denoise, x, sigmas, noise, churn, low, high, scale):
    """Karras et al. 2022, algorithm 2, written with its own letters in NumPy."""
    n = len(sigmas)
    steps = [*sigmas, 0.0]
    call = lambda x, sigma: np.asarray(denoise(jnp.asarray(x), jnp.full(x.shape[:1], sigma)).x0)  # noqa: E731
    for i, t in enumerate(steps[:-1]):
        gamma = min(churn / n, np.sqrt(2) - 1) if low <= t <= high else 0
        t_hat = t + gamma * t
        x_hat = x + np.sqrt(t_hat**2 - t**2) * scale * noise[i]
        d = (x_hat - call(x_hat, t_hat)) / t_hat
        x = x_hat + (steps[i + 1] - t_hat) * d
        if steps[i + 1] > 0:
            x = x_hat + (steps[i + 1] - t_hat) * (d + (x - call(x, steps[i + 1])) / steps[i + 1]) / 2
    return x


@pytest.mark.parametrize("churn", [0.0, 0.8, 40.0])
def test_heun_with_churn_is_edm_s_algorithm_2(churn):
    with jax.enable_x64(True):
        grid, schedule = times.karras(6), schedules.ve()
        x, noise, denoise = 80 * X.astype(jnp.float64), NOISE.astype(jnp.float64), best_denoiser(schedule)
        options = dict(churn=churn, churn_min=0.05, churn_max=50.0, churn_noise=1.003)
        got = sample(heun(schedule, **options), denoise, KEY, x, jnp.asarray(grid), noise=noise)
        expected = edm_algorithm_2(denoise, np.asarray(x), grid, np.asarray(noise), *options.values())
        np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_churn_means_the_same_on_every_schedule():
    """sigma / alpha and x / alpha carry a run from one schedule to another."""
    with jax.enable_x64(True):
        grid, noise = times.karras(6, 0.05, 20.0), NOISE.astype(jnp.float64)
        outs = []
        for schedule in (schedules.ve(), schedules.vp_linear(), schedules.rectified_flow(), schedules.cosine()):
            t = schedule.time(-jnp.log(jnp.asarray(grid)))
            x = 20 * X.astype(jnp.float64) * schedule.level(t[:1]).alpha[0]
            solver = heun(schedule, churn=3.0, churn_min=0.1, churn_max=10.0)
            outs.append(sample(solver, best_denoiser(schedule), KEY, x, t, noise=noise))
        for out in outs[1:]:
            np.testing.assert_allclose(out, outs[0], rtol=1e-7)


@pytest.mark.parametrize("make", [euler, heun])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_no_churn_is_the_plain_solver(schedule, make):
    schedule, start, end = schedule
    args = best_denoiser(schedule), KEY, X, even(start, end, 6)
    plain = sample(make(schedule), *args)
    for options in ({"churn": jnp.float32(0)}, {"churn": 9.0, "churn_min": 1e6}):
        np.testing.assert_allclose(sample(make(schedule, **options), *args), plain, atol=1e-6)


def test_churn_keeps_the_gaussian_marginal():
    schedule = schedules.ve()
    grid = times.karras(60, 0.1, 10.0)
    first, last = (schedule.level(jnp.asarray([t])) for t in (10.0, 0.1))
    x = MEAN + spread(first)[0] * jax.random.normal(jax.random.key(3), (20_000, 1))
    out = integrate(heun(schedule, churn=20.0), best_denoiser(schedule), KEY, x, jnp.asarray(grid, jnp.float32))
    assert out.mean() == pytest.approx(MEAN, abs=0.03)
    assert out.std() == pytest.approx(float(spread(last)[0]), rel=0.04)


def test_flow_without_signal_at_the_start():
    schedule = schedules.rectified_flow()
    grid = even(1.0, 0.1, 6)
    for make in (euler, heun, heun_in_time):
        assert jnp.isfinite(sample(make(schedule), best_denoiser(schedule), KEY, X, grid)).all()
    churned = sample(heun(schedule, churn=40.0), best_denoiser(schedule), KEY, X, grid, noise=NOISE)
    assert jnp.isfinite(churned).all()
    one = euler_in_time(schedule), euler(schedule)
    a, b = (sample(solver, best_denoiser(schedule), KEY, X, grid) for solver in one)
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_one_time_is_one_call_of_the_denoiser():
    schedule = schedules.ve()
    x0 = best_denoiser(schedule)(X, jnp.full(3, 80.0)).x0
    got = sample(heun(schedule), best_denoiser(schedule), KEY, X, jnp.asarray([80.0]))
    np.testing.assert_allclose(got, x0, rtol=1e-6)


def test_number_of_calls():
    calls = []

    def denoise(x, t):
        jax.debug.callback(lambda _: calls.append(1), t)
        return best_denoiser(schedules.ve())(x, t)

    sample(heun(schedules.ve()), denoise, KEY, X, jnp.asarray(times.karras(6), jnp.float32))
    jax.effects_barrier()
    assert len(calls) == 2 * 6 - 1


def test_churn_changes_without_compiling():
    grid = jnp.asarray(times.karras(6), jnp.float32)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(churn, scale):
        solver = heun(schedules.ve(), churn=churn, churn_noise=scale)
        return sample(solver, best_denoiser(schedules.ve()), KEY, X, grid, noise=NOISE)

    assert not np.allclose(run(jnp.float32(1), jnp.float32(1)), run(jnp.float32(2), jnp.float32(1)))


def test_refusals():
    with pytest.raises(ValueError, match="churn must not be negative, got -1"):
        heun(schedules.ve(), churn=-1.0)
    with pytest.raises(ValueError, match="churn_min must not exceed churn_max, got 2.0 and 1.0"):
        euler(schedules.ve(), churn=1.0, churn_min=2.0, churn_max=1.0)
    chain = schedules.discrete(schedules.linear_betas(100))
    with pytest.raises(
        ValueError, match="heun_in_time: the schedule's level has no slope in t, as a chain's; use heun"
    ):
        heun_in_time(chain)

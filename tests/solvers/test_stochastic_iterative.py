"""On data N(MEAN, STD^2) the consistency function and every moment of its samples are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import schedules
from jaxdiff.solvers.base import integrate, sample
from jaxdiff.solvers.heun import heun
from jaxdiff.solvers.midpoint import midpoint
from jaxdiff.solvers.stochastic_iterative import renoised, stochastic_iterative
from jaxdiff.solvers.time_search import greedy_times, ternary_search
from jaxdiff.types import Denoised, Level, expand
from tests.solvers.gaussian_data import KEY, MEAN, SCHEDULES, STD, best_denoiser, path, spread

LOW, HIGH = 0.01, 10.0
VE = schedules.ve(LOW, HIGH)


def end_of_path(schedule, low):
    """The consistency function: the path's point at sigma / alpha = low, over its alpha."""
    width = np.sqrt(STD**2 + low**2)

    def denoise(x, t):
        level = schedule.level(t)
        return Denoised(MEAN + width * (x - expand(level.alpha, x) * MEAN) / expand(spread(level), x))

    return denoise


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("low", [0.0, 0.2])
def test_every_state_has_the_marginal_of_its_level(name, low):
    schedule, start, end = SCHEDULES[name]
    grid = jnp.linspace(start, end + 0.3 * (start - end), 4)
    first = schedule.level(jnp.broadcast_to(grid[:1], 50_000))
    x = (first.alpha * MEAN + spread(first) * jax.random.normal(KEY, 50_000))[:, None]
    solver = stochastic_iterative(schedule, low)
    denoise = end_of_path(schedule, low)
    _, states = sample(solver, denoise, KEY, x, grid, return_trajectory=True)
    after = schedule.level(grid[1:])
    for i in range(3):
        assert float(states.x[i].mean()) == pytest.approx(float(after.alpha[i]) * MEAN, abs=0.03)
        assert float(states.x[i].std()) == pytest.approx(float(spread(after)[i]), rel=0.02)
    assert float(states.x[-1].std()) == pytest.approx(np.sqrt(STD**2 + low**2), rel=0.02)


def test_one_time_is_one_call_and_the_lowest_level_adds_no_noise():
    x = HIGH * jax.random.normal(KEY, (5, 2))
    f, solver = end_of_path(VE, LOW), stochastic_iterative(VE, LOW)
    one = sample(solver, f, KEY, x, jnp.array([HIGH]))
    np.testing.assert_array_equal(one, f(x, jnp.full(5, HIGH)).x0)
    down = integrate(solver, f, KEY, x, jnp.array([HIGH, LOW]))
    np.testing.assert_allclose(down, one, rtol=1e-5, atol=1e-6)
    clean = stochastic_iterative(VE)
    z = jax.random.normal(jax.random.fold_in(KEY, 0), x.shape)
    moved = integrate(clean, f, KEY, x, jnp.array([HIGH, 0.5]))
    np.testing.assert_allclose(moved, one + 0.5 * z, rtol=1e-5, atol=1e-6)


def test_renoised_has_what_is_missing():
    level = renoised(Level(jnp.array([1.0, 0.5, 1.0]), jnp.array([5.0, 2.0, 0.001])), 3.0)
    np.testing.assert_allclose(level.sigma, [4.0, np.sqrt(4 - 2.25), 0.0], rtol=1e-6)
    with pytest.raises(ValueError, match="sigma_min must not be negative, got -1"):
        stochastic_iterative(VE, -1.0)


def test_no_new_program_for_other_times():
    traces = []

    @jax.jit
    def run(x, grid, low):
        traces.append(1)
        return sample(stochastic_iterative(VE, low), end_of_path(VE, LOW), KEY, x, grid)

    for mid in (0.5, 2.0):
        run(jnp.ones((3, 2)), jnp.array([HIGH, mid]), jnp.float32(mid / 100))
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_midpoint_is_of_order_two(name):
    schedule, start, end = SCHEDULES[name]
    x = jnp.linspace(-2.0, 2.0, 9)
    with jax.enable_x64(True):
        x = x.astype(jnp.float64)
        errors = []
        ends = schedule.level(jnp.asarray([start, end], jnp.float64))
        noisy, clean = np.log(ends.alpha / ends.sigma)
        for n in (40, 80):
            grid = schedule.time(jnp.linspace(noisy, clean, n + 1))
            got = integrate(midpoint(schedule), best_denoiser(schedule), KEY, x, grid)
            errors.append(jnp.abs(got - path(schedule, x, grid[0], grid[-1])).max())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)


def test_midpoint_ends_with_half_the_error_it_can_see():
    """Its last step looks at an eighth of the last level (root 3), where the denoiser knows more than at the level."""
    x = jnp.array([1.5, -1.0])
    t = jnp.array([0.5])
    answer = sample(midpoint(VE), best_denoiser(VE), KEY, x, t)
    a = STD**2 / (STD**2 + 0.25)
    first = MEAN + a * (x - MEAN)
    mid = first + (x - first) / 8
    direction = (mid - (MEAN + STD**2 / (STD**2 + 0.0625**2) * (mid - MEAN))) / 0.0625
    np.testing.assert_allclose(answer, x - 0.5 * direction, rtol=1e-5)


def test_midpoint_and_heun_stir_alike():
    """With churn alone, where the denoiser leaves x as it is, both only add noise."""
    x, grid = jnp.ones((4, 2)), jnp.array([5.0, 3.0, 1.0])
    churn = {"churn": 1.0, "churn_min": 0.5, "churn_max": 4.0, "churn_noise": 1.1}
    runs = [integrate(make(VE, **churn), lambda x, t: Denoised(x), KEY, x, grid) for make in (heun, midpoint)]
    np.testing.assert_allclose(*runs, rtol=1e-6)
    assert not np.allclose(runs[0], x)
    with pytest.raises(ValueError, match="root must be positive, got 0"):
        midpoint(VE, root=0.0)
    with pytest.raises(ValueError, match="churn must not be negative"):
        midpoint(VE, churn=-1.0)


@pytest.mark.parametrize("best", range(0, 18, 3))
def test_ternary_search_finds_the_bottom_with_few_scores(best):
    calls = []

    def score(i):
        calls.append(i)
        return (i - best) ** 2

    assert ternary_search(score, 0, 17) == best
    assert len(calls) == len(set(calls)) <= 11
    assert ternary_search(lambda i: -i, 4, 4) == 4


def test_ternary_search_returns_the_best_it_saw():
    """The release answers with an earlier probe where two are left; here that would be the wrong one."""
    assert [ternary_search(lambda i, b=b: abs(i - b), 0, 1) for b in (0, 1)] == [0, 1]
    assert [ternary_search(lambda i, b=b: abs(i - b), 3, 5) for b in (3, 4, 5)] == [3, 4, 5]
    with pytest.raises(ValueError, match="need low <= high, got 5 and 3"):
        ternary_search(float, 5, 3)
    with pytest.raises(ValueError, match="the score of 3 is nan"):
        ternary_search(lambda i: float("nan"), 3, 5)


def test_greedy_times_chooses_one_after_the_other():
    wanted = (0, 8, 13)
    asked = []

    def score(points):
        asked.append(len(points))
        return sum(abs(p - w) for p, w in zip(points, wanted, strict=False))

    assert greedy_times(score, 17, 3) == wanted
    assert asked == sorted(asked)
    assert greedy_times(score, 17, 1) == (0,)
    assert greedy_times(lambda points: 0.0, 2, 2) == (0, 1)
    with pytest.raises(ValueError, match="num_steps must be 1 to 17, the points above t_min, got 18"):
        greedy_times(score, 17, 18)

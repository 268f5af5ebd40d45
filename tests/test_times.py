import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import schedules, times

KEY = jax.random.key(0)


def counts(t, num_steps):
    return np.bincount(np.asarray(t).astype(int), minlength=num_steps)


def test_uniform_index_visits_every_index_alike():
    t = times.uniform_index(10)(KEY, 50_000)
    assert t.dtype == jnp.float32 and (t == jnp.floor(t)).all()
    assert counts(t, 10) == pytest.approx(np.full(10, 5000), rel=0.05)


def test_stratified_index_spreads_each_batch_exactly():
    t = times.stratified_index(10)
    for i in range(5):
        assert (counts(t(jax.random.key(i), 40), 10) == 4).all()
    assert t(KEY, 1).shape == (1,)


def test_stratified_is_one_offset_and_equal_spacing():
    t = np.sort(times.stratified(0.2, 1.2)(KEY, 50))
    assert t.min() >= 0.2 and t.max() < 1.2
    assert np.diff(t) == pytest.approx(0.02, abs=1e-5)


@pytest.mark.parametrize(
    "sampler, to_normal, mean, std",
    [
        (times.log_normal(-1.2, 1.2), np.log, -1.2, 1.2),
        (times.logit_normal(0.5, 0.8), lambda t: np.log(t / (1 - t)), 0.5, 0.8),
    ],
)
def test_normal_draws_have_their_moments(sampler, to_normal, mean, std):
    z = to_normal(np.asarray(sampler(KEY, 50_000), np.float64))
    assert (z.mean(), z.std()) == (pytest.approx(mean, abs=0.02), pytest.approx(std, abs=0.02))


def test_uniform_fills_its_interval():
    t = np.asarray(times.uniform(0.5, 2.0)(KEY, 50_000))
    assert (t.min(), t.max(), t.mean()) == (
        pytest.approx(0.5, abs=1e-3),
        pytest.approx(2, abs=1e-3),
        pytest.approx(1.25, abs=0.01),
    )


def reference_history(num_steps, length, batches):
    """The rule in words: a list per step, the oldest of a full one leaves."""
    kept = [[] for _ in range(num_steps)]
    for ts, values in batches:
        for t, value in zip(ts, values, strict=True):
            kept[t] = (kept[t] + [value])[-length:]
    return kept


def test_history_keeps_the_last_losses_also_when_a_batch_repeats_a_step():
    rng = np.random.default_rng(0)
    batches = [(rng.integers(0, 4, 9), rng.random(9).astype(np.float32)) for _ in range(6)]
    batches.append((np.full(9, 2), np.arange(9, dtype=np.float32)))  # more than the history holds, in one batch
    state = times.init_history(4, 3)
    for ts, values in batches:
        state = times.update_history(state, jnp.asarray(ts), jnp.asarray(values))
    kept = reference_history(4, 3, batches)
    assert [sorted(row) for row in np.asarray(state.losses).tolist()] == [sorted(map(float, row)) for row in kept]
    weights = np.array([np.sqrt(np.mean(np.square(row))) for row in kept])
    expected = 0.999 * weights / weights.sum() + 0.001 / 4
    assert np.asarray(times.probabilities(state)) == pytest.approx(expected, rel=1e-5)


def test_probabilities_are_uniform_until_every_step_is_full():
    state = times.init_history(3, 2)
    state = times.update_history(state, jnp.array([0, 0, 1, 1, 2]), jnp.array([5.0, 5, 1, 1, 1]))
    assert np.asarray(times.probabilities(state)) == pytest.approx(1 / 3)
    state = times.update_history(state, jnp.array([2]), jnp.array([1.0]))
    assert np.asarray(times.probabilities(state)) == pytest.approx(
        0.999 * np.array([5, 1, 1]) / 7 + 0.001 / 3, rel=1e-5
    )
    nothing = times.LossHistory(jnp.zeros((3, 2)), jnp.full(3, 2, jnp.int32))
    assert np.asarray(times.probabilities(nothing)) == pytest.approx(1 / 3)


def test_draw_follows_the_probabilities_and_reweights_to_one():
    state = times.LossHistory(jnp.array([[1.0], [2.0], [5.0]]), jnp.ones(3, jnp.int32))
    t, weight = times.draw(KEY, state, 50_000)
    p = np.asarray(times.probabilities(state))
    assert counts(t, 3) / 50_000 == pytest.approx(p, rel=0.05)
    assert np.asarray(weight) == pytest.approx(1 / (3 * p[np.asarray(t).astype(int)]), rel=1e-5)
    assert float(weight.mean()) == pytest.approx(1, abs=0.02)


def test_respace_by_hand():
    assert times.respace(10, "4").tolist() == [0, 3, 6, 9]
    assert times.respace(10, "2,1").tolist() == [0, 4, 5]
    assert times.respace(10, "1").tolist() == [0]
    assert times.respace(10, "ddim5").tolist() == [0, 2, 4, 6, 8]
    assert times.respace(6, "3").tolist() == [0, 2, 5]  # 2.5 rounds to even
    assert times.respace(1000, "250")[-1] == 999 and times.respace(1000, "ddim250")[-1] == 996


def test_respaced_betas_keep_the_levels():
    betas = schedules.cosine_betas(50)
    kept = times.respace(50, "7")
    assert np.cumprod(1 - times.respace_betas(betas, kept)) == pytest.approx(np.cumprod(1 - betas)[kept], rel=1e-12)
    assert times.respace_betas(betas, np.arange(50)) == pytest.approx(betas, rel=1e-9)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: times.respace(10, "11"), 'section 1 of "11" has 10 indices, got 11 steps'),
        (lambda: times.respace(10, "4,4,4"), "section 2 .* has 3 indices"),
        (lambda: times.respace(1000, "ddim300"), "no stride keeps exactly 300"),
        (lambda: times.respace(10, "fast"), 'got sections "fast", expected positive counts'),
        (lambda: times.respace(10, ""), "expected positive counts"),
        (lambda: times.respace(10, "3,0"), "expected positive counts"),
        (lambda: times.respace(10, "ddim2,2"), "expected positive counts"),
        (lambda: times.evenly(10, 11), "n must be 1 to 10, the length of the chain, got 11"),
        (lambda: times.trailing(10, 0), "n must be 1 to 10"),
        (lambda: times.leading(1000, 1), "the clean end; use trailing or evenly"),
        (lambda: times.linspace(1000, 1), "the clean end; use trailing or evenly"),
        (lambda: times.ddim_uniform(1000, 1, 1), "start at index 1, the clean end"),
        (lambda: times.quadratic(1000, 1), "the clean end"),
        (lambda: times.ddim_uniform(1000, 1000, 1), r"indices 1 to 1000 leave 0 .. 999"),
        (lambda: times.time_uniform(0.0, 1.0, 5), "from noisy to clean, got 0 to 1; swap them"),
        (lambda: times.time_quadratic(1.0, -0.5, 5), "end must not be negative"),
        (lambda: times.karras(0), "n must be at least 1, got 0"),
        (lambda: times.karras(5, 0.0, 80.0), "sigma_min must be positive"),
        (lambda: times.karras_time(jnp.zeros(1), 5, 80.0, 0.002), "swap them"),
        (lambda: times.exponential(5, 80.0, 0.002), "swap them"),
        (lambda: times.uniform_log_snr(schedules.rectified_flow(), 5), "at t = 1 the schedule holds no signal"),
        (lambda: times.uniform_index(0), "num_train_steps must be at least 1"),
        (lambda: times.uniform(1.0, 1.0), "need start < end"),
        (lambda: times.log_normal(0.0, -1.0), "std must be positive"),
        (lambda: times.init_history(0), "num_train_steps must be at least 1"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


FLOW = schedules.rectified_flow()
OWN_GRIDS = {
    "evenly": lambda n: (times.evenly(100, n), 99, 0),
    "trailing": lambda n: (times.trailing(100, n), 99, None),
    "time_uniform": lambda n: (times.time_uniform(1.0, 0.1, n), 1, 0.1),
    "time_quadratic": lambda n: (times.time_quadratic(1.0, 0.1, n), 1, 0.1),
    "karras": lambda n: (times.karras(n), 80, 0.002),
    "exponential": lambda n: (times.exponential(n), 80, 0.002),
    "log_snr_vp": lambda n: (times.uniform_log_snr(schedules.vp_linear(), n), 1, 1e-3),
    "log_snr_flow": lambda n: (times.uniform_log_snr(FLOW, n, start=0.99), 0.99, 1e-3),
    "karras_chain": lambda n: (times.karras_times(schedules.discrete(schedules.linear_betas(100)), n), 99, 0),
}


@pytest.mark.parametrize("name", OWN_GRIDS)
def test_our_grids_decrease_from_the_noisiest_level_for_every_n(name):
    for n in (1, 2, 7):
        grid, first, last = OWN_GRIDS[name](n)
        assert grid.dtype == np.float64 and grid.shape == (n,)
        assert (np.diff(grid) < 0).all() and grid[0] == first
        if n > 1 and last is not None:
            assert grid[-1] == last


def test_release_spacings_by_hand():
    assert times.leading(1000, 4, 1).tolist() == [751, 501, 251, 1]
    assert times.trailing(1000, 4).tolist() == [999, 749, 499, 249]
    assert times.linspace(1000, 4).tolist() == [999, 666, 333, 0]
    assert times.ddim_uniform(1000, 4, 1).tolist() == [751, 501, 251, 1]
    assert times.ddim_uniform(1000, 30).size == 31  # 1000 // 30 = 33
    assert times.quadratic(1000, 4).tolist() == [800, 355, 88, 0]
    assert times.evenly(1000, 4).tolist() == [999, 666, 333, 0]
    assert times.leading(1000, 1, 1, one_step_at_zero=True).tolist() == [1]
    assert times.linspace(1000, 1, one_step_at_zero=True).tolist() == [0]


def test_log_snr_and_karras_grids_are_equally_spaced_in_their_own_measure():
    schedule = schedules.vp_linear()
    with jax.enable_x64(True):
        grid = times.uniform_log_snr(schedule, 9)
        level = schedule.level(jnp.asarray(grid))
        steps = np.diff(np.log(level.alpha) - np.log(level.sigma))
        assert steps == pytest.approx(np.full(8, steps[0]), rel=1e-6)
        level = schedule.level(jnp.asarray(times.karras_times(schedule, 9, rho=5.0)))
        steps = np.diff(np.asarray(level.sigma / level.alpha) ** 0.2)
        assert steps == pytest.approx(np.full(8, steps[0]), rel=1e-6)
    assert times.karras_times(schedules.ve(), 18) == pytest.approx(times.karras(18), rel=1e-12)
    assert times.uniform_log_snr(schedules.ve(), 18) == pytest.approx(times.exponential(18), rel=1e-12)


def test_grids_can_be_made_inside_jit():
    schedule = schedules.vp_linear()
    inside = jax.jit(lambda x: x * jnp.asarray(times.karras_times(schedule, 5), x.dtype))(jnp.float32(1))
    assert np.asarray(inside) == pytest.approx(times.karras_times(schedule, 5), rel=1e-6)


@pytest.mark.parametrize("n", [2, 18, 1281])
def test_karras_time_is_the_grid_by_index(n):
    traces = []

    @jax.jit
    def points(index, n):
        traces.append(1)
        return times.karras_time(index, n)

    assert np.asarray(points(jnp.arange(2000.0)[:n], jnp.int32(n))) == pytest.approx(times.karras(n), rel=1e-5)
    points(jnp.arange(2000.0)[:n], jnp.int32(n + 3))
    assert len(traces) == 1
    half = float(times.karras_time(jnp.full(1, (n - 1) / 2), n)[0])
    assert half == pytest.approx(times.karras(3)[1], rel=1e-5)

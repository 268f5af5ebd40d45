import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import schedules

SCHEDULES = {
    "linear": schedules.discrete(schedules.linear_betas(100)),
    "scaled_linear": schedules.discrete(schedules.scaled_linear_betas(100)),
    "cosine_chain": schedules.discrete(schedules.cosine_betas(100)),
    "vp_linear": schedules.vp_linear(),
    "cosine": schedules.cosine(),
    "cosine_shifted": schedules.cosine(-15.0, 15.0, shift=2 * np.log(64 / 256)),
    "ve": schedules.ve(),
    "rectified_flow": schedules.rectified_flow(),
    "flow_shifted": schedules.rectified_flow(3.0),
    "trigonometric": schedules.trigonometric(),
    "squared_cosine": schedules.squared_cosine(),
    "few_steps": schedules.discrete(schedules.vp_betas(4)),
}
VARIANCE_PRESERVING = [
    "linear",
    "scaled_linear",
    "cosine_chain",
    "vp_linear",
    "cosine",
    "cosine_shifted",
    "trigonometric",
    "squared_cosine",
    "few_steps",
]


def grid(schedule, n=41, dtype=jnp.float64):
    """Times inside the schedule: ends excluded, where some levels have no signal or no noise."""
    return jnp.linspace(schedule.t_min, schedule.t_max, n + 2, dtype=dtype)[1:-1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_inverts_level_and_noise_grows_with_t(name):
    schedule = SCHEDULES[name]
    with jax.enable_x64(True):
        t = grid(schedule)
        level = schedule.level(t)
        assert level.alpha.dtype == jnp.float64
        half_log_snr = jnp.log(level.alpha) - jnp.log(level.sigma)
        assert np.asarray(schedule.time(half_log_snr)) == pytest.approx(np.asarray(t), rel=1e-7)
        assert (np.diff(half_log_snr) < 0).all()
    low = schedule.level(grid(schedule, dtype=jnp.float32))
    assert low.alpha.dtype == low.sigma.dtype == jnp.float32
    assert np.asarray(low.sigma) == pytest.approx(np.asarray(level.sigma), rel=2e-4)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_variance_is_preserved(name):
    with jax.enable_x64(True):
        level = SCHEDULES[name].level(grid(SCHEDULES[name]))
        assert np.asarray(level.alpha**2 + level.sigma**2) == pytest.approx(1, abs=1e-12)


def test_continuous_schedules_have_their_closed_forms():
    with jax.enable_x64(True):
        t = np.linspace(0.1, 0.9, 9)
        vp = schedules.vp_linear(0.1, 20.0).level(jnp.asarray(t))
        assert np.asarray(vp.alpha) == pytest.approx(np.exp(-(t**2) * 19.9 / 4 - t * 0.05), rel=1e-12)
        flow = schedules.rectified_flow().level(jnp.asarray(t))
        assert np.asarray(flow.alpha) == pytest.approx(1 - t) and np.asarray(flow.sigma) == pytest.approx(t)
        shifted = schedules.rectified_flow(3.0).level(jnp.asarray(t))
        assert np.asarray(shifted.sigma) == pytest.approx(3 * t / (1 + 2 * t))
        # a shift by s multiplies sigma / alpha by s
        assert np.asarray(shifted.sigma / shifted.alpha) == pytest.approx(3 * t / (1 - t))
        edges = np.arctan(np.exp([-10.0, 10.0]))
        angle = edges[0] + (edges[1] - edges[0]) * t
        assert np.asarray(schedules.cosine().level(jnp.asarray(t)).alpha) == pytest.approx(np.cos(angle), rel=1e-9)
        sigma = np.array([0.01, 0.5, 60.0])
        assert np.asarray(schedules.ve().level(jnp.asarray(sigma)).sigma) == pytest.approx(sigma)
        trig = schedules.trigonometric(0.5).level(jnp.arctan(jnp.asarray(sigma) / 0.5))
        assert np.asarray(trig.sigma / trig.alpha * 0.5) == pytest.approx(sigma)


@pytest.mark.parametrize("num_steps", [20, 1000])
def test_chain_levels_are_products_of_betas(num_steps):
    betas = schedules.linear_betas(num_steps)
    assert betas[0] == pytest.approx(0.1 / num_steps) and betas[-1] == pytest.approx(20 / num_steps)
    assert np.diff(betas, 2) == pytest.approx(0, abs=1e-15)
    alpha, abar = np.sqrt(1 - betas), 1.0
    levels = schedules.discrete(betas).level(jnp.arange(num_steps).astype(jnp.float32))
    for i in range(num_steps):
        abar *= alpha[i] ** 2
        assert float(levels.alpha[i]) == pytest.approx(abar**0.5, rel=1e-5)
        assert float(levels.sigma[i]) == pytest.approx((1 - abar) ** 0.5, rel=1e-5)


def test_named_betas_by_hand():
    assert schedules.scaled_linear_betas(3, 0.01, 0.09) == pytest.approx([0.01, 0.04, 0.09])
    assert schedules.sqrt_betas(3, 0.01, 0.09) == pytest.approx(np.sqrt([0.01, 0.05, 0.09]))
    assert schedules.constant_betas(3, 0.1) == pytest.approx([0.1, 0.1, 0.1])
    assert schedules.jsd_betas(4) == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])
    assert schedules.warmup_betas(4, 0.5, 0.1, 0.2) == pytest.approx([0.1, 0.2, 0.2, 0.2])
    assert schedules.sigmoid_betas(3, 0.0, 1.0)[1] == pytest.approx(0.5)
    assert schedules.linear_betas(10, 0.1, 0.2, rescale=False)[0] == 0.1
    u = np.arange(51) / 50
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    cosine = schedules.cosine_betas(50)
    assert np.cumprod(1 - cosine)[:-1] == pytest.approx(f[1:-1] / f[0], rel=1e-10)
    assert cosine[-1] == 0.999 and cosine.max() == 0.999


def test_a_chain_of_few_steps_has_the_published_values():
    four = schedules.vp_betas(4)
    assert four == pytest.approx([0.478255, 0.849206, 0.956418, 0.987404], abs=1e-6)
    level = schedules.discrete(four).level(jnp.arange(4.0))
    assert np.asarray(level.alpha) == pytest.approx([0.72232, 0.28049, 0.05856, 0.00657], abs=1e-5)
    tables = schedules.tables(four)
    assert tables.posterior_mean_coef1 == pytest.approx([1, 0.66578, 0.26919, 0.05782], abs=1e-5)
    assert schedules.vp_betas(2) == pytest.approx([0.921324, 0.999451], abs=1e-6)
    # levels of vp_linear at equal times, with the level at t_min divided out
    with jax.enable_x64(True):
        alpha = np.asarray(schedules.vp_linear(0.2, 8.0).level(0.01 + 0.99 * jnp.arange(6.0) / 5).alpha)
    assert np.cumprod(1 - schedules.vp_betas(5, 0.2, 8.0, t_min=0.01)) == pytest.approx((alpha[1:] / alpha[0]) ** 2)
    sigma = 0.04 * (0.9 / 0.04) ** np.array([0.1, 0.4, 0.7, 1.0])
    geometric = schedules.geometric_betas(3, 0.04, 0.9, t_min=0.1)
    assert np.cumprod(1 - geometric) == pytest.approx((1 - sigma[1:]) / (1 - sigma[0]))


def test_the_squared_cosine_is_the_curve_of_its_chain_and_ends_in_pure_noise():
    level = schedules.squared_cosine().level(jnp.array([0.0, 0.5, 1.0]))
    angle = np.array([0.008, 0.508]) / 1.008 * np.pi / 2
    assert np.asarray(level.alpha[:2]) == pytest.approx(np.cos(angle), rel=1e-6)
    assert np.asarray(level.sigma[:2]) == pytest.approx(np.sin(angle), rel=1e-5)
    assert (level.alpha[2], level.sigma[2]) == (0, 1)
    chain = np.cumprod(1 - schedules.cosine_betas(50))[24]
    assert chain == pytest.approx(float((level.alpha[1] / level.alpha[0]) ** 2), rel=1e-5)


def test_tables_at_the_ends():
    t = schedules.tables(schedules.linear_betas(30))
    assert t.alphas_cumprod_prev[0] == 1 and t.alphas_cumprod_next[-1] == 0
    assert t.posterior_variance[0] == 0
    assert t.posterior_log_variance_clipped[0] == t.posterior_log_variance_clipped[1] == np.log(t.posterior_variance[1])
    assert t.posterior_mean_coef1[0] == pytest.approx(1) and t.posterior_mean_coef2[0] == 0
    assert all(table.dtype == np.float64 and table.shape == (30,) for table in t)


@pytest.mark.parametrize("make", [schedules.linear_betas, schedules.cosine_betas, schedules.scaled_linear_betas])
def test_zero_terminal_snr_removes_the_last_signal_and_keeps_the_first_level(make):
    betas = make(50)
    new = schedules.zero_terminal_snr(betas)
    assert np.cumprod(1 - new)[-1] == 0 and new[-1] == 1
    assert new[0] == pytest.approx(betas[0])
    schedule = schedules.discrete(new)
    level = schedule.level(jnp.array([0.0, 48.0, 49.0]))
    assert (level.alpha[-1], level.sigma[-1]) == (0, 1)
    assert jnp.isfinite(jnp.stack(level)).all() and level.alpha[1] > 0
    assert float(schedule.time(jnp.array([-jnp.inf]))[0]) == 49


def test_truncation_drops_levels_below_the_bound():
    betas = schedules.cosine_betas(1000)
    kept = schedules.truncate(betas)
    assert kept.size == 996 and (kept == betas[:996]).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: schedules.linear_betas(10), "use more steps or a smaller range"),
        (lambda: schedules.constant_betas(5, 1.5), r"betas must lie in \(0, 1\], got 1.5"),
        (lambda: schedules.tables(np.zeros(0)), "non-empty"),
        (lambda: schedules.ve(1.0, 0.5), "0 < sigma_min < sigma_max, got 1.0 and 0.5"),
        (lambda: schedules.rectified_flow(0.0), "shift must be positive, got 0.0"),
        (lambda: schedules.squared_cosine(0.0), "offset must be positive, got 0.0"),
        (lambda: schedules.vp_betas(0), "num_steps >= 1 and t_min in"),
        (lambda: schedules.geometric_betas(4, 0.01, 1.5), r"geometric_betas: betas must lie in \(0, 1\]"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()

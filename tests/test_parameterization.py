import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import parameterization as p
from jaxdiff import process, schedules
from jaxdiff.types import Level

CHAIN = schedules.discrete(schedules.linear_betas(100))
SCHEDULES = {
    "chain": (CHAIN, [0.0, 1.0, 50.0, 99.0]),
    "vp": (schedules.vp_linear(), [0.01, 0.3, 0.7, 1.0]),
    "ve": (schedules.ve(), [0.002, 0.5, 5.0, 80.0]),
    "flow": (schedules.rectified_flow(), [0.01, 0.3, 0.7, 0.99]),
    "trigonometric": (schedules.trigonometric(), [0.01, 0.5, 1.0, 1.5]),
}
MEANINGS = {
    "eps": p.eps(),
    "x0": p.x0(),
    "v": p.v(),
    "flow": p.flow(),
    "edm": p.edm(0.5),
    "consistency": p.consistency(0.5, 1e-3),  # below every level of the schedules
    "vp_preconditioning": p.vp_preconditioning(),
    "ve_preconditioning": p.ve_preconditioning(),
    "iddpm_preconditioning": p.iddpm_preconditioning(),
}
X0, EPS = (jax.random.normal(jax.random.key(i), (4, 3)) for i in range(2))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("meaning", MEANINGS)
def test_target_gives_back_x0(meaning, schedule):
    schedule, t = SCHEDULES[schedule]
    meaning = MEANINGS[meaning]
    with jax.enable_x64(True):
        level = schedule.level(jnp.asarray(t, jnp.float64))
        x0, eps = X0.astype(jnp.float64), EPS.astype(jnp.float64)
        x_t = process.q_sample(x0, eps, level)
        f = p.target(meaning, x0, eps, level)
        assert np.asarray(p.to_x0(meaning, f, x_t, level)) == pytest.approx(np.asarray(x0), rel=1e-9, abs=1e-9)
        assert np.asarray(p.from_x0(meaning, x0, x_t, level)) == pytest.approx(np.asarray(f), rel=1e-6, abs=1e-6)


def test_previous_x_is_the_posterior_mean():
    meaning = p.previous_x(CHAIN)
    with jax.enable_x64(True):
        index = jnp.array([0, 1, 50, 99])
        level = CHAIN.level(index.astype(jnp.float64))
        x0, eps = X0.astype(jnp.float64), EPS.astype(jnp.float64)
        x_t = process.q_sample(x0, eps, level)
        between = process.chain_bridge(schedules.tables(schedules.linear_betas(100)), index, jnp.float64)
        f = p.target(meaning, x0, eps, level)
        assert np.asarray(f) == pytest.approx(np.asarray(process.posterior_mean(x0, x_t, between)), rel=1e-8)
        assert np.asarray(p.to_x0(meaning, f, x_t, level)) == pytest.approx(np.asarray(x0), rel=1e-7)


def test_targets_by_hand():
    level = Level(jnp.full(4, 0.8), jnp.full(4, 0.6))
    x0, eps = np.asarray(X0), np.asarray(EPS)
    for meaning, expected in [
        (p.eps(), eps),
        (p.x0(), x0),
        (p.v(), 0.8 * eps - 0.6 * x0),
        (p.flow(), eps - x0),
    ]:
        assert np.asarray(p.target(meaning, X0, EPS, level)) == pytest.approx(expected, abs=1e-6)


def test_edm_is_table_1_of_the_paper():
    sigma = np.array([0.002, 0.5, 3.0, 80.0])
    c = p.edm(0.5).coefficients(Level(jnp.ones(4), jnp.asarray(sigma, jnp.float32)))
    total = sigma**2 + 0.25
    assert np.asarray(c.skip) == pytest.approx(0.25 / total, rel=1e-5)
    assert np.asarray(c.out) == pytest.approx(0.5 * sigma / np.sqrt(total), rel=1e-5)
    assert np.asarray(c.scale_in) == pytest.approx(1 / np.sqrt(total), rel=1e-5)
    t = p.edm(0.5).net_time(jnp.asarray(sigma, jnp.float32))
    assert np.asarray(t) == pytest.approx(np.log(sigma) / 4, rel=1e-5)
    # input and target both have unit variance when the data has deviation 0.5
    assert np.asarray(c.scale_in) ** 2 * total == pytest.approx(1, rel=1e-5)
    assert np.asarray(c.on_x0) ** 2 * 0.25 + np.asarray(c.on_eps) ** 2 == pytest.approx(1, rel=1e-5)


def test_a_consistency_function_is_the_identity_at_sigma_min():
    """Exactly, for any output of the network, and near it almost."""
    level = Level(jnp.ones(4), jnp.asarray([0.002, 0.002, 0.0021, 80.0], jnp.float32))
    x = p.to_x0(p.consistency(0.5, 0.002), 100 * EPS, X0, level)
    assert (x[:2] == X0[:2]).all()
    assert np.asarray(x[2]) == pytest.approx(np.asarray(X0[2]), abs=0.1) and (x[2] != X0[2]).any()
    ratio = Level(jnp.full(4, 0.5), jnp.full(4, 0.001))  # the same level of another schedule, whose x_t is alpha x0
    assert np.asarray(p.to_x0(p.consistency(0.5, 0.002), 100 * EPS, X0, ratio)) == pytest.approx(2 * np.asarray(X0))


def test_consistency_from_level_zero_is_edm():
    level = Level(jnp.asarray([1.0, 0.7, 0.1]), jnp.asarray([0.01, 0.7, 3.0]))
    ours, edm = (np.asarray(jnp.stack(m.coefficients(level))) for m in (p.consistency(0.5, 0.0), p.edm(0.5)))
    assert ours == pytest.approx(edm, rel=1e-5)
    # appendix C of the paper: only the skip and the factor of the output move, not the root under it
    c = p.consistency(0.5, 0.002).coefficients(Level(jnp.ones(1), jnp.full(1, 0.3)))
    assert float(c.skip[0]) == pytest.approx(0.25 / (0.298**2 + 0.25))
    assert float(c.out[0]) == pytest.approx(0.298 * 0.5 / (0.3**2 + 0.25) ** 0.5)


def test_network_times_of_the_preconditionings():
    sigma = jnp.array([0.01, 1.0, 50.0])
    t = np.asarray(p.vp_preconditioning().net_time(sigma)) / 999
    assert np.sqrt(np.expm1(0.5 * 19.9 * t**2 + 0.1 * t)) == pytest.approx(np.asarray(sigma), rel=1e-3)
    assert np.asarray(p.ve_preconditioning().net_time(sigma)) == pytest.approx(np.log(np.asarray(sigma) / 2), rel=1e-5)
    sigmas = p.iddpm_sigmas()
    assert sigmas[-1] == 0 and (np.diff(sigmas) < 0).all()
    index = p.iddpm_preconditioning().net_time(jnp.asarray(sigmas[[0, 300, 999]], jnp.float32))
    assert index.tolist() == [999, 699, 0]


def test_net_times():
    t = jnp.array([0.0, 3.0])
    assert p.eps().net_time(t).tolist() == [0, 3]
    assert p.eps(p.scaled_time(0.25)).net_time(t).tolist() == [0, 0.75]
    assert float(p.edm(0.5, p.log_time(250.0)).net_time(t)[1]) == pytest.approx(250 * np.log(3))


@pytest.mark.parametrize(
    "schedule",
    [schedules.rectified_flow(), schedules.discrete(schedules.zero_terminal_snr(schedules.linear_betas(50)))],
)
def test_eps_is_refused_where_alpha_is_zero(schedule):
    with pytest.raises(ValueError, match=r"does not determine x0 at t = .*use v or x0"):
        p.require_defined(schedule, p.eps())
    for meaning in (p.v(), p.x0(), p.flow(), p.edm(0.5)):
        p.require_defined(schedule, meaning)
    p.require_defined(CHAIN, p.eps())


def test_edm_needs_a_positive_deviation():
    with pytest.raises(ValueError, match="sigma_data must be positive, got 0"):
        p.edm(0.0)


def test_consistency_needs_a_positive_deviation_and_no_negative_level():
    with pytest.raises(ValueError, match="consistency: sigma_data must be positive, got 0"):
        p.consistency(0.0)
    with pytest.raises(ValueError, match="sigma_min must not be negative, got -1"):
        p.consistency(0.5, -1.0)

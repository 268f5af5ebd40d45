"""Data N(MEAN, STD^2): the velocity, its paths and their straightness are known; reflow of known pairs is one line."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import losses, parameterization, process, schedules
from jaxdiff.denoiser import denoiser
from jaxdiff.methods import rectified_flow as rf
from jaxdiff.methods.base import Sampling
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.mlp import MLP
from jaxdiff.solvers.base import sample
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.heun import heun
from jaxdiff.solvers.rk45 import rk45
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step
from jaxdiff.types import expand

KEY = jax.random.key(0)
STEP = jnp.int32(0)
MEAN, STD = 0.3, 0.7
SCHEDULE = schedules.rectified_flow()
T = jnp.array([0.999, 0.6, 0.01, 0.0])
X0 = MEAN + STD * jax.random.normal(jax.random.key(1), (4, 3))
EPS = jax.random.normal(jax.random.key(2), (4, 3))
X_T = process.q_sample(X0, EPS, SCHEDULE.level(T))


def best_velocity(x, t):
    """E[x0 - eps | x_t], the flow of N(0, 1) to N(MEAN, STD^2): with s^2 = (1 - t)^2 STD^2 + t^2 it is affine in x."""
    t = expand(t, x)
    variance = (1 - t) ** 2 * STD**2 + t**2
    return MEAN + ((1 - t) * STD**2 - t) / variance * (x - (1 - t) * MEAN)


def exact(params, x, label, cond, *, train=False, key=None):
    """A network in the paper's convention: 999 (1 - t) in, x0 - eps out, moved by what cond says."""
    moved = cond["shift"][:, None] if "shift" in cond else 0.0
    return best_velocity(x, 1 - label / 999) + params["a"] + moved


def start_of(a=0.0):
    return lambda key, batch: {"a": jnp.float32(a)}


def null(cond):
    return cond | {"shift": jnp.zeros_like(cond["shift"])}


def run_loss(method, params, batch, aux=None, key=KEY):
    return method.objectives[0].loss(params, aux or {}, batch, key, STEP)


@pytest.mark.parametrize(
    "meaning, ends_at",
    [
        (rf.velocity(), 4),
        (parameterization.flow(), 4),
        (parameterization.v(), 4),
        (parameterization.edm(0.7), 4),
        (parameterization.x0(), 3),  # says nothing about eps at t = 0
    ],
)
def test_the_velocity_follows_from_any_output_at_both_ends(meaning, ends_at):
    output = parameterization.target(meaning, X0, EPS, SCHEDULE.level(T))
    follow = rf.velocity_of(lambda params, x, t, cond, **training: output, {}, meaning)
    np.testing.assert_allclose(follow(X_T, T)[:ends_at], (X0 - EPS)[:ends_at], rtol=2e-3, atol=2e-4)


def test_the_network_sees_the_time_and_sign_of_its_release():
    seen = {}

    def network(params, x, label, cond, *, train=False, key=None):
        seen["label"] = label
        return X0 - EPS

    follow = rf.velocity_of(network, {}, rf.velocity())
    assert (follow(X_T, T) == X0 - EPS).all()
    np.testing.assert_allclose(seen["label"], [0.999, 399.6, 989.01, 999], rtol=1e-4)
    rf.velocity_of(network, {}, rf.velocity(parameterization.scaled_time(1000.0)))(X_T, T)
    np.testing.assert_allclose(seen["label"], [999, 600, 10, 0], rtol=1e-4)
    ours = rf.velocity_of(lambda params, x, t, cond, **training: EPS - X0, {}, parameterization.flow())
    np.testing.assert_allclose(ours(X_T, T), X0 - EPS, rtol=1e-6, atol=1e-6)


def test_where_training_draws_its_times():
    n = 2000
    t = rf.uniform()(KEY, n)
    assert 0 <= float(t.min()) < 0.003 and 0.995 < float(t.max()) <= 0.999
    assert float(t.mean()) == pytest.approx(0.4995, abs=0.02)
    assert (rf.noise_end()(KEY, n) == jnp.float32(0.999)).all() and (rf.data_end()(KEY, n) == 0).all()
    assert (rf.noise_end(0.0)(KEY, n) == 1).all()
    starts = rf.line_time(1 - jnp.asarray(rf.euler_times(4), jnp.float32))
    np.testing.assert_allclose(starts, [0.999, 0.74925, 0.4995, 0.24975], rtol=1e-6)
    np.testing.assert_allclose(np.unique(rf.step_starts(4)(KEY, n))[::-1], starts, rtol=1e-6)


def test_ddim_on_the_flow_is_eulers_method_with_steps_of_one_over_n():
    """The release's loop written out: its time u starts at 1e-3, its step is 1 / n and not (1 - 1e-3) / n."""
    n, x = 7, EPS
    for i in range(n):
        u = i / n * (1 - 1e-3) + 1e-3
        x = x + best_velocity(x, jnp.full(4, 1 - u)) / n
    grid = jnp.asarray(rf.euler_times(n), jnp.float32)
    out = sample(ddim(SCHEDULE), rf.flow_denoiser(best_velocity), KEY, EPS, grid)
    np.testing.assert_allclose(out, x, rtol=1e-5, atol=1e-6)
    method = rf.rectified_flow(exact, init_params=start_of())
    by_method = method.generate({"model": {"a": jnp.zeros(())}}, {}, KEY, EPS, {}, Sampling(num_steps=n))
    np.testing.assert_allclose(by_method, x, rtol=1e-4, atol=1e-5)


def test_from_t_1_it_is_the_denoiser_that_any_flow_network_has():
    def network(params, x, t, cond, *, train=False, key=None):
        return -best_velocity(x, t)

    ours = rf.flow_denoiser(rf.velocity_of(network, {}, parameterization.flow()), start=0.0)
    usual = denoiser(network, {}, SCHEDULE, parameterization.flow())
    np.testing.assert_allclose(ours(X_T, T).x0, usual(X_T, T).x0, rtol=1e-5, atol=1e-6)


def test_samples_have_the_mean_and_deviation_of_the_data():
    method = rf.rectified_flow(exact, init_params=start_of())
    params = {"model": {"a": jnp.zeros(())}}
    noise = jax.random.normal(KEY, (50, 3))
    end = MEAN + STD * noise  # the exact flow's map
    adaptive = method.generate(params, {}, KEY, noise, {}, Sampling())
    np.testing.assert_allclose(adaptive, end, atol=2e-3)  # it starts at 0.999, not at 1
    for sampling in (Sampling(num_steps=400), Sampling(num_steps=40, solver=heun)):
        np.testing.assert_allclose(method.generate(params, {}, KEY, noise, {}, sampling), end, atol=1e-2)
    one = method.generate(params, {}, KEY, noise, {}, Sampling(num_steps=1))
    np.testing.assert_allclose(one, MEAN, atol=5e-3)  # one step of a flow that is not straight answers the mean


def test_rk45_keeps_its_tolerance_and_goes_both_ways():
    def slope(x, t):
        return -best_velocity(x, t)

    calls = []
    for tolerance in (1e-3, 1e-5):
        out, n = rk45(slope, EPS, 1.0, 0.0, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(out, MEAN + STD * EPS, atol=20 * tolerance)
        calls.append(int(n))
    assert calls[0] < calls[1] and all(n % 6 == 2 for n in calls)
    back, _ = rk45(slope, out, 0.0, 1.0)
    np.testing.assert_allclose(back, EPS, atol=1e-4)
    same, n = rk45(slope, EPS, 0.5, 0.5)
    assert (same == EPS).all() and int(n) == 2
    still, _ = rk45(lambda x, t: jnp.zeros_like(x), EPS, 1.0, 0.0)
    assert (still == EPS).all()
    assert np.isnan(rk45(slope, EPS, 1.0, 0.0, max_calls=8)[0]).all()
    assert np.isnan(rk45(lambda x, t: x * jnp.nan, EPS, 1.0, 0.0)[0]).all()
    with pytest.raises(ValueError, match="atol must be positive, got 0.0"):
        rk45(slope, EPS, 1.0, 0.0, atol=0.0)


def test_the_sde_without_noise_is_euler_and_with_it_keeps_the_distribution():
    grid = jnp.asarray(rf.euler_times(5), jnp.float32)
    denoise = rf.flow_denoiser(best_velocity)
    plain = sample(ddim(SCHEDULE), denoise, KEY, EPS, grid)
    np.testing.assert_allclose(sample(rf.flow_sde(SCHEDULE, 0.0), denoise, KEY, EPS, grid), plain, atol=1e-6)
    noise = jax.random.normal(KEY, (4000, 2))
    grid = jnp.asarray(rf.euler_times(100), jnp.float32)
    out = sample(rf.flow_sde(SCHEDULE, 0.3), denoise, KEY, noise, grid)
    assert not np.allclose(out, MEAN + STD * noise, atol=0.1)
    assert float(out.mean()) == pytest.approx(MEAN, abs=0.1)
    assert float(out.std()) == pytest.approx(STD, rel=0.1)


def test_the_loss_is_that_of_the_ends_and_tells_the_straightness():
    off = jnp.full((4, 3), 0.2)
    loss, straight = rf.flow_loss(lambda x, t: X0 - EPS + off, X0, EPS, T)
    np.testing.assert_allclose(loss, 0.04, rtol=1e-4)
    np.testing.assert_allclose(straight, 0.04, rtol=1e-4)
    far, straight = rf.flow_loss(lambda x, t: X0 - EPS + off, X0, EPS, T, losses.linf)
    np.testing.assert_allclose(far, 0.2, rtol=1e-4)
    np.testing.assert_allclose(straight, 0.04, rtol=1e-4)


def test_straightness_of_known_flows():
    assert float(rf.straightness(lambda x, t: jnp.full_like(x, 0.7), EPS, 10).max()) < 1e-10
    assert float(rf.straightness(best_velocity, EPS, 1).max()) < 1e-10
    curved = rf.straightness(lambda x, t: jnp.broadcast_to(2 * t[:, None], x.shape), EPS, 500, start=0.0)
    np.testing.assert_allclose(curved, 1 / 3, rtol=1e-2)  # the variance of 2 t over [0, 1]


def test_fresh_noise_leaves_the_variance_of_the_coupling_and_pairs_leave_none():
    n = 4000
    x0 = MEAN + STD * jax.random.normal(KEY, (n, 1))
    params = {"model": {"a": jnp.zeros(())}}
    first = rf.rectified_flow(exact, init_params=start_of(), time_sampler=rf.noise_end())
    value, metrics = run_loss(first, params, {"x0": x0})
    assert float(value) == pytest.approx(STD**2, rel=0.1)  # at the noisy end v is MEAN - eps whatever x0 was drawn
    assert metrics["straightness"].shape == (n,)

    def line(params, x, label, cond, *, train=False, key=None):
        """The flow that maps eps to MEAN + STD eps along straight lines."""
        u = expand(label / 999, x)
        eps = (x - u * MEAN) / (u * STD + 1 - u)
        return MEAN + (STD - 1) * eps + params["a"]

    noise = jax.random.normal(KEY, (n, 1))
    second = rf.reflow(line, teacher_params={"a": jnp.zeros(())})
    value, _ = run_loss(second, params, {"x0": MEAN + STD * noise, "noise": noise})
    assert float(value) < 1e-8
    parted = {"x0": MEAN + STD * noise[::-1], "noise": noise}
    assert float(run_loss(second, params, parted)[0]) > 0.5
    one = second.generate(params, {}, KEY, noise, {}, Sampling(num_steps=1))
    np.testing.assert_allclose(one, MEAN + STD * noise, atol=2e-3)


def test_online_pairs_are_the_teachers_and_carry_no_gradient():
    seen = []

    def ends(params, noise, cond):
        seen.append(cond)
        return params["a"] + 2 * noise + cond["shift"][:, None]

    def student(params, x, label, cond, *, train=False, key=None):
        return params["a"] + jnp.zeros_like(x)

    method = rf.reflow(student, teacher_params={"a": jnp.float32(0.5)}, online=ends, time_sampler=rf.noise_end())
    batch = {"x0": jnp.zeros((4, 3)), "shift": jnp.ones(4)}
    params, aux = method.init(KEY, batch)
    assert params["model"]["a"] == aux["teacher"]["a"] == 0.5 and params["model"]["a"] is not aux["teacher"]["a"]
    value, _ = run_loss(method, params, batch, aux)
    assert list(seen[0]) == ["shift"] and float(value) > 0
    into_teacher = jax.grad(lambda aux: run_loss(method, params, batch, aux)[0])(aux)
    assert float(into_teacher["teacher"]["a"]) == 0
    assert rf.reflow(student, teacher_params={"a": jnp.float32(0.5)}).init(KEY, batch)[1] == {}


def test_guided_velocity():
    method = rf.rectified_flow(exact, init_params=start_of(), null_cond=null, num_steps=3)
    params, cond = {"model": {"a": jnp.zeros(())}}, {"shift": jnp.full(4, 0.4)}
    plain, one, guided = (
        method.generate(params, {}, KEY, EPS, cond, Sampling(guidance_scale=scale))
        for scale in (None, jnp.float32(1), jnp.float32(1.5))
    )
    np.testing.assert_allclose(one, plain, atol=1e-6)
    moved = method.generate(params, {}, KEY, EPS, {"shift": jnp.full(4, 0.6)}, Sampling())  # 1.5 times 0.4
    np.testing.assert_allclose(guided, moved, atol=1e-5)
    adaptive = rf.rectified_flow(exact, init_params=start_of(), null_cond=null)
    out = adaptive.generate(params, {}, KEY, EPS, cond, Sampling(guidance_scale=jnp.float32(1.5)))
    assert np.isfinite(out).all()


def test_dropped_conditions_are_the_null_one_example_by_example():
    seen = {}

    def network(params, x, label, cond, *, train=False, key=None):
        seen["shift"] = cond["shift"]
        return x

    def lost(cond):
        return {"shift": jnp.full_like(cond["shift"], -1)}

    method = rf.rectified_flow(network, init_params=start_of(), null_cond=lost, cond_dropout=0.25)
    batch = {"x0": jnp.zeros((2000, 1)), "shift": jnp.arange(2000.0)}
    run_loss(method, {"model": {}}, batch)
    dropped = seen["shift"] == -1
    assert float(dropped.mean()) == pytest.approx(0.25, abs=0.04)
    assert (seen["shift"][~dropped] == jnp.arange(2000.0)[~dropped]).all()


def test_reflow_of_a_mixture_is_right_in_one_step_and_traced_once():
    """Pairs of a flow to two points: the first flow answers their mean in one step, its reflow one of the points."""
    mlp = MLP(features=32, num_blocks=2)
    network = as_network(mlp)
    noise = jax.random.normal(KEY, (2000, 2))
    x0 = jnp.where(noise[:, :1] > 0, 1.0, -1.0) * jnp.ones((1, 2)) + 0.02 * noise
    start = init_params(mlp, KEY, jnp.zeros((1, 2)), jnp.zeros(1), {})
    method = rf.reflow(network, teacher_params=start, num_steps=1)
    optimizers = {"model": optax.adam(3e-3)}
    batch = {"x0": x0[:256], "noise": noise[:256]}
    state = create_state(method, optimizers, (), KEY, batch)
    step = jax.jit(chex.assert_max_traces(make_train_step(method, optimizers), n=1), donate_argnums=0)
    for i in range(300):
        rows = np.random.default_rng(i).integers(0, 2000, 256)
        state, metrics = step(state, {"x0": x0[rows], "noise": noise[rows]})
    assert float(metrics["straightness"]) < 0.35
    out = np.asarray(method.generate(state.params, state.aux, KEY, noise, {}, Sampling()))
    assert (np.abs(np.abs(out) - 1) < 0.4).all(axis=1).mean() > 0.75
    assert (np.sign(out[:, 0]) == np.sign(noise[:, 0])).mean() > 0.95


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"cond_dropout": 1.5}, r"a probability in \[0, 1\], got 1.5"),
        ({"cond_dropout": 0.1}, "cond_dropout needs null_cond"),
        ({"start": 1.0}, r"start must lie in \[0, 1\), got 1.0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"parameterization": parameterization.eps()}, "does not determine x0 at t = 1"),
    ],
)
def test_refused_when_built(settings, message):
    with pytest.raises(ValueError, match=message):
        rf.rectified_flow(exact, init_params=start_of(), **settings)
    with pytest.raises(ValueError, match=message):
        rf.reflow(exact, teacher_params={"a": jnp.zeros(())}, **settings)


def test_refused_when_traced():
    params = {"model": {"a": jnp.zeros(())}}
    first = rf.rectified_flow(exact, init_params=start_of())
    second = rf.reflow(exact, teacher_params=params["model"])
    with pytest.raises(ValueError, match="got a batch of pairs with 'noise'; use reflow"):
        run_loss(first, params, {"x0": X0, "noise": EPS})
    with pytest.raises(ValueError, match=r"reflow: a batch needs 'noise', got keys \['x0'\]"):
        run_loss(second, params, {"x0": X0})
    with pytest.raises(ValueError, match=r"data \(4, 3\) and noise \(4, 2\) are ends of one line"):
        run_loss(second, params, {"x0": X0, "noise": EPS[:, :2]})
    with pytest.raises(ValueError, match="guidance_scale needs null_cond"):
        first.generate(params, {}, KEY, EPS, {}, Sampling(guidance_scale=jnp.float32(2)))
    with pytest.raises(ValueError, match="solved adaptively; a solver by name needs num_steps"):
        first.generate(params, {}, KEY, EPS, {}, Sampling(solver=heun))
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        rf.step_starts(0)

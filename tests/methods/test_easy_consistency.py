import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import losses, parameterization, schedules
from jaxdiff.denoiser import denoiser
from jaxdiff.methods.base import Sampling
from jaxdiff.methods.easy_consistency import constant_widening, easy_consistency, easy_loss, gap, sigmoid_widening
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step

KEY = jax.random.key(0)
T = jnp.array([1e-3, 0.05, 0.6, 4.0, 70.0])
X0 = jax.random.normal(jax.random.key(1), (5, 3))
EPS = jax.random.normal(jax.random.key(2), (5, 3))
BATCH = {"x0": X0}


def linear(params, x_in, t, cond, *, train=False, key=None):
    return params["w"] * x_in + params["u"] * t[:, None]


def linear_params(key, batch):
    return {"w": jnp.float32(0.7), "u": jnp.float32(0.1)}


def make(network=linear, **settings):
    return easy_consistency(network, **({"init_params": linear_params, "steps_per_stage": 100} | settings))


def edm_of(params, network=linear):
    return denoiser(network, params, schedules.ve(), parameterization.edm())


def run_loss(method, params, batch=BATCH, step=0):
    return method.objectives[0].loss(params, {}, batch, KEY, jnp.int32(step))


def test_the_gap_halves_each_stage_and_never_reaches_below_zero():
    first = gap(T, jnp.int32(0))
    np.testing.assert_allclose(first, np.minimum(T * (1 + 8 / (1 + np.exp(T))) / 2, T), rtol=1e-5)
    assert (first[:3] == T[:3]).all() and (first[3:] < T[3:]).all()
    later = [gap(T, jnp.int32(k)) for k in (3, 4, 5)]
    for wide, narrow in zip(later[:-1], later[1:], strict=True):
        np.testing.assert_allclose(narrow, wide / 2, rtol=1e-5)
    np.testing.assert_allclose(gap(T, jnp.int32(1), 4.0, constant_widening), T / 16, rtol=1e-6)
    np.testing.assert_allclose(sigmoid_widening(6.0, 2.0)(T), 1 + 6 / (1 + np.exp(2 * np.float64(T))), rtol=1e-5)
    with jax.enable_x64(True):  # far into the training r is next to t and the gap still has its digits
        wide = gap(T.astype(jnp.float64), jnp.int32(30))
    np.testing.assert_allclose(gap(T, jnp.int32(30)), wide, rtol=1e-5)


def test_where_r_is_zero_the_target_is_the_clean_image():
    params = linear_params(None, None)
    denoise = edm_of(params)
    value = easy_loss(denoise, X0, EPS, T, T, losses.mse)
    direct = losses.mse(denoise(X0 + T[:, None] * EPS, T).x0, X0) / T
    np.testing.assert_allclose(value, direct, rtol=1e-6)

    def mixed(p):
        width = jnp.where(jnp.arange(5) < 2, T, T / 2)
        return easy_loss(edm_of(p), X0, EPS, T, width, losses.euclidean).sum()

    chex.assert_tree_all_finite(jax.grad(mixed)(params))


def test_the_level_zero_is_never_given_to_the_network():
    seen = []

    def spy(params, x_in, t, cond, *, train=False, key=None):
        seen.append(t)
        return x_in

    easy_loss(edm_of({}, spy), X0, EPS, T, T, losses.mse)
    assert len(seen) == 2 and all(jnp.isfinite(t).all() for t in seen)


def test_the_target_is_the_student_without_its_gradient():
    params, width = linear_params(None, None), T / 3

    def separate(p, fixed):
        r = T - width
        target = edm_of(fixed)(X0 + r[:, None] * EPS, r).x0
        return (losses.mse(edm_of(p)(X0 + T[:, None] * EPS, T).x0, target) / width).sum()

    ours = jax.grad(lambda p: easy_loss(edm_of(p), X0, EPS, T, width, losses.mse).sum())(params)
    chex.assert_trees_all_close(ours, jax.grad(separate)(params, params), rtol=1e-4)


def test_one_train_step_through_all_stages():
    method, seen = make(steps_per_stage=3), []
    optimizers = {"model": optax.sgd(1e-4)}
    state = create_state(method, optimizers, (), KEY, BATCH)
    assert state.aux == {}
    step = jax.jit(make_train_step(method, optimizers))
    for _ in range(8):
        state, metrics = step(state, BATCH)
        assert metrics["finite"]
        seen.append(int(metrics["stage"]))
    assert step._cache_size() == 1 and seen == [0, 0, 0, 1, 1, 1, 2, 2]


def test_both_calls_share_the_dropout_key():
    keys = []

    def spy(params, x_in, t, cond, *, train=False, key=None):
        assert train
        keys.append(jax.random.key_data(key))
        return x_in * params["w"]

    run_loss(make(spy), {"model": linear_params(None, None)})
    assert len(keys) == 2 and (keys[0] == keys[1]).all()


def test_samples_are_the_identity_at_sigma_min_and_take_the_noise_in_full():
    method = make()
    params, aux = method.init(KEY, BATCH)
    noise = jax.random.normal(KEY, (5, 3))
    run = method.generate
    np.testing.assert_array_equal(
        run(params, aux, KEY, noise, {}, Sampling(times=jnp.array([0.003]))), jnp.float32(0.003) * noise
    )

    def end(x, t):
        f = denoiser(linear, params["model"], schedules.ve(), parameterization.consistency(0.5, 0.003))
        return f(x, jnp.full(5, t)).x0

    one = run(params, aux, KEY, noise, {}, Sampling(num_steps=1))
    np.testing.assert_allclose(one, end(80.0 * noise, 80.0), rtol=1e-5)
    drawn = jax.random.normal(jax.random.fold_in(KEY, 0), noise.shape)
    two = run(params, aux, KEY, noise, {}, Sampling())
    np.testing.assert_allclose(two, end(one + jnp.float32(0.821) * drawn, 0.821), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"q": 1.0}, "q must be above 1, got 1.0"),
        ({"steps_per_stage": 0}, "steps_per_stage must be at least 1, got 0"),
        ({"mid_sigma": 100.0}, "need sigma_min < mid_sigma < sigma_max"),
        ({"log_std": 0.0}, "std must be positive"),
        ({"sigma_data": -1.0}, "sigma_data must be positive"),
    ],
)
def test_refused_when_built(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_refused_when_traced():
    method = make()
    params, aux = method.init(KEY, BATCH)
    with pytest.raises(ValueError, match=r"a batch needs 'x0', got keys \['image'\]"):
        run_loss(method, params, {"image": X0})
    with pytest.raises(ValueError, match="has times for 1 or 2 steps, got 3"):
        method.generate(params, aux, KEY, X0, {}, Sampling(num_steps=3))
    free, bound = (make(clip=c).generate(params, aux, KEY, 3 * X0, {}, Sampling(num_steps=1)) for c in (None, 0.1))
    np.testing.assert_allclose(bound, jnp.clip(free, -0.1, 0.1), rtol=1e-6)
    assert float(jnp.abs(free).max()) > 0.1
    with pytest.raises(ValueError, match="takes no guidance_scale"):
        method.generate(params, aux, KEY, X0, {}, Sampling(guidance_scale=jnp.float32(2)))

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import losses, parameterization, schedules, times
from jaxdiff.denoiser import denoiser
from jaxdiff.methods.base import Sampling
from jaxdiff.methods.improved_consistency import (
    doubling_levels,
    improved_consistency,
    log_normal_shares,
    log_normal_steps,
    pair_loss,
)
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step

LOW, HIGH = 0.002, 80.0
KEY = jax.random.key(0)
BATCH = {"x0": jax.random.normal(jax.random.key(1), (4, 3))}


def linear(params, x_in, t, cond, *, train=False, key=None):
    return params["w"] * x_in + params["u"] * t[:, None]


def linear_params(key, batch):
    return {"w": jnp.float32(0.7), "u": jnp.float32(0.1)}


def make(network=linear, **settings):
    built = {"init_params": linear_params, "num_levels": doubling_levels(10, 1280, 400)}
    return improved_consistency(network, **(built | settings))


def run_loss(method, params, batch=BATCH, step=0):
    return method.objectives[0].loss(params, {}, batch, KEY, jnp.int32(step))


def test_the_grid_doubles_in_eight_equal_stages():
    num_levels = doubling_levels(10, 1280, 400_000)
    at = jnp.asarray([0, 49_999, 50_000, 100_000, 350_000, 400_000, 2_000_000])
    np.testing.assert_array_equal(num_levels(at), [11, 11, 21, 41, 1281, 1281, 1281])
    # 70 is not a power of two times 10: the last stage stops at it
    np.testing.assert_array_equal(doubling_levels(10, 70, 30)(jnp.arange(0, 31, 10)), [11, 21, 41, 71])


@pytest.mark.parametrize("n", [2, 11, 161])
def test_steps_are_drawn_by_the_log_normal_s_shares(n):
    shares = log_normal_shares(times.karras(n, LOW, HIGH))
    assert shares.sum() == pytest.approx(1) and (shares > 0).all()
    count = 200_000
    steps = np.asarray(jax.jit(lambda n: log_normal_steps(KEY, count, n))(jnp.int32(n)))
    assert steps.min() >= 0 and steps.max() <= n - 2
    seen = np.bincount(steps, minlength=n - 1) / count
    assert np.abs(seen - shares).max() < 5 * np.sqrt(0.25 / count)
    chi2 = (count * (seen - shares) ** 2 / shares).sum()
    assert chi2 < n - 2 + 6 * np.sqrt(2 * n)


def test_loss_is_the_weighted_pseudo_huber_distance_of_one_path():
    f = denoiser(linear, linear_params(None, None), schedules.ve(), parameterization.consistency())
    x0, eps = BATCH["x0"], jax.random.normal(KEY, (4, 3))
    t, s = jnp.array([80.0, 2.0, 0.1, 0.01]), jnp.array([60.0, 1.5, 0.05, 0.002])
    ends = [f(x0 + a[:, None] * eps, a).x0 for a in (t, s)]
    c = 0.00054 * 3**0.5
    distance = np.sqrt(((ends[0] - ends[1]) ** 2).sum(axis=1) + c**2) - c
    np.testing.assert_allclose(pair_loss(f, x0, eps, t, s, losses.pseudo_huber()), distance / (t - s), rtol=1e-4)


def test_the_target_is_the_student_without_its_gradient():
    """The gradient is that of the loss with the target's parameters as separate constants."""
    x0, eps = BATCH["x0"], jax.random.normal(KEY, (4, 3))
    t, s = jnp.array([5.0, 2.0, 0.1, 0.01]), jnp.array([4.0, 1.5, 0.05, 0.005])
    params = linear_params(None, None)

    def f(p):
        return denoiser(linear, p, schedules.ve(), parameterization.consistency())

    def separate(p, fixed):
        target = f(fixed)(x0 + s[:, None] * eps, s).x0
        return (losses.mse(f(p)(x0 + t[:, None] * eps, t).x0, target) / (t - s)).sum()

    ours = jax.grad(lambda p: pair_loss(f(p), x0, eps, t, s, losses.mse).sum())(params)
    chex.assert_trees_all_close(ours, jax.grad(separate)(params, params), rtol=1e-5)


def test_one_train_step_through_all_stages():
    method, seen = make(num_levels=doubling_levels(10, 80, 8)), []
    optimizers = {"model": optax.sgd(1e-3)}
    state = create_state(method, optimizers, (), KEY, BATCH)
    assert state.aux == {}
    step = jax.jit(make_train_step(method, optimizers))
    for _ in range(9):
        state, metrics = step(state, BATCH)
        assert metrics["finite"]
        seen.append(int(metrics["num_levels"]))
    assert step._cache_size() == 1 and seen == [11, 11, 21, 21, 41, 41, 81, 81, 81]


def test_both_calls_share_the_dropout_key():
    keys = []

    def spy(params, x_in, t, cond, *, train=False, key=None):
        assert train
        keys.append(jax.random.key_data(key))
        return x_in * params["w"]

    run_loss(make(spy), {"model": linear_params(None, None)})
    assert len(keys) == 2 and (keys[0] == keys[1]).all()


def test_training_finds_the_consistency_function_of_normal_data():
    """For data N(0, 0.5^2) it is x sqrt((0.25 + eps^2) / (0.25 + t^2)), nearly what this network gives at its best."""

    def network(params, x_in, t, cond, *, train=False, key=None):
        return x_in * jax.nn.sigmoid(params["b"] + params["c"] * t)[:, None]

    method = make(
        network, num_levels=doubling_levels(10, 160, 300),
        init_params=lambda key, batch: {"b": jnp.float32(0), "c": jnp.float32(0)},
    )  # fmt: skip
    optimizer = optax.adam(0.05)
    params, _ = method.init(KEY, BATCH)

    @jax.jit
    def step(params, opt, k):
        key = jax.random.fold_in(KEY, k)
        batch = {"x0": 0.5 * jax.random.normal(key, (256, 2))}
        grads = jax.grad(lambda p: method.objectives[0].loss(p, {}, batch, key, k)[0])(params)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to its integer count
            updates, opt = optimizer.update(grads, opt)
        return optax.apply_updates(params, updates), opt

    opt = optimizer.init(params)
    noise = jax.random.normal(KEY, (2000, 2))
    assert float(method.generate(params, {}, KEY, noise, {}, Sampling()).std()) == pytest.approx(0.25, rel=0.05)
    for k in range(300):
        params, opt = step(params, opt, jnp.int32(k))
    assert float(method.generate(params, {}, KEY, noise, {}, Sampling()).std()) == pytest.approx(0.5, rel=0.1)


def test_sampling():
    method = make()
    params, aux = method.init(KEY, BATCH)
    noise = jax.random.normal(KEY, (5, 2))
    lowest = method.generate(params, aux, KEY, noise, {}, Sampling(times=jnp.array([LOW])))
    np.testing.assert_array_equal(lowest, jnp.float32(LOW) * noise)
    two = method.generate(params, aux, KEY, noise, {}, Sampling(times=jnp.array([HIGH, 0.821])))
    assert two.shape == noise.shape and not np.allclose(two, method.generate(params, aux, KEY, noise, {}, Sampling()))
    free, bound = (make(clip=c).generate(params, aux, KEY, 3 * noise, {}, Sampling()) for c in (None, 0.1))
    np.testing.assert_allclose(bound, jnp.clip(free, -0.1, 0.1), rtol=1e-6)
    assert float(jnp.abs(free).max()) > 0.1
    with pytest.raises(ValueError, match="takes no guidance_scale"):
        method.generate(params, aux, KEY, noise, {}, Sampling(guidance_scale=jnp.float32(2)))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: doubling_levels(20, 10, 100), "need 1 <= start <= end, got 20 and 10"),
        (lambda: doubling_levels(1, 1024, 5), "total_steps 5 are fewer than the stages"),
        (lambda: make(log_std=0.0), "log_std must be positive, got 0.0"),
        (lambda: make(num_steps=0), "n must be at least 1"),
        (lambda: make(sigma_min=0.0), "sigma_min"),
    ],
)
def test_refused_when_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_refused_when_traced():
    with pytest.raises(ValueError, match=r"a batch needs 'x0', got keys \['image'\]"):
        run_loss(make(), {"model": linear_params(None, None)}, {"image": BATCH["x0"]})

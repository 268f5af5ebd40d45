import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import parameterization, schedules, times
from jaxdiff.methods.base import Sampling
from jaxdiff.methods.edm import edm, edm_denoiser, edm_loss
from jaxdiff.solvers.heun import euler, heun
from jaxdiff.types import Level

STD = 0.5  # data ~ N(0, STD^2) in the plane
KEY = jax.random.key(0)


def exact(params, x_t, t, cond, *, train=False, key=None):
    """For data N(0, sigma_data^2) the best output is 0: skip x_t is already the mean of x0."""
    return jnp.zeros_like(x_t)


def linear(params, x_t, t, cond, *, train=False, key=None):
    out = params["w"] * x_t
    return out + params["label"][cond["label"]] if "label" in cond else out


def linear_params(key, batch):
    return {"w": jnp.float32(0.7), "label": jnp.arange(8.0).reshape(4, 2)}


def make(network=exact, **settings):
    return edm(network, **({"init_params": lambda key, batch: {}} | settings))


def loss_of(method, batch, key=KEY):
    params, aux = method.init(key, batch)
    return method.objectives[0].loss(params, aux, batch, key, jnp.int32(0))[0]


def test_the_exact_network_has_the_known_minimum():
    """E (x0 | x_t) misses x0 by sigma^2 STD^2 / (sigma^2 + STD^2), which the weight makes exactly 1."""
    batch = {"x0": STD * jax.random.normal(KEY, (50_000, 2))}
    assert float(loss_of(make(), batch)) == pytest.approx(1.0, rel=0.02)
    half_as_wide = {"x0": 0.5 * batch["x0"]}
    assert float(loss_of(make(), half_as_wide)) < 0.9


def test_loss_is_elementwise_and_weighted():
    sigma = jnp.array([0.1, 2.0])
    error = jnp.ones((2, 4, 4, 1))
    value = edm_loss(error, jnp.zeros_like(error), Level(jnp.ones(2), sigma), 0.5)
    assert value.shape == (2, 4, 4, 1)
    weight = (np.array([0.1, 2.0]) ** 2 + 0.25) / (np.array([0.1, 2.0]) * 0.5) ** 2
    assert np.asarray(value[:, 0, 0, 0]) == pytest.approx(weight, rel=1e-6)


def test_the_weight_makes_every_level_count_the_same_in_the_output():
    """The weighted x0 error equals the plain error of the network's output."""
    meaning = parameterization.edm(0.5)
    level = Level(jnp.ones(5), jnp.array([0.002, 0.1, 0.5, 3.0, 80.0]))
    x0, eps = (jax.random.normal(k, (5, 3)) for k in jax.random.split(KEY))
    x_t = x0 + level.sigma[:, None] * eps
    f = jax.random.normal(jax.random.key(7), (5, 3))
    in_x0 = edm_loss(parameterization.to_x0(meaning, f, x_t, level), x0, level, 0.5)
    in_output = (f - parameterization.target(meaning, x0, eps, level)) ** 2
    assert np.asarray(in_x0) == pytest.approx(np.asarray(in_output), rel=2e-3)


def test_training_reduces_the_loss_in_one_trace():
    method = make(linear, init_params=linear_params)
    batch = {"x0": STD * jax.random.normal(KEY, (512, 2))}
    params, aux = method.init(KEY, batch)
    optimizer = optax.adam(2e-2)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, opt, key):
        loss, grads = jax.value_and_grad(lambda p: method.objectives[0].loss(p, aux, batch, key, 0)[0])(params)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to its integer count
            updates, opt = optimizer.update(grads, opt)
        return optax.apply_updates(params, updates), opt, loss

    opt, seen = optimizer.init(params), []
    for i in range(120):
        params, opt, loss = step(params, opt, jax.random.fold_in(KEY, i))
        seen.append(float(loss))
    assert np.mean(seen[-20:]) < 0.8 * np.mean(seen[:5])
    assert float(params["model"]["w"]) == pytest.approx(0, abs=0.1)


def test_samples_have_the_data_s_moments():
    noise = jax.random.normal(KEY, (2000, 2))
    method = make()
    samples = method.generate({"model": {}}, {}, KEY, noise, {}, Sampling(num_steps=80))
    # the flow of Gaussian data is a scaling: x0 = STD / sqrt(STD^2 + sigma_max^2) sigma_max z
    assert np.asarray(samples) == pytest.approx(STD * np.asarray(noise), rel=5e-3, abs=2e-3)
    churned = make(solver=functools.partial(heun, churn=10.0, churn_min=0.05, churn_max=50.0))
    other = churned.generate({"model": {}}, {}, KEY, noise, {}, Sampling(num_steps=80))
    assert not np.allclose(samples, other, atol=0.05)
    assert float(other.std()) == pytest.approx(STD, rel=0.06)


def test_sampling_overrides():
    noise = jax.random.normal(KEY, (3, 4, 4, 1))
    method = make()
    run = functools.partial(method.generate, {"model": {}}, {}, KEY, noise, {})
    one = run(Sampling(num_steps=1))
    assert np.asarray(one) == pytest.approx(np.asarray(noise) * 80 * 0.25 / (0.25 + 6400), rel=1e-5)
    grid = jnp.asarray(times.karras(5), jnp.float32)
    chosen = np.asarray(run(Sampling(times=grid, solver=euler)))
    assert np.asarray(run(Sampling(num_steps=5, solver=euler))) == pytest.approx(chosen)
    assert not np.allclose(run(Sampling(num_steps=5)), chosen, atol=1e-3)


def test_labels_guidance_and_dropout():
    method = make(linear, init_params=linear_params, label_dropout=0.2, null_label=3)
    params, aux = method.init(KEY, None)
    noise, label = jax.random.normal(KEY, (5, 2)), {"label": jnp.full(5, 1, jnp.int32)}
    run = functools.partial(method.generate, params, aux, KEY, noise)
    plain = np.asarray(run(label, Sampling(num_steps=3)))
    assert run(label, Sampling(num_steps=3, guidance_scale=jnp.float32(1))) == pytest.approx(plain, abs=1e-5)
    null = np.asarray(run({"label": jnp.full(5, 3, jnp.int32)}, Sampling(num_steps=3)))
    assert run({}, Sampling(num_steps=3)) == pytest.approx(null)

    seen = []

    def spy(params, x_t, t, cond, *, train=False, key=None):
        assert train and key is not None
        seen.append(cond["label"])
        return x_t

    batch = {"x0": jnp.zeros((4000, 2)), "label": jnp.ones(4000, jnp.int32)}
    loss_of(make(spy, label_dropout=0.2, null_label=3), batch)
    assert np.mean(seen[0] == 3) == pytest.approx(0.2, abs=0.03)
    assert set(np.unique(seen[0])) == {1, 3}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sigma_data": 0.0}, "sigma_data must be positive"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min < sigma_max"),
        ({"log_std": 0.0}, "std must be positive"),
        ({"num_steps": 0}, "n must be at least 1"),
        ({"label_dropout": 0.1}, "needs null_label"),
        ({"label_dropout": -0.1, "null_label": 3}, r"probability in \[0, 1\]"),
    ],
)
def test_refused_when_built(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_refused_when_traced():
    with pytest.raises(ValueError, match="a batch needs 'x0'"):
        loss_of(make(), {"image": jnp.zeros((2, 2))})
    with pytest.raises(ValueError, match="a batch needs 'label'"):
        loss_of(make(label_dropout=0.1, null_label=3), {"x0": jnp.zeros((2, 2))})
    with pytest.raises(ValueError, match="guidance_scale needs"):
        edm_denoiser(exact, {}, schedules.ve(), parameterization.edm(), guidance_scale=2.0)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import parameterization, process, schedules
from jaxdiff.denoiser import clip_x0, denoiser, dynamic_threshold, map_x0, threshold
from jaxdiff.types import Denoised, Denoiser, Network

CHAIN = schedules.discrete(schedules.linear_betas(100))
T = jnp.array([0.0, 50.0, 99.0])
X0, EPS = (jax.random.normal(jax.random.key(i), (3, 4, 4, 2)) for i in range(2))
X_T = process.q_sample(X0, EPS, CHAIN.level(T))


@pytest.mark.parametrize(
    "meaning", [parameterization.eps(), parameterization.x0(), parameterization.v(), parameterization.edm(0.5)]
)
def test_a_perfect_network_gives_x0(meaning):
    def network(params, x_t, t, cond, *, train=False, key=None):
        return parameterization.target(meaning, X0, EPS, CHAIN.level(T))

    assert isinstance(network, Network)
    denoise = denoiser(network, {}, CHAIN, meaning)
    assert isinstance(denoise, Denoiser)
    d = denoise(X_T, T)
    assert np.asarray(d.x0) == pytest.approx(np.asarray(X0), abs=2e-4)
    assert d.variance_out is None


def test_what_the_network_is_given():
    given = {}

    def network(params, x_t, t, cond, *, train=False, key=None):
        given.update(params=params, x_t=x_t, t=t, cond=cond, train=train, key=key)
        return x_t

    meaning = parameterization.edm(0.5)
    cond, key = {"label": jnp.arange(3)}, jax.random.key(3)
    schedule = schedules.ve()
    sigma = jnp.array([0.1, 1.0, 10.0])
    denoiser(network, {"w": 1}, schedule, meaning, cond, train=True, key=key)(X_T, sigma)
    assert given["params"] == {"w": 1} and given["cond"] is cond and given["train"] and given["key"] is key
    assert np.asarray(given["t"]) == pytest.approx(np.log([0.1, 1, 10]) / 4, abs=1e-6)
    scale = 1 / np.sqrt(np.array([0.01, 1, 100]) + 0.25)
    assert np.asarray(given["x_t"]) == pytest.approx(np.asarray(X_T) * scale.reshape(3, 1, 1, 1), rel=1e-5)
    denoiser(network, {}, schedule, meaning)(X_T, sigma)
    assert given["cond"] == {} and given["train"] is False


def test_learned_variance_splits_the_channels():
    def network(params, x_t, t, cond, *, train=False, key=None):
        return jnp.concatenate([x_t, 2 * x_t], axis=-1)

    d = denoiser(network, {}, CHAIN, parameterization.x0(), learned_variance=True)(X_T, T)
    assert (d.x0 == X_T).all() and (d.variance_out == 2 * X_T).all()


def test_wrappers_change_x0_and_keep_the_variance():
    def denoise(x_t, t):
        return Denoised(3 * x_t, x_t)

    clipped = clip_x0(denoise)(X_T, T)
    assert jnp.abs(clipped.x0).max() == 1 and (clipped.variance_out == X_T).all()
    assert jnp.abs(clip_x0(denoise, 2.0)(X_T, T).x0).max() == 2
    assert (map_x0(denoise, jnp.negative)(X_T, T).x0 == -3 * X_T).all()
    assert (dynamic_threshold(denoise, 0.9)(X_T, T).x0 == threshold(3 * X_T, 0.9)).all()


def test_threshold_against_numpy():
    x = np.asarray(X0) * np.array([0.1, 1.0, 5.0], np.float32).reshape(3, 1, 1, 1)
    for quantile, cap in [(0.9, None), (0.995, 1.5)]:
        s = np.clip(np.quantile(np.abs(x).reshape(3, -1), quantile, axis=1), 1, cap).reshape(3, 1, 1, 1)
        ours = threshold(jnp.asarray(x), quantile, cap)
        assert np.asarray(ours) == pytest.approx(np.clip(x, -s, s) / s, abs=1e-5)
    assert (threshold(jnp.asarray(x[:1])) == x[:1]).all()  # already in range

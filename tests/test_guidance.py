import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import guidance, parameterization, schedules
from jaxdiff.denoiser import denoiser
from jaxdiff.process import eps_from_x0
from jaxdiff.solvers.base import sample
from jaxdiff.solvers.ddim import ddim
from jaxdiff.types import Denoised, expand

KEY = jax.random.key(0)
SCHEDULE = schedules.discrete(schedules.scaled_linear_betas(1000))
X = jax.random.normal(jax.random.key(1), (3, 4, 4, 2))
T = jnp.asarray([900.0, 500.0, 20.0])
COND = {"label": jnp.asarray([[1.0], [2.0], [3.0]]), "shift": jnp.asarray([0.5, 0.0, -0.5])}
NULL = {"label": jnp.zeros([3, 1]), "shift": jnp.zeros([3])}


def network(params, x_t, t, cond, *, train=False, key=None):
    del params, train, key
    out = jnp.sin(x_t) * expand(cond["label"][:, 0], x_t) + expand(cond["shift"] + 1e-3 * t, x_t)
    return jnp.concatenate([out, expand(cond["label"][:, 0], x_t) * jnp.ones_like(x_t)], axis=-1)


def build(cond):
    return denoiser(network, {}, SCHEDULE, parameterization.eps(), cond, learned_variance=True)


def test_guides_x0_and_keeps_the_conditional_variance():
    scale = 3.0
    d = guidance.classifier_free(build, COND, NULL, scale)(X, T)
    cond, uncond = build(COND)(X, T), build(NULL)(X, T)
    np.testing.assert_allclose(d.x0, uncond.x0 + scale * (cond.x0 - uncond.x0), rtol=2e-5, atol=1e-4)
    np.testing.assert_array_equal(d.variance_out, cond.variance_out)


def test_is_the_same_as_guiding_eps():
    x0 = guidance.classifier_free(build, COND, NULL, 3.0)(X, T).x0
    level = SCHEDULE.level(T)
    cond, uncond = (eps_from_x0(build(c)(X, T).x0, X, level) for c in (COND, NULL))
    np.testing.assert_allclose(eps_from_x0(x0, X, level), -2 * uncond + 3 * cond, atol=1e-4)


def test_scale_one_is_the_conditional_and_zero_the_unconditional():
    for scale, c in ((1.0, COND), (0.0, NULL)):
        x0 = guidance.classifier_free(build, COND, NULL, scale)(X, T).x0
        np.testing.assert_allclose(x0, build(c)(X, T).x0, rtol=1e-5, atol=1e-5)


def test_scale_per_example():
    scales = jnp.asarray([0.0, 1.0, 4.0])
    together = guidance.classifier_free(build, COND, NULL, scales)(X, T).x0
    for i, scale in enumerate(scales):
        np.testing.assert_array_equal(together[i], guidance.classifier_free(build, COND, NULL, scale)(X, T).x0[i])


def test_one_call_with_the_unconditional_half_first():
    seen = []

    def build_and_note(cond):
        def denoise(x, t):
            seen.append((x.shape[0], cond["label"][:, 0].tolist()))
            return build(cond)(x, t)

        return denoise

    guidance.classifier_free(build_and_note, COND, NULL, 2.0)(X, T)
    guidance.classifier_free(build_and_note, COND, NULL, None)(X, T)
    assert seen == [(6, [0.0, 0.0, 0.0, 1.0, 2.0, 3.0]), (3, [1.0, 2.0, 3.0])]


def test_scale_changes_without_compiling():
    times = jnp.asarray([900.0, 500.0, 100.0])

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(scale):
        return sample(ddim(SCHEDULE), guidance.classifier_free(build, COND, NULL, scale), KEY, X, times)

    assert not np.allclose(run(jnp.float32(1)), run(jnp.float32(5)))
    np.testing.assert_allclose(
        run(jnp.float32(1)), sample(ddim(SCHEDULE), build(COND), KEY, X, times), rtol=1e-4, atol=1e-4
    )


def test_interval_guides_only_inside():
    x0 = guidance.classifier_free(build, COND, NULL, 3.0, interval=(500.0, 800.0))(X, T).x0
    free, cond = guidance.classifier_free(build, COND, NULL, 3.0)(X, T).x0, build(COND)(X, T).x0
    np.testing.assert_array_equal(x0[1], free[1])
    np.testing.assert_allclose(x0[jnp.asarray([0, 2])], cond[jnp.asarray([0, 2])], rtol=1e-5, atol=1e-5)


def test_rescaling_restores_the_deviation():
    cond, wild = X, 5 * jnp.roll(X, 1, axis=0) + 1.0
    full = guidance.rescaled(wild, cond, 1.0)
    axes = (1, 2, 3)
    np.testing.assert_allclose(jnp.std(full, axes, ddof=1), jnp.std(cond, axes, ddof=1), rtol=1e-5)
    np.testing.assert_array_equal(guidance.rescaled(wild, cond, 0.0), wild)
    np.testing.assert_allclose(guidance.rescaled(wild, cond, 0.7), 0.7 * full + 0.3 * wild, rtol=1e-5, atol=1e-6)
    d = guidance.classifier_free(build, COND, NULL, 3.0, rescale=0.7)(X, T)
    plain = guidance.classifier_free(build, COND, NULL, 3.0)(X, T)
    np.testing.assert_allclose(d.x0, guidance.rescaled(plain.x0, build(COND)(X, T).x0, 0.7), rtol=1e-4, atol=1e-4)


def test_classifier_shifts_eps_by_sigma_times_the_gradient():
    def gradient(x, t):
        return jnp.cos(x) * expand(t, x) / 1000

    level = SCHEDULE.level(T)
    d = guidance.classifier(build(COND), SCHEDULE, gradient, 2.0)(X, T)
    before, after = (eps_from_x0(x0, X, level) for x0 in (build(COND)(X, T).x0, d.x0))
    np.testing.assert_allclose(before - after, 2 * expand(level.sigma, X) * gradient(X, T), atol=2e-5)
    np.testing.assert_array_equal(d.variance_out, build(COND)(X, T).variance_out)


def test_classifier_s_exact_gradient_gives_the_conditional_denoiser():
    """x0 ~ N(0, 1), y = x0 + 0.5 noise: with the exact gradient of log p(y | x_t), guidance is the posterior's x0."""
    y = 0.8

    def prior(x, t):
        level = SCHEDULE.level(t)
        return Denoised(expand(level.alpha, x) * x)

    def gradient(x, t):
        alpha, sigma = (expand(a, x) for a in SCHEDULE.level(t))
        return alpha * (y - alpha * x) / (sigma**2 + 0.25)

    x = jnp.linspace(-1.0, 1.0, 3)
    alpha, sigma = SCHEDULE.level(T)
    # precision-weighted mean of x0 from the prior, from x_t and from y
    precision = 1 + alpha**2 / sigma**2 + 4
    expected = (alpha * x / sigma**2 + 4 * y) / precision
    np.testing.assert_allclose(guidance.classifier(prior, SCHEDULE, gradient)(x, T).x0, expected, atol=1e-5)


def test_classifier_leaves_pure_noise_alone():
    flow = schedules.rectified_flow()
    guided = guidance.classifier(lambda x, t: Denoised(0 * x), flow, lambda x, t: jnp.ones_like(x))
    np.testing.assert_array_equal(guided(X, jnp.ones(3)).x0, jnp.zeros_like(X))


def test_class_gradient_is_that_of_the_log_probability():
    weights = jax.random.normal(jax.random.key(2), (32, 5))

    def logits(x, t):
        return x.reshape(x.shape[0], -1) @ weights + t[:, None] * 1e-3

    labels = jnp.asarray([4, 0, 2])
    probabilities = jax.nn.softmax(logits(X, T))
    expected = (jax.nn.one_hot(labels, 5) - probabilities) @ weights.T
    got = guidance.class_gradient(logits, labels)(X, T)
    np.testing.assert_allclose(got, expected.reshape(X.shape), atol=2e-5)


def test_refusals():
    with pytest.raises(ValueError, match='"lable" is only in null_cond.*did you mean "label"'):
        guidance.classifier_free(build, {"label": COND["label"]}, {"label": NULL["label"], "lable": NULL["label"]}, 2.0)
    with pytest.raises(
        ValueError, match=r'"shift" is only in cond, the other has \[\'label\'\]; give both the same names'
    ):
        guidance.classifier_free(build, COND, {"label": NULL["label"]}, 2.0)
    with pytest.raises(
        ValueError, match=r'"shift" is \(3,\) in cond and \(1,\) in null_cond; repeat the null condition'
    ):
        guidance.classifier_free(build, COND, NULL | {"shift": jnp.zeros(1)}, 2.0)
    with pytest.raises(ValueError, match=r"interval must be \(low, high\), got \(800.0, 500.0\); swap its ends"):
        guidance.classifier_free(build, COND, NULL, 2.0, interval=(800.0, 500.0))

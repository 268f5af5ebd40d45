import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import losses, process, schedules
from jaxdiff.types import Level

A = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4, 2)), jnp.float32)
B = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 4, 2)), jnp.float32)


@pytest.mark.parametrize(
    "distance, expected",
    [
        (losses.mse, lambda d: (d**2).mean()),
        (losses.l1, lambda d: np.abs(d).mean()),
        (losses.linf, lambda d: np.abs(d).max()),
        (losses.euclidean, lambda d: np.sqrt((d**2).sum())),
        (losses.pseudo_huber(0.3), lambda d: np.sqrt((d**2).sum() + 0.09) - 0.3),
        (losses.pseudo_huber(), lambda d: np.sqrt((d**2).sum() + 0.00054**2 * 32) - 0.00054 * 32**0.5),
    ],
)
def test_distances(distance, expected):
    d = np.asarray(A, np.float64) - np.asarray(B, np.float64)
    assert np.asarray(distance(A, B)) == pytest.approx([expected(row) for row in d], rel=1e-5)
    half = distance(A.astype(jnp.bfloat16), B.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32 and half.shape == (3,)
    assert (jax.grad(lambda a: distance(a, A).sum())(A) == 0).all() or distance in (losses.l1, losses.linf)
    with pytest.raises(AssertionError, match="shape"):
        distance(A, B[:, :1])


def test_resized_distances_see_smaller_images():
    """Halving a side without smoothing averages the four pixels around each new one, whose centre lies between them."""
    small = [a.reshape(3, 2, 2, 2, 2, 2).mean(axis=(2, 4)) for a in (A, B)]
    np.testing.assert_allclose(losses.resized(losses.mse, (2, 2))(A, B), losses.mse(*small), rtol=1e-5)
    row = jnp.arange(9.0).reshape(1, 1, 9, 1)
    third = jax.grad(lambda a: losses.resized(losses.mse, (1, 3))(a, jnp.zeros_like(a)).sum())(row)
    assert np.flatnonzero(third).tolist() == [1, 4, 7]  # with smoothing the neighbours would count too


def test_gaussian_kl_against_the_integral():
    x = np.linspace(-12, 12, 200_001)
    (m1, v1), (m2, v2) = (0.3, 0.5), (-0.4, 1.7)

    def log_density(m, v):
        return -0.5 * ((x - m) ** 2 / v + np.log(2 * np.pi * v))

    p = np.exp(log_density(m1, v1))
    integral = np.sum(p * (log_density(m1, v1) - log_density(m2, v2))) * (x[1] - x[0])
    kl = losses.gaussian_kl(*(jnp.float32(a).reshape(1) for a in (m1, math.log(v1), m2, math.log(v2))))
    assert float(kl[0]) == pytest.approx(integral, rel=1e-5)


@pytest.mark.parametrize("mean, std", [(0.1, 0.02), (-0.95, 0.1), (0.99, 0.3)])
def test_decoder_probabilities_add_up_to_one_and_follow_the_normal_distribution(mean, std):
    grey = jnp.asarray(np.arange(256) / 127.5 - 1, jnp.float32)
    nll = losses.discretized_gaussian_nll(grey, jnp.full(256, mean), jnp.full(256, math.log(std)))
    p = np.exp(-np.asarray(nll, np.float64))
    assert p.sum() == pytest.approx(1, abs=1e-4)
    edges = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 127.5 - 1, [np.inf]])
    cdf = np.array([0.5 * (1 + math.erf((e - mean) / std / 2**0.5)) for e in edges])
    assert p == pytest.approx(np.diff(cdf), abs=5e-4)  # the distribution function is approximated
    assert np.asarray(nll).max() <= -math.log(1e-12) + 1e-4


def test_vlb_term_is_a_divergence_or_a_likelihood_in_bits():
    tables = schedules.tables(schedules.linear_betas(50))
    t = jnp.array([0, 1, 30])
    x0 = jnp.round(jnp.clip(A, -1, 1) * 127.5) / 127.5
    level = Level(
        *(jnp.asarray(a, jnp.float32)[t] for a in (tables.sqrt_alphas_cumprod, tables.sqrt_one_minus_alphas_cumprod))
    )
    x_t = process.q_sample(x0, B, level)
    between = process.chain_bridge(tables, t)
    variance = process.fixed_small(between, x0)
    perfect = losses.vlb_term(x0, x_t, x0, between, variance, t == 0)
    assert np.asarray(perfect[1:]) == pytest.approx(0, abs=1e-6)
    log_std = 0.5 * tables.posterior_log_variance_clipped[0]
    nll = losses.discretized_gaussian_nll(x0[0], x0[0], jnp.full_like(x0[0], log_std)).mean() / math.log(2)
    assert float(perfect[0]) == pytest.approx(float(nll), rel=1e-4)
    # a mean that is off by d costs d^2 / (2 variance) nats
    off = losses.vlb_term(x0, x_t, x0 + 0.1, between, variance, t == 0)
    i = 30
    cost = (tables.posterior_mean_coef1[i] * 0.1) ** 2 / (2 * tables.posterior_variance[i]) / math.log(2)
    assert float(off[2]) == pytest.approx(cost, rel=1e-3)


def test_uncertainty_leaves_the_loss_alone_at_zero():
    loss = jnp.array([0.5, 2.0])
    assert (losses.with_log_variance(loss, jnp.zeros(2)) == loss).all()
    best = losses.with_log_variance(loss, jnp.log(loss))  # the minimum over the log-variance
    assert np.asarray(best) == pytest.approx(1 + np.log(np.asarray(loss)))


def test_refusals():
    with pytest.raises(ValueError, match="c must be positive, got 0"):
        losses.pseudo_huber(0.0)
    with pytest.raises(ValueError, match=r"size must be at least \(1, 1\), got \(0, 4\)"):
        losses.resized(losses.mse, (0, 4))
    with pytest.raises(ValueError, match=r"images are \[B, H, W, C\], got shape \(3, 4\)"):
        losses.resized(losses.mse, (2, 2))(A[:, 0, :, 0], B[:, 0, :, 0])


LOSSES = {"non_saturating": losses.non_saturating, "hinge": losses.hinge, "clamped": losses.clamped}


@pytest.mark.parametrize("name", LOSSES)
def test_an_adversarial_loss_pushes_logits_apart_and_the_generator_the_fake_one_up(name):
    loss, real, fake = LOSSES[name](), jnp.asarray([0.3, -0.2]), jnp.asarray([-0.1, 0.4])
    to_real, to_fake = jax.grad(lambda r, f: loss.discriminator(r, f).sum(), (0, 1))(real, fake)
    assert (to_real < 0).all() and (to_fake > 0).all()
    ignored, up = jax.grad(lambda r, f: loss.generator(r, f).sum(), (0, 1))(real, fake)
    assert (ignored == 0).all() and (up < 0).all()


def test_adversarial_losses_at_chance_and_at_extreme_logits():
    zero, far = jnp.zeros(1), jnp.asarray([80.0, -80.0])
    assert losses.non_saturating().discriminator(zero, zero)[0] == pytest.approx(2 * np.log(2), rel=1e-6)
    assert np.asarray(losses.non_saturating().generator(far, far)) == pytest.approx([0.0, 80.0], abs=1e-5)
    assert np.asarray(losses.relativistic().discriminator(far, far)) == pytest.approx([np.log(2)] * 2, rel=1e-6)
    assert np.asarray(losses.hinge().discriminator(far, -far)) == pytest.approx([0.0, 162.0])


def test_a_clamped_loss_has_no_gradient_past_its_margin():
    loss = losses.clamped(0.5)
    real, fake = jnp.asarray([0.6, 0.4]), jnp.asarray([-0.6, -0.4])
    to_real, to_fake = jax.grad(lambda r, f: loss.discriminator(r, f).sum(), (0, 1))(real, fake)
    assert (to_real[0], to_fake[0]) == (0, 0) and to_real[1] < 0 < to_fake[1]
    with pytest.raises(ValueError, match="margin must be at least 0, got -1"):
        losses.clamped(-1.0)


def test_r1_is_the_squared_gradient_and_its_approximation_has_that_mean():
    w = jax.random.normal(jax.random.key(0), (3, 4))
    x = jax.random.normal(jax.random.key(1), (5, 3, 4))

    def linear(x):
        return (w[None] * x).sum((1, 2))

    squared = float((w**2).sum())
    assert np.asarray(losses.r1(linear, x)) == pytest.approx(np.full(5, squared), rel=1e-5)
    many = jnp.zeros((20_000, 3, 4))
    noise = jax.random.normal(jax.random.key(2), many.shape)
    mean = float(losses.approximated_r1(linear, many, noise, 0.1).mean())
    assert mean == pytest.approx(0.01 * squared, rel=0.03)  # the mean of 20,000 chi-squares moves by 1 %
    estimate = losses.r1_or_estimate(linear, many, jax.random.key(2), 0.1)
    assert float(estimate.mean()) == pytest.approx(mean / 0.01, rel=1e-4)
    np.testing.assert_array_equal(losses.r1_or_estimate(linear, x, None, None), losses.r1(linear, x))
    with pytest.raises(ValueError, match="draws noise; give a key, or sigma=None"):
        losses.r1_or_estimate(linear, x, None, 0.1)


def test_r1_of_several_logits_is_the_mean_of_their_squared_gradients():
    w = jax.random.normal(jax.random.key(0), (3, 4))
    x = jax.random.normal(jax.random.key(1), (5, 3))

    def linear(x):
        return x @ w  # [B, 4]

    squared = float((w**2).sum(axis=0).mean())
    assert np.asarray(losses.r1(linear, x)) == pytest.approx(np.full(5, squared), rel=1e-5)
    many = jnp.zeros((40_000, 3))
    estimate = losses.r1_or_estimate(linear, many, jax.random.key(2), 0.1).mean()
    assert float(estimate) == pytest.approx(squared, rel=0.03)
    pixels = losses.r1(lambda x: linear(x).reshape(-1, 2, 2), x)
    np.testing.assert_allclose(pixels, losses.r1(linear, x), rtol=1e-6)
    one = losses.r1(lambda x: linear(x)[:, :1], x)
    np.testing.assert_array_equal(one, losses.r1(lambda x: linear(x)[:, 0], x))


@pytest.mark.parametrize("num", [1, 3])
def test_r1_couples_the_examples_that_the_logits_couple_and_has_a_gradient(num):
    x = jax.random.normal(jax.random.key(1), (4, 2))
    scale = jnp.arange(1.0, num + 1)

    def penalty(a):
        def logits(x):  # [B, num]: own square, and the mean square of the batch
            return a * scale[None] * (x**2 + (x**2).mean(axis=0, keepdims=True)).sum(axis=1, keepdims=True)

        return losses.r1(logits, x)

    expected = (4 * np.asarray(x)) ** 2  # of x^2 twice: once itself, once a quarter in each of four means
    of_scale = float((scale**2).mean())
    np.testing.assert_allclose(penalty(1.0), of_scale * expected.sum(axis=1), rtol=1e-5)
    slope = jax.grad(lambda a: penalty(a).sum())(jnp.float32(1))
    np.testing.assert_allclose(slope, 2 * of_scale * expected.sum(), rtol=1e-5)

"""Scalars per example: distances between two arrays, Gaussian likelihood terms of a chain, and adversarial terms.

Distances take [B, ...] and return [B], the mean over everything but the batch unless they say otherwise, at least in
float32. Likelihood terms are in nats and elementwise, except `vlb_term`, which is in bits per dimension. Adversarial
losses take logits, positive for "real", and are elementwise; penalties take the discriminator as a function of what it
judges. Weights are in `weighting`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxdiff.process import Bridge, Variance, posterior_mean
from jaxdiff.types import Key, expand

Distance = Callable[[Array, Array], Array]
Logits = Callable[[Array], Array]
SMALLEST_PROBABILITY = 1e-12


def mean_flat(x: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """Mean over all axes but the first, computed in float32 or better."""
    return _wide(x).reshape(x.shape[0], -1).mean(axis=1)


def mse(prediction: Float[Array, "b ..."], target: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """Mean squared difference."""
    chex.assert_equal_shape([prediction, target])
    return mean_flat(jnp.square(_wide(prediction) - _wide(target)))


def l1(prediction: Float[Array, "b ..."], target: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """Mean absolute difference."""
    chex.assert_equal_shape([prediction, target])
    return mean_flat(jnp.abs(_wide(prediction) - _wide(target)))


def linf(prediction: Float[Array, "b ..."], target: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """Largest absolute difference."""
    chex.assert_equal_shape([prediction, target])
    difference = jnp.abs(_wide(prediction) - _wide(target))
    return difference.reshape(difference.shape[0], -1).max(axis=1)


def euclidean(prediction: Float[Array, "b ..."], target: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """Euclidean norm of the difference of whole examples (not a mean). The gradient is 0 where they are equal."""
    squared = prediction.size // prediction.shape[0] * mse(prediction, target)
    equal = squared == 0
    return jnp.where(equal, squared, jnp.sqrt(jnp.where(equal, jnp.ones_like(squared), squared)))


def resized(distance: Distance, size: tuple[int, int]) -> Distance:
    """A distance between images [B, H, W, C] after bilinear resizing to `size`, height and width.

    Without smoothing when shrinking: as the consistency releases resize for their "l2-32" (32 x 32) and before LPIPS
    (224 x 224).

    Raises:
      ValueError: for a size below 1; while tracing, for arrays that are not images.
    """
    if min(size) < 1:
        raise ValueError(f"resized: size must be at least (1, 1), got {size}")

    def shrink(x):
        if x.ndim != 4:
            raise ValueError(f"resized: images are [B, H, W, C], got shape {x.shape}; use the distance itself")
        return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "bilinear", antialias=False)

    return lambda prediction, target: distance(shrink(prediction), shrink(target))


def pseudo_huber(c: float | None = None) -> Distance:
    """sqrt(|prediction - target|^2 + c^2) - c, with the Euclidean norm of the whole example (not a mean).

    Args:
      c: width of the quadratic part; None for 0.00054 sqrt(number of values of an example).

    Source: Song & Dhariwal 2023 (arXiv:2310.14189) eq. 7-8.
    """
    if c is not None and not c > 0:
        raise ValueError(f"pseudo_huber: c must be positive, got {c}; use l1 for no quadratic part")

    def distance(prediction, target):
        chex.assert_equal_shape([prediction, target])
        size = prediction.size // prediction.shape[0]
        width = 0.00054 * math.sqrt(size) if c is None else c
        squared = size * mse(prediction, target)
        return squared / (jnp.sqrt(squared + width**2) + width)  # the same, without cancellation near 0

    return distance


def with_log_variance(loss: Float[Array, " b"], log_variance: Float[Array, " b"]) -> Float[Array, " b"]:
    """loss / exp(log_variance) + log_variance: a loss scaled by its own uncertainty. Latent diffusion's `logvar`."""
    return loss / jnp.exp(log_variance) + log_variance


def gaussian_kl(
    mean: Float[Array, "*s"], log_variance: Float[Array, "*l"], other_mean: Float[Array, "*s"],
    other_log_variance: Float[Array, "*o"],
) -> Float[Array, "*s"]:  # fmt: skip
    """KL(N(mean, variance) || N(other_mean, other_variance)) of every element, in nats. Log-variances broadcast."""
    difference = log_variance - other_log_variance
    scaled = (mean - other_mean) ** 2 * jnp.exp(-other_log_variance)
    return 0.5 * (-1.0 - difference + jnp.exp(difference) + scaled)


def discretized_gaussian_nll(
    x: Float[Array, "*s"], mean: Float[Array, "*s"], log_std: Float[Array, "*l"]
) -> Float[Array, "*s"]:
    """-log of the probability that a Gaussian gives to each value's bin, in nats.

    Args:
      x: values in [-1, 1], multiples of 2/255 away from -1 (uint8 images rescaled). The first bin reaches to
        -infinity, the last to infinity.
      mean: of the Gaussian.
      log_std: logarithm of its standard deviation, broadcastable.

    The normal distribution function is the tanh approximation of the releases; the exact one changes bits/dim in the
    fourth decimal. As in the releases, probabilities are differences of two such functions, so in float32 little is
    left of one below 1e-7, and they are bounded below by 1e-12: a hopeless prediction has gradient 0.

    Source: Ho et al. 2020 (arXiv:2006.11239) eq. 13; the approximation is Improved DDPM's.
    """
    inverse_std = jnp.exp(-log_std)
    upper = _normal_cdf(inverse_std * (x - mean + 1 / 255))
    lower = _normal_cdf(inverse_std * (x - mean - 1 / 255))

    def log(p):
        return jnp.log(jnp.maximum(p, SMALLEST_PROBABILITY))

    return -jnp.where(x < -0.999, log(upper), jnp.where(x > 0.999, log(1.0 - lower), log(upper - lower)))


def vlb_term(
    x0: Float[Array, "b ..."],
    x_t: Float[Array, "b ..."],
    predicted_x0: Float[Array, "b ..."],
    between: Bridge,
    variance: Variance,
    to_data: Bool[Array, " b"],
) -> Float[Array, " b"]:
    """One term of the variational bound, in bits per dimension.

    Args:
      x0: [B, ...] clean data in [-1, 1].
      x_t: [B, ...] noisy data.
      predicted_x0: [B, ...] the model's clean data at x_t; its mean of x_s is the posterior's with this x0.
      between: posterior coefficients from t to s.
      variance: the model's variance of x_s.
      to_data: [B] whether s is the clean data: then the term is the decoder's negative log likelihood instead of the
        divergence KL(q(x_s | x_t, x0) || p(x_s | x_t)).

    Source: Ho et al. 2020 eq. 5; Nichol & Dhariwal 2021 (arXiv:2102.09672) for the variance.
    """
    mean = posterior_mean(predicted_x0, x_t, between)
    true_log_variance = expand(between.log_variance, x0)
    log_variance = jnp.broadcast_to(variance.log, x0.shape)
    divergence = gaussian_kl(posterior_mean(x0, x_t, between), true_log_variance, mean, log_variance)
    nll = discretized_gaussian_nll(x0, mean, 0.5 * log_variance)
    return jnp.where(to_data, mean_flat(nll), mean_flat(divergence)) / math.log(2.0)


class Adversarial(NamedTuple):
    """What the two players of a GAN minimise, elementwise on logits; positive means "real".

    Attributes:
      discriminator: (real, fake) -> losses in the shape of the logits.
      generator: (real, fake) -> the same. Only a relativistic loss looks at `real`.
    """

    discriminator: Callable[[Array, Array], Array]
    generator: Callable[[Array, Array], Array]


def non_saturating() -> Adversarial:
    """softplus(-real) + softplus(fake), and softplus(-fake). Source: Goodfellow et al. 2014 (arXiv:1406.2661)."""
    return Adversarial(
        lambda real, fake: jax.nn.softplus(-_wide(real)) + jax.nn.softplus(_wide(fake)),
        lambda real, fake: jax.nn.softplus(-_wide(fake)),
    )


def hinge() -> Adversarial:
    """relu(1 - real) + relu(1 + fake), and -fake. Source: Lim & Ye 2017 (arXiv:1705.02894)."""
    return Adversarial(
        lambda real, fake: jax.nn.relu(1 - _wide(real)) + jax.nn.relu(1 + _wide(fake)),
        lambda real, fake: -_wide(fake),
    )


def clamped(margin: float = 0.5) -> Adversarial:
    """`non_saturating` without a gradient where a logit is past the margin on its right side.

    Args:
      margin: >= 0; the discriminator's real logits are cut above it and its fake ones below its negative, the
        generator's above it.

    Source: the public code named after UFOGen; no paper.
    """
    if not margin >= 0:
        raise ValueError(f"clamped: margin must be at least 0, got {margin}")
    plain = non_saturating()
    return Adversarial(
        lambda real, fake: plain.discriminator(jnp.minimum(real, margin), jnp.maximum(fake, -margin)),
        lambda real, fake: plain.generator(real, jnp.minimum(fake, margin)),
    )


def relativistic() -> Adversarial:
    """softplus(fake - real) and softplus(real - fake), example by example. Source: Huang et al. 2025 (2501.05441)."""
    return Adversarial(
        lambda real, fake: jax.nn.softplus(_wide(fake) - _wide(real)),
        lambda real, fake: jax.nn.softplus(_wide(real) - _wide(fake)),
    )


def r1(logits: Logits, x: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """Squared gradient of the logit at each example, summed over everything but the batch; on fakes it is R2.

    The gradient is that of the logit's sum over the batch: it couples examples where the discriminator does (a
    statistic of the batch), as in the releases. The squared gradients of several logits an example are averaged, each
    at the price of a backward pass and its memory: prefer `approximated_r1` for more than a few. The usual loss is
    gamma / 2 times the mean. Needs the second derivative of the discriminator.

    Args:
      logits: x -> [B], or several logits an example, [B, ...].
      x: [B, ...], what is judged.

    Source: Mescheder et al. 2018 (arXiv:1801.04406) eq. 9, for one logit.
    """
    judged, backward = jax.vjp(lambda x: _wide(logits(x)).reshape(x.shape[0], -1), x)

    def squared(of: Array) -> Array:
        (gradient,) = backward(jnp.broadcast_to(of[None], judged.shape))
        return jnp.square(_wide(gradient)).reshape(x.shape[0], -1).sum(axis=1)

    each = jnp.eye(judged.shape[1], dtype=judged.dtype)
    return squared(each[0]) if len(each) == 1 else jax.vmap(squared)(each).mean(axis=0)


def approximated_r1(
    logits: Logits, x: Float[Array, "b ..."], noise: Float[Array, "b ..."], sigma: float
) -> Float[Array, " b"]:
    """(logits(x) - logits(x + sigma noise))^2, which needs first derivatives only; on fakes it is approximated R2.

    The squares of several logits an example are averaged. Over unit noise the mean is sigma^2 times `r1` to first
    order in sigma, unless the logit of one example depends on others.

    Args:
      logits: x -> [B], or several logits an example, [B, ...].
      x: [B, ...], what is judged.
      noise: unit normal, in the shape of x.
      sigma: > 0.

    Source: Lin et al. 2025 (arXiv:2501.08316) eq. 4.
    """
    return mse(logits(x), logits(x + jnp.asarray(sigma, x.dtype) * noise))


def r1_or_estimate(
    logits: Logits, x: Float[Array, "b ..."], key: Key | None, sigma: float | None
) -> Float[Array, " b"]:
    """`r1` where sigma is None, else `approximated_r1` over sigma^2 with noise drawn from key.

    Both are the squared gradient, averaged over the logits of an example, the latter to first order in sigma; so one
    weight serves both, whatever the number of logits.

    Raises:
      ValueError: for a sigma without a key.
    """
    if sigma is None:
        return r1(logits, x)
    if key is None:
        raise ValueError("an estimate of R1 draws noise; give a key, or sigma=None for the gradient itself")
    return approximated_r1(logits, x, jax.random.normal(key, x.shape, x.dtype), sigma) / sigma**2


def _normal_cdf(x):
    return 0.5 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _wide(x):
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x

"""Guidance, as functions that return a Denoiser: classifier-free (with interval and rescaling) and by a classifier.

Guidance acts on x0, uncond + scale * (cond - uncond). At one (x_t, t) this equals the same formula on eps or v, as
long as nothing clips in between; clip the result, not the two predictions. A scale of 1 is no guidance (papers that
write 1 + w mean w = scale - 1). `drop_labels` is what a method does in training to make the unconditional branch.
"""

import difflib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff.schedules import Schedule
from jaxdiff.types import Cond, Denoised, Denoiser, Key, expand

Gradient = Callable[[Array, Array], Array]
Scale = float | Float[Array, ""] | Float[Array, " b"]


def guided(uncond: Float[Array, "b ..."], cond: Float[Array, "b ..."], guidance_scale: Scale) -> Float[Array, "b ..."]:
    """uncond + scale (cond - uncond). guidance_scale: a scalar or [B].

    Source: Ho & Salimans 2022 (arXiv:2207.12598) eq. 6, with scale = 1 + w.
    """
    return uncond + _per_example(guidance_scale, cond) * (cond - uncond)


def rescaled(guided: Float[Array, "b ..."], cond: Float[Array, "b ..."], rescale: Scale = 0.7) -> Float[Array, "b ..."]:
    """Gives the guided prediction the standard deviation of the conditional one, by the share `rescale`.

    Deviations are over all axes but the batch, unbiased. Works on x0, eps or v.

    Source: Lin et al. 2023 (arXiv:2305.08891) eq. 15-16.
    """
    ratio = _std(cond) / _std(guided)
    share = _per_example(rescale, cond)
    return (share * expand(ratio, cond) + (1 - share)) * guided


def classifier_free(
    build_denoiser: Callable[[Cond], Denoiser],
    cond: Cond,
    null_cond: Cond,
    guidance_scale: Scale | None,
    *,
    interval: tuple[float, float] | None = None,
    rescale: float | Float[Array, ""] = 0.0,
) -> Denoiser:
    """Classifier-free guidance, one network call on a batch of 2 B, the unconditional half first.

    Args:
      build_denoiser: conditioning -> Denoiser, e.g. `lambda c: denoiser(network, params, schedule, eps(), c)`.
      cond: arrays [B, ...].
      null_cond: arrays of the same names and shapes, meaning "no condition".
      guidance_scale: a scalar or [B], may be traced; 1 is no guidance. None leaves the unconditional half out.
      interval: (low, high) times of the schedule; outside, the conditional prediction is used alone.
      rescale: share of `rescaled` to apply to x0; 0 applies none.

    Returns:
      A denoiser. Only x0 is guided; `variance_out` is the conditional one.

    Raises:
      ValueError: if the names or shapes of cond and null_cond differ, or the interval is empty.

    Source: Ho & Salimans 2022 (arXiv:2207.12598); Kynkaanniemi et al. 2024 (arXiv:2404.07724) for the interval.
    """
    if guidance_scale is None:
        return build_denoiser(cond)
    _require_alike(cond, null_cond)
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"classifier_free: interval must be (low, high), got {interval}; swap its ends")
    both = build_denoiser({name: jnp.concatenate([null_cond[name], cond[name]]) for name in cond})

    def denoise(x_t, t):
        d = both(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]))
        x0_uncond, x0_cond = jnp.split(d.x0, 2)
        scale = jnp.broadcast_to(jnp.asarray(guidance_scale, x_t.dtype), t.shape)
        if interval is not None:
            scale = jnp.where((t >= interval[0]) & (t <= interval[1]), scale, jnp.ones_like(scale))
        x0 = guided(x0_uncond, x0_cond, scale)
        if not (isinstance(rescale, float | int) and rescale == 0):
            x0 = rescaled(x0, x0_cond, rescale)
        return Denoised(x0, None if d.variance_out is None else jnp.split(d.variance_out, 2)[1])

    return denoise


def label_guided(
    build_denoiser: Callable[[Cond], Denoiser], cond: Cond, null_label: int | None, guidance_scale: Scale | None
) -> Denoiser:
    """`classifier_free` for class labels: the null condition is cond with every label replaced by null_label.

    Args:
      build_denoiser, guidance_scale: as for `classifier_free`.
      cond: arrays [B, ...], with "label" int [B] if there is guidance.
      null_label: label of "no class", or None if the model was trained without.

    Raises:
      ValueError: for a guidance_scale without a label and null_label.
    """
    if guidance_scale is None:
        return build_denoiser(cond)
    if null_label is None or "label" not in cond:
        raise ValueError(
            f"guidance_scale needs cond['label'] and a null_label, got cond {sorted(cond)}, null_label {null_label}; "
            "train with label_dropout, or leave guidance_scale out"
        )
    null_cond = cond | {"label": jnp.full_like(cond["label"], null_label)}
    return classifier_free(build_denoiser, cond, null_cond, guidance_scale)


def with_guidance(
    cond: Cond, guidance_scale: Scale | None, guidance_range: tuple[float, float], like: Float[Array, "b ..."]
) -> Cond:
    """cond with "guidance" [B], w = scale - 1, for a network that has learnt guidance as an input.

    Args:
      cond: arrays [B, ...].
      guidance_scale: a scalar or [B]; None for the lowest of the range.
      guidance_range: (low, high) of w in training.
      like: gives batch size and dtype.

    Source: Meng et al. 2023 (arXiv:2210.03142) section 3.1.
    """
    w = guidance_range[0] if guidance_scale is None else guidance_scale - 1
    return cond | {"guidance": jnp.broadcast_to(jnp.asarray(w, like.dtype), like.shape[:1])}


def drop_labels(key: Key, cond: Cond, share: float, null_label: int | None) -> Cond:
    """Replaces a random share of cond["label"] [B] by null_label: how a model learns to do without a condition.

    Source: Ho & Salimans 2022 algorithm 1.
    """
    if share == 0 or null_label is None or "label" not in cond:
        return cond
    dropped = jax.random.bernoulli(key, share, cond["label"].shape)
    return cond | {"label": jnp.where(dropped, null_label, cond["label"])}


def check_label_dropout(share: float, null_label: int | None) -> None:
    """Refuses a share that is no probability, or dropout without a label to drop to.

    Raises:
      ValueError: in either case.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"label_dropout is a probability in [0, 1], got {share}")
    if share and null_label is None:
        raise ValueError("label_dropout needs null_label, the index of 'no class' (often the number of classes)")


def classifier(denoise: Denoiser, schedule: Schedule, gradient: Gradient, guidance_scale: Scale = 1.0) -> Denoiser:
    """Classifier guidance for solvers without a variance: x0 + sigma^2 / alpha * scale * gradient, not clipped again.

    The same as eps - sigma * scale * gradient. For ancestral sampling prefer `solvers.ancestral`, which moves the mean.

    Args:
      denoise: the unguided denoiser.
      schedule: gives the level of t. Where alpha = 0, x_t says nothing about the class and x0 stays as it is.
      gradient: (x_t [B, ...], t [B]) -> gradient of log p(y | x_t) with respect to x_t.
      guidance_scale: a scalar or [B].

    Source: Dhariwal & Nichol 2021 (arXiv:2105.05233) algorithm 2.
    """

    def denoise_guided(x_t, t):
        d = denoise(x_t, t)
        alpha, sigma = (a.astype(x_t.dtype) for a in schedule.level(t))
        pure = alpha == 0
        push = jnp.where(pure, jnp.zeros_like(alpha), sigma**2 / jnp.where(pure, jnp.ones_like(alpha), alpha))
        return d._replace(x0=d.x0 + expand(push, x_t) * _per_example(guidance_scale, x_t) * gradient(x_t, t))

    return denoise_guided


def class_gradient(logits: Callable[[Array, Array], Array], labels: Int[Array, " b"]) -> Gradient:
    """The gradient of log p(label | x_t) of a classifier trained on noisy data.

    Args:
      logits: (x_t [B, ...], t [B]) -> [B, number of classes]; each row depends on its own example only.
      labels: [B], the classes wanted.
    """

    def log_prob(x_t, t):
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits(x_t, t)), labels[:, None], axis=1)
        return chosen.sum()

    return jax.grad(log_prob)


def _per_example(scale, like):
    return expand(jnp.broadcast_to(jnp.asarray(scale, like.dtype), like.shape[:1]), like)


def _std(x):
    return jnp.std(x.reshape(x.shape[0], -1), axis=1, ddof=1)


def _require_alike(cond, null_cond):
    for name in sorted(set(cond) ^ set(null_cond)):
        here, there = ("cond", null_cond) if name in cond else ("null_cond", cond)
        close = difflib.get_close_matches(name, there, 1)
        hint = f'did you mean "{close[0]}"?' if close else "give both the same names"
        raise ValueError(f'classifier_free: "{name}" is only in {here}, the other has {sorted(there)}; {hint}')
    for name in cond:
        if cond[name].shape != null_cond[name].shape:
            raise ValueError(
                f'classifier_free: "{name}" is {cond[name].shape} in cond and {null_cond[name].shape} in null_cond; '
                "repeat the null condition for every example"
            )

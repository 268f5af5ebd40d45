"""One attention function, softmax(q k^T / sqrt(d)) v for each head, in the form that is fast where it runs.

On GPU and TPU it is the library's function. On a CPU it is written out here, twice: `_plain`, left to JAX to
differentiate, and `_by_head`, which goes through the heads one by one, keeps no matrix of scores and has its own
backward pass. `forward_mode` and `portable` say, while tracing, what else a program is needed for. Masks, dropout of
weights and slices of one head's scores are not here.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# From this many scores on (16 MB in float32) they leave the caches, and one head at a time is faster.
MANY_SCORES = 2**22

# Part of the key of jit's caches, unlike a variable of Python: what was traced outside is not reused inside.
_FORWARD_MODE = jax.make_user_context(False)
_PORTABLE = jax.make_user_context(False)


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Inside, networks are traced in forms that `jax.jvp` and `jax.linearize` accept; reverse mode still works.

    Outside, large layers on a CPU have backward passes of their own, which forward mode refuses.
    """
    with _FORWARD_MODE(True):
        yield


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Inside, networks are traced into programs that `jax.export` can lower for CPU, GPU and TPU on any machine.

    Outside, they are traced for the default backend alone. Every mode of differentiation works inside.
    """
    with _PORTABLE(True):
        yield


def only_reverse_mode() -> bool:
    """Whether what is being traced may use backward passes that hold on a CPU and in reverse mode alone."""
    return jax.default_backend() == "cpu" and not (_FORWARD_MODE.value or _PORTABLE.value)


def attention(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"]
) -> Float[Array, "b n h d"]:
    """softmax(q k^T / sqrt(d)) v for each head, with the softmax in float32 or wider.

    On a CPU the products are in float32, too, and the division by the softmax sum comes after the product with v.

    Args:
      q: [B, N, H, D] queries.
      k: [B, M, H, D] keys.
      v: [B, M, H, D] values.

    Returns:
      [B, N, H, D] in the dtype of q.

    Source: Vaswani et al. 2017 (arXiv:1706.03762) eq. 1.
    """
    if _PORTABLE.value:
        return lax.platform_dependent(q, k, v, cpu=_plain, default=jax.nn.dot_product_attention)
    if jax.default_backend() != "cpu":
        return jax.nn.dot_product_attention(q, k, v)
    (b, n, h, _), m = q.shape, k.shape[1]
    if not only_reverse_mode() or b * h * n * m < MANY_SCORES:
        return _plain(q, k, v)
    work = _work_dtype(q)
    return _by_head(q.astype(work), k.astype(work), v.astype(work)).astype(q.dtype)


def _work_dtype(x: Array) -> Any:
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _plain(q: Array, k: Array, v: Array) -> Array:
    work = _work_dtype(q)
    # Batch and heads in front are one batch axis to the matrix products, and two to a mesh that splits both.
    q_bhnd, k_bhmd, v_bhmd = (a.astype(work).transpose(0, 2, 1, 3) for a in (q, k, v))
    logits = jnp.einsum("bhnd,bhmd->bhnm", q_bhnd * q.shape[-1] ** -0.5, k_bhmd)
    weights = jnp.exp(logits - lax.stop_gradient(logits.max(-1, keepdims=True)))
    out = jnp.einsum("bhnm,bhmd->bhnd", weights, v_bhmd) / weights.sum(-1, keepdims=True)
    return out.transpose(0, 2, 1, 3).astype(q.dtype)


def _heads_first(a: Array) -> Array:
    return a.transpose(2, 0, 1, 3)


def _heads_back(a: Array) -> Array:
    return a.transpose(1, 2, 0, 3)


@jax.custom_vjp
def _by_head(q: Array, k: Array, v: Array) -> Array:
    return _forward(q, k, v)[0]


def _forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    def head(qkv: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q_bnd, k_bmd, v_bmd = qkv
        logits = jnp.einsum("bnd,bmd->bnm", q_bnd, k_bmd)
        largest = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = weights.sum(-1, keepdims=True)
        return jnp.einsum("bnm,bmd->bnd", weights, v_bmd) / total, (largest + jnp.log(total))[..., 0]

    # The loop runs over heads and leaves the batch an axis of its own, so that a mesh can split it.
    out, log_total = lax.map(head, (_heads_first(q * q.shape[-1] ** -0.5), _heads_first(k), _heads_first(v)))
    return _heads_back(out), (q, k, v, out, log_total)


def _backward(residuals: tuple[Array, ...], out_bar: Array) -> tuple[Array, Array, Array]:
    """With P the weights, dP = dO V^T and delta = rowsum(dO O): dS = P (dP - delta), and each gradient is a product.

    Scores are computed as [M, N], for which the products of dK and dV are ordinary ones; the product of dQ contracts
    the first axis of dS, a slow kernel, unless K comes transposed and dQ leaves transposed. Both are transposed
    outside the loop, because inside it XLA folds the transposition back into the product.

    Source: Dao et al. 2022 (arXiv:2205.14135) appendix B.2.
    """
    q, k, v, out, log_total = residuals
    scale = q.shape[-1] ** -0.5
    delta = jnp.einsum("bnhd,hbnd->hbn", out_bar, out)

    def head(operands: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        q_bnd, k_bmd, k_bdm, v_bmd, out_bar_bnd, log_total_bn, delta_bn = operands
        weights = jnp.exp(jnp.einsum("bmd,bnd->bmn", k_bmd, q_bnd) - log_total_bn[:, None])
        logits_bar = weights * (jnp.einsum("bmd,bnd->bmn", v_bmd, out_bar_bnd) - delta_bn[:, None])
        q_bar = jnp.einsum("bdm,bmn->bdn", k_bdm, logits_bar)
        return q_bar, jnp.einsum("bmn,bnd->bmd", logits_bar, q_bnd), jnp.einsum("bmn,bnd->bmd", weights, out_bar_bnd)

    operands = (*(_heads_first(a) for a in (q * scale, k)), k.transpose(2, 0, 3, 1))
    operands = (*operands, _heads_first(v), _heads_first(out_bar), log_total, delta)
    q_bar, k_bar, v_bar = lax.map(head, operands)
    return q_bar.transpose(1, 3, 0, 2) * scale, _heads_back(k_bar), _heads_back(v_bar)


_by_head.defvjp(_forward, _backward)

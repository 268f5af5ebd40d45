"""One attention function, softmax(q k^T / sqrt(d)) v for each head, in the form that is fast where it runs.

On GPU and TPU it is the library's function. On a CPU it is written out here, twice: `_plain`, left to JAX to
differentiate, and `_by_head`, which goes through the heads one by one and through a head's queries in slices that stay
in the caches, keeps no matrix of scores and has its own backward pass. Where the scores of a single head are too many
for a memory (images of high resolution), every device goes through the queries in slices. `forward_mode` and
`portable` say, while tracing, what else a program is needed for. Masks other than the causal one and dropout of
weights are not here.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# From this many scores on (16 MB in float32) they leave the caches, and one head at a time is faster.
MANY_SCORES = 2**22
# Scores of a slice on a CPU, 4 MB in float32: of 64 to 512 queries with 4096 keys, 256 were the fastest.
SLICE_SCORES = 2**20
# Fewer queries make thin matrix products.
FEWEST_QUERIES = 64

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


def only_cpu() -> bool:
    """Whether what is being traced may use forms that are fast on a CPU and perhaps slow elsewhere."""
    return jax.default_backend() == "cpu" and not _PORTABLE.value


def only_reverse_mode() -> bool:
    """Whether what is being traced may use backward passes that hold on a CPU and in reverse mode alone."""
    return only_cpu() and not _FORWARD_MODE.value


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    *,
    causal: bool = False,
    max_scores: int = 2**26,
) -> Float[Array, "b n h d"]:
    """softmax(q k^T / sqrt(d)) v for each head, with the softmax in float32 or wider.

    On a CPU the products are in float32, too, and the division by the softmax sum comes after the product with v.

    Args:
      q: [B, N, H, D] queries.
      k: [B, M, H, D] keys.
      v: [B, M, H, D] values.
      causal: query i sees the keys 0 to i alone.
      max_scores: the most scores of one head and one example that exist at a time. Where N M is more, the queries are
        taken in slices, one after the other, and again in the backward pass. The default, 256 MB in float32, is passed
        by more than 8192 tokens: at one resolution above the 64 x 64 of Stable Diffusion.

    Returns:
      [B, N, H, D] in the dtype of q.

    Raises:
      ValueError: max_scores is below 1.

    Source: Vaswani et al. 2017 (arXiv:1706.03762) eq. 1; Rabe and Staats 2021 (arXiv:2112.05682) for the slices.
    """
    if max_scores < 1:
        raise ValueError(f"max_scores must be at least 1, got {max_scores}")
    (b, n, h, _), m = q.shape, k.shape[1]
    if only_reverse_mode() and b * h * n * m >= MANY_SCORES:
        rows = max(FEWEST_QUERIES, SLICE_SCORES // (b * m))
        work = _work_dtype(q)
        parts = (a.astype(work) for a in (q, k, v))
        return _by_head(*parts, causal, min(rows, max(1, max_scores // m))).astype(q.dtype)
    form = _whole if n * m <= max_scores else functools.partial(_in_slices, rows=max(1, max_scores // m))
    return form(q, k, v, causal)


def _whole(q: Array, k: Array, v: Array, causal: bool, first: Array | int = 0) -> Array:
    """Attention of the queries whose positions begin at `first`, in one piece."""
    # The library's mask is [B, H, N, M].
    mask = _seen(q.shape[1], k.shape[1], first)[None, None] if causal else None
    if _PORTABLE.value:
        return lax.platform_dependent(
            q, k, v, cpu=lambda q, k, v: _plain(q, k, v, mask), default=lambda q, k, v: _library(q, k, v, mask)
        )
    return (_plain if jax.default_backend() == "cpu" else _library)(q, k, v, mask)


def _library(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def _in_slices(q: Array, k: Array, v: Array, causal: bool, rows: int) -> Array:
    slices = _split(q, rows, 1)
    firsts = jnp.arange(slices.shape[1]) * slices.shape[2]
    # Without checkpoint the backward pass would keep the scores of all slices.
    part = jax.checkpoint(lambda q, first: _whole(q, k, v, causal, first))
    out = lax.map(lambda operands: part(*operands), (slices.swapaxes(0, 1), firsts))
    return _joined(out.swapaxes(0, 1), q.shape[1], 1)


def _seen(rows: int, m: int, first: Array | int) -> Array:
    """[rows, M]: whether the query at position first + i sees the key at j."""
    return jnp.arange(rows)[:, None] + first >= jnp.arange(m)[None, :]


def _split(a: Array, rows: int, axis: int) -> Array:
    """An axis [N] as [parts, length], length at most `rows`; zeros fill the last part."""
    n = a.shape[axis]
    parts = -(-n // min(rows, n))
    length = -(-n // parts)
    pad = [(0, 0)] * a.ndim
    pad[axis] = (0, parts * length - n)
    return jnp.pad(a, pad).reshape(*a.shape[:axis], parts, length, *a.shape[axis + 1 :])


def _joined(a: Array, n: int, axis: int) -> Array:
    """Undoes `_split`."""
    whole = a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :])
    return lax.slice_in_dim(whole, 0, n, axis=axis)


def _work_dtype(x: Array) -> Any:
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _plain(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    work = _work_dtype(q)
    # Batch and heads in front are one batch axis to the matrix products, and two to a mesh that splits both.
    q_bhnd, k_bhmd, v_bhmd = (a.astype(work).transpose(0, 2, 1, 3) for a in (q, k, v))
    logits = jnp.einsum("bhnd,bhmd->bhnm", q_bhnd * q.shape[-1] ** -0.5, k_bhmd)
    logits = logits if mask is None else jnp.where(mask, logits, -jnp.inf)
    weights = jnp.exp(logits - lax.stop_gradient(logits.max(-1, keepdims=True)))
    out = jnp.einsum("bhnm,bhmd->bhnd", weights, v_bhmd) / weights.sum(-1, keepdims=True)
    return out.transpose(0, 2, 1, 3).astype(q.dtype)


def _heads_first(a: Array) -> Array:
    return a.transpose(2, 0, 1, 3)


def _heads_back(a: Array) -> Array:
    return a.transpose(1, 2, 0, 3)


def _query_slices(a: Array, rows: int) -> Array:
    """[B, N, H, D] to [H, parts, B, length, D]: the order in which the loops go."""
    return _split(a, rows, 1).transpose(3, 1, 0, 2, 4)


def _queries_back(a: Array, n: int) -> Array:
    """Undoes `_query_slices`."""
    return _joined(a.transpose(2, 1, 3, 0, 4), n, 1)


_with_static: Any = functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))


@_with_static
def _by_head(q: Array, k: Array, v: Array, causal: bool, rows: int) -> Array:
    return _forward(q, k, v, causal, rows)[0]


def _forward(q: Array, k: Array, v: Array, causal: bool, rows: int) -> tuple[Array, tuple[Array, ...]]:
    slices = _query_slices(q * q.shape[-1] ** -0.5, rows)
    firsts = jnp.arange(slices.shape[1]) * slices.shape[3]

    def head(operands: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q_pbrd, k_bmd, v_bmd = operands

        def part(operands: tuple[Array, Array]) -> tuple[Array, Array]:
            q_brd, first = operands
            logits = jnp.einsum("brd,bmd->brm", q_brd, k_bmd)
            if causal:
                logits = jnp.where(_seen(logits.shape[1], logits.shape[2], first)[None], logits, -jnp.inf)
            largest = logits.max(-1, keepdims=True)
            weights = jnp.exp(logits - largest)
            total = weights.sum(-1, keepdims=True)
            return jnp.einsum("brm,bmd->brd", weights, v_bmd) / total, largest + jnp.log(total)

        return lax.map(part, (q_pbrd, firsts))

    # The loops run over heads and slices and leave the batch an axis of its own, so that a mesh can split it.
    out, log_total = lax.map(head, (slices, _heads_first(k), _heads_first(v)))
    out = _queries_back(out, q.shape[1])
    return out, (q, k, v, out, log_total)


def _backward(causal: bool, rows: int, residuals: tuple[Array, ...], out_bar: Array) -> tuple[Array, Array, Array]:
    """With P the weights, dP = dO V^T and delta = rowsum(dO O): dS = P (dP - delta), and each gradient is a product.

    Scores are computed as [M, N], for which the products of dK and dV are ordinary ones; the product of dQ contracts
    the first axis of dS, a slow kernel, unless K comes transposed and dQ leaves transposed. Both are transposed
    outside the loop, because inside it XLA folds the transposition back into the product.

    Source: Dao et al. 2022 (arXiv:2205.14135) appendix B.2.
    """
    q, k, v, out, log_total = residuals
    scale = q.shape[-1] ** -0.5
    delta = jnp.einsum("bnhd,bnhd->bnh", out_bar, out)[..., None]
    queries = tuple(_query_slices(a, rows) for a in (q * scale, out_bar, delta))
    firsts = jnp.arange(queries[0].shape[1]) * queries[0].shape[3]

    def head(operands: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        *queries_pbr, k_bmd, k_bdm, v_bmd = operands

        def part(sums: tuple[Array, Array], operands: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            q_brd, out_bar_brd, delta_br1, log_total_br1, first = operands
            logits = jnp.einsum("bmd,brd->bmr", k_bmd, q_brd)
            if causal:
                logits = jnp.where(_seen(logits.shape[2], logits.shape[1], first).T[None], logits, -jnp.inf)
            weights = jnp.exp(logits - log_total_br1.swapaxes(1, 2))
            weights_bar = jnp.einsum("bmd,brd->bmr", v_bmd, out_bar_brd)
            logits_bar = weights * (weights_bar - delta_br1.swapaxes(1, 2))
            k_bar = sums[0] + jnp.einsum("bmr,brd->bmd", logits_bar, q_brd)
            v_bar = sums[1] + jnp.einsum("bmr,brd->bmd", weights, out_bar_brd)
            return (k_bar, v_bar), jnp.einsum("bdm,bmr->bdr", k_bdm, logits_bar)

        return lax.scan(part, (jnp.zeros_like(k_bmd), jnp.zeros_like(v_bmd)), (*queries_pbr, firsts))

    keys = (_heads_first(k), k.transpose(2, 0, 3, 1), _heads_first(v))
    (k_bar, v_bar), q_bar = lax.map(head, (*queries, log_total, *keys))
    q_bar = _queries_back(q_bar.swapaxes(3, 4), q.shape[1]) * scale
    return q_bar, _heads_back(k_bar), _heads_back(v_bar)


_by_head.defvjp(_forward, _backward)

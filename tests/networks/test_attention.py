"""Attention against the softmax formula and against the plain form that JAX differentiates by itself."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxdiff.networks import attention as attention_module
from jaxdiff.networks.attention import attention, forward_mode, portable

# b, n, m, h, d: self-attention, a context of another length, one token, the head widths of Stable Diffusion
SHAPES = [(2, 6, 6, 3, 8), (1, 5, 9, 2, 40), (2, 4, 1, 1, 64), (1, 3, 7, 2, 160)]


@pytest.fixture
def by_head(monkeypatch):
    """Sends small attentions down the path of large ones."""
    monkeypatch.setattr(attention_module, "MANY_SCORES", 0)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def qkv(b, n, m, h, d, dtype=jnp.float32):
    return tuple(jnp.asarray(normal(seed, b, size, h, d), dtype) for seed, size in enumerate((n, m, m)))


def is_by_head(*operands):
    # A new function each time: what is traced depends on the threshold, which the cache of traces does not know.
    return "custom_vjp" in str(jax.make_jaxpr(lambda *a: attention(*a))(*operands))


def softmax_attention(q, k, v):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    logits = np.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), v)


def close(ours, theirs, atol):
    def compare(a, b):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), atol=atol)

    jax.tree.map(compare, ours, theirs)


@pytest.mark.parametrize("scale", [1.0, 50.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_small_attention_is_the_formula(shape, scale):
    q, k, v = (scale * a for a in qkv(*shape))
    np.testing.assert_allclose(attention(q, k, v), softmax_attention(q, k, v), atol=2e-6 * scale**2)
    assert not is_by_head(q, k, v)


def test_small_attention_has_the_gradient_of_the_librarys():
    q, k, v = qkv(2, 5, 5, 3, 4)
    weight = jnp.asarray(normal(3, *q.shape))
    ours, theirs = (
        jax.grad(lambda *a, f=f: jnp.sum(weight * f(*a)), argnums=(0, 1, 2))(q, k, v)
        for f in (attention, jax.nn.dot_product_attention)
    )
    close(ours, theirs, atol=3e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_head_by_head_is_the_formula_and_has_the_gradient_of_the_plain_form(by_head, shape):
    operands = qkv(*shape)
    out, vjp = jax.vjp(attention, *operands)
    plain, plain_vjp = jax.vjp(attention_module._plain, *operands)
    np.testing.assert_allclose(out, softmax_attention(*operands), atol=3e-6)
    out_bar = jnp.asarray(normal(3, *out.shape))
    close((out, vjp(out_bar)), (plain, plain_vjp(out_bar)), atol=5e-6)
    assert is_by_head(*operands)


@pytest.mark.parametrize("threshold", [0, 2**22])
def test_bfloat16_computes_in_float32(monkeypatch, threshold):
    monkeypatch.setattr(attention_module, "MANY_SCORES", threshold)
    operands = qkv(1, 6, 7, 2, 8, jnp.bfloat16)
    out, vjp = jax.vjp(attention, *operands)
    plain, plain_vjp = jax.vjp(attention_module._plain, *operands)
    grads = vjp(jnp.ones_like(out))
    assert {a.dtype for a in (out, *grads)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(out.astype(jnp.float32), softmax_attention(*operands), atol=1e-2)
    close((out, grads), (plain, plain_vjp(jnp.ones_like(plain))), atol=1e-2)


def test_head_by_head_in_float64_keeps_its_digits(by_head):
    with jax.enable_x64(True):
        operands = qkv(1, 5, 6, 2, 8, jnp.float64)
        out, vjp = jax.vjp(attention, *operands)
        plain, plain_vjp = jax.vjp(attention_module._plain, *operands)
        close((out, vjp(jnp.cos(out))), (plain, plain_vjp(jnp.cos(plain))), atol=1e-13)


@pytest.mark.parametrize("threshold", [0, 2**22])
def test_logits_may_overflow_the_exponential(monkeypatch, threshold):
    monkeypatch.setattr(attention_module, "MANY_SCORES", threshold)
    q = jnp.full((1, 2, 1, 4), 1e3)
    k, v = jnp.stack([q[:, 0], -q[:, 0]], axis=1), jnp.asarray(normal(0, 1, 2, 1, 4))
    np.testing.assert_allclose(attention(q, k, v), np.broadcast_to(v[:, :1], q.shape), atol=1e-6)
    assert all(np.isfinite(g).all() for g in jax.grad(lambda *a: attention(*a).sum(), argnums=(0, 1, 2))(q, k, v))


def test_gradient_of_a_gradient_norm_is_that_of_the_plain_form(by_head):
    def penalty(form):
        def slope(*a):
            return sum(jnp.sum(g**2) for g in jax.grad(lambda *a: jnp.sum(form(*a) ** 2), argnums=(0, 1, 2))(*a))

        return jax.jit(jax.grad(slope, argnums=(0, 1, 2)))

    with jax.enable_x64(True):
        operands = qkv(1, 4, 5, 2, 3, jnp.float64)
        close(penalty(attention)(*operands), penalty(attention_module._plain)(*operands), atol=1e-12)


def test_examples_can_be_mapped(by_head):
    operands = qkv(3, 4, 5, 2, 3)
    one_by_one = jax.vmap(lambda q, k, v: attention(q[None], k[None], v[None])[0])(*operands)
    np.testing.assert_allclose(one_by_one, attention(*operands), atol=2e-6)


def test_forward_mode_needs_its_context_and_is_right_inside(by_head):
    operands = qkv(1, 4, 5, 2, 3)
    tangents = tuple(jnp.asarray(normal(seed + 5, *a.shape)) for seed, a in enumerate(operands))
    # Traced for reverse mode first: the context must not find that trace in the cache.
    compiled = jax.jit(lambda *a: attention(*a))
    compiled(*operands)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(attention, operands, tangents)
    with forward_mode():
        out, slope = jax.jvp(compiled, operands, tangents)
    np.testing.assert_allclose(out, attention(*operands), atol=2e-6)
    step = 1e-2
    ends = [softmax_attention(*(a + s * t for a, t in zip(operands, tangents, strict=True))) for s in (step, -step)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), atol=1e-3)


def test_portable_form_is_the_same_function(by_head):
    operands = qkv(2, 4, 6, 2, 8)
    with portable():
        out, vjp = jax.vjp(attention, *operands)
        _, slope = jax.jvp(attention, operands, operands)
    direct, direct_vjp = jax.vjp(attention, *operands)
    close((out, vjp(jnp.cos(out))), (direct, direct_vjp(jnp.cos(direct))), atol=5e-6)
    assert np.isfinite(slope).all()


def test_a_batch_over_two_devices_needs_no_collective(by_head):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split = NamedSharding(mesh, PartitionSpec("data"))
    operands = qkv(4, 6, 7, 2, 8)

    def forward_and_back(q, k, v):
        out, vjp = jax.vjp(attention, q, k, v)
        return out, vjp(jnp.cos(out))

    program = jax.jit(forward_and_back, in_shardings=split).lower(*operands).compile()
    # Operations, not the names of this file's functions, which the text holds as well.
    assert re.findall(r"(all-\w+|collective-\w+|reduce-scatter)\S*\(", program.as_text()) == []
    on_two = program(*jax.device_put(operands, split))
    close(on_two, forward_and_back(*operands), atol=5e-6)


def value_and_vjp(form, operands):
    @jax.jit
    def run(*operands):
        out, vjp = jax.vjp(form, *operands)
        return out, vjp(jnp.cos(out))

    return run(*operands)


def causal_attention(q, k, v):
    """Each query with the keys it sees, one by one."""
    rows = [softmax_attention(q[:, i : i + 1], k[:, : i + 1], v[:, : i + 1]) for i in range(q.shape[1])]
    return np.concatenate(rows, axis=1)


@pytest.mark.parametrize("rows", [None, 3])
def test_causal_attention_is_that_of_the_keys_before(monkeypatch, rows):
    if rows:  # by head, in slices of as many queries, with a last one that is not full
        monkeypatch.setattr(attention_module, "MANY_SCORES", 0)
        monkeypatch.setattr(attention_module, "FEWEST_QUERIES", rows)
        monkeypatch.setattr(attention_module, "SLICE_SCORES", 1)
    operands = qkv(2, 5, 5, 3, 4)
    ours = value_and_vjp(lambda *a: attention(*a, causal=True), operands)
    seen = jnp.tril(jnp.ones((5, 5), bool))[None, None]
    np.testing.assert_allclose(ours[0], causal_attention(*operands), atol=2e-6)
    close(ours, value_and_vjp(lambda *a: attention_module._plain(*a, seen), operands), atol=5e-6)
    assert is_by_head(*operands) == bool(rows)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("context", [forward_mode, portable, contextlib.nullcontext])
def test_slices_of_the_queries_change_nothing(monkeypatch, context, causal):
    monkeypatch.setattr(attention_module, "MANY_SCORES", 0)
    operands = qkv(2, 7, 7, 2, 4)
    with context():
        sliced = value_and_vjp(lambda *a: attention(*a, causal=causal, max_scores=3 * 7), operands)
    close(sliced, value_and_vjp(lambda *a: attention(*a, causal=causal), operands), atol=5e-6)


@pytest.mark.parametrize("context", [forward_mode, contextlib.nullcontext])
def test_slices_of_the_queries_take_less_memory(context):
    shape = jax.ShapeDtypeStruct((1, 1024, 1, 8), jnp.float32)

    def megabytes(rows, differentiate):
        def run(q, k, v):
            out, vjp = jax.vjp(lambda *a: attention(*a, max_scores=rows * 1024), q, k, v)
            return vjp(out) if differentiate else out

        with context():
            program = jax.jit(run).lower(shape, shape, shape).compile()
        return program.memory_analysis().temp_size_in_bytes / 2**20

    # All scores are 4 MB, those of 64 queries 0.25 MB.
    assert megabytes(1024, differentiate=False) > 4 > 4 * megabytes(64, differentiate=False)
    assert megabytes(1024, differentiate=True) > 4 > 2 * megabytes(64, differentiate=True)


def test_a_limit_that_no_score_keeps_is_refused():
    with pytest.raises(ValueError, match="max_scores must be at least 1, got 0"):
        attention(*qkv(1, 2, 2, 1, 1), max_scores=0)

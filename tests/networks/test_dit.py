"""DiT: published sizes, positions, patches, the scanned form, second derivatives, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.networks import attention
from jaxdiff.networks.base import as_network, init_params, num_params, param_shapes
from jaxdiff.networks.dit import DiT, dit_preset, example_inputs, grid_positions

TINY = DiT(in_channels=2, out_channels=3, input_size=8, width=8, depth=2, num_heads=2, num_classes=3)
MILLIONS = {"XL/2": 675, "L/2": 458, "B/4": 130, "S/8": 33}


@functools.cache
def active_params(dit):
    """Parameters none of which is zero: what training makes of the zero-initialised layers."""
    generator = np.random.default_rng(0)
    params = init_params(dit, jax.random.key(0), *example_inputs(dit))
    return jax.tree.map(lambda a: a + 0.1 * generator.standard_normal(a.shape, np.float32), params)


def inputs(height=4, width=8):
    x_t = jax.random.normal(jax.random.key(1), (2, height, width, 2))
    return x_t, jnp.asarray([3.0, 700.0]), {"label": jnp.asarray([0, 3], jnp.int32)}


def stacked(params):
    """The parameters as the scanned form keeps them."""
    blocks = [params[f"block_{i}"] for i in range(TINY.depth)]
    rest = {name: tree for name, tree in params.items() if not name.startswith("block_")}
    return rest | {"blocks": jax.tree.map(lambda *a: jnp.stack(a), *blocks)}


@pytest.mark.parametrize("name", MILLIONS)
@pytest.mark.parametrize("scan", [False, True])
def test_parameter_count_is_the_published_one(name, scan):
    dit = dit_preset(name).clone(scan=scan)
    positions = grid_positions(dit.input_size // dit.patch_size, dit.input_size // dit.patch_size, dit.width)
    assert round((num_params(param_shapes(dit, *example_inputs(dit))) + positions.size) / 1e6) == MILLIONS[name]


def test_the_untrained_network_answers_zero():
    params = init_params(TINY, jax.random.key(0), *example_inputs(TINY))
    np.testing.assert_array_equal(jax.jit(as_network(TINY))(params, *inputs()), np.zeros((2, 4, 8, 3)))


def test_positions_are_sines_and_cosines_of_column_and_row():
    table = grid_positions(3, 5, 8).reshape(3, 5, 8)
    frequencies = np.asarray([1.0, 0.01])
    row, column = 2, 4
    expected = [f(index * frequencies) for index in (column, row) for f in (np.sin, np.cos)]
    np.testing.assert_allclose(table[row, column], np.concatenate(expected), atol=1e-6)


def test_without_blocks_at_work_a_patch_sees_itself_alone():
    params = dict(init_params(TINY, jax.random.key(0), *example_inputs(TINY)))
    params["out"] = active_params(TINY)["out"]
    x_t, t, cond = inputs()
    influence = jax.jit(jax.grad(lambda x: as_network(TINY)(params, x, t, cond)[0, 2:4, 4:6].sum()))(x_t)
    outside = influence.at[0, 2:4, 4:6].set(0.0)
    assert np.abs(influence[0, 2:4, 4:6]).min() > 0
    np.testing.assert_array_equal(outside, 0.0)


def test_every_token_sees_the_others_time_and_label():
    params, (x_t, t, cond) = active_params(TINY), inputs()
    run = jax.jit(as_network(TINY))
    out = run(params, x_t, t, cond)
    for changed in (
        (x_t.at[:, 0, 0].add(1.0), t, cond),
        (x_t, t + 1.0, cond),
        (x_t, t, {"label": jnp.asarray([1, 1], jnp.int32)}),
    ):
        assert np.abs(run(params, *changed) - out)[:, -1, -1].min() > 0


@pytest.mark.parametrize("remat", [False, True])
def test_the_scanned_form_is_the_same_function(remat):
    params, arguments = active_params(TINY), inputs()

    def run(dit, params):
        def loss(params):
            out, features = dit.apply({"params": params}, *arguments, return_features=True)
            return jnp.mean(out**2), (out, features)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (_, (out, features)), gradient = run(TINY, params)
    (_, (scanned, seen)), scanned_gradient = run(TINY.clone(scan=True, remat=remat), stacked(params))
    np.testing.assert_allclose(scanned, out, atol=1e-6)
    assert seen.keys() == features.keys()
    for name, feature in features.items():
        np.testing.assert_allclose(seen[name], feature, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), scanned_gradient, stacked(gradient))


def test_the_scanned_form_starts_by_the_same_rules():
    dit = TINY.clone(scan=True)
    params = init_params(dit, jax.random.key(0), *example_inputs(dit))
    kernel = params["blocks"]["mlp_in"]["kernel"]
    assert kernel.shape == (2, 8, 32)
    assert 0.9 < np.abs(kernel).max() / np.sqrt(6 / 40) <= 1
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1
    np.testing.assert_array_equal(params["blocks"]["modulation"]["kernel"], 0.0)


def test_second_derivatives_through_attention_with_its_own_backward_pass(monkeypatch):
    dit, (x_t, t, cond) = TINY.clone(depth=1), inputs()

    def penalty(params):
        slope = jax.grad(lambda x: dit.apply({"params": params}, x, t, cond).sum())(x_t)
        return jnp.square(slope).sum()

    plain = jax.jit(jax.grad(penalty))(active_params(dit))
    monkeypatch.setattr(attention, "MANY_SCORES", 1)
    by_head = jax.jit(jax.grad(lambda params: penalty(params)))(active_params(dit))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), by_head, plain)


def test_bfloat16_blocks_end_in_float32():
    params, arguments = active_params(TINY), inputs()
    out = jax.jit(as_network(TINY))(params, *arguments)
    half = jax.jit(as_network(TINY.clone(dtype=jnp.bfloat16)))(params, *arguments)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, out, atol=0.05 * np.abs(out).max())


def test_a_network_without_classes_takes_no_label():
    dit = TINY.clone(num_classes=None, null_label=False)
    x_t, t, _ = inputs()
    assert jax.eval_shape(as_network(dit), active_params(dit), x_t, t, {}).shape == (2, 4, 8, 3)


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_outside_the_table_shows(label):
    x_t, t, _ = inputs()
    out = jax.jit(as_network(TINY))(active_params(TINY), x_t, t, {"label": jnp.asarray([0, label], jnp.int32)})
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: dit_preset("XL2"), "there is no DiT 'XL2'; give one of S, B, L, XL with /2, /4 or /8"),
        (lambda: dit_preset("M/2"), "there is no DiT 'M/2'"),
        (lambda: TINY.clone(width=10), "width must be divisible by 4 and by the 2 heads, got 10"),
        (lambda: TINY.clone(depth=0), "depth must be at least 1, got 0"),
        (lambda: TINY.clone(input_size=7), "input_size 7 is not divisible by patch_size 2"),
        (lambda: TINY.clone(num_classes=None), "null_label needs num_classes"),
        (lambda: as_network(TINY)(active_params(TINY), *inputs(5)), r"H and W divisible by 2 .* got \(2, 5, 8, 2\)"),
        (lambda: as_network(TINY)(active_params(TINY), *inputs()[:2], {}), r"this DiT needs cond\['label'\]"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)

"""Low-rank additions: the product of two matrices and nothing else, zero at first, alone in the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.lora import EVERY_BLOCK, LowRank, adapt, init_lora, merge
from jaxdiff.networks.unet import example_inputs
from jaxdiff.networks.unet_presets import stable_diffusion_unet


def normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


PARAMS = {"dense": {"kernel": normal(3, 6), "bias": normal(6)}, "conv": {"kernel": normal(3, 3, 2, 4)}}


def test_a_dense_kernel_gets_the_scaled_product():
    down, up = normal(3, 2), normal(2, 6)
    merged = merge(PARAMS, {"dense/kernel": (LowRank(down, up, jnp.float32(4.0)),)}, 0.5)
    np.testing.assert_allclose(merged["dense"]["kernel"], PARAMS["dense"]["kernel"] + 0.5 * 2.0 * down @ up, atol=1e-5)
    np.testing.assert_array_equal(merged["dense"]["bias"], PARAMS["dense"]["bias"])
    np.testing.assert_array_equal(merged["conv"]["kernel"], PARAMS["conv"]["kernel"])


def test_a_part_of_fused_columns():
    down, up = normal(3, 1), normal(1, 2)
    merged = merge(PARAMS, {"dense/kernel": (LowRank(down, up, None, 2),)})["dense"]["kernel"]
    difference = np.asarray(merged - PARAMS["dense"]["kernel"])
    np.testing.assert_allclose(difference[:, 2:4], down @ up, atol=1e-6)
    assert not difference[:, [0, 1, 4, 5]].any()


def test_a_convolution_is_one_after_another():
    down, up = normal(3, 3, 2, 2), normal(2, 4)
    added = merge(PARAMS, {"conv/kernel": (LowRank(down, up),)})["conv"]["kernel"] - PARAMS["conv"]["kernel"]
    for row in range(3):
        np.testing.assert_allclose(added[row, 1], down[row, 1] @ up, atol=1e-5)


def test_additions_stack_and_come_out_again():
    lora = {"dense/kernel": (LowRank(normal(3, 2), normal(2, 6)), LowRank(normal(3, 1), normal(1, 6)))}
    back = merge(merge(PARAMS, lora), lora, -1.0)
    np.testing.assert_allclose(back["dense"]["kernel"], PARAMS["dense"]["kernel"], atol=1e-5)


def test_new_additions_are_zero_and_take_the_gradient():
    lora = init_lora(jax.random.key(0), PARAMS, 2, targets="kernel", alpha=1.0)
    assert set(lora) == {"dense/kernel", "conv/kernel"}
    jax.tree.map(np.testing.assert_array_equal, merge(PARAMS, lora), PARAMS)

    def network(params, x_t, t, cond, *, train=False, key=None):
        return x_t @ params["dense"]["kernel"] * t[:, None]

    x, t = normal(4, 3), jnp.ones(4)
    gradient = jax.grad(lambda p: jnp.sum(adapt(network, PARAMS)(p, x, t, {}) ** 2))(lora)
    assert jax.tree.structure(gradient) == jax.tree.structure(lora)
    assert np.abs(gradient["dense/kernel"][0].up).min() > 0 and not np.any(gradient["dense/kernel"][0].down)


def test_another_weight_is_not_another_program():
    lora = init_lora(jax.random.key(0), PARAMS, 1, targets="dense")
    traces = []

    @jax.jit
    def merged(weight):
        traces.append(weight)
        return merge(PARAMS, lora, weight)

    merged(0.3), merged(0.9)
    assert len(traces) == 1


def test_every_block_is_what_lcm_lora_changes():
    """16 transformers of 12 layers, 22 residual blocks of 3 and 14 of them with a skip, 3 resamplings each way."""
    unet = stable_diffusion_unet(1)
    shapes = param_shapes(unet, *example_inputs(unet))
    every = jax.eval_shape(lambda key: init_lora(key, shapes, 64, targets=EVERY_BLOCK), jax.random.key(0))
    assert len(every) == 16 * 12 + 22 * 3 + 14 + 6
    attention = jax.eval_shape(lambda key: init_lora(key, shapes, 4), jax.random.key(0))
    assert len(attention) == 16 * 8


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        init_lora(jax.random.key(0), PARAMS, 0)
    with pytest.raises(ValueError, match="no kernel has 'attn' in its path; paths look like 'conv/kernel'"):
        init_lora(jax.random.key(0), PARAMS, 1, targets="attn")
    with pytest.raises(ValueError, match="'other/kernel', which this network lacks"):
        merge(PARAMS, {"other/kernel": (LowRank(normal(3, 1), normal(1, 6)),)})
    with pytest.raises(ValueError, match=r"dense/kernel is \(3, 6\), which .* up \(1, 6\) from column 2"):
        merge(PARAMS, {"dense/kernel": (LowRank(normal(3, 1), normal(1, 6), None, 2),)})

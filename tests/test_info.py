"""Costs from shapes: FLOPs against hand counts, bytes against the sharding rule, and nothing on a device."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxdiff.info import Info, count_flops, describe, info
from jaxdiff.runs import experiment_from

TOY = Path(__file__).parents[1] / "experiments" / "toy_ddpm.py"
X = jax.ShapeDtypeStruct((5, 7), jnp.float32)
W = jax.ShapeDtypeStruct((7, 3), jnp.float32)
IMAGE = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
KERNEL = jax.ShapeDtypeStruct((3, 3, 3, 4), jnp.float32)
DENSE = 2 * 5 * 7 * 3
CONV = 2 * (2 * 4 * 4) * (3 * 3 * 3 * 4)  # outputs of a stride of 2, times the kernel


def flops(function, *shapes):
    return count_flops(jax.make_jaxpr(function)(*shapes).jaxpr)


def dense(x, w):
    return x @ w


def conv(image, kernel, stride=2, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        image, kernel, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def test_dense_layer_and_its_gradient():
    assert flops(dense, X, W) == DENSE
    # Both gradients cost as much as the layer itself.
    assert flops(jax.grad(lambda x, w: (dense(x, w) ** 2).sum(), argnums=(0, 1)), X, W) == 3 * DENSE
    assert flops(jax.vmap(dense, in_axes=(0, None)), jax.ShapeDtypeStruct((4, 5, 7), jnp.float32), W) == 4 * DENSE


def test_convolution_with_stride_and_its_gradients():
    assert flops(conv, IMAGE, KERNEL) == CONV
    loss = lambda image, kernel: conv(image, kernel).sum()  # noqa: E731
    assert flops(jax.grad(loss, argnums=1), IMAGE, KERNEL) == 2 * CONV
    assert flops(jax.grad(loss, argnums=0), IMAGE, KERNEL) == 2 * CONV
    grouped = jax.ShapeDtypeStruct((3, 3, 1, 6), jnp.float32)
    assert flops(lambda i, k: conv(i, k, 1, 3), IMAGE, grouped) == 2 * (2 * 8 * 8) * (3 * 3 * 1 * 6)


def test_loops_branches_and_calls():
    square = jax.ShapeDtypeStruct((7, 7), jnp.float32)

    def scanned(x, w):
        return jax.lax.scan(lambda carry, _: (carry @ w, None), x, None, length=6)[0]

    def branched(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: (x @ w) @ w, lambda: x @ w)

    one = 2 * 5 * 7 * 7
    assert flops(scanned, X, square) == 6 * one
    assert flops(branched, X, square) == 2 * one
    assert flops(jax.jit(jax.checkpoint(dense)), X, W) == DENSE
    # Remat runs the layer once more on the way back.
    twice = jax.grad(
        lambda x: jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ jnp.ones((7, 7))) @ jnp.ones((7, 7))))(x).sum()
    )
    plain = jax.grad(lambda x: jnp.sin(jnp.sin(x @ jnp.ones((7, 7))) @ jnp.ones((7, 7))).sum())
    assert flops(twice, X) > flops(plain, X) == 4 * one


def test_toy_costs():
    counted = info(experiment_from(TOY, ["smoke=true"]))
    # An MLP of width 16: in, time, blocks of two layers with a time layer each, out; the count is the tree's own.
    experiment = experiment_from(TOY, ["smoke=true"])
    params, _ = experiment.method.init(jax.random.key(0), next(experiment.data()))
    assert counted.parameters == {"model": sum(leaf.size for leaf in jax.tree.leaves(params))}
    assert counted.bytes["parameters"] == counted.bytes["averages"] == 4 * counted.parameters["model"]
    # Adam keeps two moments and counters.
    assert 0 <= counted.bytes["optimiser"] - 2 * counted.bytes["parameters"] <= 16
    assert counted.bytes["batch"] == 16 * 2 * 4
    assert counted.flops > 6 * 16 * counted.parameters["model"] * 0.5


def test_a_mesh_divides_batch_and_large_leaves():
    experiment = experiment_from(TOY, [])
    alone, spread = info(experiment), info(experiment, {"data": 2, "fsdp": 4})
    assert spread.bytes["batch"] * 8 == alone.bytes["batch"]
    assert alone.bytes["parameters"] / 4 < spread.bytes["parameters"] < alone.bytes["parameters"] / 3
    assert (spread.flops, spread.parameters) == (alone.flops, alone.parameters)


def test_nothing_is_allocated():
    before = {id(array) for array in jax.live_arrays()}
    counted = info(experiment_from(TOY, ["features=512"]), {"data": 4})
    new = [array for array in jax.live_arrays() if id(array) not in before]
    assert counted.parameters["model"] > 1_000_000
    assert sum(array.nbytes for array in new) < 10_000


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"date": 2}, "axes data, fsdp, tensor of size 1 or more, got date=2"),
        ({"data": 0}, "got data=0"),
        ({"data": 3}, "batch_size / accumulate is 16, which does not divide among data x fsdp = 3 devices"),
    ],
)
def test_bad_meshes_are_refused(mesh, message):
    with pytest.raises(ValueError, match=message):
        info(experiment_from(TOY, ["smoke=true"]), mesh)


def test_costs_in_words():
    text = describe(
        experiment_from(TOY, ["smoke=true"]), Info({"model": 1_500_000}, 3.2e9, {"parameters": 2**20, "other": 0})
    )
    assert text.splitlines() == [
        "toy_ddpm: 16 examples of 2 a step, on one device",
        "  model            1.500 M parameters (1,500,000)",
        "  train step       3.200 GFLOP (200.000 MFLOP an example; convolutions and matrix products)",
        "  a device         1.000 MiB (parameters 1.000 MiB; activations not counted)",
    ]

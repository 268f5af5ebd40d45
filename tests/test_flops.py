"""FLOPs: layers, loops and calls by hand; a UNet's train step by hand; and XLA's own count of what it compiled.

At the end, what distillation costs in passes of its network: consistency distillation's step, sCM's derivative.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxdiff import schedules
from jaxdiff.flops import count_flops
from jaxdiff.info import batch_shapes, state_shapes
from jaxdiff.methods.consistency import adaptive, consistency_distillation
from jaxdiff.methods.continuous_consistency import network_jvp
from jaxdiff.methods.ddpm import ddpm
from jaxdiff.networks.base import as_network, init_params, param_shapes
from jaxdiff.networks.layers import fourier_embedding
from jaxdiff.networks.mlp import MLP
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.training.experiment import Experiment
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step

X = jax.ShapeDtypeStruct((5, 7), jnp.float32)
W = jax.ShapeDtypeStruct((7, 3), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((7, 7), jnp.float32)
IMAGE = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
KERNEL = jax.ShapeDtypeStruct((3, 3, 3, 4), jnp.float32)
DENSE = 2 * 5 * 7 * 3
ONE = 2 * 5 * 7 * 7  # X times SQUARE
CONV = 2 * (2 * 4 * 4) * (3 * 3 * 3 * 4)  # outputs of a stride of 2, times the kernel
SIZE, BATCH = 8, 64


def flops(function, *shapes, **options):
    return count_flops(jax.make_jaxpr(function)(*shapes).jaxpr, **options)


def dense(x, w):
    return x @ w


def conv(image, kernel, stride=2, groups=1, padding="SAME"):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        image, kernel, (stride, stride), padding, dimension_numbers=numbers, feature_group_count=groups
    )


def test_dense_layer_and_its_gradient():
    assert flops(dense, X, W) == DENSE
    # Both gradients cost as much as the layer itself; the forward product is not needed for the gradient of a sum.
    assert flops(jax.grad(lambda x, w: (dense(x, w) ** 2).sum(), argnums=(0, 1)), X, W) == 3 * DENSE
    assert flops(jax.grad(lambda x, w: dense(x, w).sum(), argnums=(0, 1)), X, W) == 2 * DENSE
    assert flops(jax.vmap(dense, in_axes=(0, None)), jax.ShapeDtypeStruct((4, 5, 7), jnp.float32), W) == 4 * DENSE


def test_convolution_with_stride_and_its_gradients():
    assert flops(conv, IMAGE, KERNEL) == CONV
    loss = lambda image, kernel: (conv(image, kernel) ** 2).sum()  # noqa: E731
    assert flops(jax.grad(loss, argnums=1), IMAGE, KERNEL) == 2 * CONV
    assert flops(jax.grad(loss, argnums=0), IMAGE, KERNEL) == 2 * CONV
    grouped = jax.ShapeDtypeStruct((3, 3, 1, 6), jnp.float32)
    assert flops(lambda i, k: conv(i, k, 1, 3), IMAGE, grouped) == 2 * (2 * 8 * 8) * (3 * 3 * 1 * 6)


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((0, 1), (0, 1)), ((2, 0), (1, 3))])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_gradients_of_ragged_convolutions_cost_what_the_convolution_costs(size, padding, stride):
    image = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    forward = lambda image, kernel: conv(image, kernel, stride, 1, padding)  # noqa: E731
    gradient = jax.grad(lambda image, kernel: forward(image, kernel).sum(), argnums=(0, 1))
    height, width = jax.eval_shape(forward, image, KERNEL).shape[1:3]
    assert flops(forward, image, KERNEL) == 2 * 2 * height * width * 3 * 3 * 3 * 4
    without = flops(forward, image, KERNEL, padding=False)
    assert flops(gradient, image, KERNEL, padding=False) == 2 * without
    if padding != "VALID" and stride == 1:
        assert without < flops(forward, image, KERNEL)
    # XLA leaves the padding out, too.
    assert jax.jit(forward).lower(image, KERNEL).cost_analysis()["flops"] == without


def test_loops_branches_and_calls():
    def scanned(x, w):
        return jax.lax.scan(lambda carry, _: (carry @ w, None), x, None, length=6)[0]

    def nested(x, w):
        return jax.lax.scan(lambda carry, _: (scanned(carry, w), None), x, None, length=2)[0]

    def branched(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: (x @ w) @ w, lambda: x @ w)

    def endless(x, w):
        return jax.lax.while_loop(lambda x: (x @ w).sum() < 1, lambda x: x @ w, x)

    assert flops(scanned, X, SQUARE) == 6 * ONE
    assert flops(nested, X, SQUARE) == 12 * ONE
    assert flops(branched, X, SQUARE) == 2 * ONE
    assert flops(endless, X, SQUARE) == 2 * ONE  # condition and body, once each
    assert flops(jax.jit(jax.checkpoint(dense)), X, W) == DENSE
    # Remat runs the layer once more on the way back.
    layers = lambda x, w: jnp.sin(jnp.sin(x @ w) @ w)  # noqa: E731
    plain = jax.grad(lambda x, w: layers(x, w).sum())
    twice = jax.grad(lambda x, w: jax.checkpoint(layers)(x, w).sum())
    assert flops(plain, X, SQUARE) == 4 * ONE
    assert flops(lambda x, w: (layers(x, w), twice(x, w)), X, SQUARE) == 6 * ONE


def test_functions_with_their_own_derivative():
    @jax.custom_vjp
    def own(x, w):
        return x @ w

    def backward(residuals, bar):
        x, w = residuals
        _, unused = jax.vjp(lambda x: own(x, w), x)
        del unused
        return bar @ w.T, x.T @ (bar @ w)

    own.defvjp(lambda x, w: (own(x, w), (x, w)), backward)

    @jax.custom_jvp
    def other(x, w):
        return x @ w

    @other.defjvp
    def _(primals, tangents):
        return other(*primals), tangents[0] @ primals[1]

    assert flops(own, X, SQUARE) == flops(other, X, SQUARE) == ONE
    value = lambda function: lambda x, w: (function(x, w) ** 2).sum()  # noqa: E731
    # Two products and their chain; the forward product inside `backward` leads to nothing and is not made.
    assert flops(jax.grad(value(own), argnums=(0, 1)), X, SQUARE) == 4 * ONE
    assert flops(jax.grad(value(own)), X, SQUARE) == 2 * ONE
    assert flops(jax.grad(value(other)), X, SQUARE) == 2 * ONE


def test_a_mesh_counts_the_work_of_all_its_devices():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    spread = jax.shard_map(
        dense, mesh=mesh, in_specs=(PartitionSpec("a"), PartitionSpec()), out_specs=PartitionSpec("a")
    )
    x = jax.ShapeDtypeStruct((6, 7), jnp.float32)
    # Each of four devices multiplies three rows: the two along b do the same.
    assert flops(spread, x, W) == 4 * (2 * 3 * 7 * 3)


def test_what_nothing_is_made_of_does_not_count():
    def wasteful(x, w):
        _, both = jax.jit(lambda x, w: (x @ w, jnp.sin(x)))(x, w)
        return both + jax.lax.stop_gradient(x)

    assert flops(wasteful, X, W) == 0


def no_data() -> Any:
    raise AssertionError("costs are counted without data")


def experiment(width: int, **fields) -> Experiment:
    unet = UNet(
        in_channels=1, out_channels=1, base_channels=width, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8,
        **fields,
    )  # fmt: skip
    method = ddpm(
        as_network(unet), schedules.cosine_betas(16),
        init_params=lambda key, batch: init_params(unet, key, *example_inputs(unet)),
    )  # fmt: skip
    return Experiment(
        name="counted", method=method, data=no_data, optimizers={"model": optax.adam(1e-3)}, num_steps=1,
        sample_shape=(SIZE, SIZE, 1), batch_size=BATCH,
    )  # fmt: skip


def by_hand(c: int) -> list[tuple[str, int]]:
    """(kind, FLOPs) of every layer of that UNet, forward: 2 k k i o h w for a convolution, and so on."""
    conv = lambda k, i, o, size: 2 * k * k * i * o * size * size * BATCH  # noqa: E731
    dense = lambda i, o, rows=1: 2 * i * o * rows * BATCH  # noqa: E731
    fine, coarse, tokens = SIZE, SIZE // 2, (SIZE // 2) ** 2

    def block(i, o, size):
        layers = [("inner", conv(3, i, o, size)), ("inner", dense(4 * c, o)), ("outer", conv(3, o, o, size))]
        return layers + ([("outer", conv(1, i, o, size))] if i != o else [])

    attention = [("inner", dense(2 * c, 6 * c, tokens)), ("inner", 2 * dense(tokens, 2 * c, tokens))]
    attention += [("outer", dense(2 * c, 2 * c, tokens))]
    first = [("first", conv(3, 1, c, fine)), ("first", dense(c, 4 * c)), ("outer", dense(4 * c, 4 * c))]
    down = [*block(c, c, fine), ("outer", conv(3, c, c, coarse)), *block(c, 2 * c, coarse)]
    middle = [*block(2 * c, 2 * c, coarse), *attention, *block(2 * c, 2 * c, coarse)]
    up = [*block(4 * c, 2 * c, coarse), *block(3 * c, 2 * c, coarse), ("outer", conv(3, 2 * c, 2 * c, fine))]
    up += [*block(3 * c, c, fine), *block(2 * c, c, fine), ("outer", conv(3, c, 1, fine))]
    return first + down + middle + up


def step_by_hand(c: int, remat: bool) -> int:
    """Forward, twice as much backward but for the first layers, whose inputs need no gradient, and what is made anew.

    A block made anew stops short of its last layers, whose results no gradient needs.
    """
    layers = by_hand(c)
    again = sum(cost for kind, cost in layers if kind == "inner") if remat else 0
    return 3 * sum(cost for _, cost in layers) - sum(cost for kind, cost in layers if kind == "first") + again


def traced_step(experiment: Experiment):
    batch = batch_shapes(experiment)
    step = make_train_step(experiment.method, experiment.optimizers)
    return jax.jit(step, donate_argnums=0).trace(state_shapes(experiment, batch), batch)


def test_a_forward_pass_equals_the_hand_count_and_xla_agrees():
    width = 128
    unet = UNet(
        in_channels=1, out_channels=1, base_channels=width, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8
    )  # fmt: skip
    x = jax.ShapeDtypeStruct((BATCH, SIZE, SIZE, 1), jnp.float32)
    t = jax.ShapeDtypeStruct((BATCH,), jnp.float32)
    params = jax.eval_shape(lambda key: init_params(unet, key, *example_inputs(unet)), jax.random.key(0))
    traced = jax.jit(lambda params, x, t: as_network(unet)(params, x, t, {})).trace(params, x, t)
    assert count_flops(traced.jaxpr.jaxpr) == pytest.approx(sum(cost for _, cost in by_hand(width)), rel=0.002)
    compiled = traced.lower().compile().cost_analysis()
    assert compiled["flops"] == pytest.approx(count_flops(traced.jaxpr.jaxpr, padding=False), rel=0.02)


@pytest.mark.parametrize(("width", "remat"), [(16, False), (128, True)])
def test_a_train_step_equals_the_hand_count(width, remat):
    counted = count_flops(traced_step(experiment(width, remat=remat)).jaxpr.jaxpr)
    assert counted == pytest.approx(step_by_hand(width, remat), rel=0.002)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_a_compiled_train_step_computes_nothing_twice(remat):
    # Padding aside, which XLA leaves out: what it compiled is the hand count, elementwise work included, within 2 %.
    traced = traced_step(experiment(128, remat=remat))
    padding = count_flops(traced.jaxpr.jaxpr) - count_flops(traced.jaxpr.jaxpr, padding=False)
    compiled = traced.lower().compile().cost_analysis()
    assert compiled["flops"] == pytest.approx(step_by_hand(128, remat) - padding, rel=0.02)
    assert compiled["bytes accessed"] > 0


# The networks are wide enough for products to outweigh elementwise work, which XLA's count includes.
NETWORKS = {
    "mlp": (MLP(features=256, num_blocks=2, time_features=functools.partial(fourier_embedding, fastest=4.0)), (2,)),
    "unet": (
        UNet(in_channels=1, out_channels=1, base_channels=128, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8),
        (SIZE, SIZE, 1),
    ),
}
MOST_ROWS = {"mlp": 512, "unet": BATCH}
ALL_NETWORKS = ["mlp", pytest.param("unet", marks=pytest.mark.slow)]


def inputs_of(name):
    """Module, and shapes of parameters, x_t and t."""
    module, shape = NETWORKS[name]
    x = jax.ShapeDtypeStruct((MOST_ROWS[name], *shape), jnp.float32)
    t = jax.ShapeDtypeStruct(x.shape[:1], jnp.float32)
    return module, param_shapes(module, x, t, {}), x, t


def xla_flops(function, *shapes):
    return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]


def distillation_step(module, params, x):
    """The train step of consistency distillation with Adam, and shapes of its arguments."""

    def make(teacher_params):
        return consistency_distillation(
            as_network(module), teacher_params=teacher_params, curriculum=adaptive(2, 20, 100, 0.9)
        )

    def state_of(key, teacher_params):
        return create_state(make(teacher_params), optimizers, (), key, {"x0": jnp.zeros(x.shape)})

    optimizers = {"model": optax.adam(1e-3)}
    state = jax.eval_shape(state_of, jax.random.key(0), params)
    # Only `init` looks at the teacher's parameters; a step finds them in its state.
    return make_train_step(make(None), optimizers), state, {"x0": x}


def passes_of(count, module, params, x, t):
    """Counted passes of one step: two of the teacher and one of the target forward, the student forward and back."""
    network = as_network(module)

    def forward(params, x, t):
        return network(params, x, t, {})

    def squared(params, x, t):
        return (forward(params, x, t) ** 2).mean()

    return 3 * count(forward, params, x, t) + count(jax.value_and_grad(squared), params, x, t)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_distillation_step_is_its_five_passes(name):
    module, params, x, t = inputs_of(name)
    step, *given = distillation_step(module, params, x)
    assert flops(step, *given) == pytest.approx(passes_of(flops, module, params, x, t), rel=1e-3)


@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_a_compiled_distillation_step_has_no_hidden_work(name):
    module, params, x, t = inputs_of(name)
    step, *given = distillation_step(module, params, x)
    passes = passes_of(xla_flops, module, params, x, t)
    # XLA may share a little between the passes; it must not add more than the optimiser and the loss.
    assert 0.95 * passes < xla_flops(step, *given) < 1.05 * passes


def forward_and_derivative(module):
    """The plain pass, as used without a derivative, and sCM's pass with one."""
    plain, forward_mode = as_network(module), as_network(module, forward_mode=True)
    forward = lambda params, x, t: plain(params, x, t, {})  # noqa: E731
    derivative = lambda params, x, t: network_jvp(forward_mode, params, x, t, x, {})  # noqa: E731
    return forward, derivative


@pytest.mark.parametrize("name", NETWORKS)
def test_the_derivative_of_scm_costs_two_passes(name):
    module, *given = inputs_of(name)
    forward, derivative = forward_and_derivative(module)
    assert 1.9 < flops(derivative, *given) / flops(forward, *given) < 2.1


@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_the_compiled_derivative_of_scm_costs_two_passes(name):
    module, *given = inputs_of(name)
    forward, derivative = forward_and_derivative(module)
    assert 1.9 < xla_flops(derivative, *given) / xla_flops(forward, *given) < 2.2

"""Costs from shapes: bytes against the sharding rule, activations against closed forms and XLA, and no device."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxdiff import schedules
from jaxdiff.info import Info, activations, batch_shapes, describe, info, state_shapes
from jaxdiff.methods.base import Objective
from jaxdiff.methods.ddpm import ddpm
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.runs import experiment_from
from jaxdiff.training.experiment import Experiment
from jaxdiff.training.state import TrainState
from jaxdiff.training.step import make_train_step

TOY, ADM = (Path(__file__).parents[1] / "experiments" / name for name in ("toy_ddpm.py", "lsun_adm.py"))


def test_toy_costs():
    counted = info(experiment_from(TOY, ["smoke=true"]))
    # An MLP of width 16: in, time, blocks of two layers with a time layer each, out; the count is the tree's own.
    experiment = experiment_from(TOY, ["smoke=true"])
    batch = jax.tree.map(jnp.asarray, dict(next(experiment.data())))
    params, _ = experiment.method.init(jax.random.key(0), batch)
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


def of_loss(function, params, batch_size=16):
    """Bytes that a loss keeps: (those that grow with the batch, the others)."""

    def loss(params, aux, batch, key, step):
        del aux, key, step
        return function(params["model"], batch["x0"]).mean(), {}

    state = TrainState(jnp.int32(0), jax.random.key(0), {"model": params}, {}, {}, {})
    return activations(Objective("model", loss), state, {"x0": jax.ShapeDtypeStruct((batch_size, 3), jnp.float32)})


def test_activations_are_what_the_backward_pass_needs_and_is_not_given():
    w, deep = jnp.ones((3, 5)), jnp.ones((5, 5))
    # The gradient of a product needs its input, which is the batch; that of the sine its cosine.
    assert of_loss(lambda w, x: x @ w, w) == (0, 0)
    assert of_loss(lambda w, x: jnp.sin(x @ w), w) == (4 * 16 * 5, 0)
    assert of_loss(lambda w, x: jnp.sin(x @ w), w, 32) == (4 * 32 * 5, 0)
    # Two sines, and the input of the second product.
    two = lambda w, x: jnp.sin(jnp.sin(x @ w["a"]) @ w["b"])  # noqa: E731
    assert of_loss(two, {"a": w, "b": deep}) == (3 * 4 * 16 * 5, 0)
    # Made anew in the backward pass: nothing is kept, since inputs are there anyway.
    assert of_loss(jax.checkpoint(two), {"a": w, "b": deep}) == (0, 0)
    # One array kept for two purposes is one array.
    assert of_loss(lambda w, x: jnp.exp(x @ w), w) == (4 * 16 * 5, 0)


def test_parameters_in_another_dtype_do_not_grow_with_the_batch():
    def half(w, x):
        first, second = (a.astype(jnp.bfloat16) for a in w)
        return jnp.sin(jnp.tanh(x.astype(jnp.bfloat16) @ first) @ second)

    weights = (jnp.ones((3, 5)), jnp.ones((5, 7)))
    small, large = (of_loss(half, weights, n) for n in (16, 64))
    assert small[1] == large[1] == 2 * 5 * 7
    assert 4 * small[0] == large[0] > 0


def no_data() -> Any:
    raise AssertionError("costs are counted without data")


def unet_experiment(batch_size=8, accumulate=1, **fields):
    usual = {"channel_mult": (1,), "attention_factors": (1,), "scale_shift_norm": True}
    unet = UNet(1, 1, 32, num_res_blocks=1, norm_groups=8, **(usual | fields))
    method = ddpm(
        as_network(unet), schedules.cosine_betas(16),
        init_params=lambda key, batch: init_params(unet, key, *example_inputs(unet)),
    )  # fmt: skip
    return Experiment(
        name="unet", method=method, data=no_data, optimizers={"model": optax.adam(1e-3)}, num_steps=1,
        sample_shape=(16, 16, 1), batch_size=batch_size, accumulate=accumulate,
    )  # fmt: skip


def test_a_batch_on_more_devices_and_in_micro_batches_keeps_less():
    experiment = unet_experiment()
    whole, spread = info(experiment).bytes, info(experiment, {"data": 4, "fsdp": 2}).bytes
    assert whole["activations"] == pytest.approx(8 * spread["activations"], rel=0.01) and whole["activations"] > 10**6
    assert whole["gradients"] == whole["parameters"] and spread["gradients"] == spread["parameters"]
    micro = info(dataclasses.replace(experiment, accumulate=4)).bytes
    assert whole["activations"] == pytest.approx(4 * micro["activations"], rel=0.01)
    # The sum so far, and the newest.
    assert micro["gradients"] == 2 * whole["gradients"]
    # Weights that fsdp splits come together for a step.
    assert whole["gathered"] == 0 and spread["gathered"] == whole["parameters"]


def test_remat_and_bfloat16_show():
    def kept(**fields):
        experiment = unet_experiment(**fields)
        batch = batch_shapes(experiment)
        return activations(experiment.method.objectives[0], state_shapes(experiment, batch), batch)[0]

    plain = kept()
    assert kept(remat=True) < plain / 4
    assert kept(dtype=jnp.bfloat16) < 0.9 * plain


def test_rules_of_the_experiment_split_parameters_over_the_tensor_axis():
    experiment = unet_experiment()
    object.__setattr__(experiment, "partition", (("conv_in/kernel$", (None, None, None, "tensor")),))
    whole, split = info(experiment).bytes, info(experiment, {"tensor": 2}).bytes
    kernels = [
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            state_shapes(experiment, batch_shapes(experiment)).params["model"]
        )
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith("conv_in/kernel")
    ]
    assert len(kernels) == 6
    assert whole["parameters"] - split["parameters"] == 4 * sum(kernels) // 2
    assert whole["optimiser"] - split["optimiser"] == 4 * sum(kernels)
    assert whole["activations"] == split["activations"]


def temporary(experiment):
    """XLA's temporary memory of the train step, and our estimate of it."""
    batch = batch_shapes(experiment)
    step = make_train_step(experiment.method, experiment.optimizers, experiment.ema)
    lowered = jax.jit(step, donate_argnums=0).lower(state_shapes(experiment, batch), batch)
    counted = info(experiment).bytes
    memory: Any = lowered.compile().memory_analysis()
    return memory.temp_size_in_bytes, counted["gradients"] + counted["activations"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "attention", "attention in bfloat16"])
def test_xla_needs_about_as_much(name):
    makers = {
        "digits": lambda: experiment_from(TOY.with_name("digits_ddpm.py"), []),
        "attention": lambda: unet_experiment(channel_mult=(1, 2), attention_factors=(1, 2)),
        "attention in bfloat16": lambda: unet_experiment(
            channel_mult=(1, 2), attention_factors=(1, 2), dtype=jnp.bfloat16
        ),
    }
    xla, ours = temporary(makers[name]())
    assert 1 / 1.5 < ours / xla < 1.5


@pytest.mark.slow
def test_the_largest_network_is_counted_from_shapes_alone():
    before = sum(array.nbytes for array in jax.live_arrays())
    counted = info(experiment_from(ADM, []), {"data": 32, "fsdp": 8})
    assert counted.parameters == {"model": 552_814_086}
    assert counted.bytes["activations"] > 2**30
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 100_000


def test_costs_in_words():
    text = describe(
        experiment_from(TOY, ["smoke=true"]), Info({"model": 1_500_000}, 3.2e9, {"parameters": 2**20, "other": 0})
    )
    assert text.splitlines() == [
        "toy_ddpm: 16 examples of 2 a step, on one device",
        "  model            1.500 M parameters (1,500,000)",
        "  train step       3.200 GFLOP (200.000 MFLOP an example; convolutions and matrix products)",
        "  a device         1.000 MiB (parameters 1.000 MiB)",
    ]

"""The mesh, the size rule and partition rules, on the four emulated devices of the test session."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_toys as toys
from jax.sharding import AxisType, PartitionSpec

from jaxdiff.methods.base import Objective
from jaxdiff.training import ema, sharding
from jaxdiff.training.state import abstract_state, create_state

FOUR = jax.devices()[:4]


def test_the_mesh_takes_the_rest_and_is_auto_everywhere():
    mesh = sharding.make_mesh(fsdp=2, devices=FOUR)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert dict(sharding.single_device().shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (8, 1, 1), (1, 1, 1)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(ValueError, match=r"does not fit 4 device\(s\): their product must be 4"):
        sharding.make_mesh(*sizes, devices=FOUR)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-1, -1, 1), (2, -2, 1)])
def test_impossible_mesh_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="mesh sizes must be at least 1, and at most one of them -1"):
        sharding.make_mesh(*sizes, devices=FOUR)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 3, 64, 64), PartitionSpec(None, None, None, "fsdp")),
        ((512, 64), PartitionSpec("fsdp", None)),
        ((1023, 66), PartitionSpec(None, "fsdp")),
        ((1023, 33), PartitionSpec()),
        ((64,), PartitionSpec()),
        ((), PartitionSpec()),
    ],
)
def test_the_size_rule(shape, expected):
    assert sharding.partition_spec("", shape, {"fsdp": 2}) == expected
    assert sharding.partition_spec("", shape, {"data": 4}) == PartitionSpec()


def test_moments_and_averages_lie_with_their_parameters_and_bytes_fall():
    method = toys.regression()

    def init(key, batch):
        del batch
        return {"model": {"weights": jax.random.normal(key, (128, 256)), "bias": jnp.zeros(256)}}, ()

    mesh = sharding.make_mesh(1, 4, devices=FOUR)
    emas = (ema.constant("slow", 0.9),)
    example = next(toys.Points())
    state = create_state(
        method._replace(init=init), {"model": optax.adam(0.1)}, emas, jax.random.key(0), example, mesh=mesh
    )
    tables = [state.params["model"], state.opt_state["model"][0].mu, state.opt_state["model"][0].nu]
    for tree in [*tables, state.ema["slow"]["model"]]:
        assert tree["weights"].sharding.spec == PartitionSpec(None, "fsdp")
        assert tree["weights"].addressable_shards[0].data.shape == (128, 64)
        assert tree["bias"].sharding.spec == PartitionSpec()
    moved = sharding.shard_state(state, sharding.make_mesh(4, devices=FOUR))
    np.testing.assert_array_equal(moved.params["model"]["weights"], state.params["model"]["weights"])
    assert moved.params["model"]["weights"].addressable_shards[0].data.shape == (128, 256)


RULES = (("kernel$", (None, "tensor")), ("bias$", ("tensor",)))


@pytest.mark.parametrize(
    ("path", "shape", "mesh", "expected"),
    [
        ("params/model/in/kernel", (128, 256), {"tensor": 2}, (128, 128)),
        ("params/model/in/kernel", (128, 256), {"fsdp": 2, "tensor": 2}, (64, 128)),
        ("params/model/in/kernel", (129, 256), {"fsdp": 2, "tensor": 2}, (129, 128)),
        ("params/model/in/kernel", (64, 256), {"fsdp": 2, "tensor": 4}, (64, 64)),  # too few are left for fsdp
        ("params/model/in/bias", (256,), {"fsdp": 2, "tensor": 2}, (128,)),
        ("params/model/in/scale", (256,), {"fsdp": 2, "tensor": 2}, (256,)),
        ("opt_state/model/0/mu/in/kernel", (128, 256), {"data": 8, "tensor": 2}, (128, 128)),
        ("opt_state/model/0/v_row/in/kernel", (128,), {"tensor": 2}, (128,)),  # Adafactor's sums over columns
        ("opt_state/model/0/v_row/in/bias", (1,), {"tensor": 2}, (1,)),
        ("key", (), {"fsdp": 2, "tensor": 2}, ()),
    ],
)
def test_a_rule_comes_first_and_fsdp_takes_what_is_left(path, shape, mesh, expected):
    assert sharding.device_shape(path, shape, mesh, RULES) == expected
    spec = sharding.partition_spec(path, shape, mesh, RULES)
    named = [1 if axis is None else mesh.get(axis, 1) for axis in spec]
    assert [size // parts for size, parts in zip(shape, named, strict=False)] == list(expected)[: len(spec)]


def test_the_first_rule_counts_and_may_name_any_axis():
    rules = (("in/kernel$", ("fsdp", "tensor")), *RULES)
    mesh = {"fsdp": 2, "tensor": 2}
    assert sharding.partition_spec("params/in/kernel", (4, 4), mesh, rules) == PartitionSpec("fsdp", "tensor")
    assert sharding.partition_spec("params/out/kernel", (4, 4), mesh, rules) == PartitionSpec(None, "tensor")


@pytest.mark.parametrize(
    ("shape", "rule", "message"),
    [
        (
            (128, 6),
            (None, "tensor"),
            r"splits dimension 1 of params/model/kernel \[128, 6\] by tensor=4, which does not",
        ),
        (
            (3, 3, 8, 8),
            (None, "tensor"),
            "has 2 dimensions, params/model/kernel has 4: write one name or None for each",
        ),
        ((8, 8), (None, "tensr"), "takes each of data, fsdp, tensor at most once"),
        ((8, 8), ("tensor", "tensor"), "takes each of data, fsdp, tensor at most once"),
    ],
)
def test_rules_that_do_not_fit_a_parameter_are_refused(shape, rule, message):
    with pytest.raises(ValueError, match=message) as error:
        sharding.device_shape("params/model/kernel", shape, {"tensor": 4}, (("kernel$", rule),))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("optimizer", [optax.adam(0.1, mu_dtype=jnp.bfloat16), optax.adafactor(0.1)])
def test_every_optimizer_state_finds_its_place(optimizer):
    def init(key, batch):
        del batch
        return {"model": {"kernel": jax.random.normal(key, (128, 256)), "bias": jnp.zeros(256)}}, {"key": key}

    mesh = sharding.make_mesh(1, 2, 2, devices=FOUR)
    emas, example = (ema.constant("slow", 0.9),), next(toys.Points())
    made_of = toys.regression()._replace(init=init), {"model": optimizer}, emas
    state = create_state(*made_of, jax.random.key(0), example, mesh=mesh, partition=RULES)
    like = abstract_state(*made_of, example, mesh=mesh, partition=RULES)
    assert jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), state) == jax.tree.map(
        lambda a: (a.shape, a.dtype, a.sharding), like
    )
    parts = {("kernel", (128, 256)): (64, 128), ("bias", (256,)): (128,)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-1]
        assert leaf.sharding.shard_shape(leaf.shape) == parts.get((name, leaf.shape), leaf.shape), path
    assert state.key.sharding.spec == state.aux["key"].sharding.spec == state.step.sharding.spec == PartitionSpec()


def test_a_method_on_a_mesh_gathers_what_fsdp_splits_and_nothing_else():
    def loss(params, aux, batch, key, step):
        del aux, key, step
        return (batch["x0"] @ params["model"]["kernel"]).sum(), {}

    method = toys.regression()._replace(objectives=(Objective("model", loss),))
    assert sharding.on_mesh(method, sharding.make_mesh(2, 1, 2, devices=FOUR)) is method
    mesh = sharding.make_mesh(1, 2, 2, devices=FOUR)
    (objective,) = sharding.on_mesh(method, mesh, partition=RULES).objectives
    params = {"model": {"kernel": jnp.ones((128, 256)), "bias": jnp.ones(256)}}
    batch = {"x0": jnp.ones((4, 128))}
    traced = jax.make_jaxpr(objective.loss)(params, {}, batch, jax.random.key(0), jnp.int32(0))
    placed = [equation for equation in traced.eqns if equation.primitive.name == "sharding_constraint"]
    assert [(e.invars[0].aval.shape, e.params["sharding"].spec) for e in placed] == [
        ((128, 256), PartitionSpec(None, "tensor"))
    ]


def test_a_batch_is_split_over_data_and_fsdp():
    mesh = sharding.make_mesh(2, 2, devices=FOUR)
    batch = next(toys.Points())
    placed = sharding.put_batch(batch, mesh)
    np.testing.assert_array_equal(placed["x0"], batch["x0"])
    assert {shard.data.shape for shard in placed["x0"].addressable_shards} == {(2, 3)}
    assert len({str(shard.index) for shard in placed["target"].addressable_shards}) == 4


def test_batches_that_cannot_be_split_are_refused():
    mesh = sharding.make_mesh(4, devices=FOUR)
    with pytest.raises(ValueError, match="a batch of 6 does not divide among 4 devices"):
        sharding.put_batch({"x0": np.zeros((6, 2))}, mesh)
    with pytest.raises(ValueError, match="one leading axis for all, got leading sizes"):
        sharding.put_batch({"x0": np.zeros((8, 2)), "label": np.zeros(4)}, mesh)
    with pytest.raises(ValueError, match="one leading axis for all"):
        sharding.put_batch({"x0": np.zeros(())}, mesh)
